# SPDX-License-Identifier: GPL-2.0-or-later
"""What pdma does besides copying: fill, compare, the fault log, interrupts.

On real rigs; the memory is g1's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import CallFailed, InfrastructureError
from qemu_ioasid.hostdevice import HostDevice
from qemu_ioasid.rig import Completion, Descriptor, Guest, Rig, copy

PAGE = 4096
CHUNK = 64 * 1024
NOP, COPY, FILL, COMPARE = range(4)
#: Where the mdev finds g1's arena: to write, and only to read.
WRITABLE, READABLE = 1 << 33, 1 << 34
SIZE = 1 << 20
PATTERN = 0x8877665544332211
BYTES = PATTERN.to_bytes(8, "little")
ENTRIES = 64


def work(opcode: int, src: int, dst: int, length: int, pasid: int | None = None) -> Descriptor:
    """One descriptor."""
    return {**copy(pasid, src, dst, length), "opcode": opcode}


@pytest.fixture
def g1(shared_rig: Rig, mdev: HostDevice) -> Guest:
    """The guest whose arena is mapped into the mdev's own address space, twice."""
    guest = shared_rig.guests["g1"]
    for iova, writeable in ((WRITABLE, True), (READABLE, False)):
        shared_rig.host.agent.call(
            "ioas_map_guest",
            iommufd=mdev.iommufd,
            ioas=mdev.ioas,
            iova=iova,
            gpa=guest.gpa,
            length=SIZE,
            writeable=writeable,
            guest="g1",
        )
    guest.agent.call("watch")
    return guest


@pytest.fixture
def pasid(shared_rig: Rig, mdev: HostDevice) -> Iterator[int]:
    """A PASID of the mdev that names its own address space, too."""
    given = shared_rig.registrar.alloc("test")
    shared_rig.registrar.register(mdev.name, mdev.iommufd, given, mdev.ioas)
    yield given
    shared_rig.registrar.unregister(mdev.name, given)
    shared_rig.registrar.free(given)


