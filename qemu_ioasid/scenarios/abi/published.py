# SPDX-License-Identifier: GPL-2.0-or-later
"""What a debugger sees: the moment at which seq is stored, and counts that wrap around."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator

from qemu_ioasid import gdbstub, process
from qemu_ioasid.client import Pending
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.gdbstub import Stub
from qemu_ioasid.model.engine import NOP
from qemu_ioasid.rig import Descriptor
from qemu_ioasid.scenarios.checks import Skipped, Trial
from qemu_ioasid.scenarios.flight.ground import (
    CHUNK,
    COMPLETIONS,
    LOG,
    PAGE,
    PLAIN,
    RECORD,
    REGISTERS,
    RINGS,
    RINGS_SIZE,
    Flight,
    fill,
)
from qemu_ioasid.scenarios.table import Table

#: The device's structure, with its log, lies so near to a pointer into it.
NEAR = 2
#: The ring's entries; so many are used before its counts are set to just below where they wrap.
RING, USED, WRAP = 1024, 517, 1 << 32
NEARLY = WRAP - RING + USED
#: What the driver has of vmalloc(); at 1, root is shown where (Documentation, kptr_restrict).
SHOW = """
cd /proc/sys/kernel && before=$(cat kptr_restrict) && echo 1 >kptr_restrict
grep ' pdma_' /proc/vmallocinfo
echo $before >kptr_restrict
"""

SECOND = COMPLETIONS + RECORD

TABLE = Table()
_CHECK = TABLE.phase("what a debugger sees")


@_CHECK("published", "stop the host VM as a completion's seq is stored, and read the rest")
def published(flight: Flight, trial: Trial) -> None:
    """Who sees seq may read all of it: another processor, at that moment."""
    seen, _ = _at_second_fault(flight, trial)
    whole = flight.region(RINGS, SECOND, RECORD)
    trial.require(seen == whole, f"with its seq the completion was {seen.hex()}")
    trial.saw("the whole completion")


@_CHECK("published-log", "stop the host VM as a fault's completion is stored, and read the log")
def published_log(flight: Flight, trial: Trial) -> None:
    """Who sees seq may read the log, too."""
    _, memory = _at_second_fault(flight, trial)
    before, logged = (flight.region(REGISTERS, LOG + at, RECORD) for at in (0, RECORD))
    if before not in memory:
        raise Skipped("no register of the processor leads to the log")
    trial.require(logged in memory, "the fault was not in the log yet")
    trial.saw("the fault in the log")


def _at_second_fault(flight: Flight, trial: Trial) -> tuple[bytes, bytes]:
    """The second completion of two faults as its seq is stored, and memory around the device."""
    space = flight.registered()
    # Every field of what comes of it is something: its second chunk is not mapped.
    work = fill(space.pasid, PLAIN, 2 * CHUNK)
    flight.completions(trial, flight.submit(work), "FAULT")
    deadline = Deadline(20, "store of a completion's seq")
    place = _rings(flight, deadline) + SECOND
    with _at_store(flight, trial, place, work, deadline) as (stub, call):
        seen, memory = stub.read(place, RECORD), b"".join(_pointed_at(stub).values())
    flight.completions(trial, call.result(deadline)["ticket"], "FAULT")
    return seen, memory


@_CHECK("wrapped", "have a device count past 2^32")
def wrapped(flight: Flight, trial: Trial) -> None:
    """Nobody submits so much in a test: its counts are changed where the kernel has them."""
    nop: Descriptor = {"opcode": NOP, "pasid": None}
    flight.done(flight.submit(*[nop] * USED))
    deadline = Deadline(30, "store of a completion's seq")
    at = COMPLETIONS + RECORD * USED
    counts = struct.pack("<2I", USED, USED + 1)
    with _at_store(flight, trial, _rings(flight, deadline) + at, nop, deadline) as (stub, call):
        memory = _pointed_at(stub)
        early = _places(memory, struct.pack("<2I", USED + 1, USED + 1))
        places = _places(memory, counts)
        trial.require(bool(places) or not early, "HEAD had moved before seq was stored")
        if len(places) != 1:
            raise Skipped(f"HEAD and TAIL cannot be told apart from {len(places)} places")
        stub.write(places[0], struct.pack("<2I", NEARLY, NEARLY + 1))
    call.result(deadline)
    flight.ends()
    trial.require(flight.counts() == (NEARLY + 1,) * 2, f"TAIL and HEAD are {flight.counts()}")
    # The rest of the ring is NOPs, as it was zeroed.
    tail = (NEARLY + 1 + RING) % WRAP
    flight.host.call("device_doorbell", name=flight.device, tail=tail)
    flight.ends()
    trial.answer(f"TAIL and HEAD {flight.counts()}")
    trial.require(flight.counts() == (tail, tail), f"TAIL and HEAD are {flight.counts()}")
    found = flight.rings()[COMPLETIONS:]
    seqs = [int.from_bytes(found[slot * RECORD :][:4], "little") for slot in range(RING)]
    expected = [(tail - RING + (slot - tail) % RING + 1) % WRAP for slot in range(RING)]
    trial.require(seqs == expected, "the completions are not numbered on")
    trial.saw("work on both sides of it, numbered on")


def _places(memory: dict[int, bytes], data: bytes) -> list[int]:
    """Where in these pages *data* is."""
    return [
        page + found.start()
        for page, content in memory.items()
        for found in re.finditer(re.escape(data), content)
    ]


@contextlib.contextmanager
def _at_store(
    flight: Flight, trial: Trial, address: int, work: Descriptor, deadline: Deadline
) -> Iterator[tuple[Stub, Pending]]:
    """The host VM, stopped as *work* has the engine store to *address*; and that submission."""
    folder = process.current_run().folder
    with gdbstub.stopped(flight.rig.host.qmp, "host", folder, deadline) as stub:
        call = flight.host.start("device_submit_start", name=flight.device, descriptors=[work])
        trial.require(stub.run_to_store(address, 4), "the VM stopped for another reason")
        yield stub, call


def _rings(flight: Flight, deadline: Deadline) -> int:
    """Where the kernel has the rings of the device, which is the only one open."""
    said = flight.rig.host.ssh.output(SHOW, deadline).decode()
    found = re.findall(rf"^0x(\w+)-0x\w+ +{RINGS_SIZE + PAGE} pdma_.*\buser\b", said, re.MULTILINE)
    if len(found) != 1:
        raise Skipped(f"which of the driver's memory are the rings cannot be told: {said.strip()}")
    return int(found[0], 16)


def _pointed_at(stub: Stub) -> dict[int, bytes]:
    """The pages around all that the processor's registers point at, by address."""
    pages = {
        page
        for pointer in stub.registers()
        for page in range(pointer // PAGE - NEAR, pointer // PAGE + NEAR + 1)
        # The kernel's half.
        if page * PAGE >> 63 == 1
    }
    return {page * PAGE: stub.read(page * PAGE, PAGE) for page in sorted(pages)}
