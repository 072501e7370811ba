# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by work: a guest submits what it may not, with each part of it wrong in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.rig import Descriptor, copy
from qemu_ioasid.scenarios.acts import HALF, LENGTH, OWN_IOVA, SLOT, SOURCE_AT, TARGET_AT
from qemu_ioasid.scenarios.attacks.ground import WIDTH, Grant, Ground
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.table import Row, crossed
from qemu_ioasid.scenarios.witness import moved

#: The engine's limit for one descriptor (kernel-patches/ABI.md, MAX_LENGTH), its chunk, its ring.
MAX_LENGTH = 1 << 20
CHUNK = 1 << 16
RING = 1024
TOP = 1 << 64

# Which PASID


class Named(NamedTuple):
    """A PASID that a device has not: which, and the grant whose memory it would be."""

    said: str
    pick: Callable[[Ground, str], tuple[int, Grant]]


def _own(change: Callable[[int], int]) -> Callable[[Ground, str], tuple[int, Grant]]:
    def pick(ground: Ground, device: str) -> tuple[int, Grant]:
        grant = ground.standing(device)
        return change(grant.pasid), grant

    return pick


def _unregistered(ground: Ground, device: str) -> tuple[int, Grant]:
    return ground.pasid(ground.owner[device].name), ground.standing(device)


def _of(other: Callable[[Ground, str], str]) -> Callable[[Ground, str], tuple[int, Grant]]:
    def pick(ground: Ground, device: str) -> tuple[int, Grant]:
        grant = ground.standing(other(ground, device))
        return grant.pasid, grant

    return pick


def _detached(ground: Ground, device: str) -> tuple[int, Grant]:
    grant = ground.grant(device)
    ground.leave(grant)
    return grant.pasid, grant


def _freed(ground: Ground, device: str) -> tuple[int, Grant]:
    pasid, grant = _detached(ground, device)
    ground.free(pasid)
    return pasid, grant


def _moved_on(ground: Ground, device: str) -> tuple[int, Grant]:
    """What the device had is registered for a device of the other guest, with its memory."""
    pasid, _ = _detached(ground, device)
    stranger = ground.stranger(device)
    guest = ground.owner[stranger]
    offset = ground.slot(guest)
    ioas = ground.mapped(guest, guest.name, (offset, SLOT))
    ground.registrar.register(stranger, guest.name, pasid, ioas)
    iova = (1 << 32) + offset
    return pasid, Grant(stranger, guest.name, guest.name, pasid, ioas, iova, offset, SLOT)


PASIDS: Mapping[str, Named] = {
    "unregistered": Named("that was allocated and never registered", _unregistered),
    "sibling": Named("registered for another device of its guest only", _of(Ground.sibling)),
    "stranger": Named("registered for the other guest's device only", _of(Ground.stranger)),
    "detached": Named("that was detached", _detached),
    "freed": Named("that was detached and freed", _freed),
    "moved-on": Named("that was its own and is the other guest's now", _moved_on),
    "zero": Named("0", _own(lambda pasid: 0)),
    "last": Named("2^20 - 1, the last there is", _own(lambda pasid: WIDTH - 1)),
    "width": Named("2^20, one past the last", _own(lambda pasid: WIDTH)),
    "width-alias": Named("of its own plus 2^20", _own(lambda pasid: pasid + WIDTH)),
    "top-alias": Named("of its own plus 2^31", _own(lambda pasid: pasid | 1 << 31)),
    "all-ones": Named("2^32 - 1", _own(lambda pasid: (1 << 32) - 1)),
}


