# SPDX-License-Identifier: GPL-2.0-or-later
"""What each opcode does to memory, where it ends, and what is no work at all."""

from __future__ import annotations

from typing import Any

from qemu_ioasid.model.engine import COMPARE, COPY, FILL, NOP
from qemu_ioasid.rig import Descriptor
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.flight.ground import CHUNK, PAGE, Flight
from qemu_ioasid.scenarios.table import Table

#: Where the memory lies, in two mappings, one behind the other; nothing is mapped behind both.
BASE, SIZE = 1 << 33, 8 * CHUNK
BORDER = SIZE // 2
PATTERN = 0x8877665544332211
BYTES = PATTERN.to_bytes(8, "little")
MAX_LENGTH = 1 << 20
TOP = (1 << 64) - 1
#: Lengths of one chunk and of several, and an address that nothing is aligned to.
LENGTHS = (1, 7, 8, 9, 4099, CHUNK, 2 * CHUNK + 3)
ODD = 0x1003

#: What is wrong with a descriptor, alone or first of several, and the reason and address logged.
MALFORMED: dict[str, tuple[Descriptor, str, int]] = {}

TABLE = Table()
_CHECK = TABLE.phase("work")

Outcome = tuple[str, int, int, int]


def work(opcode: int, src: int, dst: int, length: int, pasid: int | None = None) -> Descriptor:
    """One descriptor."""
    return {"opcode": opcode, "pasid": pasid, "src": src, "dst": dst, "length": length}


def _with(descriptor: Descriptor, **changes: Any) -> Descriptor:
    return {**descriptor, **changes}


MALFORMED.update(
    {
        "opcode": (work(4, 0, 0, 0), "OPCODE", 0),
        "opcode, and all else": (work(0xFFFFFFFF, TOP, TOP, 0xFFFFFFFF), "OPCODE", 0),
        "flags": (_with(work(COPY, 0, 0, 8), flags=4), "FLAGS", 0),
        "flags, and length": (_with(work(COPY, 0, 0, 0), flags=0xFFFFFFFF), "FLAGS", 0),
        "pasid": (_with(work(COPY, 0, 0, 0, 9), flags=0), "NO_PASID", 0),
        "pasid of NOP": (_with(work(NOP, 0, 0, 0, 9), flags=2), "NO_PASID", 0),
        "no length: COPY": (work(COPY, TOP, TOP, 0), "LENGTH", 0),
        "no length: FILL": (work(FILL, 0, 0, 0), "LENGTH", 0),
        "no length: COMPARE": (work(COMPARE, 0, 0, 0), "LENGTH", 0),
        "length": (work(FILL, 0, TOP, MAX_LENGTH + 1), "LENGTH", 0),
        "length of NOP": (work(NOP, 0, 0, MAX_LENGTH + 1), "LENGTH", 0),
        "src": (work(COPY, TOP, TOP, 2), "WRAP", TOP),
        "src and dst": (work(COMPARE, TOP - 1, TOP - 2, 4), "WRAP", TOP - 1),
        "dst": (work(COMPARE, 0, TOP - 6, 8), "WRAP", TOP - 6),
        "dst of FILL": (work(FILL, TOP, TOP - 1, 3), "WRAP", TOP - 1),
        "src of NOP": (work(NOP, TOP, 0, 2), "WRAP", TOP),
        "dst of NOP": (work(NOP, 0, TOP, 2), "WRAP", TOP),
    }
)


