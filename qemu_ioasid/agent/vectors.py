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


class Vectors:
    """All vectors of an open, bound device. A context manager.

    Raises OSError when made, and then holds nothing.
    """

    def __init__(self, device: VfioDevice) -> None:
        self._device = device
        _, count = device.irq_info(uapi.VFIO_PCI_MSIX_IRQ_INDEX)
        with ExitStack() as opened:
            self._events = [
                opened.enter_context(
                    Descriptor(os.eventfd(0, _FLAGS), f"{device.name}: vector {n}")
                )
                for n in range(count)
            ]
            with ExitStack() as borrowed:
                fds = [borrowed.enter_context(event.borrowed()) for event in self._events]
                data = struct.pack(f"={count}i", *fds)
                self._set(uapi.VFIO_IRQ_SET_DATA_EVENTFD, count, data)
            opened.pop_all()

    def _set(self, kind: int, count: int, data: bytes = b"") -> None:
        flags = uapi.VFIO_IRQ_SET_ACTION_TRIGGER | kind
        self._device.set_irqs(uapi.VFIO_PCI_MSIX_IRQ_INDEX, flags, 0, count, data)

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
                self._set(uapi.VFIO_IRQ_SET_DATA_NONE, 0)

    def __enter__(self) -> Vectors:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
