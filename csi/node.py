"""The Node service: mounts volumes at paths of this node and reports their state.

Each RPC validates, locks the volume, acts and answers. Every RPC can be repeated, at any time and
after any failure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpc import ServicerContext, StatusCode

from csi import credentials, csi_pb2
from csi.attachments import Attachment, Attachments
from csi.condition import condition_of
from csi.csi_pb2_grpc import NodeServicer
from csi.daemon import Daemon
from csi.errors import InvalidArgumentError, RpcError, without_ids
from csi.mounts import safe_path
from csi.node_records import Place
from csi.parameters import CLAIM_NAMESPACE
from csi.request_fields import check_capability, check_text
from csi.start import PATIENCE_S
from csi.volume_attributes import Rules, Volume, own_attributes
from csi.waiting import WaitingCalls
from lazyfs.errors import LazyfsError
from lazyfs.store.credentials import Credentials

log = logging.getLogger(__name__)

# Attributes that kubelet adds (podInfoOnMount of the CSIDriver object).
EPHEMERAL = "csi.storage.k8s.io/ephemeral"
POD_NAME, POD_NAMESPACE = "csi.storage.k8s.io/pod.name", "csi.storage.k8s.io/pod.namespace"
# kubelet gives a call two minutes; calls without a deadline get the same.
TIMEOUT_S = 115.0
# The part of a deadline that is left for cleanup and for the answer.
RESERVE_S = 3.0
POLL_S = 0.2
# If no request was in flight for this long, there is no room for more.
REST_S = 3.0

_Rpc = csi_pb2.NodeServiceCapability.RPC


class Node(NodeServicer):
    """The Node service of one node.

    Args:
        node_id: the name of the node.
        rules: what volumes may set.
        attachments: the volumes and their paths.
        inline_node_role: whether an inline volume, which anyone who may create pods can write, may
            be read with the plugin's own credentials.
    """

    def __init__(
        self, node_id: str, rules: Rules, attachments: Attachments, *, inline_node_role: bool
    ) -> None:
        self._node_id = node_id
        self._rules = rules
        self._attachments = attachments
        self._inline_node_role = inline_node_role
        self._waiting = WaitingCalls()

    def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeStageVolumeResponse:
        """Start the daemon of a volume with a node-stage secret; only record other volumes.

        Without such a secret the credentials come with a pod (its token, a node-publish secret) or
        are the node's own, so the daemon starts when the volume is published.
        """
        until = _deadline(context)
        check_text("volume_id", request.volume_id)
        path = safe_path("staging_target_path", request.staging_target_path)
        volume = self._volume(request.volume_context, request.volume_capability)
        given = credentials.of_stage(volume, request.secrets)
        asked = _digest(request.volume_context, request.volume_capability)
        namespace = request.volume_context.get(CLAIM_NAMESPACE, "")
        with (
            self._attachments.locks.held(request.volume_id),
            self._waiting.one_of(namespace or f"volume {request.volume_id}") as at_most_s,
        ):
            until = min(until, time.monotonic() + at_most_s)
            if given is None:
                self._attachments.note(request.volume_id, path, asked)
                return csi_pb2.NodeStageVolumeResponse()
            place = Place("staging", None, asked, namespace=namespace)
            daemon = self._attachments.put(
                Attachment(request.volume_id, path, place, volume, given),
                min(_patience_s(context, until), at_most_s),
            )
            _wait_for(volume, daemon, until)
        return csi_pb2.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        """Remove the record that a volume is staged; its daemon ends if no other path needs it."""
        check_text("volume_id", request.volume_id)
        path = safe_path("staging_target_path", request.staging_target_path)
        with self._attachments.locks.held(request.volume_id):
            self._attachments.take_away(request.volume_id, path, "staging")
        return csi_pb2.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        """Bind-mount a volume read-only at a pod's path; repeated calls renew its token."""
        until = _deadline(context)
        check_text("volume_id", request.volume_id)
        target = safe_path("target_path", request.target_path)
        attributes = request.volume_context
        volume = self._volume(attributes, request.volume_capability)
        given = credentials.of_publish(volume, request.secrets, attributes)
        place = Place(
            "target", None, _digest(attributes, request.volume_capability),
            namespace=attributes.get(POD_NAMESPACE, ""), pod=attributes.get(POD_NAME, ""),
        )  # fmt: skip
        inline = attributes.get(EPHEMERAL) == "true"
        namespace = attributes.get(POD_NAMESPACE) or f"volume {request.volume_id}"
        with (
            self._attachments.locks.held(request.volume_id),
            self._waiting.one_of(namespace) as at_most_s,
        ):
            until = min(until, time.monotonic() + at_most_s)
            via = None
            if inline:
                self._check_inline(volume, given)
            else:
                staged = self._staged(request.volume_id, request.staging_target_path)
                via = staged if given is None else None
            owner = credentials.owner_of(request.volume_id, attributes)
            daemon = self._attachments.put(
                Attachment(request.volume_id, target, place, volume, given, owner, via),
                min(_patience_s(context, until), at_most_s),
            )
            if via is not None and daemon is not via:
                self._attachments.restage(
                    request.volume_id, Path(request.staging_target_path), daemon
                )
            if daemon is not via:
                _wait_for(volume, daemon, until)
        return csi_pb2.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Unmount a volume from a pod's path and remove the path, even if its daemon is dead."""
        check_text("volume_id", request.volume_id)
        target = safe_path("target_path", request.target_path)
        with self._attachments.locks.held(request.volume_id):
            self._attachments.take_away(request.volume_id, target, "target")
        return csi_pb2.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: ServicerContext
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        """The size of the model, how much of it is on this node, and the condition.

        A read-only volume cannot fill up: all bytes and files are `available`; `used` bytes are on
        this node.
        """
        check_text("volume_id", request.volume_id)
        path, place = self._place(request.volume_id, request.volume_path)
        found = condition_of(path, place, self._attachments.daemons)
        condition = csi_pb2.VolumeCondition(
            abnormal=found.trouble is not None, message=without_ids(found.message)
        )
        return csi_pb2.NodeGetVolumeStatsResponse(
            usage=_usage(found.status), volume_condition=condition
        )

    def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        kinds = (
            _Rpc.STAGE_UNSTAGE_VOLUME,
            _Rpc.GET_VOLUME_STATS,
            _Rpc.VOLUME_CONDITION,
            # Otherwise kubelet would want to change the group of every file.
            _Rpc.VOLUME_MOUNT_GROUP,
        )
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[csi_pb2.NodeServiceCapability(rpc=_Rpc(type=kind)) for kind in kinds]
        )

    def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, context: ServicerContext
    ) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)

    def _volume(
        self, attributes: Mapping[str, str], capability: csi_pb2.VolumeCapability
    ) -> Volume:
        check_capability(capability)
        volume = self._rules.volume(
            attributes,
            capability.mount.mount_flags,
            inline=attributes.get(EPHEMERAL) == "true",
        )
        return _with_group(volume, capability.mount.volume_mount_group)

    def _staged(self, volume_id: str, staging_target_path: str) -> Daemon | None:
        """The daemon of a staged volume; None if its daemons start with the pods.

        Raises:
            RpcError: it is not staged there.
        """
        path = safe_path("staging_target_path", staging_target_path)
        place = self._attachments.place(volume_id, path)
        daemon = self._attachments.daemons.get(place.daemon) if place and place.daemon else None
        if place is None or place.kind != "staging" or (place.daemon and daemon is None):
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                f"volume {volume_id} is not staged at {staging_target_path}",
            )
        return daemon

    def _place(self, volume_id: str, volume_path: str) -> tuple[Path, Place]:
        """The place of a volume at a path.

        Raises:
            RpcError: it is not there, or the path is invalid.
        """
        if not volume_path:
            raise InvalidArgumentError("volume_path is missing")
        with suppress(InvalidArgumentError):
            path = safe_path("volume_path", volume_path)
            if (place := self._attachments.place(volume_id, path)) is not None:
                return path, place
        raise RpcError(StatusCode.NOT_FOUND, f"volume {volume_id} is not at {volume_path!r}")

    def _check_inline(self, volume: Volume, given: Credentials | None) -> None:
        unsigned = volume.mount_options.no_sign_request
        if given is None and not unsigned and not self._inline_node_role:
            raise RpcError(
                StatusCode.PERMISSION_DENIED,
                "an inline volume may not be read with the node's own credentials: give it "
                "nodePublishSecretRef, roleArn or noSignRequest, or start the driver with "
                "--inline-node-role",
            )


