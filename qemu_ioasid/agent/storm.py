"""What a hostile guest does to its device: anything at all, as fast as it can, from a seed.

What comes next never depends on what the device does, only on the seed and the arguments: the same
ones give the same bytes, which the digest tells.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import struct
import threading
import zlib
from contextlib import ExitStack, suppress

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.libc import address_of
from qemu_ioasid.agent.uapi import pdma as uapi
from qemu_ioasid.agent.uapi import vfio as vfio_uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence
    from typing import Any

    from qemu_ioasid.agent.opendevice import OpenDevice

    Json = dict[str, Any]

ENTRIES = uapi.PDMA_RING_ENTRIES
_TOP = 1 << 64
_WORD = 1 << 32
_DESC = struct.Struct("<4I2Q")
_ENDED = struct.Struct("<2I")
#: How work ends that the device may try.
_OTHERS = (
    uapi.PDMA_COMPLETION_DONE,
    uapi.PDMA_COMPLETION_FAULT,
    uapi.PDMA_COMPLETION_DIFFERENT,
)
#: How many wrong completions are told.
_TOLD = 8
#: How many different descriptors a storm draws from.
PALETTE = 512
#: Where the device finds its own rings, where its guest can map them.
RING_IOVA = 0x7000_0000
#: What is put back behind writes to config space: the header and MSI-X
#: (include/uapi/linux/pci_regs.h, kernel-patches/ABI.md).
_HEADER, _BARS = 0x4C, range(0x10, 0x28)
KNOWN = (uapi.PDMA_OP_NOP, uapi.PDMA_OP_COPY, uapi.PDMA_OP_FILL, uapi.PDMA_OP_COMPARE)
OPCODES = (
    *KNOWN * 3,
    *(4, 31, 32, 1 << 31, _WORD - 1),
)
FLAGS = (
    *(uapi.PDMA_DESC_PASID, uapi.PDMA_DESC_PASID | uapi.PDMA_DESC_INTERRUPT) * 4,
    *(0, uapi.PDMA_DESC_INTERRUPT, 4, 8, 1 << 31, _WORD - 1),
)
PASIDS = (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 31, _WORD - 1)
LENGTHS = (0, 1, 7, 64, 4096, 65535, 65537, uapi.PDMA_MAX_LENGTH, uapi.PDMA_MAX_LENGTH + 1, 1 << 31)
#: How many of the longest copies wait while as many are worked on.
_AHEAD = 8
BATCHES = (1, 2, 7, 64, 500, ENTRIES)
#: The regions there are, by their index, and where each lies in the file.
REGIONS = {
    uapi.PDMA_REGS_BAR: uapi.PDMA_REGS_SIZE,
    uapi.PDMA_RING_BAR: uapi.PDMA_RING_SIZE,
    uapi.PDMA_MSIX_BAR: uapi.PDMA_MSIX_SIZE,
    vfio_uapi.VFIO_PCI_CONFIG_REGION_INDEX: 256,
}
_REGION_SHIFT = 40
_WIDTHS: dict[int, Any] = {
    1: ctypes.c_uint8,
    2: ctypes.c_uint16,
    4: ctypes.c_uint32,
    8: ctypes.c_uint64,
}


class Target:
    """A range that the device may use by a PASID (None: without one), or that it may not."""

    def __init__(self, pasid: int | None, iova: int, length: int) -> None:
        self.pasid = pasid
        self.iova = iova
        self.length = length

    def address(self, draw: random.Random) -> int:
        """In it, at its edges, or anywhere."""
        inside = self.iova + draw.randrange(self.length)
        edges = (self.iova - 1, self.iova + self.length - 1, self.iova + self.length)
        far = (0, _TOP - 1, _TOP - 4096, draw.getrandbits(64), draw.getrandbits(32))
        return draw.choice((inside, inside, inside, self.iova, *edges, *far)) % _TOP


def descriptor(draw: random.Random, targets: Sequence[Target]) -> bytes:
    """One that is right in some ways and wrong in others; one in ten is any bytes."""
    if not draw.randrange(10):
        return draw.randbytes(_DESC.size)
    target = draw.choice(targets)
    pasid = target.pasid
    if not draw.randrange(3):
        pasid = draw.choice((*PASIDS, draw.randrange(64), draw.getrandbits(20)))
    short, long = draw.randrange(1, 4096), draw.randrange(1, target.length)
    length = draw.choice((*LENGTHS, *(short,) * 20, long, long))
    return _DESC.pack(
        draw.choice(OPCODES),
        0 if target.pasid is None and draw.randrange(4) else draw.choice(FLAGS),
        pasid or 0,
        length,
        target.address(draw),
        target.address(draw),
    )


def verdict(record: bytes, listed: int) -> int | None:
    """How a descriptor must end on a device with one PASID in its list; None: its memory decides.

    kernel-patches/ABI.md, the checks in their order.
    """
    opcode, flags, pasid, length, src, dst = _DESC.unpack(record)
    last = max(length - 1, 0)
    sourced = opcode != uapi.PDMA_OP_FILL
    if (
        opcode not in KNOWN
        or flags & ~(uapi.PDMA_DESC_PASID | uapi.PDMA_DESC_INTERRUPT)
        or (pasid and not flags & uapi.PDMA_DESC_PASID)
        or length > uapi.PDMA_MAX_LENGTH
        or (not length and opcode != uapi.PDMA_OP_NOP)
        or (sourced and src + last >= _TOP)
        or dst + last >= _TOP
    ):
        return uapi.PDMA_COMPLETION_INVALID
    if flags & uapi.PDMA_DESC_PASID and pasid != listed:
        return uapi.PDMA_COMPLETION_REFUSED
    return uapi.PDMA_COMPLETION_DONE if opcode == uapi.PDMA_OP_NOP else None


def longest(target: Target) -> bytes:
    """A copy of all that the device takes at once, within a target that has room for it."""
    flags = 0 if target.pasid is None else uapi.PDMA_DESC_PASID
    length = min(target.length, uapi.PDMA_MAX_LENGTH)
    words = uapi.PDMA_OP_COPY, flags, target.pasid or 0, length, target.iova, target.iova
    return _DESC.pack(*words)


class Storm:
    """A storm over one open device, which nobody else uses meanwhile; run() it once.

    The first target's PASID is in the device's list, and no other one.
    """

    def __init__(
        self,
        opened: OpenDevice,
        seed: int,
        targets: Sequence[Target],
        seconds: float,
        *,
        rings: bool,
        judged: bool,
    ) -> None:
        """seconds: how long the device may take for a ring full of work.

        With rings, the device finds its own ones where work without a PASID may write them.
        Without judged, somebody else may reset the device meanwhile.
        """
        self._seconds = seconds
        self._opened = opened
        self._ring = opened.ring
        self._memory = opened.ring.memory
        self._draw = random.Random(seed)
        self._targets = list(targets)
        self._digest = 0
        self._begun = threading.Event()
        self._over = threading.Event()
        self._palette: list[bytes] = []
        self._due: dict[bytes, int | None] = {}
        self.wrong: list[Json] = []
        self.counts = dict.fromkeys(
            ("descriptors", "completions", "registers", "doorbells", "config", "resets"), 0
        )
        #: The errno of each thing that could not be done at all, by what it is.
        self.refused: dict[str, int] = {}
        self._targets.append(Target(None, RING_IOVA, uapi.PDMA_RING_SIZE))
        # Work that writes the rings leaves nothing there to judge it by.
        self._rings, self._judged = rings, judged

    def stop(self) -> None:
        """Ends it, wherever it is."""
        self._over.set()

    def wait(self, seconds: float) -> None:
        """Waits until work of it has ended. Raises TimeoutError."""
        if not self._begun.wait(seconds):
            raise TimeoutError(f"work of the storm, ended: not within {seconds:g} s")

    def run(self, operations: int | None) -> Json:
        """At least so many descriptors and accesses; None: the longest copies, until stop().

        TimeoutError when the device does not come to the end of its work.
        """
        with ExitStack() as stack:
            if self._rings:
                self._map_rings(stack)
            registers = self._map_registers(stack)
            accesses = functools.partial(self._registers, registers)
            kinds: dict[Callable[[], None], int] = {
                self._descriptors: 30,
                functools.partial(self._doorbells, 1, 2, ENTRIES): 15,
                self._completions: 8,
                self._resets: 2,
                self._config: 6,
                accesses: 40,
            }
            if registers is None:
                # The device's file itself: no machine, and no other VFIO, is between.
                kinds[self._regions] = kinds.pop(accesses)
            if operations is None:
                kinds = {self._longest: 8, self._doorbells: 1}
            else:
                self._palette = [descriptor(self._draw, self._targets) for _ in range(PALETTE)]
                listed = self._targets[0].pasid or 0
                self._due = {each: verdict(each, listed) for each in self._palette}
            try:
                while not self._over.is_set() and (
                    operations is None or sum(self.counts.values()) < operations
                ):
                    (act,) = self._draw.choices(list(kinds), list(kinds.values()))
                    act()
                self._idle()
            finally:
                self._ring.resume()
        return {
            "operations": sum(self.counts.values()),
            **self.counts,
            "wrong": self.wrong,
            "refused": self.refused,
            "digest": f"{self._digest:08x}",
        }

    def _map_rings(self, stack: ExitStack) -> None:
        try:
            self._opened.iommufd.ioas_map(
                self._opened.ioas, address_of(self._memory), uapi.PDMA_RING_SIZE, RING_IOVA
            )
        except OSError as error:
            # A guest's VFIO gives no memory of a device to DMA.
            self.refused["mapping the rings"] = error.errno or 0
            self._rings = False
            return
        stack.callback(
            self._opened.iommufd.ioas_unmap, self._opened.ioas, RING_IOVA, uapi.PDMA_RING_SIZE
        )

    def _map_registers(self, stack: ExitStack) -> mmap.mmap | None:
        region = self._opened.device.region(vfio_uapi.VFIO_PCI_BAR0_REGION_INDEX)
        if not region.flags & vfio_uapi.VFIO_REGION_INFO_FLAG_MMAP:
            return None
        return stack.enter_context(self._opened.device.map(region))

    def _note(self, kind: str, count: int, data: bytes) -> None:
        self.counts[kind] += count
        self._digest = zlib.crc32(data, self._digest)

    def _idle(self, left: int = 0) -> int:
        """Waits until all work has ended, but for so much of it; TAIL then."""

        def ended() -> int | None:
            tail = self._ring.register("TAIL")
            return tail if (tail - self._ring.register("HEAD")) % _WORD <= left else None

        return wait_for("end of the device's work", self._seconds, ended)

    def _put(self, first: int, records: Sequence[bytes]) -> None:
        """Into the ring from a slot on, around its end."""
        first %= ENTRIES
        room = ENTRIES - first
        for slot, part in ((first, records[:room]), (0, records[room:])):
            start = uapi.PDMA_DESC_OFFSET + slot * _DESC.size
            self._memory[start : start + len(part) * _DESC.size] = b"".join(part)

    def _doorbell(self, tail: int) -> None:
        self._ring.ring_doorbell(tail % _WORD)

    # --- what there is to do ------------------------------------------------------------

    def _descriptors(self) -> None:
        """A batch; every third is written over as the device works on it, the others are judged."""
        records = self._draw.choices(self._palette, k=self._draw.choice(BATCHES))
        over = self._draw.choices(self._palette, k=len(records))
        again = not self._draw.randrange(3)
        tail = self._idle()
        self._put(tail, records)
        self._doorbell(tail + len(records))
        if again:
            self._put(tail, over)
        elif self._judged and not self._rings:
            self._idle()
            self._judge(tail, records)
        self._note("descriptors", len(records), b"".join([*records, *over]))

    def _judge(self, first: int, records: Sequence[bytes]) -> None:
        """Notes what ended otherwise than the ABI has it."""
        for number, record in enumerate(records, first):
            start = uapi.PDMA_COMPLETION_OFFSET + number % ENTRIES * _DESC.size
            seq, status = _ENDED.unpack_from(self._memory, start)
            due = self._due[record]
            if seq != (number + 1) % _WORD or (
                status not in _OTHERS if due is None else status != due
            ):
                self.wrong.append({"descriptor": record.hex(), "seq": seq, "status": status})
        del self.wrong[_TOLD:]

    def _longest(self) -> None:
        """Never nothing to do for the device, and each piece as long as can be."""
        records = [longest(self._targets[0])] * _AHEAD
        tail = self._idle(_AHEAD)
        if self.counts["descriptors"] > _AHEAD:
            self._begun.set()
        self._put(tail, records)
        self._doorbell(tail + len(records))
        self._note("descriptors", len(records), b"")

    def _doorbells(self, *more: int) -> None:
        """Back and too far; or so far as one of more; and again."""
        tail = self._ring.register("TAIL")
        any_step = (0, -1, ENTRIES + 1, 1 << 31, self._draw.getrandbits(31) + ENTRIES, *more)
        steps = [self._draw.choice(any_step) for _ in range(self._draw.randrange(1, 64))]
        for step in steps:
            self._doorbell(tail + step)
        self._note("doorbells", len(steps), repr(steps).encode())

    def _completions(self) -> None:
        """Descriptors over the records that the device writes meanwhile."""
        records = self._draw.choices(self._palette, k=64)
        start = uapi.PDMA_COMPLETION_OFFSET + self._draw.randrange(ENTRIES - 64) * _DESC.size
        self._memory[start : start + 64 * _DESC.size] = b"".join(records)
        self._note("completions", 64, b"".join(records))

    def _registers(self, mapped: mmap.mmap | None) -> None:
        """Reads and writes of BAR0 of every size, at every alignment."""
        accesses = [
            (
                width := self._draw.choice(tuple(_WIDTHS)),
                self._draw.randrange(uapi.PDMA_REGS_SIZE - width),
                self._draw.getrandbits(8 * width) if self._draw.randrange(2) else None,
            )
            for _ in range(self._draw.randrange(1, 64))
        ]
        for width, offset, value in accesses if mapped is not None else ():
            # one instruction: what the machine makes of a copy is its own affair
            cell = _WIDTHS[width].from_address(address_of(mapped) + offset)
            if value is None:
                _ = cell.value
            else:
                cell.value = value
        self._note("registers", len(accesses), repr(accesses).encode())

    def _regions(self) -> None:
        """Reads and writes of every region, in it, across its end and past it."""
        accesses = []
        for _ in range(self._draw.randrange(1, 64)):
            index = self._draw.choice((0, 0, 0, *range(10)))
            size = REGIONS.get(index, 4096)
            count = self._draw.choice(
                (1, 2, 3, 4, 4, 4, 8, 16, size, self._draw.randrange(1, size))
            )
            offset = self._draw.choice(
                (
                    4 * self._draw.randrange(size // 4),
                    self._draw.randrange(size),
                    size - count,
                    size,
                )
            )
            write = self._draw.randrange(2)
            accesses.append((index, offset, count, write))
            data = self._draw.randbytes(count)
            try:
                with self._opened.device.descriptor.borrowed() as fd:
                    at = (index << _REGION_SHIFT) + max(0, offset)
                    done = os.pwrite(fd, data, at) if write else len(os.pread(fd, count, at))
            except OSError:
                done = 0
            if done != (count if self._may(index, max(0, offset), count) else 0):
                self.wrong.append({"access": accesses[-1], "done": done})
        del self.wrong[_TOLD:]
        self._ring.enable()
        self._note("registers", len(accesses), repr(accesses).encode())

    @staticmethod
    def _may(index: int, offset: int, count: int) -> bool:
        """Whether the device takes an access: kernel-patches/ABI.md, the regions."""
        inside = offset + count <= REGIONS.get(index, 0)
        return inside and (index != uapi.PDMA_REGS_BAR or (count == 4 and offset % 4 == 0))

    def _config(self) -> None:
        """Config space, past VFIO where the machine lets us; the header is put back."""
        accesses = [
            (
                width := self._draw.choice((1, 2, 4)),
                self._draw.randrange(0, 256, width),
                self._draw.getrandbits(8 * width),
            )
            for _ in range(self._draw.randrange(1, 12))
        ]
        path = f"/sys/class/vfio-dev/{self._opened.device.cdev}/device/config"
        with ExitStack() as stack:
            fd = -1
            with suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                stack.callback(_write_header, fd, os.pread(fd, _HEADER, 0))
            for width, offset, value in accesses:
                data = value.to_bytes(width, "little")
                if offset in _BARS:
                    # sized, and not moved: what it would cover is the guest's own machine
                    offset, data = offset & ~3, b"\xff" * 4
                region = self._opened.device.region(vfio_uapi.VFIO_PCI_CONFIG_REGION_INDEX)
                with suppress(OSError):
                    self._opened.device.write(region, offset, data)
                if fd >= 0:
                    os.pwrite(fd, data, offset)
        self._ring.enable()
        self._note("config", len(accesses), repr(accesses).encode())

    def _resets(self) -> None:
        """A reset in the middle of whatever is under way."""
        if "reset" not in self.refused:
            try:
                self._opened.device.reset()
            except OSError as error:
                self.refused["reset"] = error.errno or 0
            self._ring.enable()
        self._note("resets", 1, b"reset")


def _write_header(fd: int, header: bytes) -> None:
    # A machine whose device moves takes long to think it over: what is right stays.
    found = os.pread(fd, len(header), 0)
    for offset in range(0, len(header), 4):
        word = header[offset : offset + 4]
        if found[offset : offset + 4] != word:
            os.pwrite(fd, word, offset)