def repeated(length: int, at: int = 0) -> bytes:
    """What FILL makes of so many bytes, from its byte *at* on."""
    return (BYTES * (length // 8 + 2))[at % 8 :][:length]


class Memory:
    """What work without a PASID, and by *pasid*, reaches at `BASE`; what is in it is known."""

    def __init__(self, flight: Flight, trial: Trial) -> None:
        self._flight, self._trial = flight, trial
        ioas = flight.registrar.ioas(flight.iommufd)
        self._handles = [
            flight.memory(ioas, BASE + at, SIZE - BORDER) for at in range(0, SIZE, BORDER)
        ]
        for handle in self._handles:
            flight.release(handle)
        flight.host.call("raw_attach", device=flight.device, ioas=ioas)
        self.pasid = flight.registrar.alloc(flight.iommufd)
        flight.registrar.register(flight.device, flight.iommufd, self.pasid, ioas)
        self.expected = bytearray(SIZE)

    def put(self, at: int, data: bytes) -> None:
        """Expect *data* there from now on."""
        self.expected[at : at + len(data)] = data

    def ends(self, *pairs: tuple[Descriptor, Outcome]) -> None:
        """Have the device do the works; each must end so: status, error, addr, done."""
        found = self._flight.done(self._flight.submit(*(each for each, _ in pairs)))
        for (descriptor, outcome), done in zip(pairs, found, strict=True):
            told = done["status"], done["error"], done["addr"], done["done"]
            self._trial.require(told == outcome, f"{descriptor} ended as {told}, not {outcome}")

    def is_so(self) -> None:
        """Require the memory to be as expected, all of it."""
        found = b"".join(self._flight.content(handle, 0, SIZE - BORDER) for handle in self._handles)
        wrong = next((at for at in range(SIZE) if found[at] != self.expected[at]), None)
        self._trial.require(wrong is None, f"byte {wrong or 0:#x} is not as it must be")
        self._trial.saw(f"all {SIZE} bytes")


def _done(length: int) -> Outcome:
    return "DONE", 0, 0, length


@_CHECK("fill", "fill memory, in one chunk and in several, over the border of two mappings")
def fill(flight: Flight, trial: Trial) -> None:
    memory = Memory(flight, trial)
    for start, pasid in ((0, None), (BORDER - CHUNK - 5, memory.pasid)):
        for number, length in enumerate(LENGTHS[:5]):
            at = start + number * 2 * PAGE + ODD
            memory.ends((work(FILL, PATTERN, BASE + at, length, pasid), _done(length)))
            memory.put(at, repeated(length))
    at = BORDER - CHUNK - 5
    memory.ends((work(FILL, PATTERN, BASE + at, LENGTHS[-1]), _done(LENGTHS[-1])))
    memory.put(at, repeated(LENGTHS[-1]))
    memory.is_so()


@_CHECK("fill-ends", "fill what is not mapped, at once and after some chunks")
def fill_ends(flight: Flight, trial: Trial) -> None:
    memory = Memory(flight, trial)
    # src is no address: it neither wraps nor has to be mapped.
    memory.ends((work(FILL, TOP, 8, 8), ("FAULT", 2, 8, 0)))
    edge = SIZE - CHUNK - 8
    failed = BASE + edge + CHUNK
    memory.ends((work(FILL, PATTERN, BASE + edge, 2 * CHUNK), ("FAULT", 2, failed, CHUNK)))
    # The chunk that failed is there up to the end of what is mapped.
    memory.put(edge, repeated(CHUNK + 8))
    memory.is_so()


@_CHECK("copy", "copy bytes that all differ, in several chunks, over the border of two mappings")
def copy(flight: Flight, trial: Trial) -> None:
    memory = Memory(flight, trial)
    source = 2 * CHUNK + 7
    length = LENGTHS[-1]
    for number, at in enumerate(range(source, source + length + PAGE, PAGE)):
        value = PATTERN + number
        memory.ends((work(FILL, value, BASE + at, PAGE), _done(PAGE)))
        memory.put(at, value.to_bytes(8, "little") * (PAGE // 8))
    for at, pasid in ((ODD, None), (BORDER + CHUNK + ODD, memory.pasid)):
        copied = work(COPY, BASE + source, BASE + at, length, pasid)
        memory.ends((copied, _done(length)))
        memory.put(at, bytes(memory.expected[source : source + length]))
    nowhere = 1 << 40
    memory.ends((work(COPY, nowhere, BASE, 8), ("FAULT", 2, nowhere, 0)))
    memory.ends((work(COPY, BASE, nowhere, 8), ("FAULT", 2, nowhere, 0)))
    memory.is_so()


@_CHECK("compare", "compare what is the same but for one byte, wherever that is")
def compare(flight: Flight, trial: Trial) -> None:
    """The first byte that differs is found; nothing is written."""
    memory = Memory(flight, trial)
    src, dst = 0x1001, BORDER + 3
    for length in (1, 4099, 2 * CHUNK + 3):
        for at in (src, dst):
            memory.ends((work(FILL, PATTERN, BASE + at, length), _done(length)))
            memory.put(at, repeated(length))
        ways = [work(COMPARE, BASE + src, BASE + dst, length, by) for by in (None, memory.pasid)]
        memory.ends(*((way, _done(length)) for way in ways))
        places = {0, length // 2, length - 1, min(length - 1, CHUNK)}
        for place in sorted(places, reverse=True):
            memory.ends((work(FILL, 0, BASE + dst + place, 1), _done(1)))
            memory.put(dst + place, b"\0")
            differs: Outcome = ("DIFFERENT", 0, BASE + dst + place, place)
            memory.ends(*((way, differs) for way in ways))
    memory.is_so()


@_CHECK("compare-ends", "compare what is not mapped on either side, and differs or not")
def compare_ends(flight: Flight, trial: Trial) -> None:
    """A chunk that differs and faults, faults; an earlier one differs."""
    memory = Memory(flight, trial)
    nowhere, edge, end = 1 << 40, BASE + SIZE - CHUNK, BASE + SIZE
    memory.ends((work(FILL, PATTERN, edge - 8, 16), _done(16)))
    memory.put(SIZE - CHUNK - 8, repeated(16))
    memory.ends(
        (work(COMPARE, nowhere, BASE, 8), ("FAULT", 2, nowhere, 0)),
        (work(COMPARE, BASE, nowhere, 8), ("FAULT", 2, nowhere, 0)),
        (work(COMPARE, edge - 1, edge, CHUNK + 1), ("DIFFERENT", 0, edge, 0)),
        (work(COMPARE, edge, edge, CHUNK + 1), ("FAULT", 2, end, CHUNK)),
        (work(COMPARE, edge - 1, end - 8, 9), ("FAULT", 2, end - 8, 0)),
    )
    memory.is_so()


@_CHECK("malformed", "submit each kind of work that is none")
def malformed(flight: Flight, trial: Trial) -> None:
    """INVALID, the first reason there is; and in the log."""
    works = [descriptor for descriptor, *_ in MALFORMED.values()]
    found = flight.done(flight.submit(*works))
    records = flight.faults()
    trial.require(len(records) == len(works), f"{len(records)} records for {len(works)} works")
    for count, (name, done) in enumerate(zip(MALFORMED, found, strict=True)):
        descriptor, reason, addr = MALFORMED[name]
        told = done["status"], done["error"], done["addr"], done["done"]
        trial.require(told == ("INVALID", 22, addr, 0), f"{name}: ended as {told}")
        expected = {
            "seq": count + 1,
            "reason": reason,
            "access": "NONE",
            "count": count,
            "pasid": descriptor["pasid"] or 0,
            "error": 22,
            "addr": addr,
        }
        trial.require(records[count] == expected, f"{name}: logged as {records[count]}")
    trial.answer(f"{len(works)} INVALID")
    trial.saw("the reason and the address of each in the log")