def _usage(status: dict[str, Any] | None) -> list[csi_pb2.VolumeUsage]:
    """The size of a volume; empty if its daemon does not answer: its condition says why."""
    if status is None:
        return []
    size, files = status["size_bytes"], status["files"]
    here = status["prefetch"]["there_bytes"]
    unit = csi_pb2.VolumeUsage.Unit
    return [
        csi_pb2.VolumeUsage(unit=unit.BYTES, total=size, used=here, available=size),
        # kubelet's stock alerts fire when bytes or inodes run out.
        csi_pb2.VolumeUsage(unit=unit.INODES, total=files, used=files, available=files),
    ]


def _deadline(context: ServicerContext) -> float:
    """When an RPC must be done, by the monotonic clock."""
    remaining_s = context.time_remaining()
    limit_s = TIMEOUT_S if remaining_s is None else min(TIMEOUT_S, remaining_s - RESERVE_S)
    return time.monotonic() + max(limit_s, 0.0)


def _patience_s(context: ServicerContext, until: float) -> float:
    """How long an RPC waits for a daemon; kubelet sets a deadline and gets an early answer."""
    remaining_s = until - time.monotonic()
    return remaining_s if context.time_remaining() is None else min(PATIENCE_S, remaining_s)


def _digest(attributes: Mapping[str, str], capability: csi_pb2.VolumeCapability) -> str:
    """A digest of the volume that a call describes.

    It does not include the driver's defaults: after an upgrade that changed them, kubelet's
    repeated calls still describe the same volume.
    """
    mount = capability.mount
    asked = [
        sorted(own_attributes(attributes).items()),
        list(mount.mount_flags),
        mount.volume_mount_group,
    ]
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()


