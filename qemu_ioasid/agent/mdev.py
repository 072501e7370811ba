"""A mediated device of the parent pdma (drivers/vfio/mdev, Documentation: vfio-mediated-device)."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from qemu_ioasid.agent.vfio import MDEV_DEVICES

PARENT = "pdma"
# The kernel puts the name of the parent device's driver before it (mdev_sysfs.c), which is not the
# name of the mdev driver and none of this module's business.
TYPE_SUFFIX = "-1"
TYPES = f"/sys/class/mdev_bus/{PARENT}/mdev_supported_types"


def write_attribute(path: str, value: str) -> None:
    """Writes a sysfs or procfs attribute in one write. Raises OSError with the kernel's errno."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def mdev_type() -> str | None:
    """The name of pdma's one type; None when the kernel has no such parent."""
    with suppress(FileNotFoundError):
        for name in os.listdir(TYPES):
            if name.endswith(TYPE_SUFFIX):
                return name
    return None


class Mdev:
    """One mdev, created by create() and gone after remove(). A context manager."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.sysfs = f"{MDEV_DEVICES}/{uuid}"

    @classmethod
    def create(cls, uuid: str) -> Mdev:
        """Creates the mdev.

        EEXIST: there is one. EINVAL: not a UUID. ENODEV: the kernel has no parent pdma.
        """
        name = mdev_type()
        if name is None:
            raise OSError(errno.ENODEV, f"no mdev parent {PARENT}")
        write_attribute(f"{TYPES}/{name}/create", uuid)
        return cls(uuid)

    @property
    def cdev(self) -> str:
        """The VFIO name, "vfioN"."""
        return os.listdir(f"{self.sysfs}/vfio-dev")[0]

    def remove(self) -> None:
        """Removes the mdev; blocks while its device file is open. Gone already: does nothing."""
        with suppress(FileNotFoundError):
            write_attribute(f"{self.sysfs}/remove", "1")

    def __enter__(self) -> Mdev:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
