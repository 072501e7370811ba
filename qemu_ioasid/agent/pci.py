"""PCI functions in sysfs: handing them to vfio-pci."""

from __future__ import annotations

import os

from qemu_ioasid.agent.mdev import write_attribute
from qemu_ioasid.agent.vfio import PCI_DEVICES

DRIVER = "vfio-pci"


def give_to_vfio(address: str) -> str:
    """Binds the function to vfio-pci, whoever had it; returns its sysfs folder.

    Raises FileNotFoundError (no such function), OSError (the driver did not take it).
    """
    sysfs = f"{PCI_DEVICES}/{address}"
    link = f"{sysfs}/driver"
    write_attribute(f"{sysfs}/driver_override", DRIVER)
    if os.path.islink(link):
        if os.path.basename(os.readlink(link)) == DRIVER:
            return sysfs
        write_attribute(f"{link}/unbind", address)
    # bind reports the probe's errno; drivers_probe would swallow it
    write_attribute(f"/sys/bus/pci/drivers/{DRIVER}/bind", address)
    return sysfs
