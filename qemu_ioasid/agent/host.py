"""The host role: mdevs, guests, the registrar, the witnesses. JSON in, JSON out."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack, suppress

from qemu_ioasid.agent import failnth, gcov, kernellist, kmemleak, mdev
from qemu_ioasid.agent.batches import Batches
from qemu_ioasid.agent.common import Common, with_several
from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.findings import Findings
from qemu_ioasid.agent.guestvm import GuestVm
from qemu_ioasid.agent.hello import executable, machine
from qemu_ioasid.agent.holder import Holders
from qemu_ioasid.agent.hotplug import Hotplug
from qemu_ioasid.agent.iommufd import IOMMU, Iommufd
from qemu_ioasid.agent.opendevice import OwnDevices
from qemu_ioasid.agent.raw import Raw
from qemu_ioasid.agent.registrar import Registrar
from qemu_ioasid.agent.slowmemory import USERFAULTFD, SlowMemories
from qemu_ioasid.agent.vfio import MDEV_DEVICES, VfioDevice
from qemu_ioasid.agent.witness import Witness

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.server import Emit
    from qemu_ioasid.agent.spawn import Spawner

    Json = dict[str, Any]

QEMU = "qemu-system-x86_64"
STOP_SECONDS = 30.0

# fmt: off
OPERATIONS = (
    "hello", "mdev_create", "mdev_remove", "guest_start", "guest_status", "guest_stop",
    "guest_forget", "freeze", "thaw", "wake",
    "ioas_alloc", "ioas_destroy", "ioas_map_guest", "ioas_unmap", "pasid_alloc",
    "pasid_free", "pasids", "register", "replace", "unregister", "ledger", "audit",
    "kernel_list", "kernel_table", "wait_blocked", "device_open", "device_close", "program",
    "reset",
)
# fmt: on


class Host:
    """Holds every fd of the host side. The methods named in OPERATIONS are the protocol's.

    Arguments and answers: docs of the protocol (agent operations). An "iommufd" is named by the
    guest it belongs to, or "agent:DEVICE" for a device the agent opened itself.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        # guards the dicts; never held across a call that may block
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._registrar = Registrar()
        self._mdevs: dict[str, mdev.Mdev] = {}
        self._uuids: dict[str, str] = {}
        self._guests: dict[str, GuestVm] = {}
        self._own = OwnDevices()
        self._witness = Witness(self._guest)
        self._slow = SlowMemories(self._iommufd)
        self._raw = Raw(self._device, self._iommufd, self._uuids)
        self._holders = Holders(self._raw.device, self._iommufd, self._spawning)
        self._spawner: Spawner | None = None
        self._common = Common()
        operations = {
            **self._common.operations,
            **self._own.operations,
            **Findings(self._iommufd, self._guest).operations,
            **self._slow.operations,
            **self._witness.operations,
            **kmemleak.operations,
            **gcov.operations,
            **{name: getattr(self, name) for name in OPERATIONS},
            **Batches(self._registrar, self._device, self._iommufd).operations,
            **self._raw.operations,
            **self._holders.operations,
            **Hotplug(self._guest, self._opened_for).operations,
            "device_submit": self._own.submit,
            "device_submit_start": self._own.submit_start,
            "device_submit_wait": self._own.submit_wait,
            "device_reset": self._own.reset,
            "device_doorbell": self._own.doorbell,
            "device_registers": self._own.registers,
            "device_read": self._own.read,
        }
        self.operations: Mapping[str, Callable[..., Any]] = {
            **with_several(operations),
            "fail_nth": failnth.FailNth(operations).fail_nth,
        }

    def close(self) -> None:
        """Ends everything: sleepers wake, guests die, devices close, mdevs go."""
        with ExitStack() as stack:
            for created in list(self._mdevs.values()):
                stack.callback(created.remove)
            guests = list(self._guests.values())
            for guest in guests:
                stack.callback(guest.stop, STOP_SECONDS)
            stack.callback(self._own.close)
            stack.callback(self._raw.close)
            stack.callback(self._holders.close)
            for guest in guests:
                if guest.running:
                    stack.callback(guest.kill)
            stack.callback(self._witness.close)
            stack.callback(self._slow.close)
            stack.callback(self._common.close)

    # --- names --------------------------------------------------------------------------

    def _guest(self, name: str) -> GuestVm:
        with self._lock:
            if name not in self._guests:
                raise KeyError(f"no guest {name!r}")
            return self._guests[name]

    def _devices(self) -> dict[str, VfioDevice]:
        devices = {opened.device.name: opened.device for opened in self._own.all()}
        with self._lock:
            for guest in self._guests.values():
                if guest.running:
                    devices.update(guest.devices)
            return devices

    def _device(self, name: str) -> VfioDevice:
        devices = self._devices()
        if name not in devices:
            raise KeyError(f"no open device {name!r}")
        return devices[name]

    def _iommufd(self, name: str) -> Iommufd:
        with self._lock:
            if name in self._guests:
                return self._guests[name].iommufd
        for opened in self._own.all():
            if opened.iommufd.name == name:
                return opened.iommufd
        raise KeyError(f"no iommufd {name!r}")

    def _refuse_open(self, name: str) -> None:
        if name in self._devices():
            raise OSError(errno.EBUSY, f"device {name!r} is open")

    def _unopened(self, name: str) -> str:
        """The uuid of an mdev that is open nowhere here."""
        if name not in self._uuids:
            raise KeyError(f"no device {name!r}")
        self._refuse_open(name)
        return self._uuids[name]

    # --- the machine, the mdevs ---------------------------------------------------------

    def hello(self) -> Json:
        """The machine, and the features the rig needs of the kernel."""
        from qemu_ioasid.agent.tracing import TRACEFS, ensure_mounted

        for filesystem, folder in (("debugfs", kernellist.DEBUGFS), ("tracefs", TRACEFS)):
            # where it fails, the features below say no
            with suppress(OSError):
                ensure_mounted(filesystem, folder)
        kernel = {
            "iommu": os.path.exists(IOMMU),
            "mdev_type": mdev.mdev_type() is not None,
            "debugfs": os.path.isdir(kernellist.FOLDER),
            "tracefs": os.path.exists(f"{TRACEFS}/trace"),
            "kprobe": os.path.exists(f"{TRACEFS}/kprobe_events"),
            "userfaultfd": os.path.exists(USERFAULTFD),
            "kmemleak": os.path.exists(kmemleak.KMEMLEAK),
            "fail_nth": failnth.supported(),
        }
        return {**machine("host", kernel), "qemu": executable(QEMU)}

    def mdev_create(self, name: str, uuid: str) -> Json:
        """Creates an mdev and names it."""
        with self._opening:
            if name in self._mdevs:
                raise OSError(errno.EEXIST, f"there is an mdev {name!r}")
            with ExitStack() as stack:
                created = stack.enter_context(mdev.Mdev.create(uuid))
                cdev = created.cdev
                self._mdevs[name] = created
                self._uuids[name] = uuid
                stack.pop_all()
        return {"name": name, "uuid": uuid, "vfio": cdev}

    def mdev_remove(self, name: str) -> None:
        """Removes an mdev; EBUSY while its device is open here."""
        self._refuse_open(name)
        if name not in self._mdevs:
            raise KeyError(f"no mdev {name!r}")
        self._mdevs[name].remove()
        del self._mdevs[name]

    # --- guests -------------------------------------------------------------------------

    def guest_start(
        self,
        name: str,
        argv: list[str],
        memory: int,
        devices: dict[str, str],
        sockets: list[str],
        huge: bool = False,
        inherit: list[int] | None = None,
    ) -> Json:
        """Starts a guest's QEMU with every fd it needs."""
        with self._opening, ExitStack() as stack:
            if name in self._guests:
                raise OSError(errno.EEXIST, f"there is a guest {name!r}")
            iommufd = stack.enter_context(Iommufd.open(name))
            opened = {
                label: stack.enter_context(self._opened_for(label, uuid, iommufd))
                for label, uuid in devices.items()
            }
            guest = GuestVm(name, memory, huge, iommufd, opened)
            stack.callback(guest.forget)
            with self._lock:
                self._guests[name] = guest
            stack.callback(self._guests.pop, name)
            pid = guest.start(
                self._spawning(), argv, sockets, self._guest_gone, self._unplugged, inherit or ()
            )
            stack.pop_all()
        return {
            "pid": pid,
            "sockets": guest.socket_paths,
            "devices": {label: device.cdev for label, device in opened.items()},
        }

    def _spawning(self) -> Spawner:
        from qemu_ioasid.agent.spawn import Spawner

        with self._lock:
            if self._spawner is None:
                self._spawner = Spawner()
            return self._spawner

    def _opened_for(self, label: str, uuid: str, iommufd: Iommufd) -> VfioDevice:
        self._refuse_open(label)
        device = VfioDevice.open(label, f"{MDEV_DEVICES}/{uuid}", iommufd)
        self._uuids[label] = uuid
        return device

    def _unplugged(self, device: VfioDevice) -> None:
        self._registrar.drop_device(device)
        self._emit({"event": "device-unplugged", "device": device.name})

    def _guest_gone(self, guest: GuestVm) -> None:
        for device in guest.devices.values():
            self._registrar.drop_device(device)
        self._registrar.drop_owner(guest.name)
        ending = {"returncode": guest.returncode, "stderr": guest.output()}
        self._emit({"event": "guest-exit", "name": guest.name, **ending})

    def guest_status(self, name: str) -> Json:
        """Whether QEMU runs, how it ended, what it wrote."""
        guest = self._guest(name)
        return {
            "pid": guest.pid,
            "running": guest.running,
            "returncode": guest.returncode,
            "stderr": guest.output(),
        }

    def guest_stop(self, name: str, seconds: float = STOP_SECONDS) -> Json:
        """Kills QEMU; everything but the memory is closed when this answers."""
        self._guest(name).stop(seconds)
        return self.guest_status(name)

    def freeze(self, seconds: float) -> None:
        """Stops every guest where it is; TimeoutError: one does not stop."""
        for guest in list(self._guests.values()):
            if guest.running:
                guest.freeze(seconds)

    def thaw(self) -> None:
        """Lets the guests go on."""
        for guest in list(self._guests.values()):
            if guest.running:
                guest.thaw()

    def wake(self, now: int, entropy: str) -> Json:
        """The VM was restored: its guests go on, in the present."""
        self.thaw()
        return self._common.wake(now, entropy)

    def guest_forget(self, name: str) -> None:
        """Frees a dead guest's memory and its name."""
        guest = self._guest(name)
        guest.forget()
        with self._lock:
            del self._guests[name]
        self._witness.forget(name)

    # --- address spaces -----------------------------------------------------------------

    def ioas_alloc(self, iommufd: str) -> Json:
        """A fresh IOAS of an iommufd."""
        return {"ioas": self._iommufd(iommufd).ioas_alloc()}

    def ioas_destroy(self, iommufd: str, ioas: int) -> None:
        """Destroys an IOAS."""
        self._iommufd(iommufd).destroy(ioas)

    def ioas_map_guest(
        self,
        iommufd: str,
        ioas: int,
        iova: int,
        gpa: int,
        length: int,
        writeable: bool = True,
        guest: str | None = None,
    ) -> Json:
        """Maps a range of a guest's RAM file (guest-physical address = file offset)."""
        fd = self._guest(guest or iommufd).memory_fd
        space = self._iommufd(iommufd)
        return {"iova": space.ioas_map_file(ioas, fd, gpa, length, iova, writeable)}

    def ioas_unmap(self, iommufd: str, ioas: int, iova: int, length: int) -> Json:
        """Unmaps a range."""
        return {"length": self._iommufd(iommufd).ioas_unmap(ioas, iova, length)}

    # --- the registrar ------------------------------------------------------------------

    def pasid_alloc(self, owner: str) -> Json:
        """A PASID of the parent."""
        return {"pasid": self._registrar.alloc(owner)}

    def pasid_free(self, pasid: int) -> None:
        """Gives a PASID back."""
        self._registrar.free(pasid)

    def pasids(self) -> list[Any]:
        """The PASIDs handed out."""
        return self._registrar.allocated()

    def register(self, device: str, iommufd: str, pasid: int, ioas: int) -> None:
        """Puts a PASID into a device's list."""
        self._registrar.register(self._device(device), self._iommufd(iommufd), pasid, ioas)

    def replace(self, device: str, pasid: int, ioas: int) -> None:
        """Makes a registered PASID name another IOAS."""
        self._registrar.replace(self._device(device), pasid, ioas)

    def unregister(self, device: str, pasid: int) -> None:
        """Takes a PASID out of a device's list."""
        self._registrar.unregister(self._device(device), pasid)

    def ledger(self) -> list[Any]:
        """What the registrar registered."""
        return self._registrar.ledger()

    def audit(self) -> Json:
        """The ledger against the kernel's lists of every open device."""

        def pasids(device: VfioDevice) -> dict[int, int]:
            rows = self.kernel_list(device.name)
            return {int(row["pasid"]): int(row["ioas"]) for row in rows}

        return self._registrar.audit(self._devices().values(), pasids)

    def reset(self) -> Json:
        """As it was before anybody registered anything; the kernel's word on that, and its news."""
        self._slow.close()
        self._holders.close()
        self._raw.close()
        for opened in self._own.all():
            self.device_close(opened.device.name)
        self._registrar.clear()
        lists = {}
        for name, device in self._devices().items():
            lists[name] = self.kernel_list(name)
            for row in lists[name]:
                device.detach_pasid(int(row["pasid"]))
            if lists[name]:
                lists[name] = self.kernel_list(name)
        self._witness.forget()
        with self._lock:
            # a dead guest's iommufd has taken its own along
            iommufds = [guest.iommufd for guest in self._guests.values() if guest.running]
        for iommufd in iommufds:
            _, error = iommufd.destroy_many(sorted(iommufd.spaces))
            if error:
                raise error
        return {
            "table": self.kernel_table(),
            "lists": lists,
            **self._common.news(),
            "running": sorted(guest.name for guest in self._guests.values() if guest.running),
        }

    # --- the kernel's own word ----------------------------------------------------------

    def kernel_list(self, device: str) -> list[Json]:
        """The kernel's own list of a device, open or not."""
        if device not in self._uuids:
            raise KeyError(f"no device {device!r}")
        return kernellist.device_list(self._uuids[device])

    def kernel_table(self) -> list[Json]:
        """The kernel's PASID table of the parent."""
        return kernellist.parent_table()

    def wait_blocked(self, device: str, pasid: int, seconds: float) -> Json:
        """Waits until the kernel keeps new work off a PASID of a device, or has dropped it.

        The state is what its list shows (closed: being unregistered, paused: being replaced).
        """

        def state() -> str | None:
            for row in self.kernel_list(device):
                if row["pasid"] == pasid:
                    return None if row["state"] == kernellist.OPEN else str(row["state"])
            return "gone"

        return {"state": wait_for(f"PASID {pasid} of {device} blocked", seconds, state)}

    # --- a device opened by the agent itself --------------------------------------------

    def device_open(self, name: str) -> Json:
        """Opens an mdev that no guest has open."""
        with self._opening:
            sysfs = f"{MDEV_DEVICES}/{self._unopened(name)}"
            opened = self._own.open(name, sysfs, f"agent:{name}")
        return {"iommufd": opened.iommufd.name, "ioas": opened.ioas, "vfio": opened.device.cdev}

    def program(self, devices: list[str], **order: Any) -> Json:
        """Many steps on mdevs that nobody has open, and what each did to everything."""
        from qemu_ioasid.agent import program

        with self._opening:
            return program.run({name: self._unopened(name) for name in devices}, **order)

    def device_close(self, name: str) -> None:
        """Closes a device opened by device_open."""
        device = self._own.get(name).device
        self._own.close_one(name)
        self._registrar.drop_device(device)
