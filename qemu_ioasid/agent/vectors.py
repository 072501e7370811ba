"""The MSI-X vectors of a device, each with an eventfd to wait on."""

from __future__ import annotations

import os
import select
import struct
from contextlib import ExitStack

from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.uapi import vfio as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_ioasid.agent.vfio import VfioDevice

_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK


def assign(device: VfioDevice, start: int, count: int) -> list[Descriptor]:
    """Names a new eventfd for each of count vectors from start on; the caller closes them.

    Raises OSError, and then leaves none.
    """
    with ExitStack() as opened:
        events = [
            opened.enter_context(Descriptor(os.eventfd(0, _FLAGS), f"{device.name}: vector {n}"))
            for n in range(start, start + count)
        ]
        with ExitStack() as borrowed:
            fds = [borrowed.enter_context(event.borrowed()) for event in events]
            device.set_irqs(
                uapi.VFIO_PCI_MSIX_IRQ_INDEX,
                uapi.VFIO_IRQ_SET_ACTION_TRIGGER | uapi.VFIO_IRQ_SET_DATA_EVENTFD,
                start,
                count,
                struct.pack(f"={count}i", *fds),
            )
        opened.pop_all()
    return events


class Vectors:
    """All vectors of an open, bound device. A context manager.

    Raises OSError when made, and then holds nothing.
    """

    def __init__(self, device: VfioDevice) -> None:
        self._device = device
        _, count = device.irq_info(uapi.VFIO_PCI_MSIX_IRQ_INDEX)
        self._events = assign(device, 0, count)

    def wait(self, vector: int, seconds: float) -> int:
        """How often the vector was raised since the last wait: at least once.

        Raises TimeoutError; OSError EBADF after close(), IndexError for a vector there is not.
        """
        event = self._events[vector]
        with event.borrowed() as fd:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                raise TimeoutError(f"{event.name}: not raised within {seconds:g} s")
            return os.eventfd_read(fd)

    def close(self) -> None:
        """Takes the eventfds away from the device, which may be closed already."""
        with ExitStack() as stack:
            for event in self._events:
                stack.callback(event.close)
            if not self._device.descriptor.closed:
                flags = uapi.VFIO_IRQ_SET_ACTION_TRIGGER | uapi.VFIO_IRQ_SET_DATA_NONE
                self._device.set_irqs(uapi.VFIO_PCI_MSIX_IRQ_INDEX, flags, 0, 0)

    def __enter__(self) -> Vectors:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
