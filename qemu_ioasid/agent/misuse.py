"""Calls on an mdev that nobody has open, which no honest program makes, and what they answer.

An answer is "0" or the errno's name.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from contextlib import contextmanager
from functools import partial

from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.libc import address_of, called, protect
from qemu_ioasid.agent.opendevice import OpenDevice
from qemu_ioasid.agent.pdma import Descriptor
from qemu_ioasid.agent.uapi import pdma
from qemu_ioasid.agent.uapi import vfio as uapi
from qemu_ioasid.agent.uapi.mman import PROT_NONE
from qemu_ioasid.agent.vfio import VfioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Json = dict[str, Any]

PAGE = 4096
PASID = 7
TRIGGER = uapi.VFIO_IRQ_SET_ACTION_TRIGGER
EVENTFD, NONE, BOOL = (
    uapi.VFIO_IRQ_SET_DATA_EVENTFD,
    uapi.VFIO_IRQ_SET_DATA_NONE,
    uapi.VFIO_IRQ_SET_DATA_BOOL,
)
MSIX = uapi.VFIO_PCI_MSIX_IRQ_INDEX


#: Nothing of a process lies there.
NOWHERE = ctypes.c_void_p(8)


def answer(call: Callable[[], object]) -> str:
    """What the kernel answers: "0", or the errno's name."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "0"


def set_irqs(opened: OpenDevice) -> Json:
    """Each way of asking for interrupts, and whether the vectors raise the eventfds they should."""
    one, two = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        return _irqs(opened, one, two)
    finally:
        os.close(one)
        os.close(two)


def _irqs(opened: OpenDevice, one: int, two: int) -> Json:
    device = opened.device

    def ask(
        kind: int, start: int, count: int, *data: int, action: int = TRIGGER, index: int = MSIX
    ) -> str:
        packed = bytes(data) if kind == BOOL else struct.pack(f"={len(data)}i", *data)
        return answer(lambda: device.set_irqs(index, action | kind, start, count, packed))

    def raised() -> list[int]:
        counts = []
        for fd in (one, two):
            try:
                counts.append(os.eventfd_read(fd))
            except BlockingIOError:
                counts.append(0)
        return counts

    indexes = range(5)
    told = {
        "info": [device.irq_info(index) for index in indexes],
        "other indexes": [ask(NONE, 0, 0, index=index) for index in indexes if index != MSIX],
        "no such index": ask(NONE, 0, 0, index=5),
        "past the end": [ask(EVENTFD, 0, 3, one, one, one), ask(EVENTFD, 2, 0), ask(NONE, 1, 2)],
        "wrapping": ask(NONE, 1, 0xFFFFFFFF),
        "two kinds": ask(EVENTFD | NONE, 0, 1, one),
        "unknown flag": ask(NONE, 0, 1, action=TRIGGER | 1 << 6),
        "no action": ask(NONE, 0, 1, action=0),
        "mask": ask(NONE, 0, 1, action=uapi.VFIO_IRQ_SET_ACTION_MASK),
        "too short": ask(EVENTFD, 0, 2, one),
        "nothing to raise": [ask(NONE, 0, 2), raised()],
        "both": [ask(EVENTFD, 0, 2, one, two), ask(NONE, 0, 2), raised()],
        "chosen": [ask(BOOL, 0, 2, 0, 1), raised()],
        "chosen from 1 on": [ask(BOOL, 1, 1, 0), ask(BOOL, 1, 1, 1), raised()],
        "no eventfd": [ask(EVENTFD, 0, 2, two, 0), ask(EVENTFD, 0, 2, two, 999)],
        "nothing changed": [ask(NONE, 0, 1), raised()],
        "swapped": [ask(EVENTFD, 1, 1, one), ask(NONE, 1, 1), raised()],
        "one away": [ask(EVENTFD, 0, 1, -1), ask(NONE, 0, 2), raised()],
    }
    opened.ring.reset()
    told["reset"] = [ask(NONE, 0, 2), raised()]
    told["all away"] = [ask(NONE, 0, 0), ask(NONE, 0, 2), raised()]
    return told


def log_written(opened: OpenDevice) -> Json:
    """Writes to the log and to BAR4; the log of one refusal before and after, and what BAR4 has."""
    device, ring = opened.device, opened.ring
    ring.wait(ring.submit([Descriptor(pasid=PASID, opcode=pdma.PDMA_OP_NOP)]), 10)
    bar0, bar4 = device.region(0), device.region(pdma.PDMA_MSIX_BAR)
    words = range(pdma.PDMA_FAULT_OFFSET, pdma.PDMA_REGS_SIZE, 4)
    before = [device.read(bar0, at, 4) for at in words]
    for at in (*words, pdma.PDMA_REG_FAULT_COUNT, pdma.PDMA_REG_FAULT_ENTRIES):
        device.write(bar0, at, b"\xff\xff\xff\xff")
    device.write(bar4, 1, b"\xff" * (PAGE - 1))
    return {
        "logged": ring.register("FAULT_COUNT"),
        "same": [device.read(bar0, at, 4) for at in words] == before,
        "bar4": [bar4.size, bar4.flags, device.read(bar4, 0, PAGE) == bytes(PAGE)],
        "outside": answer(lambda: device.write(bar4, 1, bytes(PAGE))),
    }


