"""Files and ioctls with nothing in front of the kernel: what whoever holds the fds can do.

A "device" is the name of a file opened or kept here, or whatever else the host has open by it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import ExitStack, suppress
from itertools import chain

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.libc import vmsplice
from qemu_ioasid.agent.opendevice import completions
from qemu_ioasid.agent.pdma import Ring
from qemu_ioasid.agent.procfs import task_state
from qemu_ioasid.agent.uapi import iommufd as iommufd_uapi
from qemu_ioasid.agent.uapi import vfio as uapi
from qemu_ioasid.agent.vectors import assign
from qemu_ioasid.agent.vfio import MDEV_DEVICES, Region, VfioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Json = dict[str, Any]


def _states(name: str) -> list[str]:
    """The states of the kernel threads of this name."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # A process may end while this looks.
        ended = suppress(FileNotFoundError, ProcessLookupError)
        with ended, open(f"/proc/{pid}/comm") as file:
            if file.read().strip() == name:
                found.append(task_state(f"/proc/{pid}"))
    return found


class Raw:
    """The operations. device and iommufd find by name what the host has open beside these."""

    def __init__(
        self,
        device: Callable[[str], VfioDevice],
        iommufd: Callable[[str], Iommufd],
        uuids: Mapping[str, str],
    ) -> None:
        self._other_device = device
        self._iommufd = iommufd
        self._uuids = uuids
        self._lock = threading.Lock()
        self._files: dict[str, VfioDevice] = {}
        # fault.c gives a file for each fault queue
        self._queues: list[int] = []
        self._pinned: dict[str, Descriptor] = {}
        self._events: dict[str, list[Descriptor]] = {}
        names = (
            "raw_attach",
            "raw_detach",
            "raw_bind",
            "raw_reset",
            "file_open",
            "file_keep",
            "file_close",
        )
        more = (
            "file_submit",
            "iommufd_close",
            "hwpt_alloc",
            "fault_queue_alloc",
            "wait_worker",
            "misuse",
        )
        pages = ("file_access", "region_pin", "region_pinned", "raw_irqs", "irqs_seen")
        self.operations: Mapping[str, Callable[..., Any]] = {
            name: getattr(self, name) for name in (*names, *more, *pages)
        }

    def device(self, name: str) -> VfioDevice:
        """The file of this name; KeyError: there is none."""
        with self._lock:
            found = self._files.get(name)
        return found or self._other_device(name)

    def _enter(self, name: str, file: VfioDevice) -> None:
        with self._lock:
            taken = name in self._files
            if not taken:
                self._files[name] = file
        if taken:
            file.close()
            raise ValueError(f"there is a file {name!r}")

    def file_open(self, name: str, device: str) -> Json:
        """Opens the file of an mdev, or of a PCI function by its address, and binds it to nothing.

        A PCI function is given to vfio-pci.
        """
        if device in self._uuids:
            sysfs = f"{MDEV_DEVICES}/{self._uuids[device]}"
        else:
            from qemu_ioasid.agent.pci import give_to_vfio

            sysfs = give_to_vfio(device)
        file = VfioDevice.open(name, sysfs)
        self._enter(name, file)
        return {"vfio": file.cdev}

    def file_keep(self, name: str, device: str) -> None:
        """Keeps a duplicate of a device's file."""
        kept = self.device(device)
        duplicate = kept.descriptor.duplicate(name)
        self._enter(name, VfioDevice(duplicate, kept.cdev, kept.iommufd))

    def file_close(self, name: str) -> None:
        """Closes a file opened or kept."""
        with self._lock:
            file = self._files.pop(name)
        file.close()

    def file_submit(self, device: str, descriptors: list[Json], seconds: float) -> list[Json]:
        """Submits a batch through a file alone, as a process does that has just been given it."""
        with Ring(self.device(device)) as ring:
            return completions(ring, descriptors, seconds)

    def iommufd_close(self, iommufd: str) -> None:
        """Closes the agent's iommufd; what is bound to it goes on."""
        self._iommufd(iommufd).close()

    def raw_bind(self, device: str, iommufd: str, argsz: int | None = None, flags: int = 0) -> Json:
        """Binds a file; the answer is the device's id in that iommufd."""
        target, space = self.device(device), self._iommufd(iommufd)
        with space.descriptor.borrowed() as fd:
            argument = uapi.vfio_device_bind_iommufd(iommufd=fd, flags=flags)
            argument.argsz = ctypes.sizeof(argument) if argsz is None else argsz
            target.descriptor.ioctl(uapi.VFIO_DEVICE_BIND_IOMMUFD, argument)
        target.iommufd = space
        return {"devid": int(argument.out_devid)}

    def raw_attach(
        self,
        device: str,
        ioas: int,
        pasid: int | None = None,
        argsz: int | None = None,
        flags: int | None = None,
        readonly: bool = False,
    ) -> Json:
        """An attach with no ledger and no check."""
        target = self.device(device).descriptor
        argument = uapi.vfio_device_attach_iommufd_pt(pt_id=ioas, pasid=pasid or 0)
        argument.argsz = ctypes.sizeof(argument) if argsz is None else argsz
        implied = 0 if pasid is None else uapi.VFIO_DEVICE_ATTACH_PASID
        argument.flags = implied if flags is None else flags
        if readonly:
            target.ioctl_on_readonly(uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument)
        else:
            target.ioctl(uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument)
        return {"pt_id": int(argument.pt_id)}

    def raw_detach(
        self,
        device: str,
        pasid: int | None = None,
        argsz: int | None = None,
        flags: int | None = None,
    ) -> None:
        """A detach with no ledger and no check."""
        argument = uapi.vfio_device_detach_iommufd_pt(pasid=pasid or 0)
        argument.argsz = ctypes.sizeof(argument) if argsz is None else argsz
        implied = 0 if pasid is None else uapi.VFIO_DEVICE_DETACH_PASID
        argument.flags = implied if flags is None else flags
        self.device(device).descriptor.ioctl(uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT, argument)

    def raw_reset(self, device: str) -> None:
        """A reset, whoever uses the device and does not know of it."""
        self.device(device).reset()

    def hwpt_alloc(self, iommufd: str, devid: int, ioas: int, flags: int = 0) -> Json:
        """A page table of an IOAS, for a physical device that is bound."""
        argument = iommufd_uapi.iommu_hwpt_alloc(dev_id=devid, pt_id=ioas, flags=flags)
        argument.size = ctypes.sizeof(argument)
        self._iommufd(iommufd).descriptor.ioctl(iommufd_uapi.IOMMU_HWPT_ALLOC, argument)
        return {"hwpt": int(argument.out_hwpt_id)}

    def fault_queue_alloc(self, iommufd: str) -> Json:
        """A fault queue, whose file is kept until the agent ends."""
        argument = iommufd_uapi.iommu_fault_alloc()
        argument.size = ctypes.sizeof(argument)
        self._iommufd(iommufd).descriptor.ioctl(iommufd_uapi.IOMMU_FAULT_QUEUE_ALLOC, argument)
        self._queues.append(int(argument.out_fault_fd))
        return {"fault_queue": int(argument.out_fault_id)}

    def file_access(
        self, device: str, like: str, region: int, how: str, offset: int = 0, length: int = 4
    ) -> Json:
        """A read, a write of zeros or a map in a region, without the ioctl that tells where it is.

        like is a bound file of a device of the same kind, which knows.
        """
        place = self.device(like).region(region)
        target = self.device(device)
        if how == "read":
            return {"hex": target.read(place, offset, length).hex()}
        if how == "write":
            target.write(place, offset, bytes(length))
            return {"hex": ""}
        with target.map(Region(region, place.flags, length, place.offset + offset)) as mapped:
            return {"hex": mapped[:].hex()}

    def raw_irqs(self, device: str, start: int, count: int) -> None:
        """Names an eventfd for each of the MSI-X vectors, and keeps those whatever comes."""
        self._events.setdefault(device, []).extend(assign(self.device(device), start, count))

    def irqs_seen(self, device: str) -> Json:
        """How often each of those was raised since it was named or read."""
        counts = []
        for event in self._events[device]:
            with event.borrowed() as fd:
                try:
                    counts.append(os.eventfd_read(fd))
                except BlockingIOError:
                    counts.append(0)
        return {"counts": counts}

    def region_pin(self, device: str, region: int) -> None:
        """Keeps hold of a region's pages, which nothing but an open file of a device may have.

        vmsplice(2) has a pipe refer to them; a close of the file does not end that.
        """
        target = self.device(device)
        reader, writer = os.pipe()
        kept = Descriptor(reader, f"pages of {device}")
        try:
            with target.map(target.region(region)) as mapped:
                vmsplice(writer, mapped)
        except BaseException:
            kept.close()
            raise
        finally:
            os.close(writer)
        self._pinned[device] = kept

    def region_pinned(self, device: str) -> Json:
        """What is in those pages now; they are let go."""
        with self._pinned.pop(device) as kept, kept.borrowed() as fd:
            found = bytearray()
            while part := os.read(fd, 1 << 16):
                found += part
        return {"hex": found.hex()}

    def misuse(self, device: str, part: str) -> Json:
        """Calls that no honest program makes, on an mdev that nobody has open; see misuse.py."""
        from qemu_ioasid.agent.misuse import answers

        return answers(f"{MDEV_DEVICES}/{self._uuids[device]}", part)

    def wait_worker(self, device: str, state: str, seconds: float) -> None:
        """Waits until a device's kernel thread is in a state as proc(5) has it.

        S: it has no work. I: it has begun a descriptor, whose PASID is being replaced.
        """
        name = f"pdma/{self._uuids[device]}"

        def reached() -> bool | None:
            return True if state in _states(name) else None

        wait_for(f"worker of {device} in state {state}", seconds, reached)

    def close(self) -> None:
        """Closes every file."""
        with ExitStack() as stack:
            for name in list(self._files):
                stack.callback(self.file_close, name)
            while self._pinned:
                stack.callback(self._pinned.popitem()[1].close)
            for event in chain.from_iterable(self._events.values()):
                stack.callback(event.close)
            self._events.clear()
            while self._queues:
                stack.callback(os.close, self._queues.pop())
