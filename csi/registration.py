"""Registers the node plugin with kubelet, without a sidecar.

kubelet connects to every socket in its directory `plugins_registry`, when the socket appears and
when kubelet itself starts. It asks who the plugin is (GetInfo), calls NodeGetInfo at the endpoint
in the answer, and reports the result (NotifyRegistrationStatus). When the socket is removed,
kubelet forgets the driver.
https://pkg.go.dev/k8s.io/kubelet/pkg/apis/pluginregistration/v1
"""

from __future__ import annotations

import logging
from pathlib import Path

from grpc import ServicerContext, StatusCode

from csi.errors import RpcError
from csi.pluginregistration_pb2 import (
    InfoRequest,
    PluginInfo,
    RegistrationStatus,
    RegistrationStatusResponse,
)
from csi.pluginregistration_pb2_grpc import RegistrationServicer

log = logging.getLogger(__name__)

# kubelet accepts every 1.x.
CSI_VERSION = "1.0.0"


def socket_of(directory: Path, driver_name: str) -> Path:
    """The registration socket of a driver, named as node-driver-registrar names it."""
    return directory / f"{driver_name}-reg.sock"


class Registration(RegistrationServicer):
    """Answers kubelet, and records whether it registered the driver.

    Args:
        driver_name: as in the CSIDriver object.
        endpoint: the plugin's own socket, by its path on the node.
        socket: the registration socket.
    """

    def __init__(self, driver_name: str, endpoint: Path, socket: Path) -> None:
        self._info = PluginInfo(
            type="CSIPlugin",
            name=driver_name,
            endpoint=str(endpoint),
            supported_versions=[CSI_VERSION],
        )
        self._socket = socket
        self._trouble: str | None = f"kubelet has not asked at {socket} yet"

    def GetInfo(self, request: InfoRequest, context: ServicerContext) -> PluginInfo:
        return self._info

    def NotifyRegistrationStatus(
        self, request: RegistrationStatus, context: ServicerContext
    ) -> RegistrationStatusResponse:
        if request.plugin_registered:
            self._trouble = None
            log.info("kubelet registered the driver %s", self._info.name)
        else:
            self._trouble = f"kubelet refused: {request.error}"
            log.error("kubelet did not register the driver: %s", request.error)
        return RegistrationStatusResponse()

    def check(self) -> None:
        """Raises RpcError while kubelet cannot use the driver."""
        trouble = self._trouble
        if not self._socket.exists():
            trouble = (
                f"{self._socket} was removed: delete this pod, so that the next one makes it again"
            )
        if trouble is not None:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                f"the driver {self._info.name} is not registered: {trouble}",
            )
