# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads a virtual VT-d from outside its VM: registers, tables, and what they translate.

An independent witness: whatever the VM's kernel claims, this is what the
hardware would walk. Layouts: Intel VT-d specification, chapters 9 (scalable
mode tables) and 11 (registers), as docs/facts.md has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import InfrastructureError
from qemu_ioasid.qmp import Qmp

#: Where QEMU's q35 has the registers (hw/i386/x86-iommu, Q35_HOST_BRIDGE_IOMMU_ADDR).
REGISTERS = 0xFED90000
#: GSTS_REG; RTADDR_REG, 64 bits, is behind it.
GSTS = 0x1C
GSTS_TES = 1 << 31
#: RTADDR_REG, Translation Table Mode.
TTM_SCALABLE = 1
_ADDRESS = 0x000F_FFFF_FFFF_F000

#: PASID entry, PGTT (9.6).
FIRST_STAGE, SECOND_STAGE, NESTED, PASS_THROUGH = 1, 2, 3, 4
PGTT_NAMES = {1: "first-stage", 2: "second-stage", 3: "nested", 4: "pass-through"}

#: Reads *count* little-endian 64-bit words of the VM's physical memory.
Read = Callable[[int, int], list[int]]


class NotPresent(Exception):
    """The walk met an entry that is not present; the message names which."""


@dataclass(frozen=True)
class Stage:
    """What the registers say: translation enabled, and the root table's mode and address."""

    enabled: bool
    scalable: bool
    root: int


@dataclass(frozen=True)
class PasidEntry:
    """One entry of a PASID table: its stage and the page table behind it."""

    pgtt: int
    levels: int
    table: int
    domain: int


def reader(monitor: Qmp) -> Read:
    """Physical memory through the monitor's ``xp``: the same at both levels, MMIO included."""

    def read(address: int, count: int) -> list[int]:
        text = monitor.monitor(
            f"xp /{count}gx {address:#x}", Deadline(10, "answer to xp from the monitor")
        )
        words = [
            int(word, 16)
            for line in text.splitlines()
            for word in re.findall(r"0x[0-9a-f]{16}\b", line.partition(":")[2])
        ]
        if len(words) != count:
            raise InfrastructureError(f"xp {address:#x}: {text.strip()!r} are not {count} words")
        return words

    return read


def stage(monitor: Qmp) -> Stage:
    """The global status and root table registers."""

    # The two registers lie side by side; QEMU's xp reads them 4 bytes at a time.
    text = monitor.monitor(
        f"xp /3wx {REGISTERS + GSTS:#x}", Deadline(10, "answer to xp from the monitor")
    )
    words = [int(word, 16) for word in re.findall(r"\s0x([0-9a-f]{8})\b", text)]
    if len(words) != 3:
        raise InfrastructureError(f"xp: no VT-d registers in {text.strip()!r}")
    status, low, high = words
    root = low | high << 32
    return Stage(
        enabled=bool(status & GSTS_TES),
        scalable=root >> 10 & 3 == TTM_SCALABLE,
        root=root & ~0xFFF,
    )


def pasid_entry(read: Read, root: int, bdf: str, pasid: int | None = None) -> PasidEntry:
    """Walk root, context and PASID tables for the function *bdf*.

    *pasid* None is work without one: the context entry's RID_PASID. Raises
    NotPresent.
    """
    bus, slot, function = (int(part, 16) for part in re.split("[:.]", bdf)[-3:])
    devfn = slot << 3 | function
    low, high = read(root + 16 * bus, 2)
    half = high if devfn & 0x80 else low
    if not half & 1:
        raise NotPresent(f"root entry of bus {bus:#x}")
    context = read((half & _ADDRESS) + 32 * (devfn & 0x7F), 4)
    if not context[0] & 1:
        raise NotPresent(f"context entry of {bdf}")
    if pasid is None:
        pasid = context[1] & 0xFFFFF
    if pasid >> 6 >= 1 << ((context[0] >> 9 & 7) + 7):
        raise NotPresent(f"PASID {pasid:#x}: past the directory of {bdf}")
    directory = read((context[0] & _ADDRESS) + 8 * (pasid >> 6), 1)[0]
    if not directory & 1:
        raise NotPresent(f"PASID directory entry of {pasid:#x}")
    entry = read((directory & _ADDRESS) + 64 * (pasid & 0x3F), 3)
    if not entry[0] & 1:
        raise NotPresent(f"PASID entry of {pasid:#x}")
    pgtt = entry[0] >> 6 & 7
    first = pgtt == FIRST_STAGE
    return PasidEntry(
        pgtt=pgtt,
        levels=(entry[2] >> 2 & 3) + 4 if first else (entry[0] >> 2 & 7) + 2,
        table=(entry[2] if first else entry[0]) & _ADDRESS,
        domain=entry[1] & 0xFFFF,
    )


def translate(read: Read, entry: PasidEntry, iova: int) -> int:
    """The physical address of *iova*. Raises NotPresent where a page is not mapped.

    First- and second-stage tables differ in what makes an entry present (bit 0,
    bits 1:0) and agree in the rest: 9 bits a level, bit 7 a large page.
    """
    if entry.pgtt == PASS_THROUGH:
        return iova
    if entry.pgtt not in (FIRST_STAGE, SECOND_STAGE):
        raise InfrastructureError(f"page-table type {entry.pgtt} is not walked")
    present = 1 if entry.pgtt == FIRST_STAGE else 3
    table = entry.table
    for level in range(entry.levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        word = read(table + 8 * (iova >> shift & 0x1FF), 1)[0]
        if not word & present:
            raise NotPresent(f"level {level} entry of {iova:#x}")
        if level == 1 or word & 0x80:
            mask = (1 << shift) - 1
            return (word & _ADDRESS & ~mask) | (iova & mask)
        table = word & _ADDRESS
    raise AssertionError("unreachable: level 1 returns")