def filled(length: int) -> bytes:
    """What FILL makes of so many bytes."""
    return (BYTES * (length // 8 + 1))[:length]


def outcome(done: Completion) -> tuple[Any, ...]:
    """Status, error, addr, done."""
    return done["status"], done["error"], done["addr"], done["done"]


def one(mdev: HostDevice, descriptor: Descriptor) -> tuple[Any, ...]:
    """What becomes of it."""
    return outcome(*mdev.submit(descriptor))


def unexpected(guest: Guest, *expected: tuple[int, bytes]) -> list[Any]:
    """What changed in the arena since the last call and should not have; bytes by their offset."""
    expect = [{"offset": offset, "hex": data.hex()} for offset, data in expected]
    found: list[Any] = guest.agent.call("changes", expect=expect)["unexpected"]
    return found


def log(mdev: HostDevice, rig: Rig, since: int = 0) -> dict[str, Any]:
    """The mdev's fault log."""
    told: dict[str, Any] = rig.host.agent.call("device_faults", name=mdev.name, since=since)
    return told


def test_fill(mdev: HostDevice, g1: Guest, pasid: int) -> None:
    lengths = (1, 7, 8, 9, 4099, 2 * CHUNK + 3)
    at = [(number << 18) + 0x1003 for number in range(4)]
    for group, named in ((lengths[:3], pasid), (lengths[3:], None)):
        pairs = list(zip(at, group, strict=False))
        fills = [work(FILL, PATTERN, WRITABLE + offset, size, named) for offset, size in pairs]
        done = mdev.submit(*fills)
        assert [outcome(each) for each in done] == [("DONE", 0, 0, size) for size in group]
        assert unexpected(g1, *((offset, filled(size)) for offset, size in pairs)) == []


def test_fill_stops_where_it_may_not_write(mdev: HostDevice, g1: Guest) -> None:
    assert one(mdev, work(FILL, 0, READABLE, 8)) == ("FAULT", 1, READABLE, 0)
    # src is no address: it neither wraps nor has to be mapped.
    assert one(mdev, work(FILL, (1 << 64) - 1, 8, 8)) == ("FAULT", 2, 8, 0)
    assert unexpected(g1) == []
    edge = WRITABLE + SIZE - CHUNK - 8
    assert one(mdev, work(FILL, 5, edge, 2 * CHUNK)) == ("FAULT", 2, edge + CHUNK, CHUNK)
    # The chunk that failed is there up to the edge of what is mapped.
    assert unexpected(g1, (SIZE - CHUNK - 8, (5).to_bytes(8, "little") * (CHUNK // 8 + 1))) == []


@pytest.mark.parametrize("length", [1, 4099, 2 * CHUNK + 3])
def test_compare(mdev: HostDevice, g1: Guest, pasid: int, length: int) -> None:
    """The first byte that differs is found, wherever it is; nothing is written."""
    src, at = WRITABLE + 0x1001, 0x80003
    places = sorted({0, length // 2, length - 1, min(length - 1, CHUNK)}, reverse=True)
    steps = [work(FILL, PATTERN, src, length), work(FILL, PATTERN, WRITABLE + at, length)]
    expected: list[tuple[Any, ...]] = [("DONE", 0, 0, length)] * 2
    changed = bytearray(filled(length))
    # What may only be read can be compared.
    sides = [(WRITABLE + at, None), (READABLE + at, pasid)]
    steps += [work(COMPARE, src, dst, length, named) for dst, named in sides]
    expected += [("DONE", 0, 0, length)] * 2
    for place in places:
        steps.append(work(FILL, 0, WRITABLE + at + place, 1))
        steps += [work(COMPARE, src, dst, length, named) for dst, named in sides]
        expected.append(("DONE", 0, 0, 1))
        expected += [("DIFFERENT", 0, dst + place, place) for dst, _ in sides]
        changed[place] = 0
    assert [outcome(done) for done in mdev.submit(*steps)] == expected
    assert unexpected(g1, (0x1001, filled(length)), (at, bytes(changed))) == []


def test_compare_reads_both_sides(shared_rig: Rig, mdev: HostDevice, g1: Guest) -> None:
    """Each side may fault; a chunk that differs and faults, faults; an earlier one differs."""
    nowhere, edge = 1 << 40, WRITABLE + SIZE - CHUNK
    assert one(mdev, work(COMPARE, nowhere, WRITABLE, 8)) == ("FAULT", 2, nowhere, 0)
    assert one(mdev, work(COMPARE, WRITABLE, nowhere, 8)) == ("FAULT", 2, nowhere, 0)
    accesses = [fault["access"] for fault in log(mdev, shared_rig)["faults"]]
    assert accesses == ["READ", "READ"]
    assert one(mdev, work(COMPARE, edge - 1, edge, CHUNK + 1))[0] == "DIFFERENT"
    same = ("FAULT", 2, edge + CHUNK, CHUNK)
    assert one(mdev, work(COMPARE, edge, edge, CHUNK + 1)) == same
    assert one(mdev, work(COMPARE, edge + CHUNK - 9, edge + CHUNK - 8, 9))[0] == "FAULT"
    assert unexpected(g1) == []


TOP = (1 << 64) - 1
#: What is wrong with a descriptor, alone or first of several, and the reason and address logged.
MALFORMED: dict[str, tuple[Descriptor, str, int]] = {
    "opcode": (work(4, 0, 0, 0), "OPCODE", 0),
    "opcode-largest": (work(0xFFFFFFFF, TOP, TOP, 0xFFFFFFFF), "OPCODE", 0),
    "flags": ({**work(COPY, 0, 0, 8), "flags": 4}, "FLAGS", 0),
    "flags-all": ({**work(COPY, 0, 0, 0), "flags": 0xFFFFFFFF}, "FLAGS", 0),
    "pasid": ({**work(COPY, 0, 0, 0, 9), "flags": 0}, "NO_PASID", 0),
    "pasid-nop": ({**work(NOP, 0, 0, 0, 9), "flags": 2}, "NO_PASID", 0),
    "length-0-copy": (work(COPY, TOP, TOP, 0), "LENGTH", 0),
    "length-0-fill": (work(FILL, 0, 0, 0), "LENGTH", 0),
    "length-0-compare": (work(COMPARE, 0, 0, 0), "LENGTH", 0),
    "length-over": (work(FILL, 0, TOP, (1 << 20) + 1), "LENGTH", 0),
    "wrap-src": (work(COPY, TOP, TOP, 2), "WRAP", TOP),
    "wrap-dst": (work(COMPARE, 0, TOP - 6, 8), "WRAP", TOP - 6),
    "wrap-fill": (work(FILL, TOP, TOP - 1, 3), "WRAP", TOP - 1),
    "wrap-nop": (work(NOP, TOP, 0, 2), "WRAP", TOP),
}


def test_malformed_work_is_logged(shared_rig: Rig, mdev: HostDevice) -> None:
    done = mdev.submit(*(descriptor for descriptor, *_ in MALFORMED.values()))
    told = log(mdev, shared_rig)
    assert told["count"] == len(MALFORMED)
    for number, (name, completion) in enumerate(zip(MALFORMED, done, strict=True)):
        descriptor, reason, addr = MALFORMED[name]
        assert outcome(completion) == ("INVALID", 22, addr, 0), name
        assert told["faults"][number] == {
            "seq": number + 1,
            "reason": reason,
            "access": "NONE",
            "count": number,
            "pasid": descriptor["pasid"] or 0,
            "error": 22,
            "addr": addr,
        }, name


def test_refusals_and_faults_are_logged(
    shared_rig: Rig, mdev: HostDevice, g1: Guest, pasid: int
) -> None:
    nowhere = 1 << 40
    done = mdev.submit(
        work(NOP, 0, 0, 0),
        work(NOP, 0, 0, 0, pasid + 1),
        work(COPY, WRITABLE, WRITABLE + PAGE, 8, pasid),
        work(COPY, WRITABLE, nowhere, 8, pasid),
        work(COPY, nowhere, WRITABLE, 8),
        work(COPY, WRITABLE, READABLE, 8, pasid),
        work(COMPARE, WRITABLE, WRITABLE + 1, PAGE),
        work(FILL, 0, 0, 0),
    )
    keys = ("count", "reason", "access", "pasid", "error", "addr")
    told = log(mdev, shared_rig)
    assert [tuple(fault[key] for key in keys) for fault in told["faults"]] == [
        (1, "NOT_LISTED", "NONE", pasid + 1, 13, 0),
        (3, "UNMAPPED", "WRITE", pasid, 2, nowhere),
        (4, "UNMAPPED", "READ", 0, 2, nowhere),
        (5, "NO_RIGHT", "WRITE", pasid, 1, READABLE),
        (7, "LENGTH", "NONE", 0, 22, 0),
    ]
    assert [completion["status"] for completion in done] == [
        *("DONE", "REFUSED", "DONE", "FAULT", "FAULT", "FAULT", "DIFFERENT", "INVALID")
    ]
    assert log(mdev, shared_rig, since=3)["faults"] == told["faults"][3:]
    mdev.reset()
    assert log(mdev, shared_rig) == {"count": 0, "faults": []}
    mdev.submit(work(4, 0, 0, 0))
    assert [fault["seq"] for fault in log(mdev, shared_rig)["faults"]] == [1]


def test_a_log_that_is_full_drops_the_oldest(shared_rig: Rig, mdev: HostDevice) -> None:
    mdev.submit(*[work(NOP, 0, 0, 0, 5)] * (ENTRIES + 9))
    told = log(mdev, shared_rig)
    assert told["count"] == ENTRIES + 9
    assert [fault["count"] for fault in told["faults"]] == list(range(9, ENTRIES + 9))


def test_interrupts_in_the_host_vm(shared_rig: Rig, mdev: HostDevice) -> None:
    agent = shared_rig.host.agent
    flagged, silent = {**work(NOP, 0, 0, 0), "interrupt": True}, work(NOP, 0, 0, 0)
    agent.call("irq_start", name=mdev.name)
    for _ in range(2):
        mdev.submit(silent, flagged, silent, {**work(4, 0, 0, 0), "flags": 6}, silent, flagged)
        assert agent.call("irq_wait", name=mdev.name, vector=0, seconds=10) == {"count": 3}
        assert agent.call("irq_wait", name=mdev.name, vector=1, seconds=10) == {"count": 1}
        mdev.reset()
    with pytest.raises(CallFailed, match="vector 1: not raised") as caught:
        agent.call("irq_wait", name=mdev.name, vector=1, seconds=0)
    assert caught.value.name == "ETIMEDOUT"
    agent.call("irq_stop", name=mdev.name)
    assert [done["status"] for done in mdev.submit(flagged)] == ["DONE"]
    with pytest.raises(InfrastructureError, match="not started"):
        agent.call("irq_wait", name=mdev.name, vector=0, seconds=0)


def test_interrupts_and_the_log_in_a_guest(shared_rig: Rig) -> None:
    """MSI-X through QEMU, KVM and the guest's interrupt remapping; each device its own."""
    guest = shared_rig.guests["g1"]
    for device in ("a", "b"):
        guest.agent.call("irq_start", name=device)
    for device, other in (("a", "b"), ("b", "a"), ("a", "b")):
        for descriptor, vector in (
            ({**work(NOP, 0, 0, 0), "interrupt": True}, 0),
            (work(NOP, 0, 0, 0, 5), 1),
        ):
            guest.submit(device, descriptor)
            told = guest.agent.call("irq_wait", name=device, vector=vector, seconds=10)
            assert told == {"count": 1}
        with pytest.raises(CallFailed, match="not raised"):
            guest.agent.call("irq_wait", name=other, vector=0, seconds=0)
    told = guest.agent.call("device_faults", name="a")
    assert (told["count"], [fault["reason"] for fault in told["faults"]]) == (2, ["NOT_LISTED"] * 2)
    assert {fault["pasid"] for fault in told["faults"]} == {5}
    guest.agent.call("irq_stop", name="a")
    guest.submit("a", work(NOP, 0, 0, 0, 5))
    guest.agent.call("irq_start", name="a")
    guest.submit("a", work(NOP, 0, 0, 0, 5))
    assert guest.agent.call("irq_wait", name="a", vector=1, seconds=10) == {"count": 1}


def test_work_of_one_device_does_not_hold_anothers(
    shared_rig: Rig, mdev: HostDevice, g1: Guest
) -> None:
    """A full ring of the longest work there is, and g2's in the middle of it."""
    agent = shared_rig.host.agent
    longest = work(COMPARE, WRITABLE, WRITABLE, SIZE)
    args = {"name": mdev.name, "descriptors": [longest] * 1024, "seconds": 60}
    storm = agent.start("device_submit", **args)
    while not agent.call("device_registers", name=mdev.name)["HEAD"]:
        assert not storm.ends_within(0)
    guest = shared_rig.guests["g2"]
    for _ in range(5):
        (done,) = guest.submit("c", work(NOP, 0, 0, 0))
        assert done["status"] == "DONE"
    registers = agent.call("device_registers", name=mdev.name)
    assert 0 < registers["HEAD"] < registers["TAIL"] == 1024
    mdev.reset()
    with pytest.raises(CallFailed, match="lost in a reset"):
        storm.result(Deadline(10, "end of the storm"))