def _with_group(volume: Volume, group: str) -> Volume:
    """The volume for pods of a group (fsGroup), if the group makes a difference.

    World-readable files need no group; with one, pods of two groups could not share a daemon.
    """
    if not group:
        return volume
    if not group.isdecimal():
        raise InvalidArgumentError(f"volume_mount_group: {group!r} is not the number of a group")
    options = volume.mount_options
    if options.gid is not None or options.file_mode & 0o004:
        return volume
    return replace(volume, options={**volume.options, "gid": group})


def _wait_for(volume: Volume, daemon: Daemon, until: float) -> None:
    """Wait until the headers or the model are here, if the volume has `waitFor`.

    Blocks that have no room before others are read are not waited for.

    Raises:
        RpcError: they are not here at the deadline. The volume stays mounted and loading continues.
    """
    if volume.wait_for is None:
        return
    busy_at_s = time.monotonic()
    progress, trouble = "the progress is not known", ""
    while time.monotonic() < until:
        try:
            status = daemon.status()
            if status["ready"][volume.wait_for]:
                return
            prefetch = status["prefetch"]
            progress = f"{prefetch['there_bytes']} of {prefetch['wanted_bytes']} bytes are here"
            trouble = status["trouble"] or ""
            if not prefetch["planned"] or status["in_flight"] or trouble:
                busy_at_s = time.monotonic()
        except LazyfsError as error:
            trouble = str(error)
            busy_at_s = time.monotonic()
        if time.monotonic() - busy_at_s > REST_S:
            log.info("%s: waitFor %s: %s, and there is no room for more", volume.source,
                     volume.wait_for, progress)  # fmt: skip
            return
        time.sleep(POLL_S)
    log.info("%s: waitFor %s: %s", volume.source, volume.wait_for, progress)
    # Without figures, so that Kubernetes counts equal events.
    why = f": {trouble}" if trouble else "; it is being loaded"
    raise RpcError(
        StatusCode.DEADLINE_EXCEEDED,
        f"{volume.source}: waitFor {volume.wait_for}: not all is here yet{why}",
    )
