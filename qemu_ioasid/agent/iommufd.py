"""/dev/iommu: address spaces (IOAS) and what is mapped in them.

ioctls: include/uapi/linux/iommufd.h; behaviour: drivers/iommu/iommufd/ioas.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
from contextlib import suppress

from qemu_ioasid.agent.descriptor import Descriptor, words
from qemu_ioasid.agent.uapi import iommufd as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

IOMMU = "/dev/iommu"


def _map_flags(iova: int | None, writeable: bool) -> int:
    flags = uapi.IOMMU_IOAS_MAP_READABLE
    if iova is not None:
        flags |= uapi.IOMMU_IOAS_MAP_FIXED_IOVA
    if writeable:
        flags |= uapi.IOMMU_IOAS_MAP_WRITEABLE
    return flags


class Iommufd:
    """One open /dev/iommu. Closing it frees its IOASes unless a bound device still holds it.

    Every method raises OSError with the kernel's errno, and then nothing has changed.
    """

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self.name = descriptor.name
        # the IOASes made here; others may have the same iommufd and make their own
        self.spaces: set[int] = set()

    @classmethod
    def open(cls, name: str) -> Iommufd:
        """Opens /dev/iommu. The name is for messages and for the registrar's ledger."""
        return cls(Descriptor.open(IOMMU, name=name))

    def ioas_alloc(self) -> int:
        """A fresh, empty IOAS: its id, which only this iommufd understands."""
        argument = uapi.iommu_ioas_alloc(size=ctypes.sizeof(uapi.iommu_ioas_alloc))
        self.descriptor.ioctl(uapi.IOMMU_IOAS_ALLOC, argument)
        ioas = int(argument.out_ioas_id)
        self.spaces.add(ioas)
        return ioas

    def destroy(self, ident: int) -> None:
        """Destroys an object by id. EBUSY: in use. ENOENT: no such id here."""
        argument = uapi.iommu_destroy(size=ctypes.sizeof(uapi.iommu_destroy), id=ident)
        self.descriptor.ioctl(uapi.IOMMU_DESTROY, argument)
        self.spaces.discard(ident)

    def ioas_alloc_many(self, count: int) -> list[int]:
        """As many fresh IOASes."""
        record = uapi.iommu_ioas_alloc(size=ctypes.sizeof(uapi.iommu_ioas_alloc))
        argument, fields = words(record)
        ioas_at = type(record).out_ioas_id.offset // 4
        made: list[int] = []
        try:
            with self.descriptor.borrowed() as fd:
                for _ in range(count):
                    fcntl.ioctl(fd, uapi.IOMMU_IOAS_ALLOC, argument)
                    made.append(fields[ioas_at])
        except BaseException:
            self.destroy_many(made)
            raise
        self.spaces.update(made)
        return made

    def destroy_many(self, idents: Sequence[int]) -> tuple[int, OSError | None]:
        """As destroy for each, in order, until the first error: how many, and that error."""
        record = uapi.iommu_destroy(size=ctypes.sizeof(uapi.iommu_destroy))
        done, error = self.descriptor.ioctl_each(
            uapi.IOMMU_DESTROY, record, type(record).id.offset, idents
        )
        self.spaces.difference_update(idents[:done])
        return done, error

    def ioas_map(
        self, ioas: int, user_va: int, length: int, iova: int | None, writeable: bool = True
    ) -> int:
        """Maps length bytes of this process from user_va, at iova (None: the kernel chooses).

        Returns the IOVA. EEXIST: something is mapped there. EINVAL: not aligned, or reserved.
        """
        argument = uapi.iommu_ioas_map(
            size=ctypes.sizeof(uapi.iommu_ioas_map),
            flags=_map_flags(iova, writeable),
            ioas_id=ioas,
            user_va=user_va,
            length=length,
            iova=iova or 0,
        )
        self._map(uapi.IOMMU_IOAS_MAP, argument)
        return int(argument.iova)

    def ioas_map_file(
        self, ioas: int, fd: int, start: int, length: int, iova: int | None, writeable: bool = True
    ) -> int:
        """Maps length bytes of a memfd from byte start. Otherwise as ioas_map."""
        argument = uapi.iommu_ioas_map_file(
            size=ctypes.sizeof(uapi.iommu_ioas_map_file),
            flags=_map_flags(iova, writeable),
            ioas_id=ioas,
            fd=fd,
            start=start,
            length=length,
            iova=iova or 0,
        )
        self._map(uapi.IOMMU_IOAS_MAP_FILE, argument)
        return int(argument.iova)

    def _map(self, request: int, argument: uapi.iommu_ioas_map | uapi.iommu_ioas_map_file) -> None:
        try:
            self.descriptor.ioctl(request, argument)
        except OSError as error:
            # The kernel (7.2) does not take back a mapping whose IOVA it could not tell.
            if error.errno == errno.EFAULT and argument.flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA:
                with suppress(OSError):
                    self.ioas_unmap(argument.ioas_id, argument.iova, argument.length)
            raise

    def ioas_unmap(self, ioas: int, iova: int, length: int) -> int:
        """Unmaps whole former mappings inside the range; returns the bytes unmapped.

        ENOENT: nothing is mapped there, or a mapping reaches out of the range; those before that
        one are gone then.
        """
        argument = uapi.iommu_ioas_unmap(
            size=ctypes.sizeof(uapi.iommu_ioas_unmap), ioas_id=ioas, iova=iova, length=length
        )
        self.descriptor.ioctl(uapi.IOMMU_IOAS_UNMAP, argument)
        return int(argument.length)

    def close(self) -> None:
        """Closes the fd. A device bound to it keeps its address spaces alive."""
        self.descriptor.close()

    def __enter__(self) -> Iommufd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
