"""PCI functions in sysfs: handing them to vfio-pci."""

from __future__ import annotations

import os
from contextlib import suppress

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.mdev import write_attribute
from qemu_ioasid.agent.vfio import PCI_DEVICES

DRIVER = "vfio-pci"
SLOTS = "/sys/bus/pci/slots"


def give_to_vfio(address: str) -> str:
    """Binds the function to vfio-pci, whoever had it; returns its sysfs folder.

    It is not reset at each open and close: behind a root port that takes seconds in a guest nested
    in TCG, and has the whole VM wait for work in flight.

    Raises FileNotFoundError (no such function), OSError (the driver did not take it).
    """
    sysfs = f"{PCI_DEVICES}/{address}"
    link = f"{sysfs}/driver"
    write_attribute(f"{sysfs}/driver_override", DRIVER)
    # where the kernel knows no way to reset it there is no such file
    with suppress(FileNotFoundError):
        write_attribute(f"{sysfs}/reset_method", "\n")
    if os.path.islink(link):
        if os.path.basename(os.readlink(link)) == DRIVER:
            return sysfs
        write_attribute(f"{link}/unbind", address)
    # bind reports the probe's errno; drivers_probe would swallow it
    write_attribute(f"/sys/bus/pci/drivers/{DRIVER}/bind", address)
    return sysfs


def wait_for_driver(address: str, seconds: float) -> None:
    """Returns when the function is there and has a driver. Raises TimeoutError.

    The link is made under the function's lock, which give_to_vfio() takes: the probe is over then.
    """
    link = f"{PCI_DEVICES}/{address}/driver"
    wait_for(f"{address} with a driver", seconds, lambda: os.path.islink(link) or None)


def switch_off(address: str) -> None:
    """Turns off the slot that the function sits in; its driver has let go when this returns.

    Raises FileNotFoundError (it is in no slot), OSError. drivers/pci/hotplug/pciehp_ctrl.c: this
    does not wait the five seconds in which a press of the button can be taken back.
    """
    # a slot's address has no function
    wanted = address.rpartition(".")[0]
    for slot in os.listdir(SLOTS):
        with open(f"{SLOTS}/{slot}/address") as file:
            if file.read().strip() == wanted:
                write_attribute(f"{SLOTS}/{slot}/power", "0")
                return
    raise FileNotFoundError(f"{address} is in no slot of {SLOTS}")
