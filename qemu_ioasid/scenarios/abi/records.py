# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device tells of its work: completions, the fault log, interrupts, counts."""

from __future__ import annotations

from qemu_ioasid.model.engine import COMPARE, COPY, FILL, NOP
from qemu_ioasid.scenarios.abi.work import BASE, Memory, work
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.flight.ground import LOG, PAGE, RECORD, REGISTERS, Flight
from qemu_ioasid.scenarios.table import Table

#: The slots of the log and of the ring.
ENTRIES, RING = 64, 1024
#: More than 16 bits count, in whole rings.
MANY = 65 * RING
NOWHERE = 1 << 40
OVERRUN = 2

TABLE = Table()
_CHECK = TABLE.phase("what is told of work")

#: Records of the log as (count, reason, access, error, addr).
Record = tuple[int, str, str, int, int]


@_CHECK("log", "have work refused, fault and differ, and read the log")
def log(flight: Flight, trial: Trial) -> None:
    memory = Memory(flight, trial)
    pasid, unlisted = memory.pasid, memory.pasid + 1
    works = (
        (work(NOP, 0, 0, 0), "DONE"),
        (work(NOP, 0, 0, 0, unlisted), "REFUSED"),
        (work(COPY, BASE, BASE + PAGE, 8, pasid), "DONE"),
        (work(COPY, BASE, NOWHERE, 8, pasid), "FAULT"),
        (work(COPY, NOWHERE, BASE, 8), "FAULT"),
        (work(FILL, 1, BASE, 8), "DONE"),
        (work(COMPARE, BASE, BASE + 1, 8), "DIFFERENT"),
        (work(COMPARE, BASE, NOWHERE, 8, pasid), "FAULT"),
        (work(FILL, 0, 0, 0), "INVALID"),
    )
    expected: list[Record] = [
        (1, "NOT_LISTED", "NONE", 13, 0),
        (3, "UNMAPPED", "WRITE", 2, NOWHERE),
        (4, "UNMAPPED", "READ", 2, NOWHERE),
        (7, "UNMAPPED", "READ", 2, NOWHERE),
        (8, "LENGTH", "NONE", 22, 0),
    ]
    for _ in range(2):
        ticket = flight.submit(*(each for each, _ in works))
        flight.completions(trial, ticket, *(status for _, status in works))
        found = flight.faults()
        keys = ("count", "reason", "access", "error", "addr")
        told = [tuple(record[key] for key in keys) for record in found]
        trial.require(told == expected, f"the log has {told}")
        numbers = [record["seq"] for record in found]
        trial.require(numbers == [*range(1, len(expected) + 1)], f"numbered {numbers}")
        pasids = [record["pasid"] for record in found]
        trial.require(pasids == [unlisted, pasid, 0, pasid, 0], f"with PASIDs {pasids}")
        # It begins anew.
        flight.host.call("device_reset", name=flight.device)
    trial.saw("a record of each that did not end well, and no other; twice")


@_CHECK("log-full", "have more work refused than the log has room for")
def log_full(flight: Flight, trial: Trial) -> None:
    """The oldest record gives way, and each is in the slot of its number."""
    for more in (ENTRIES - 1, 1, 1, ENTRIES + 9):
        flight.done(flight.submit(*[work(NOP, 0, 0, 0, 5)] * more))
        count = flight.registers()["FAULT_COUNT"]
        slots = flight.region(REGISTERS, LOG, ENTRIES * RECORD)
        seqs = [int.from_bytes(slots[at : at + 4], "little") for at in range(0, len(slots), RECORD)]
        expected = [0] * ENTRIES
        for number in range(max(0, count - ENTRIES), count):
            expected[number % ENTRIES] = number + 1
        trial.require(seqs == expected, f"after {count} records the slots have {seqs}")
    trial.answer(f"{count} records")
    trial.saw("the latest of them, each in its slot")