def names_pasid(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Work that is as it should be, but for its PASID."""
    pasid, grant = PASIDS[name].pick(ground, device)
    ground.denied(trial, device, pasid, grant.iova)


# Which address


@dataclass(frozen=True)
class Address:
    """Where a copy goes, from the start of a registered slot, and how that ends.

    *at*: what the fault is reported at. *within*: what of the slot may have changed. *absolute*:
    source and target do not count from the slot.
    """

    said: str
    source: int = SOURCE_AT
    target: int = TARGET_AT
    length: int = LENGTH
    ends: str = "DONE"
    error: str = ""
    at: str = ""
    within: tuple[int, int] | None = None
    absolute: str = ""


def _fault(said: str, at: str, **place: Any) -> Address:
    return Address(said, ends="FAULT", error="ENOENT", at=at, **place)


def _invalid(said: str, **place: Any) -> Address:
    return Address(said, ends="INVALID", error="EINVAL", **place)


ADDRESSES: Mapping[str, Address] = {
    "inside": Address("within its range, at odd addresses"),
    "first-bytes": Address("to the first 16 bytes of its range", HALF, 0, 16),
    "last-bytes": Address("to the last 16 bytes of its range", 0, SLOT - 16, 16),
    "source-past-end": _fault("from right behind its range", "source", source=SLOT, length=16),
    "target-past-end": _fault("to right behind its range", "target", target=SLOT, length=16),
    "source-before-start": _fault("from right before its range", "source", source=-16, length=16),
    "target-before-start": _fault("to right before its range", "target", target=-16, length=16),
    "source-over-end": _fault("from over the end", "source", source=SLOT - 32, length=64),
    "target-over-end": _fault(
        "to over the end", "target", target=SLOT - 32, length=64, within=(SLOT - 32, 32)
    ),
    "source-over-start": _fault("from over the start", "source", source=-32, length=64),
    "target-over-start": _fault("to over the start", "target", target=-32, length=64),
    "source-unmapped": _fault(
        "from the bottom of its address space", "source", source=0, absolute="source"
    ),
    "target-unmapped": _fault(
        "to the bottom of its address space", "target", target=0, absolute="target"
    ),
    "source-top": _fault(
        "from the last bytes of 2^64", "source", source=TOP - LENGTH, absolute="source"
    ),
    "target-top": _fault(
        "to the last bytes of 2^64", "target", target=TOP - LENGTH, absolute="target"
    ),
    "source-wraps": _invalid("from over 2^64", source=TOP - 32, absolute="source"),
    "target-wraps": _invalid("to over 2^64", target=TOP - 32, absolute="target"),
    "no-length": _invalid("no bytes", length=0),
    "longest": _fault("the engine's limit", "source", source=0, length=MAX_LENGTH),
    "too-long": _invalid("one byte over the engine's limit", length=MAX_LENGTH + 1),
    "length-all-ones": _invalid("2^32 - 1 bytes", length=(1 << 32) - 1),
}


def names_address(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Work that is as it should be, but for where it goes."""
    case = ADDRESSES[name]
    grant = ground.grant(device) if case.ends == "DONE" else ground.standing(device)
    source = case.source + (0 if case.absolute == "source" else grant.iova)
    target = case.target + (0 if case.absolute == "target" else grant.iova)
    work = copy(grant.pasid, source, target, case.length)
    _ends(ground, trial, grant, device, work, case)


def _ends(
    ground: Ground, trial: Trial, grant: Grant, device: str, work: Descriptor, case: Address
) -> None:
    """Require *work* to end as *case* says, in the grant's guest."""
    guest = ground.owner[device]
    source, target = work["src"], work["dst"]
    # A chunk is read before one is written: a read that fails is the only access.
    chunk = min(case.length, CHUNK)
    reads = None if case.ends == "INVALID" else (source, chunk)
    writes = None if case.ends == "INVALID" or case.at == "source" else (target, chunk)
    expect, within = None, None
    if case.ends == "DONE":
        expect = moved(grant.offset + case.target, case.length, grant.offset + case.source)
    elif case.within:
        within = grant.offset + case.within[0], case.within[1]
    with ground.witnesses.around(
        trial,
        target=guest.name if expect or within else None,
        expect=expect,
        within=within,
        reads=reads,
        writes=writes,
    ):
        done = ground.submit(trial, guest, device, work, case.ends)
        if case.error:
            ground.errno_is(trial, done, case.error)
        if case.at:
            fault = {"source": source, "target": target}[case.at]
            trial.require(done["addr"] == fault, f"the fault must be at {fault:#x}")
        trial.require(
            done["done"] == (case.length if case.ends == "DONE" else 0),
            f"the completion tells of {done['done']} bytes done",
        )


# What the range is

READ_ONLY_SOURCE = Address("from a read-only range")
READ_ONLY_TARGET = Address("to a read-only range", ends="FAULT", error="EPERM", at="target")


def read_only(ground: Ground, trial: Trial, device: str, role: str) -> None:
    """A range that the device may read and not write."""
    guest = ground.owner[device]
    offset = ground.slots(guest, 2)
    ioas = ground.mapped(guest, guest.name, (offset, SLOT), writeable=False)
    other = offset + SLOT
    ground.several(ground.mapping(guest, guest.name, ioas, other, SLOT, True))
    pasid = ground.enter(device, guest, ioas)
    iova = (1 << 32) + offset
    grant = Grant(device, guest.name, guest.name, pasid, ioas, iova, offset, SLOT)
    if role == "source":
        case = Address(READ_ONLY_SOURCE.said, SOURCE_AT, SLOT + TARGET_AT)
    else:
        case = READ_ONLY_TARGET
    work = copy(pasid, iova + case.source, iova + case.target, case.length)
    _ends(ground, trial, grant, device, work, case)


def hole(ground: Ground, trial: Trial, device: str, role: str) -> None:
    """Two ranges of one address space, with a slot of nobody's between."""
    guest = ground.owner[device]
    offset = ground.slots(guest, 3)
    end = offset + 2 * SLOT
    ioas = ground.mapped(guest, guest.name, (offset, SLOT), (end, SLOT))
    pasid = ground.enter(device, guest, ioas)
    iova = (1 << 32) + offset
    grant = Grant(device, guest.name, guest.name, pasid, ioas, iova, offset, 3 * SLOT)
    length = SLOT + 64
    if role == "source":
        case = _fault("", "source", source=SLOT - 32, target=2 * SLOT, length=length)
    else:
        # From one range to over the other's end is as far as 64 bytes more than a slot go.
        case = _fault("", "target", source=0, target=SLOT - 32, length=64, within=(SLOT - 32, 32))
    work = copy(pasid, iova + case.source, iova + case.target, case.length)
    _ends(ground, trial, grant, device, work, case)


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
        done = ground.submit(trial, guest, device, work, "FAULT")
        ground.errno_is(trial, done, "ENOENT")
        fault = work["src" if role == "source" else "dst"] + CHUNK
        trial.require(done["addr"] == fault, f"the fault must be at {fault:#x}")
        trial.require(done["done"] == CHUNK, f"{done['done']} bytes done, not {CHUNK}")


# Which address space


def own_space(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """What a PASID reaches is not the device's own, nor the other way round."""
    guest, grant = ground.owner[device], ground.standing(device)
    if name == "by-none":
        work, at = ground.work(None, grant.iova), grant.iova + SOURCE_AT
        with ground.witnesses.around(trial, reads=(at, LENGTH)):
            ground.faults(trial, guest, device, work, at)
        return
    offset = ground.slot(guest)
    guest.agent.call("ioas_map", name=device, iova=OWN_IOVA, offset=offset, length=SLOT)
    try:
        work, at = ground.work(grant.pasid, OWN_IOVA), OWN_IOVA + SOURCE_AT
        with ground.witnesses.around(trial, reads=(at, LENGTH)):
            ground.faults(trial, guest, device, work, at)
    finally:
        guest.agent.call("ioas_unmap", name=device, iova=OWN_IOVA, length=SLOT)


SPACES = {
    "by-none": "without a PASID to where one of its PASIDs reaches",
    "by-pasid": "with a PASID to where the device's own address space reaches",
}

# What else a descriptor says


class Said(NamedTuple):
    """A descriptor that differs in what it is: its fields, its status and errno."""

    said: str
    fields: Mapping[str, Any]
    ends: str = "INVALID"
    error: str = "EINVAL"


DESCRIPTORS: Mapping[str, Said] = {
    "opcode-unknown": Said("an opcode there is not", {"opcode": 31}),
    "opcode-all-ones": Said("opcode 2^32 - 1", {"opcode": (1 << 32) - 1}),
    "flag-unknown": Said("a flag there is not", {"flags": 1 | 1 << 31}),
    "flags-all-ones": Said("flags 2^32 - 1", {"flags": (1 << 32) - 1}),
    "pasid-unflagged": Said("a PASID without its flag", {"flags": 0}),
}


def says(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Work that is as it should be, but for one field of its descriptor."""
    grant, case = ground.standing(device), DESCRIPTORS[name]
    work = {**ground.work(grant.pasid, grant.iova), **case.fields}
    with ground.witnesses.around(trial):
        done = ground.submit(trial, ground.owner[device], device, work, case.ends)
        ground.errno_is(trial, done, case.error)


def nothing(ground: Ground, trial: Trial, device: str, name: str) -> None:
    """Not even work that does nothing may name a PASID of another."""
    pasid, _ = PASIDS[name].pick(ground, device)
    work = {**copy(pasid, 0, 0, 0), "opcode": 0}
    with ground.witnesses.around(trial):
        done = ground.submit(trial, ground.owner[device], device, work, "REFUSED")
        ground.errno_is(trial, done, "EACCES")


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
_NOPS = {name: PASIDS[name].said for name in ("unregistered", "sibling", "stranger")}
_PASID, _ADDRESS, _RANGE = "by which PASID", "to which address", "of which range"
_DESCRIPTOR = "by what descriptor"

# fmt: off
GROUPS = (
    Group(_PASID, "pasid-{case}-{device}", "{device} names a PASID {case}",
          names_pasid, _said(PASIDS), "abc"),
    Group(_ADDRESS, "address-{case}-{device}", "{device} copies {case}",
          names_address, _said(ADDRESSES)),
    Group(_RANGE, "read-only-{case}-{device}", "{device} copies with a read-only {case}",
          read_only, _ROLES),
    Group(_RANGE, "hole-{case}-{device}", "{device} copies with a hole in its {case}",
          hole, _ROLES),
    Group(_RANGE, "chunk-{case}-{device}", "{device} copies, the {case}'s second chunk out",
          second_chunk, _ROLES),
    Group(_RANGE, "space-{case}-{device}", "{device} copies {case}", own_space, SPACES),
    Group(_DESCRIPTOR, "descriptor-{case}-{device}", "{device} is given {case}",
          says, _said(DESCRIPTORS), "a"),
    Group(_DESCRIPTOR, "nop-{case}-{device}", "{device} does nothing, by a PASID {case}",
          nothing, _NOPS, "a"),
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
        if not (row.arguments[0] in alone and row.arguments[1] == "sibling")
    ]
    return [*by_guests, *doorbells]