def requests(fd: int) -> dict[str, list[str | int]]:
    """By ioctl: its argument nowhere, of size 0, of an index that there is not."""
    told = {}
    for name, argument in {
        "INFO": uapi.vfio_device_info(argsz=0),
        "REGION_INFO": uapi.vfio_region_info(index=9),
        "IRQ_INFO": uapi.vfio_irq_info(index=5),
        "SET_IRQS": uapi.vfio_irq_set(index=MSIX, flags=TRIGGER | EVENTFD, count=1),
    }.items():
        request = ctypes.c_ulong(
            getattr(uapi, f"VFIO_DEVICE_{'' if name == 'SET_IRQS' else 'GET_'}{name}")
        )
        answers = [called("ioctl", fd, request, NOWHERE)]
        answers.append(called("ioctl", fd, request, ctypes.byref(argument)))
        # What SET_IRQS says is behind it lies past the end of the page, where nothing is.
        argument.argsz = ctypes.sizeof(argument) + 4 * (name == "SET_IRQS")
        with page_end() as end:
            place = end - ctypes.sizeof(argument)
            ctypes.memmove(place, ctypes.byref(argument), ctypes.sizeof(argument))
            answers.append(called("ioctl", fd, request, ctypes.c_void_p(place)))
        told[name] = answers
    return told


def regions(opened: OpenDevice) -> Json:
    """What the device tells of itself, and of accesses at the edge of what it has."""
    device = opened.device
    found = [device.region(index) for index in range(9)]
    bar0, bar2, bar4, config = (found[index] for index in (0, 2, 4, 7))
    words = range(0, 0x30, 4)

    def registers() -> list[int]:
        return [int.from_bytes(device.read(bar0, at, 4), "little") for at in words]

    device.reset()
    told: Json = {
        "info": list(device.info()),
        "regions": [[region.size, region.flags] for region in found],
        "at": [region.offset for region in found],
        "registers": registers(),
        "config": device.read(config, 0, 256).hex(),
    }
    for at in words:
        if at != pdma.PDMA_REG_TAIL:
            device.write(bar0, at, b"\xff" * 4)
    told["written"] = registers()
    device.write(config, 0, b"\xff" * 256)
    told["config set"] = device.read(config, 0, 256).hex()
    device.reset()
    for at in range(256):
        device.write(config, at, b"\xff")
    told["config set by bytes"] = device.read(config, 0, 256).hex()
    device.reset()
    told["config after a reset"] = device.read(config, 0, 256).hex()
    told["sizes"] = [
        answer(partial(device.read, bar0, at, size))
        for at, size in ((0, 1), (0, 2), (0, 8), (2, 4))
    ] + [answer(partial(device.write, bar0, pdma.PDMA_REG_TAIL, b"\0"))]
    there = {region.index for region in (bar0, bar2, bar4, config)}
    edges = []
    for region in found:
        for over in (4, 0) if region.index in there else (0,):
            at, size = region.size - over, 4 + over
            edges.append(answer(partial(device.read, region, at, size)))
            edges.append(answer(partial(device.write, region, at, bytes(size))))
    told["past"] = edges
    return told


@contextmanager
def page_end() -> Iterator[int]:
    """The end of a page that has nothing behind it that can be read."""
    with mmap.mmap(-1, 2 * PAGE) as memory:
        end = address_of(memory) + PAGE
        protect(end, PAGE, PROT_NONE)
        yield end


def misused(opened: OpenDevice) -> Json:
    """The calls on the device's file that no driver makes."""
    device = opened.device
    bar0, bar2 = device.region(0), device.region(2)
    told: Json = {}
    with device.descriptor.borrowed() as fd:
        offset = ctypes.c_long(bar0.offset)
        told["nothing"] = [
            called(name, fd, NOWHERE, ctypes.c_size_t(0), offset) for name in ("pread", "pwrite")
        ]
        told["nowhere"] = called("pwrite", fd, NOWHERE, ctypes.c_size_t(4), offset)
        told["mmap"] = [
            answer(partial(mmap.mmap, fd, PAGE, flags, offset=region.offset))
            for region, flags in (
                (bar0, mmap.MAP_SHARED),
                (bar2, mmap.MAP_PRIVATE),
                (bar2, mmap.MAP_SHARED),
            )
        ]
        told["unknown"] = called("ioctl", fd, ctypes.c_ulong(uapi.VFIO_DEVICE_GET_INFO + 100), 0)
        told.update(requests(fd))
    return told


def bind(sysfs: str) -> Json:
    """A file that is bound only where the kernel says so."""
    kind = uapi.vfio_device_bind_iommufd
    with (
        Iommufd.open("device") as iommufd,
        VfioDevice.open("device", sysfs) as device,
        iommufd.descriptor.borrowed() as fd,
    ):

        def ask(call: Callable[[int, ctypes.Structure], object], flags: int = 0) -> str:
            argument = kind(argsz=ctypes.sizeof(kind), flags=flags, iommufd=fd)
            return answer(lambda: call(uapi.VFIO_DEVICE_BIND_IOMMUFD, argument))

        return {
            # pdma knows nothing of tokens.
            "with a token": ask(device.descriptor.ioctl, uapi.VFIO_DEVICE_BIND_FLAG_TOKEN),
            "unwritable": ask(device.descriptor.ioctl_on_readonly),
            "unbound": answer(lambda: device.attach(iommufd.ioas_alloc())),
            "bound": ask(device.descriptor.ioctl),
            "again": ask(device.descriptor.ioctl),
        }


PARTS = {"irqs": set_irqs, "log": log_written, "misused": misused, "regions": regions}


def answers(sysfs: str, part: str) -> Json:
    """What the mdev of a sysfs folder answers to these calls: bind, or one of PARTS.

    Raises OSError when it cannot be opened.
    """
    if part == "bind":
        return bind(sysfs)
    with OpenDevice("misused", sysfs, "misused") as opened:
        return PARTS[part](opened)
