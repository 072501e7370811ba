# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device says of itself: its regions, registers and config space, and who may touch what."""

from __future__ import annotations

from qemu_ioasid.scenarios.abi.calls import answers
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.flight.ground import Flight
from qemu_ioasid.scenarios.table import Table

TABLE = Table()
_CHECK = TABLE.phase("what a device says of itself")

#: VFIO_REGION_INFO_FLAG_READ, _WRITE and _MMAP (include/uapi/linux/vfio.h).
READ, WRITE, MMAP = 1, 2, 4
NONE = [0, 0]
#: By index: size and flags.
REGIONS = [
    [0x1000, READ | WRITE],
    NONE,
    [0x10000, READ | WRITE | MMAP],
    NONE,
    [0x1000, READ | WRITE],
    NONE,
    NONE,
    [0x100, READ | WRITE],
    NONE,
]
#: MAGIC to FAULT_ENTRIES, and what is behind them.
REGISTERS = [0x414D4450, 2, 1024, 1 << 20, 20, 15, 64, 0, 0, 0, 0, 0]


def _config(writable: bool) -> bytes:
    """The config space as it is at first, or with all that can be set."""
    space = bytearray(256)
    words = {0x00: 0x70D11234, 0x04: 0x00100000, 0x08: 0x08800001, 0x2C: 0x70D11234}
    words |= {0x34: 0x40, 0x40: 0x00010011, 0x44: 4, 0x48: 0x804}
    if writable:
        # command, cache line size, the BARs, interrupt line
        more = {0x04: 0x0546, 0x0C: 0xFF, 0x3C: 0xFF}
        more |= {0x10: 0xFFFFF000, 0x18: 0xFFFF0000, 0x20: 0xFFFFF000}
        words = {at: words.get(at, 0) | more.get(at, 0) for at in {*words, *more}}
    for at, word in words.items():
        space[at : at + 4] = word.to_bytes(4, "little")
    return bytes(space)


@_CHECK("regions", "ask for all there is to know, and read and write all of it and more")
def regions(flight: Flight, trial: Trial) -> None:
    """ABI.md, "The mdev" and "BAR0"."""
    expected = {
        "info": [3, 9, 5],
        "regions": REGIONS,
        "at": [index << 40 for index in range(9)],
        "registers": REGISTERS,
        "written": REGISTERS,
        "config": _config(False).hex(),
        "config set": _config(True).hex(),
        "config set by bytes": _config(True).hex(),
        "config after a reset": _config(False).hex(),
        # BAR0 takes 4 bytes at a multiple of 4
        "sizes": ["EINVAL"] * 5,
        # at the end and past it, each of those there are, and those that there are not
        "past": ["EINVAL"] * 2 * (4 * 2 + 5),
    }
    answers(flight, trial, "regions", expected)
