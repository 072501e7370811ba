"""Devices that are unplugged from guests that run, and plugged into them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.guestvm import GuestVm
    from qemu_ioasid.agent.iommufd import Iommufd
    from qemu_ioasid.agent.vfio import VfioDevice

    Json = dict[str, Any]

SECONDS = 30.0


class Hotplug:
    """The operations. What follows a device's end is guestvm's: it hears of it from QEMU."""

    def __init__(
        self,
        guest: Callable[[str], GuestVm],
        opened: Callable[[str, str, Iommufd], VfioDevice],
    ) -> None:
        """opened(name, uuid, iommufd) opens an mdev for a guest; OSError EBUSY: it is open."""
        self._guest = guest
        self._opened = opened
        self.operations: Mapping[str, Callable[..., Any]] = {
            "guest_plug": self.guest_plug,
            "guest_unplug": self.guest_unplug,
            "guest_unplugged": self.guest_unplugged,
        }

    def guest_plug(
        self, guest: str, device: str, uuid: str, arguments: Json, seconds: float = SECONDS
    ) -> Json:
        """Opens an mdev and has QEMU plug it in; on failure it is closed again."""
        vm = self._guest(guest)
        opened = self._opened(device, uuid, vm.iommufd)
        vm.plug(opened, arguments, seconds)
        return {"vfio": opened.cdev}

    def guest_unplug(self, guest: str, device: str, seconds: float = SECONDS) -> None:
        """Has QEMU ask the guest for a device: it stays until the guest lets go of it."""
        self._guest(guest).unplug(device, seconds)

    def guest_unplugged(self, guest: str, device: str, seconds: float) -> None:
        """Waits until a device is gone, with all that was registered on it."""
        self._guest(guest).wait_unplugged(device, seconds)
