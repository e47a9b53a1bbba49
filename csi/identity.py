"""The Identity service: who the plugin is, and whether it is ready."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from google.protobuf.wrappers_pb2 import BoolValue
from grpc import ServicerContext, StatusCode

from csi import csi_pb2
from csi.csi_pb2_grpc import IdentityServicer
from csi.errors import RpcError
from lazyfs import __version__
from lazyfs.errors import LazyfsError, OptionError
from lazyfs.handover.keeper import KeeperError

# Raises LazyfsError or KeeperError if something that the plugin needs is missing.
Check = Callable[[], None]

# spec.md, GetPluginInfoResponse.name: a domain name (RFC 1035), of up to 63 characters.
_NAME = re.compile(r"(?=.{1,63}$)[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?")


class Identity(IdentityServicer):
    """Answers for a plugin.

    Args:
        name: the driver's, as in the CSIDriver object.
        checks: conditions for the plugin to be ready.

    Raises:
        OptionError: the name is invalid for a driver.
    """

    def __init__(self, name: str, checks: Sequence[Check]) -> None:
        if not _NAME.fullmatch(name):
            raise OptionError(
                f"--driver-name: {name!r} is not allowed: a domain name of up to 63 characters"
            )
        self._name = name
        self._checks = checks

    def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: ServicerContext
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=self._name, vendor_version=__version__)

    def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        # The node plugin says so too: the capability is that of the whole driver.
        service = csi_pb2.PluginCapability.Service(
            type=csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE
        )
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[csi_pb2.PluginCapability(service=service)]
        )

    def Probe(
        self, request: csi_pb2.ProbeRequest, context: ServicerContext
    ) -> csi_pb2.ProbeResponse:
        """FAILED_PRECONDITION with the reason if something is missing."""
        for check in self._checks:
            try:
                check()
            except (LazyfsError, KeeperError) as error:
                raise RpcError(StatusCode.FAILED_PRECONDITION, str(error)) from error
        return csi_pb2.ProbeResponse(ready=BoolValue(value=True))