@_CHECK("log-counts", f"have {MANY} pieces of work refused")
def log_counts(flight: Flight, trial: Trial) -> None:
    """The ring has the same work each time around."""
    flight.done(flight.submit(*[work(NOP, 0, 0, 0, 5)] * RING))
    # A doorbell counts from HEAD, which moves after the completion.
    flight.ends()
    for tail in range(2 * RING, MANY + RING, RING):
        flight.host.call("device_doorbell", name=flight.device, tail=tail)
        flight.ends()
    registers = flight.registers()
    told = registers["FAULT_COUNT"], registers["HEAD"]
    trial.answer(f"FAULT_COUNT {told[0]}, HEAD {told[1]}")
    trial.require(told == (MANY, MANY), f"FAULT_COUNT and HEAD are {told}")
    last = flight.faults()[-1]
    trial.require(last["seq"] == MANY, f"the last record is number {last['seq']}")
    trial.saw("all of them counted")


@_CHECK("interrupts", "have work of each status ask for an interrupt, and not ask for one")
def interrupts(flight: Flight, trial: Trial) -> None:
    """Vector 0 for whoever asks, however it ended; vector 1 for each record; and again."""
    memory = Memory(flight, trial)
    statuses = {
        "DONE": work(NOP, 0, 0, 0),
        "REFUSED": work(NOP, 0, 0, 0, memory.pasid + 1),
        "FAULT": work(FILL, 1, NOWHERE, 8),
        "INVALID": work(FILL, 1, BASE, 0),
        "DIFFERENT": work(COMPARE, BASE, BASE + PAGE, 8),
    }
    flight.done(flight.submit(work(FILL, 1, BASE, 8)))
    flight.host.call("raw_irqs", device=flight.device, start=0, count=2)
    for turn in range(3):
        for status, descriptor in statuses.items():
            for asked in (False, True):
                ticket = flight.submit({**descriptor, "interrupt": asked})
                flight.completions(trial, ticket, status)
                flight.ends()
                found = flight.host.call("irqs_seen", device=flight.device)["counts"]
                expected = [int(asked), int(status not in ("DONE", "DIFFERENT"))]
                how = f"{status}, {'asked for' if asked else 'not asked for'}, turn {turn + 1}"
                trial.require(found == expected, f"{how}: raised {found}, not {expected}")
        flight.host.call("device_reset", name=flight.device)
    trial.saw("each vector as often as it must be, over three resets")


@_CHECK("reset", "reset a device whose every part has been used")
def reset(flight: Flight, trial: Trial) -> None:
    """All is as after an open but the list, the eventfds and the own address space."""
    memory = Memory(flight, trial)
    flight.host.call("raw_irqs", device=flight.device, start=0, count=2)
    flight.done(flight.submit(*[work(FILL, 5, BASE, 8, memory.pasid), work(4, 0, 0, 0)] * 9))
    flight.ends()
    flight.host.call("device_doorbell", name=flight.device, tail=2 * RING)
    status = flight.registers()["STATUS"]
    trial.require(status == OVERRUN, f"STATUS is {status} after an overrun")
    flight.host.call("irqs_seen", device=flight.device)
    flight.host.call("device_reset", name=flight.device)
    registers = flight.registers()
    told = {name: registers[name] for name in ("TAIL", "HEAD", "STATUS", "FAULT_COUNT")}
    trial.require(not any(told.values()), f"after the reset {told}")
    trial.require(not any(flight.rings()), "the rings are not empty")
    trial.require(not any(flight.log()), "the log is not empty")
    found = flight.registrar.kernel_list(flight.device)
    trial.require(found == [memory.pasid], f"the list has {found}")
    works = [{**work(FILL, 1, BASE, 8, by), "interrupt": True} for by in (memory.pasid, None)]
    flight.completions(trial, flight.submit(*works), "DONE", "DONE")
    flight.ends()
    raised = flight.host.call("irqs_seen", device=flight.device)["counts"]
    trial.require(raised == [2, 0], f"the vectors were raised {raised} times")
    trial.saw("nothing of before but the list, the own address space and the eventfds")
