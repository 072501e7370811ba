"""PCI functions in sysfs: handing them to vfio-pci."""

from __future__ import annotations

import errno
import os
import select
import threading
from contextlib import suppress

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.mdev import write_attribute
from qemu_ioasid.agent.uapi import vfio as uapi
from qemu_ioasid.agent.vfio import PCI_DEVICES, VfioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DRIVER = "vfio-pci"
SLOTS = "/sys/bus/pci/slots"


def give_to_vfio(address: str) -> str:
    """Binds the function to vfio-pci, whoever had it; returns its sysfs folder.

    It is not reset at each open: behind a root port that takes seconds in a guest nested in TCG.

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
                try:
                    write_attribute(f"{SLOTS}/{slot}/power", "0")
                except OSError as error:
                    # it is off, or on its way there: the five seconds were over
                    if error.errno != errno.ENODEV:
                        raise
                return
    raise FileNotFoundError(f"{address} is in no slot of {SLOTS}")


def eject(address: str, device: VfioDevice, let_go: Callable[[], None], seconds: float) -> None:
    """As switch_off(), for a function that is open as device; let_go closes it.

    It does so when the kernel asks for it (VFIO_PCI_REQ_IRQ_INDEX), and not before: vfio-pci resets
    the bus of a device that is closed, unless it is being removed, which takes seconds in a guest
    nested in TCG. Raises as switch_off(), TimeoutError.
    """
    asked = os.eventfd(0, os.EFD_CLOEXEC)
    failed: list[OSError] = []

    def turn_off() -> None:
        try:
            switch_off(address)
        except OSError as error:
            failed.append(error)
            os.eventfd_write(asked, 1)

    flags = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
    data = asked.to_bytes(4, "little")
    device.set_irqs(uapi.VFIO_PCI_REQ_IRQ_INDEX, flags, 0, 1, data)
    thread = threading.Thread(target=turn_off, daemon=True)
    thread.start()
    poll = select.poll()
    poll.register(asked, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise TimeoutError(f"{address} asked for by the kernel: not within {seconds:g} s")
    if not failed:
        let_go()
        thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{address} removed by the kernel: not within {seconds:g} s")
    os.close(asked)
    if failed:
        raise failed[0]
