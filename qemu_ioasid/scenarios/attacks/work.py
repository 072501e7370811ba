# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by work: a guest submits what it may not, with each part of it wrong in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.rig import Descriptor, copy
from qemu_ioasid.scenarios.acts import HALF, LENGTH, OWN_IOVA, SLOT, SOURCE_AT, TARGET_AT
from qemu_ioasid.scenarios.attacks.ground import (
    BASE,
    DIFFERENT,
    DONE,
    NO_RIGHT,
    REFUSED,
    UNMAPPED,
    Ending,
    Grant,
    Ground,
    invalid,
)
from qemu_ioasid.scenarios.attacks.pasids import PASIDS
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.table import Row, crossed
from qemu_ioasid.scenarios.witness import Span, moved

#: The engine's limit for one descriptor (kernel-patches/ABI.md, MAX_LENGTH), its chunk, its ring.
MAX_LENGTH = 1 << 20
CHUNK = 1 << 16
RING = 1024
TOP = 1 << 64

# By which PASID


def names_pasid(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Work that is as it should be, but for its PASID."""
    pasid, grant = PASIDS[name].pick(ground, device)
    ground.denied(trial, device, pasid, grant.iova)


# Which address

#: Opcodes by what they do (kernel-patches/ABI.md).
OPCODES = {"copies": 1, "fills": 2, "compares": 3}
#: What FILL stores, over and over.
PATTERN = 0x0123_4567_89AB_CDEF


@dataclass(frozen=True)
class Address:
    """Where work goes, from the start of a registered slot, and how it ends.

    *at*: what is to blame. *within*: what of the slot may have changed. *absolute*: which of
    source and target does not count from the slot. *does*: a key of OPCODES.
    """

    said: str
    ending: Ending = DONE
    at: str = ""
    source: int = SOURCE_AT
    target: int = TARGET_AT
    length: int = LENGTH
    within: tuple[int, int] | None = None
    absolute: str = ""
    does: str = "copies"

    def work(self, grant: Grant) -> Descriptor:
        """As work that the grant is for, but for what is wrong."""
        source = self.source + (0 if self.absolute == "source" else grant.iova)
        target = self.target + (0 if self.absolute == "target" else grant.iova)
        if self.does == "fills":
            source = PATTERN
        return {**copy(grant.pasid, source, target, self.length), "opcode": OPCODES[self.does]}


def _unmapped(at: str, said: str, **place: Any) -> Address:
    return Address(said, UNMAPPED[at], at, **place)


WRAP, LENGTH_WRONG = invalid("WRAP"), invalid("LENGTH")
_TOP = TOP - LENGTH

ADDRESSES: Mapping[str, Address] = {
    "inside": Address("within its range, at odd addresses"),
    "first-bytes": Address("to the first 16 bytes of its range", source=HALF, target=0, length=16),
    "last-bytes": Address("to the last 16 bytes of its range", target=SLOT - 16, length=16),
    "source-past-end": _unmapped("source", "from right behind its range", source=SLOT, length=16),
    "target-past-end": _unmapped("target", "to right behind its range", target=SLOT, length=16),
    "source-before-start": _unmapped("source", "from right before it", source=-16, length=16),
    "target-before-start": _unmapped("target", "to right before it", target=-16, length=16),
    "source-over-end": _unmapped("source", "from over the end", source=SLOT - 32, length=64),
    "target-over-end": _unmapped(
        "target", "to over the end", target=SLOT - 32, length=64, within=(SLOT - 32, 32)
    ),
    "source-over-start": _unmapped("source", "from over the start", source=-32, length=64),
    "target-over-start": _unmapped("target", "to over the start", target=-32, length=64),
    "source-unmapped": _unmapped("source", "from address 0", source=0, absolute="source"),
    "target-unmapped": _unmapped("target", "to address 0", target=0, absolute="target"),
    "source-top": _unmapped("source", "from below 2^64", source=_TOP, absolute="source"),
    "target-top": _unmapped("target", "to below 2^64", target=_TOP, absolute="target"),
    "source-wraps": Address("from over 2^64", WRAP, "source", source=TOP - 32, absolute="source"),
    "target-wraps": Address("to over 2^64", WRAP, "target", target=TOP - 32, absolute="target"),
    "no-length": Address("no bytes", LENGTH_WRONG, length=0),
    "longest": _unmapped("source", "the engine's limit", source=0, length=MAX_LENGTH),
    "too-long": Address("a byte over the engine's limit", LENGTH_WRONG, length=MAX_LENGTH + 1),
    "length-all-ones": Address("2^32 - 1 bytes", LENGTH_WRONG, length=(1 << 32) - 1),
}


def _fill(said: str, ending: Ending = DONE, at: str = "", **place: Any) -> Address:
    return Address(said, ending, at, does="fills", **place)


def _compare(said: str, ending: Ending, at: str = "", **place: Any) -> Address:
    return Address(said, ending, at, does="compares", **place)


OTHER_WORK: Mapping[str, Address] = {
    "fill-inside": _fill("its range, at odd addresses"),
    "fill-past-end": _fill(
        "right behind its range", UNMAPPED["target"], "target", target=SLOT, length=16
    ),
    "fill-before-start": _fill(
        "right before its range", UNMAPPED["target"], "target", target=-16, length=16
    ),
    "fill-over-end": _fill(
        "over the end",
        UNMAPPED["target"],
        "target",
        target=SLOT - 32,
        length=64,
        within=(SLOT - 32, 32),
    ),
    "fill-wraps": _fill("over 2^64", WRAP, "target", target=TOP - 32, absolute="target"),
    "fill-no-length": _fill("no bytes", LENGTH_WRONG, length=0),
    "compare-inside": _compare("bytes of its range", DIFFERENT),
    "compare-source-past-end": _compare(
        "what is right behind its range", UNMAPPED["source"], "source", source=SLOT, length=16
    ),
    "compare-target-past-end": _compare(
        "with what is right behind its range", UNMAPPED["source"], "target", target=SLOT, length=16
    ),
    "compare-target-over-end": _compare(
        "with what is over the end", UNMAPPED["source"], "target", target=SLOT - 32, length=64
    ),
    "compare-wraps": _compare(
        "with what is over 2^64", WRAP, "target", target=TOP - 32, absolute="target"
    ),
}


def names_address(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Work that is as it should be, but for where it goes."""
    case = ADDRESSES.get(name) or OTHER_WORK[name]
    # What moves or differs is not to depend on what other rows have moved.
    fresh = case.ending in (DONE, DIFFERENT)
    grant = ground.grant(device) if fresh else ground.standing(device)
    _ends(ground, trial, grant, case)


def _ends(ground: Ground, trial: Trial, grant: Grant, case: Address) -> None:
    """Require the work of *case* in *grant* to end so, and to change nothing else."""
    work = case.work(grant)
    reads, writes = _touched(case, work)
    expect, within = None, None
    at = grant.offset + case.target
    if case.ending is DONE and case.does == "fills":
        pattern = PATTERN.to_bytes(8, "little") * (case.length // 8 + 1)
        expect = {"offset": at, "length": case.length, "hex": pattern[: case.length].hex()}
    elif case.ending is DONE:
        expect = moved(at, case.length, grant.offset + case.source)
    elif case.within:
        within = grant.offset + case.within[0], case.within[1]
    with ground.witnesses.around(
        trial,
        target=grant.guest if expect or within else None,
        expect=expect,
        within=within,
        reads=reads,
        writes=writes,
    ):
        blamed = {"": 0, "source": work["src"], "target": work["dst"]}[case.at]
        done = ground.does(trial, grant.guest, grant.device, work, case.ending, blamed)
        if case.ending is not DIFFERENT:
            trial.require(
                done["done"] == (case.length if case.ending is DONE else 0),
                f"the completion tells of {done['done']} bytes done",
            )


def _touched(case: Address, work: Descriptor) -> tuple[Span | None, Span | None]:
    """Where the kernel may read and write for this work: what is wrong ends it."""
    if case.ending.status == "INVALID":
        return None, None
    chunk = min(case.length, CHUNK)
    source, target = (work["src"], chunk), (work["dst"], chunk)
    if case.does == "fills":
        return None, target
    if case.does == "compares":
        start = min(source[0], target[0])
        return (start, max(source[0], target[0]) + chunk - start), None
    # A chunk is read before it is written: a read that fails is the only access.
    return source, None if case.at == "source" else target


# By which PASID, other work


def names_pasid_for(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """As `names_pasid`, of work other than a copy: which, and by which PASID."""
    which, _, whose = name.partition("-")
    case = {"nop": None, "fill": _fill(""), "compare": _compare("", DIFFERENT)}[which]
    pasid, grant = PASIDS[whose].pick(ground, device)
    work = {**copy(pasid, 0, 0, 0), "opcode": 0}
    if case is not None:
        work = {**case.work(grant), "pasid": pasid}
    with ground.witnesses.around(trial):
        ground.does(trial, ground.owner[device].name, device, work, REFUSED)


def oracle(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """What a comparison of another's memory answers does not depend on what is in it."""
    other = ground.sibling(device) if name == "sibling" else ground.stranger(device)
    victim = ground.grant(other)
    work = {**ground.work(victim.pasid, victim.iova), "opcode": OPCODES["compares"]}
    answers = []
    for equal in (False, True):
        if equal:
            ground.allowed(trial, victim)
        with ground.witnesses.around(trial):
            done = ground.does(trial, ground.owner[device].name, device, work, REFUSED)
        answers.append({key: done[key] for key in ("status", "error", "addr", "done")})
    trial.require(answers[0] == answers[1], f"where they differ {answers[0]}, else {answers[1]}")


# What the range is


def read_only(ground: Ground, trial: Trial, device: str, role: str) -> None:
    """A range that the device may read and not write."""
    guest = ground.owner[device]
    offset = ground.slots(guest, 2)
    ioas = ground.mapped(guest, guest.name, (offset, SLOT), writeable=False)
    ground.host.several(ground.mapping(guest, guest.name, ioas, offset + SLOT, SLOT, True))
    pasid = ground.enter(device, guest, ioas)
    grant = Grant(device, guest.name, guest.name, pasid, ioas, BASE + offset, offset, SLOT)
    cases = {
        "source": Address("", target=SLOT + TARGET_AT),
        "target": Address("", NO_RIGHT, "target"),
        "fill": _fill("", NO_RIGHT, "target"),
        "compare": _compare("", DIFFERENT),
    }
    _ends(ground, trial, grant, cases[role])


def hole(ground: Ground, trial: Trial, device: str, role: str) -> None:
    """Two ranges of one address space, with a slot of nobody's between."""
    guest = ground.owner[device]
    offset = ground.slots(guest, 3)
    ioas = ground.mapped(guest, guest.name, (offset, SLOT), (offset + 2 * SLOT, SLOT))
    pasid = ground.enter(device, guest, ioas)
    grant = Grant(device, guest.name, guest.name, pasid, ioas, BASE + offset, offset, 3 * SLOT)
    edge, whole = SLOT - 32, SLOT + 64
    cases = {
        "source": _unmapped("source", "", source=edge, target=2 * SLOT, length=whole),
        # No more than a slot can be read, and it is read first.
        "target": _unmapped("target", "", target=edge, length=64, within=(edge, 32)),
    }
    _ends(ground, trial, grant, cases[role])


def second_chunk(ground: Ground, trial: Trial, device: str, role: str) -> None:
    """The first chunk is within the range, the second is not."""
    guest = ground.owner[device]
    slots = 2 * CHUNK // SLOT
    grant = ground.grant(device, slots=slots)
    near, far = 0, CHUNK
    source, target = (far, near) if role == "source" else (near, far)
    work = copy(grant.pasid, grant.iova + source, grant.iova + target, CHUNK + 64)
    length = CHUNK if role == "source" else CHUNK + 64
    with ground.witnesses.around(
        trial,
        target=guest.name,
        within=(grant.offset + target, CHUNK),
        reads=(grant.iova + source, CHUNK + 64),
        writes=(grant.iova + target, length),
    ):
        fault = work["src" if role == "source" else "dst"] + CHUNK
        done = ground.does(trial, guest.name, device, work, UNMAPPED[role], fault)
        trial.require(done["done"] == CHUNK, f"{done['done']} bytes done, not {CHUNK}")


# Which address space


def own_space(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """What a PASID reaches is not the device's own, nor the other way round."""
    guest, grant = ground.owner[device], ground.standing(device)
    if name == "by-none":
        ground.faulted(trial, device, None, grant.iova)
        return
    offset = ground.slot(guest)
    guest.agent.call("ioas_map", name=device, iova=OWN_IOVA, offset=offset, length=SLOT)
    try:
        ground.faulted(trial, device, grant.pasid, OWN_IOVA)
    finally:
        guest.agent.call("ioas_unmap", name=device, iova=OWN_IOVA, length=SLOT)


SPACES = {
    "by-none": "without a PASID to where one of its PASIDs reaches",
    "by-pasid": "with a PASID to where the device's own address space reaches",
}

# What else a descriptor says


class Said(NamedTuple):
    """A descriptor that differs in what it is: its fields, and the reason that is logged."""

    said: str
    fields: Mapping[str, Any]
    reason: str


ONES = (1 << 32) - 1
DESCRIPTORS: Mapping[str, Said] = {
    "opcode-unknown": Said("an opcode there is not", {"opcode": 31}, "OPCODE"),
    "opcode-all-ones": Said("opcode 2^32 - 1", {"opcode": ONES}, "OPCODE"),
    "flag-unknown": Said("a flag there is not", {"flags": 1 | 1 << 31}, "FLAGS"),
    "flags-all-ones": Said("flags 2^32 - 1", {"flags": ONES}, "FLAGS"),
    "pasid-unflagged": Said("a PASID without its flag", {"flags": 0}, "NO_PASID"),
}


def says(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Work that is as it should be, but for one field of its descriptor."""
    grant, case = ground.standing(device), DESCRIPTORS[name]
    work = {**ground.work(grant.pasid, grant.iova), **case.fields}
    with ground.witnesses.around(trial):
        ground.does(trial, grant.guest, device, work, invalid(case.reason))


# The doorbell

DOORBELLS: Mapping[str, tuple[str, Callable[[int], int]]] = {
    "back": ("moved back by one", lambda tail: tail - 1),
    "past-the-ring": ("moved on by more than the ring has", lambda tail: tail + RING + 1),
}


def rings(ground: Ground, trial: Trial, name: str) -> None:
    """A count that cannot be: nothing is submitted."""
    with ground.spare() as spare:
        grant, agent = ground.spare_grant(), ground.host
        with ground.witnesses.around(trial):
            tail = agent.call("device_registers", name=spare)["TAIL"]
            wrong = DOORBELLS[name][1](tail) % (1 << 32)
            told = agent.call("device_doorbell", name=spare, tail=wrong)
        trial.answer(f"TAIL {told['TAIL']}, HEAD {told['HEAD']}, STATUS {told['STATUS']:#x}")
        trial.require(told["TAIL"] == tail, f"TAIL moved from {tail}")
        trial.require(told["STATUS"] == 2, "STATUS must have OVERRUN, and nothing else")
        ground.allowed(trial, grant, "host")


# The tables

Cases = Mapping[str, str]


def _said(cases: Mapping[str, Any]) -> Cases:
    return {name: case.said for name, case in cases.items()}


class Group(NamedTuple):
    """Rows of one act: as `crossed` has them, on those of the devices a, b and c."""

    phase: str
    name: str
    tried: str
    act: Callable[..., None]
    cases: Cases
    devices: str = "ac"


_ROLES = {"source": "source", "target": "target"}
_RIGHTS = {**_ROLES, "fill": "target, to fill", "compare": "pair, to compare"}
_WHOSE = ("unregistered", "sibling", "stranger")
_OTHERS = {
    f"{which}-{whose}": f"{does} by a PASID {PASIDS[whose].said}"
    for which, does in {"nop": "does nothing,", "fill": "fills", "compare": "compares"}.items()
    for whose in _WHOSE
}
_ORACLES = {"sibling": "its guest's other device", "stranger": "the other guest"}
_ELSEWHERE = {name: f"{case.does} {case.said}" for name, case in OTHER_WORK.items()}
_PASID, _ADDRESS, _RANGE = "by which PASID", "to which address", "of which range"
_DESCRIPTOR = "by what descriptor"

# fmt: off
GROUPS = (
    Group(_PASID, "pasid-{case}-{device}", "{device} names a PASID {case}",
          names_pasid, _said(PASIDS), "abc"),
    Group(_PASID, "{case}-{device}", "{device} {case}", names_pasid_for, _OTHERS, "a"),
    Group(_PASID, "oracle-{case}-{device}", "{device} compares memory of {case}, equal and not",
          oracle, _ORACLES, "a"),
    Group(_ADDRESS, "address-{case}-{device}", "{device} copies {case}",
          names_address, _said(ADDRESSES)),
    Group(_ADDRESS, "{case}-{device}", "{device} {case}", names_address, _ELSEWHERE, "a"),
    Group(_RANGE, "read-only-{case}-{device}", "{device} copies with a read-only {case}",
          read_only, _RIGHTS),
    Group(_RANGE, "hole-{case}-{device}", "{device} copies with a hole in its {case}",
          hole, _ROLES),
    Group(_RANGE, "chunk-{case}-{device}", "{device} copies, the {case}'s second chunk out",
          second_chunk, _ROLES),
    Group(_RANGE, "space-{case}-{device}", "{device} copies {case}", own_space, SPACES),
    Group(_DESCRIPTOR, "descriptor-{case}-{device}", "{device} is given {case}",
          says, _said(DESCRIPTORS), "a"),
)
# fmt: on


def rows(config: RigConfig, parts: Mapping[str, str]) -> list[Row]:
    """The attacks by work on a rig, each device's own guest being the attacker."""
    alone = {guest.mdevs[0] for guest in config.guests.values() if len(guest.mdevs) == 1}
    doorbells = [
        Row(_DESCRIPTOR, f"doorbell-{name}", f"an mdev's doorbell is {said}", rings, (name,))
        for name, (said, _) in DOORBELLS.items()
    ]
    by_guests = [
        row
        for group in GROUPS
        for row in crossed(*group[:5], [parts[part] for part in group.devices])
        if not (row.arguments[0] in alone and row.arguments[1].endswith("sibling"))
    ]
    return [*by_guests, *doorbells]
