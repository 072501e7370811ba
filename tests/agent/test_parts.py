"""The small parts: watch, parsing, descriptors, waits."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading

import pytest

from qemu_ioasid.agent import deadline, kernellist, tracing
from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.watch import JOIN, PAGE, Watch, differing


def naive(old: bytes, new: bytes) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for at, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after:
            continue
        if ranges and at - sum(ranges[-1]) < JOIN:
            ranges[-1] = (ranges[-1][0], at + 1 - ranges[-1][0])
        else:
            ranges.append((at, 1))
    return ranges


@pytest.mark.parametrize("seed", range(20))
def test_differing_finds_what_a_byte_by_byte_look_finds(seed: int) -> None:
    dice = random.Random(seed)
    old = bytearray(dice.randbytes(3 * PAGE + 100))
    new = bytearray(old)
    for _ in range(dice.randrange(6)):
        start = dice.choice([0, PAGE - 8, dice.randrange(len(old)), len(old) - 5])
        length = min(dice.choice([1, 3, 64, PAGE]), len(old) - start)
        new[start : start + length] = dice.randbytes(length)
    with mmap.mmap(-1, 4 * PAGE) as memory:
        memory[: len(old)] = old
        watch = Watch(memory, 0, len(old))
        memory[: len(new)] = new
        seen = [(int(each["offset"]), int(each["length"])) for each in watch.changes()["changed"]]
        assert watch.first(len(new)) == new
    assert seen == naive(bytes(old), bytes(new))
    whole: list[tuple[int, int]] = []
    differing(bytes(old), bytes(new), 0, whole)
    assert whole == seen


def _differing(old: bytes, new: bytes) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for page in range(0, len(old), PAGE):
        differing(old[page : page + PAGE], new[page : page + PAGE], page, ranges)
    return ranges


def test_differing_joins_across_pages_and_small_gaps_only() -> None:
    old, new = bytes(3 * PAGE), bytearray(3 * PAGE)
    new[PAGE - 4 : PAGE + 4] = b"x" * 8
    new[100] = new[100 + JOIN] = new[200] = new[200 + JOIN + 1] = 1
    assert _differing(old, bytes(new)) == [
        (100, JOIN + 1),
        (200, 1),
        (200 + JOIN + 1, 1),
        (PAGE - 4, 8),
    ]
    assert _differing(old, old) == []


def test_watch_tells_expected_from_unexpected() -> None:
    with mmap.mmap(-1, 16 * PAGE) as memory:
        # No byte of it is zero: one that is copied onto zeroes does not show as a change.
        memory[PAGE : 2 * PAGE] = bytes(1 + at % 255 for at in range(PAGE))
        watch = Watch(memory, PAGE, 8 * PAGE)
        data = memory[PAGE : PAGE + 200]
        memory[3 * PAGE : 3 * PAGE + 200] = data
        memory[0] = 1
        copied: dict[str, int | str] = {"offset": 2 * PAGE, "length": 200, "source": 0}
        seen = watch.changes([copied])
        assert seen["unexpected"] == []
        assert seen["changed"] == [{"offset": 2 * PAGE, "length": 200, "hex": data[:64].hex()}]
        written: dict[str, int | str] = {"offset": 2 * PAGE, "hex": data.hex()}
        assert watch.changes([written]) == {"changed": [], "unexpected": []}
        memory[5 * PAGE] ^= 0xFF
        assert [r["offset"] for r in watch.changes([copied])["unexpected"]] == [4 * PAGE]
        assert watch.changes() == {"changed": [], "unexpected": []}


def test_an_expected_copy_that_did_not_happen_is_unexpected() -> None:
    with mmap.mmap(-1, 4 * PAGE) as memory:
        memory[:100] = b"x" * 100
        watch = Watch(memory, 0, 4 * PAGE)
        seen = watch.changes([{"offset": PAGE, "length": 100, "source": 0}])
        assert seen["changed"] == []
        assert [(r["offset"], r["length"]) for r in seen["unexpected"]] == [(PAGE, 100)]


@pytest.mark.parametrize(
    "item",
    [
        {"offset": PAGE, "hex": "00"},
        {"offset": -1, "hex": "00"},
        {"offset": 0, "length": 2, "source": PAGE - 1},
    ],
)
def test_an_expectation_outside_the_range_is_refused(item: dict[str, int | str]) -> None:
    with mmap.mmap(-1, 2 * PAGE) as memory, pytest.raises(ValueError, match="outside"):
        Watch(memory, 0, PAGE).changes([item])


def test_a_watch_outside_the_memory_is_refused() -> None:
    with mmap.mmap(-1, PAGE) as memory, pytest.raises(ValueError, match="outside"):
        Watch(memory, 1, PAGE)


def test_kernel_list_is_read_by_its_header() -> None:
    text = "pasid ioas inflight state\n5 2 0 open\n0x10 3 1 paused\n"
    assert kernellist.parse(text) == [
        {"pasid": 5, "ioas": 2, "inflight": 0, "state": "open"},
        {"pasid": 16, "ioas": 3, "inflight": 1, "state": "paused"},
    ]
    assert kernellist.parse("# pasid ioas\n") == []


@pytest.mark.parametrize("text", ["", "pasid ioas\n5\n", "pasid ioas\n5 6 7\n"])
def test_a_list_that_does_not_fit_its_header_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="header"):
        kernellist.parse(text)


TRACE = """\
# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
    kworker/u4:1-35      [000] .....    12.3: acc_1: (iommufd_access_rw+0x4/0x250) \
iova=0x1000 length=64 flags=0x2 access=0xffff888101
 pdma acc_1: x-36        [001] .....    12.4: acc_1: (iommufd_access_rw+0x4/0x250) \
iova=0x100002000 length=4096 flags=0x3 access=0xffff888102
"""


def test_trace_lines_become_accesses() -> None:
    seen = [(a.iova, a.length, a.write, a.access) for a in tracing.parse(TRACE, "acc_1")]
    assert seen == [
        (0x1000, 64, False, 0xFFFF888101),
        (0x100002000, 4096, True, 0xFFFF888102),
    ]


def test_a_trace_line_without_its_arguments_is_an_error() -> None:
    with pytest.raises(ValueError, match="length"):
        tracing.parse("x-1 [000] ..... 1.0: acc_1: (f+0x4/0x250) iova=0x1\n", "acc_1")


def test_a_descriptor_closes_when_its_last_user_is_done() -> None:
    reader, writer = os.pipe()
    descriptor = Descriptor(writer, "a pipe")
    with descriptor.borrowed() as fd:
        descriptor.close()
        assert descriptor.closed
        os.write(fd, b"x")
        with pytest.raises(OSError, match="a pipe is closed") as caught, descriptor.borrowed():
            pass
        assert caught.value.errno == errno.EBADF
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b""
    descriptor.close()
    os.close(reader)


def test_a_wait_names_what_it_waited_for() -> None:
    with pytest.raises(TimeoutError, match=r"the moon: not within 0\.01 s"):
        wait_for("the moon", 0.01, lambda: None)
    event = threading.Event()
    threading.Timer(0.02, event.set).start()
    assert wait_for("an event", 20, lambda: event.is_set() or None) is True


def test_a_wait_still_works_when_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "YIELDING", 0.0)
    event = threading.Event()
    threading.Timer(0.02, event.set).start()
    assert wait_for("an event", 20, lambda: event.is_set() or None) is True
