"""A VFIO device opened by its character device (/dev/vfio/devices/vfioN).

ioctls: include/uapi/linux/vfio.h; behaviour: drivers/vfio/device_cdev.c, vfio_main.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from qemu_ioasid.agent.descriptor import Descriptor, words
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.uapi import vfio as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MDEV_DEVICES = "/sys/bus/mdev/devices"
PCI_DEVICES = "/sys/bus/pci/devices"


class Region:
    """One region of a device: sizes and offsets in bytes, flags VFIO_REGION_INFO_FLAG_*."""

    __slots__ = ("flags", "index", "offset", "size")

    def __init__(self, index: int, flags: int, size: int, offset: int) -> None:
        self.index = index
        self.flags = flags
        self.size = size
        self.offset = offset


class VfioDevice:
    """One open device file. Its PASID list dies with the last close of the file.

    iommufd is the one the device is, or is going to be, bound to: bind() sets it, and whoever hands
    the fd to a VMM to bind says so at construction.

    Every method raises OSError with the kernel's errno, and then nothing has changed.
    """

    def __init__(self, descriptor: Descriptor, cdev: str, iommufd: Iommufd | None = None) -> None:
        """cdev is "vfioN". Takes over the descriptor."""
        self.descriptor = descriptor
        self.name = descriptor.name
        self.cdev = cdev
        self.iommufd = iommufd

    @classmethod
    def open(cls, name: str, sysfs: str, iommufd: Iommufd | None = None) -> VfioDevice:
        """Opens the device of a sysfs folder (MDEV_DEVICES/UUID, PCI_DEVICES/BDF).

        Raises FileNotFoundError when no VFIO driver has it, OSError.
        """
        cdev = os.listdir(f"{sysfs}/vfio-dev")[0]
        return cls(Descriptor.open(f"/dev/vfio/devices/{cdev}", name=name), cdev, iommufd)

    def bind(self, iommufd: Iommufd) -> int:
        """Binds to an iommufd for the life of this file; returns the device id in that iommufd.

        EINVAL: bound already. EBUSY: another file of the device is bound.
        """
        with iommufd.descriptor.borrowed() as fd:
            argument = uapi.vfio_device_bind_iommufd(
                argsz=ctypes.sizeof(uapi.vfio_device_bind_iommufd), iommufd=fd
            )
            self.descriptor.ioctl(uapi.VFIO_DEVICE_BIND_IOMMUFD, argument)
        self.iommufd = iommufd
        return int(argument.out_devid)

    def attach(self, pt_id: int) -> int:
        """The device's own address space (work without a PASID) becomes pt_id. Returns pt_id."""
        return self._attach(pt_id, 0, 0)

    def attach_pasid(self, pasid: int, pt_id: int) -> int:
        """The device's list gets pasid, naming pt_id; for a PASID it has, pt_id replaces the old.

        ENOENT: no such IOAS in the bound iommufd. EBUSY: the parent has the PASID for another
        address space. EOPNOTSUPP: the driver takes no PASIDs. Blocks while old work drains.
        """
        return self._attach(pt_id, uapi.VFIO_DEVICE_ATTACH_PASID, pasid)

    def _attach(self, pt_id: int, flags: int, pasid: int) -> int:
        argument = uapi.vfio_device_attach_iommufd_pt(
            argsz=ctypes.sizeof(uapi.vfio_device_attach_iommufd_pt),
            flags=flags,
            pt_id=pt_id,
            pasid=pasid,
        )
        self.descriptor.ioctl(uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument)
        return int(argument.pt_id)

    def attach_pasids(
        self, pasids: Sequence[int], pt_ids: Sequence[int]
    ) -> tuple[int, OSError | None]:
        """As attach_pasid for each, in order, until the first error: how many, and that error."""
        record = uapi.vfio_device_attach_iommufd_pt(
            argsz=ctypes.sizeof(uapi.vfio_device_attach_iommufd_pt),
            flags=uapi.VFIO_DEVICE_ATTACH_PASID,
        )
        argument, fields = words(record)
        pasid_at, pt_id_at = type(record).pasid.offset // 4, type(record).pt_id.offset // 4
        call, request, done = fcntl.ioctl, uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, 0
        try:
            with self.descriptor.borrowed() as fd:
                for pasid, pt_id in zip(pasids, pt_ids, strict=True):
                    fields[pasid_at] = pasid
                    # The kernel writes it: the page table it chose for an IOAS.
                    fields[pt_id_at] = pt_id
                    call(fd, request, argument)
                    done += 1
        except OSError as error:
            return done, error
        return done, None

    def detach(self) -> None:
        """Work without a PASID has no address space from here on."""
        self._detach(0, 0)

    def detach_pasid(self, pasid: int) -> None:
        """pasid leaves the device's list. Returns when nothing in flight can use it any more.

        The kernel answers 0 for a PASID that is not in the list, too.
        """
        self._detach(uapi.VFIO_DEVICE_DETACH_PASID, pasid)

    def detach_pasids(self, pasids: Sequence[int]) -> tuple[int, OSError | None]:
        """As detach_pasid for each, in order, until the first error: how many, and that error."""
        record = uapi.vfio_device_detach_iommufd_pt(
            argsz=ctypes.sizeof(uapi.vfio_device_detach_iommufd_pt),
            flags=uapi.VFIO_DEVICE_DETACH_PASID,
        )
        return self.descriptor.ioctl_each(
            uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT, record, type(record).pasid.offset, pasids
        )

    def _detach(self, flags: int, pasid: int) -> None:
        argument = uapi.vfio_device_detach_iommufd_pt(
            argsz=ctypes.sizeof(uapi.vfio_device_detach_iommufd_pt), flags=flags, pasid=pasid
        )
        self.descriptor.ioctl(uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT, argument)

    def info(self) -> tuple[int, int, int]:
        """(VFIO_DEVICE_FLAGS_*, number of regions, number of interrupt indexes)."""
        argument = uapi.vfio_device_info(argsz=ctypes.sizeof(uapi.vfio_device_info))
        self.descriptor.ioctl(uapi.VFIO_DEVICE_GET_INFO, argument)
        return int(argument.flags), int(argument.num_regions), int(argument.num_irqs)

    def region(self, index: int) -> Region:
        """Where a region (VFIO_PCI_*_REGION_INDEX) lies in the file. Size 0: not implemented."""
        argument = uapi.vfio_region_info(argsz=ctypes.sizeof(uapi.vfio_region_info), index=index)
        self.descriptor.ioctl(uapi.VFIO_DEVICE_GET_REGION_INFO, argument)
        return Region(index, int(argument.flags), int(argument.size), int(argument.offset))

    def irq_info(self, index: int) -> tuple[int, int]:
        """(VFIO_IRQ_INFO_*, number of vectors) of an interrupt index."""
        argument = uapi.vfio_irq_info(argsz=ctypes.sizeof(uapi.vfio_irq_info), index=index)
        self.descriptor.ioctl(uapi.VFIO_DEVICE_GET_IRQ_INFO, argument)
        return int(argument.flags), int(argument.count)

    def set_irqs(self, index: int, flags: int, start: int, count: int, data: bytes = b"") -> None:
        """VFIO_DEVICE_SET_IRQS. data is what the VFIO_IRQ_SET_DATA_* of flags says, per vector."""
        header = uapi.vfio_irq_set(
            argsz=ctypes.sizeof(uapi.vfio_irq_set) + len(data),
            flags=flags,
            index=index,
            start=start,
            count=count,
        )
        with self.descriptor.borrowed() as fd:
            fcntl.ioctl(fd, uapi.VFIO_DEVICE_SET_IRQS, bytes(header) + data)

    def read(self, region: Region, offset: int, length: int) -> bytes:
        """Bytes of a region; may be shorter than length."""
        with self.descriptor.borrowed() as fd:
            return os.pread(fd, length, region.offset + offset)

    def write(self, region: Region, offset: int, data: bytes) -> None:
        """Writes to a region in one call. OSError EIO when the device took only a part."""
        with self.descriptor.borrowed() as fd:
            if os.pwrite(fd, data, region.offset + offset) != len(data):
                raise OSError(5, f"{self.name}: short write to region {region.index}")

    def map(self, region: Region) -> mmap.mmap:
        """Maps a whole region, shared, for reading and writing. The caller closes the mmap.

        The mapping keeps the device file open past close().
        """
        with self.descriptor.borrowed() as fd:
            return mmap.mmap(
                fd,
                region.size,
                mmap.MAP_SHARED,
                mmap.PROT_READ | mmap.PROT_WRITE,
                offset=region.offset,
            )

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: work is cancelled, registers start over, the PASID list stays."""
        self.descriptor.ioctl(uapi.VFIO_DEVICE_RESET)

    def close(self) -> None:
        """Closes the file (after calls in progress). The last close empties the PASID list."""
        self.descriptor.close()

    def __enter__(self) -> VfioDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
