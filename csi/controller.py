"""The Controller service: makes and deletes volumes for claims. It only reads from S3."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from grpc import ServicerContext, StatusCode

from csi import csi_pb2
from csi.controller_records import ProvisionedVolume, Records, digest_of, id_of
from csi.csi_pb2_grpc import ControllerServicer
from csi.errors import InvalidArgumentError, MendableError, RpcError
from csi.kubernetes import ApiServer
from csi.parameters import Parameters
from csi.request_fields import check_capability, check_size, check_text
from csi.source_check import SourceSize, check_source
from csi.volume_attributes import (
    Rules,
    Volume,
    credentials_of,
    own_attributes,
)
from lazyfs.errors import SourceError, UnavailableError
from lazyfs.options.option_types import format_size
from lazyfs.store.credentials import Credentials

log = logging.getLogger(__name__)

_Rpc = csi_pb2.ControllerServiceCapability.RPC
# Time limit for checking a source; then an event of the claim says that S3 does not answer.
LOOK_TIMEOUT_S = 10.0
CAPABILITIES = (_Rpc.CREATE_DELETE_VOLUME, _Rpc.LIST_VOLUMES)


class Controller(ControllerServicer):
    """Makes volumes.

    Args:
        driver_name: the first part of the annotation `<driver>/source`.
        rules: what a StorageClass may set, as on the nodes.
        records: the volumes that were made.
        api_server: for reading claims; None outside a cluster.
        look: checks that a source exists, and how large it is.
    """

    def __init__(
        self,
        driver_name: str,
        rules: Rules,
        records: Records,
        api_server: ApiServer | None,
        look: Callable[[Volume, Credentials | None], SourceSize] = check_source,
    ) -> None:
        self._annotation = f"{driver_name}/source"
        self._rules = rules
        self._records = records
        self._api_server = api_server
        self._look = look

    def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[
                csi_pb2.ControllerServiceCapability(rpc=_Rpc(type=each)) for each in CAPABILITIES
            ]
        )

    def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: ServicerContext
    ) -> csi_pb2.CreateVolumeResponse:
        """Make a volume for a source in S3, or find the one that was made for this name."""
        check_text("name", request.name)
        flags = _checked_flags(request.volume_capabilities)
        if request.HasField("volume_content_source"):
            raise InvalidArgumentError("a lazyfs volume cannot be a copy of a volume or snapshot")
        if request.mutable_parameters:
            raise InvalidArgumentError(
                "lazyfs volumes have no mutable parameters (VolumeAttributesClass)"
            )
        required, limit = _range(request.capacity_range)
        parameters = Parameters.read(request.parameters)
        record = self._records.find(id_of(request.name))
        if record is None:
            record = self._new_record(request, parameters, flags, required, limit)
            if not self._records.add(record):
                # Another replica, or another call, was faster.
                found = self._records.find(record.volume_id)
                if found is None:
                    raise RpcError(
                        StatusCode.ABORTED,
                        f"{request.name}: is being made and deleted at the same time; try again",
                    )
                record = found
        _check_same(record, request.name, parameters, required, limit)
        return csi_pb2.CreateVolumeResponse(volume=_volume(record))

    def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: ServicerContext
    ) -> csi_pb2.DeleteVolumeResponse:
        """Remove the record of a volume. Nothing in S3 is touched."""
        check_text("volume_id", request.volume_id)
        self._records.remove(request.volume_id)
        return csi_pb2.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        check_text("volume_id", request.volume_id)
        if not request.volume_capabilities:
            raise InvalidArgumentError("volume_capabilities is missing")
        record = self._records.find(request.volume_id)
        if record is None:
            raise RpcError(
                StatusCode.NOT_FOUND,
                f"{request.volume_id}: this driver made no volume with this id",
            )
        try:
            flags = _checked_flags(request.volume_capabilities)
            self._rules.volume(record.attributes, flags)
            _check_context(record, request)
        except InvalidArgumentError as error:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=str(error))
        return csi_pb2.ValidateVolumeCapabilitiesResponse(
            confirmed=csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    def ListVolumes(
        self, request: csi_pb2.ListVolumesRequest, context: ServicerContext
    ) -> csi_pb2.ListVolumesResponse:
        """Volumes in the order of their ids; a token is the last id of the page before."""
        after = request.starting_token
        if request.max_entries < 0:
            raise InvalidArgumentError(f"max_entries: {request.max_entries} is negative")
        if after and digest_of(after) is None:
            raise RpcError(
                StatusCode.ABORTED, f"starting_token: {after!r} is not a token of this driver"
            )
        rest = sorted(
            (record for record in self._records.all() if record.volume_id > after),
            key=lambda record: record.volume_id,
        )
        page = rest[: request.max_entries or None]
        return csi_pb2.ListVolumesResponse(
            entries=[csi_pb2.ListVolumesResponse.Entry(volume=_volume(each)) for each in page],
            next_token=page[-1].volume_id if len(page) < len(rest) else "",
        )

    def _new_record(
        self,
        request: csi_pb2.CreateVolumeRequest,
        parameters: Parameters,
        flags: list[str],
        required: int,
        limit: int,
    ) -> ProvisionedVolume:
        """The record for a volume that can be made as requested."""
        attributes = parameters.attributes(self._chosen_source(parameters))
        check_size("the volume's attributes", attributes)
        volume = self._rules.volume(attributes, flags)
        try:
            credentials = credentials_of(request.secrets)
        except InvalidArgumentError as error:
            raise MendableError(str(error)) from None
        size_bytes = self._size(volume, credentials, parameters)
        if limit and size_bytes > limit:
            raise RpcError(
                StatusCode.OUT_OF_RANGE,
                f"{volume.source} has {format_size(size_bytes)}, more than the limit of "
                f"{format_size(limit)}; raise or remove the claim's limit",
            )
        return ProvisionedVolume(
            name=request.name,
            volume_id=id_of(request.name),
            capacity_bytes=max(required, size_bytes),
            parameters=parameters.own,
            attributes=attributes,
        )

    def _chosen_source(self, parameters: Parameters) -> str | None:
        """The source that the claim's annotation requests, if claims may choose."""
        if not parameters.allowed_prefixes:
            return None
        namespace, name = parameters.claim
        if self._api_server is None:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                "allowedPrefixes: the claim cannot be read: this controller is not in a cluster",
            )
        chosen = self._api_server.claim_annotations(namespace, name).get(self._annotation)
        if not chosen and not parameters.names_a_source:
            raise MendableError(
                f"the claim {namespace}/{name} has no annotation {self._annotation}, and the "
                "StorageClass no source"
            )
        return chosen

    def _size(self, volume: Volume, credentials: Credentials | None, parameters: Parameters) -> int:
        """Check that the source can be read; its size in bytes, 0 if it is not checked."""
        # With a pod's own role, only the pod's token opens the source.
        if not parameters.check_source or (volume.role_arn and credentials is None):
            return 0
        try:
            return self._soon(volume, credentials).size_bytes
        except SourceError as error:
            if credentials is not None:
                raise
            raise type(error)(
                f"{error} (checked with the controller's own credentials: the StorageClass has no "
                'csi.storage.k8s.io/provisioner-secret-name; checkSource: "false" skips the check)'
            ) from error

    def _soon(self, volume: Volume, credentials: Credentials | None) -> SourceSize:
        """Check a source. Raises SourceError, also after the time limit."""
        found: Future[SourceSize] = Future()

        def look() -> None:
            try:
                found.set_result(self._look(volume, credentials))
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=look, daemon=True).start()
        try:
            return found.result(LOOK_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError(
                f"{volume.source}: S3 has not answered for {LOOK_TIMEOUT_S:g} s"
            ) from None


def _checked_flags(capabilities: Iterable[csi_pb2.VolumeCapability]) -> list[str]:
    """The mount flags of capabilities; raises if one is not supported."""
    given = list(capabilities)
    if not given:
        raise InvalidArgumentError("volume_capabilities is missing")
    flags: list[str] = []
    for each in given:
        check_capability(each)
        flags += [flag for flag in each.mount.mount_flags if flag not in flags]
    return flags


def _range(asked: csi_pb2.CapacityRange) -> tuple[int, int]:
    """The minimum and maximum size in bytes; 0 for no limit."""
    required, limit = asked.required_bytes, asked.limit_bytes
    if required < 0 or limit < 0 or (limit and required > limit):
        raise RpcError(
            StatusCode.OUT_OF_RANGE,
            f"capacity_range: no size is at least {required} and at most {limit} bytes",
        )
    return required, limit


def _check_same(
    record: ProvisionedVolume, name: str, parameters: Parameters, required: int, limit: int
) -> None:
    """Raises RpcError if an existing volume differs from the request."""
    if record.name != name or record.parameters != parameters.own:
        raise RpcError(
            StatusCode.ALREADY_EXISTS, f"{name}: this volume was made with other parameters"
        )
    if record.capacity_bytes < required or (limit and record.capacity_bytes > limit):
        raise RpcError(
            StatusCode.ALREADY_EXISTS,
            f"{name}: this volume was made with {format_size(record.capacity_bytes)}",
        )


def _check_context(
    record: ProvisionedVolume, request: csi_pb2.ValidateVolumeCapabilitiesRequest
) -> None:
    for what, given, known in (
        ("volume_context", request.volume_context, record.attributes),
        ("parameters", request.parameters, record.parameters),
    ):
        if given and own_attributes(given) != own_attributes(known):
            raise InvalidArgumentError(f"{what}: differs from the volume's")
    if request.mutable_parameters:
        raise InvalidArgumentError("lazyfs volumes have no mutable parameters")


def _volume(record: ProvisionedVolume) -> csi_pb2.Volume:
    context: Mapping[str, str] = record.attributes
    return csi_pb2.Volume(
        volume_id=record.volume_id, capacity_bytes=record.capacity_bytes, volume_context=context
    )
