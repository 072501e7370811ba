# SPDX-License-Identifier: GPL-2.0-or-later
"""The walker on tables laid out by hand; on a guest's real ones it runs in every isolation run."""

from __future__ import annotations

import struct

import pytest

from qemu_ioasid import vtd

ROOT, CONTEXT, DIRECTORY, TABLE, PAGES = 0x1000, 0x2000, 0x3000, 0x4000, 0x10000
BDF = "0000:00:10.0"
DEVFN = 0x80


class Memory:
    """Physical memory of the test's making, in 64-bit words."""

    def __init__(self) -> None:
        self.bytes = bytearray(0x20000)

    def write(self, address: int, *words: int) -> None:
        """Store *words* from *address* on."""
        struct.pack_into(f"<{len(words)}Q", self.bytes, address, *words)

    def read(self, address: int, count: int) -> list[int]:
        """As `vtd.Read`."""
        return list(struct.unpack_from(f"<{count}Q", self.bytes, address))


@pytest.fixture
def memory() -> Memory:
    """Tables for 00:10.0: PASID 0 first-stage, PASID 65 second-stage, one page at 1 GiB + 4 KiB."""
    memory = Memory()
    memory.write(ROOT, 0, CONTEXT | 1)  # devfn 0x80 is in the high half
    memory.write(CONTEXT + 32 * (DEVFN & 0x7F), DIRECTORY | 1, 0)
    memory.write(DIRECTORY, TABLE | 1, TABLE + 0x1000 | 1)
    memory.write(TABLE, 1 | 1 << 6, 7, PAGES)
    memory.write(TABLE + 0x1000 + 64, 1 | 2 << 6 | 2 << 2 | PAGES, 9, 0)
    memory.write(PAGES, PAGES + 0x1000 | 3)
    memory.write(PAGES + 0x1000 + 8, PAGES + 0x2000 | 3)
    memory.write(PAGES + 0x2000, PAGES + 0x3000 | 3, 0x40000000 | 0x80 | 3)
    memory.write(PAGES + 0x3000 + 8, 0xABC000 | 3)
    return memory


@pytest.mark.parametrize(("pasid", "pgtt"), [(None, vtd.FIRST_STAGE), (65, vtd.SECOND_STAGE)])
def test_walk(memory: Memory, pasid: int | None, pgtt: int) -> None:
    entry = vtd.pasid_entry(memory.read, ROOT, BDF, pasid)
    assert (entry.pgtt, entry.levels, entry.table) == (pgtt, 4, PAGES)
    assert vtd.translate(memory.read, entry, 0x40001234) == 0xABC234
    assert vtd.translate(memory.read, entry, 0x40234567) == 0x40034567
    with pytest.raises(vtd.NotPresent, match="level 1"):
        vtd.translate(memory.read, entry, 0x40002000)
    with pytest.raises(vtd.NotPresent, match="level 4"):
        vtd.translate(memory.read, entry, 1 << 40)


def test_what_is_not_present_is_named(memory: Memory) -> None:
    for pasid, what in ((1, "PASID entry"), (128, "PASID directory entry"), (1 << 19, "past")):
        with pytest.raises(vtd.NotPresent, match=what):
            vtd.pasid_entry(memory.read, ROOT, BDF, pasid)
    with pytest.raises(vtd.NotPresent, match="context entry"):
        vtd.pasid_entry(memory.read, ROOT, "0000:00:11.0")
    with pytest.raises(vtd.NotPresent, match="root entry"):
        vtd.pasid_entry(memory.read, ROOT, "0000:01:00.0")
