"""PCI functions in sysfs: finding them, handing them to vfio-pci."""

from __future__ import annotations

import os

from qemu_ioasid.agent.mdev import write_attribute
from qemu_ioasid.agent.vfio import PCI_DEVICES

DRIVER = "vfio-pci"


def functions(vendor: int, device: int) -> list[str]:
    """The addresses ("0000:00:05.0") of the functions with this identity, in order."""
    found = []
    for address in sorted(os.listdir(PCI_DEVICES)):
        identity = []
        for attribute in ("vendor", "device"):
            with open(f"{PCI_DEVICES}/{address}/{attribute}") as file:
                identity.append(int(file.read(), 16))
        if identity == [vendor, device]:
            found.append(address)
    return found


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
