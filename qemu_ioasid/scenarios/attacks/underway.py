# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks under way: something changes while work sleeps in the middle of a write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.rig import Descriptor, copy
from qemu_ioasid.scenarios.acts import OWN_IOVA, SLOT
from qemu_ioasid.scenarios.attacks.ground import SPARE, Grant, Ground
from qemu_ioasid.scenarios.attacks.work import CHUNK
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.table import Row

PAGE = 4096
#: How long a detach that must wait is watched for returning.
EARLY_SECONDS = 0.5
#: Where a PASID reaches memory that puts an access to sleep.
SLOW = OWN_IOVA


@contextlib.contextmanager
def _slow(ground: Ground, iommufd: str, ioas: int, length: int) -> Iterator[int]:
    """Memory at SLOW of an IOAS that puts an access to sleep until it is released."""
    made = ground.host.call("slow_create", iommufd=iommufd, ioas=ioas, iova=SLOW, length=length)
    try:
        yield made["handle"]
    finally:
        # Whatever failed: a device left asleep would fail every check that follows.
        ground.host.call("slow_close", handle=made["handle"])


def _asleep(ground: Ground, handle: int) -> None:
    ground.host.call("slow_wait", handle=handle, seconds=20 * calibration())


class Rewrite(NamedTuple):
    """What is written over a descriptor that the device carries out."""

    said: str
    fields: Callable[[Ground, Grant, Descriptor], Mapping[str, Any]]


def _theirs(ground: Ground, grant: Grant, work: Descriptor) -> Mapping[str, Any]:
    return {"pasid": ground.standing(ground.c).pasid}


REWRITES: Mapping[str, Rewrite] = {
    "pasid": Rewrite("the other guest's PASID", _theirs),
    "space": Rewrite("no PASID", lambda ground, grant, work: {"pasid": None}),
    "source": Rewrite("another source", lambda ground, grant, work: {"src": work["src"] + PAGE}),
    "target": Rewrite("another target", lambda ground, grant, work: {"dst": grant.iova}),
    "length": Rewrite("another length", lambda ground, grant, work: {"length": CHUNK}),
    "opcode": Rewrite("another opcode", lambda ground, grant, work: {"opcode": 0}),
}


def rewritten(ground: Ground, trial: Trial, name: str) -> None:
    """A descriptor rewritten in the middle of its work: the device goes on with what it checked."""
    length = CHUNK + PAGE
    grant = ground.wide
    work = copy(grant.pasid, grant.iova, SLOW, length)
    other = {**work, **REWRITES[name].fields(ground, grant, work)}
    with _slow(ground, grant.iommufd, grant.ioas, length) as handle:
        with ground.witnesses.around(trial, reads=(grant.iova, length), writes=(SLOW, length)):
            attempt = ground.attempt(trial, ground.g1.name, ground.a, work, "DONE")
            ticket = ground.g1.submit_start(ground.a, work)
            _asleep(ground, handle)
            ground.g1.agent.call("submit_rewrite", ticket=ticket, index=0, descriptor=other)
            ground.host.call("slow_release", handle=handle)
            (done,) = ground.g1.submit_wait(ticket)
            trial.settle(attempt, done)
            trial.require(done["pasid"] == grant.pasid, f"done by PASID {done['pasid']}")
        _landed(ground, trial, handle, grant, CHUNK)


def _landed(ground: Ground, trial: Trial, handle: int, grant: Grant, offset: int) -> None:
    """Require the page at *offset* of the slow memory to be that of the grant's range."""
    place = {"guest": grant.guest, "gpa": ground.g1.gpa + grant.offset + offset, "length": PAGE}
    here, there = ground.host.several(
        ("slow_read", {"handle": handle, "offset": offset, "length": PAGE}), ("read", place)
    )
    trial.require(here["hex"] == there["hex"], "the bytes that arrived are not those it named")
    trial.saw("what arrived is what the descriptor named when it was begun")


def rewritten_before(ground: Ground, trial: Trial) -> None:
    """A descriptor rewritten after the doorbell, before it is begun: checked as it is by then."""
    grant, theirs = ground.grant(ground.a), ground.standing(ground.c)
    first = copy(grant.pasid, grant.iova, SLOW, PAGE)
    second, other = ground.work(grant.pasid, grant.iova), ground.work(theirs.pasid, theirs.iova)
    with (
        _slow(ground, grant.iommufd, grant.ioas, PAGE) as handle,
        ground.witnesses.around(trial, reads=(grant.iova, PAGE), writes=(SLOW, PAGE)),
    ):
        attempts = [
            ground.attempt(trial, ground.g1.name, ground.a, first, "DONE"),
            ground.attempt(trial, ground.g1.name, ground.a, other, "REFUSED"),
        ]
        ticket = ground.g1.submit_start(ground.a, first, second)
        _asleep(ground, handle)
        ground.g1.agent.call("submit_rewrite", ticket=ticket, index=1, descriptor=other)
        ground.host.call("slow_release", handle=handle)
        ground.unlogged(ground.a)
        for attempt, done in zip(attempts, ground.g1.submit_wait(ticket), strict=True):
            trial.settle(attempt, done)


def rewritten_checked(ground: Ground, trial: Trial) -> None:
    """A descriptor rewritten when it is copied, and its PASID not yet found: the copy is checked.

    The PASID is being replaced, which takes as long as b's write into the new address space sleeps.
    """
    theirs, offset = ground.standing(ground.c), ground.slot(ground.g1)
    grant, seconds = ground.grant(ground.a), 20 * calibration()
    # Both address spaces have something where the grant has its slot.
    op, args = ground.mapping(ground.g1, grant.iommufd, grant.ioas, offset, SLOT, True)
    ioas = ground.registrar.ioas(grant.iommufd)
    ground.host.call(op, **{**args, "ioas": ioas, "iova": grant.iova})
    asleep = copy(ground.enter(ground.b, ground.g1, ioas), grant.iova, SLOW, PAGE)
    with _slow(ground, grant.iommufd, ioas, PAGE) as handle:
        sleeping = ground.g1.submit_start(ground.b, asleep)
        _asleep(ground, handle)
        ground.witnesses.stale()
        with ground.moving(trial, replace(grant, offset=offset)):
            entry: dict[str, Any] = {"device": ground.a, "pasid": grant.pasid}
            replacing = ground.host.start("replace", ioas=ioas, **entry)
            state = ground.host.call("wait_blocked", seconds=seconds, **entry)["state"]
            trial.require(state == "paused", f"a replace is under way, and the entry {state}")
            work = ground.work(grant.pasid, grant.iova)
            attempt = ground.attempt(trial, ground.g1.name, ground.a, work, "DONE")
            ticket = ground.g1.submit_start(ground.a, work)
            ground.host.call("wait_worker", device=ground.a, state="I", seconds=seconds)
            other = ground.work(theirs.pasid, theirs.iova)
            ground.g1.agent.call("submit_rewrite", ticket=ticket, index=0, descriptor=other)
            ground.host.call("slow_release", handle=handle)
            replacing.result(Deadline(45, "return of the replace"))
            ground.g1.submit_wait(sleeping)
            (done,) = ground.g1.submit_wait(ticket)
            ground.unlogged(ground.a)
            trial.settle(attempt, done)


def drained(ground: Ground, trial: Trial) -> None:
    """A detach under a sleeping write returns when the write is whole, and not before."""
    grant = ground.grant(ground.a)
    first = copy(grant.pasid, grant.iova, SLOW, PAGE)
    second = ground.work(grant.pasid, grant.iova)
    with _slow(ground, grant.iommufd, grant.ioas, PAGE) as handle:
        with ground.witnesses.around(trial, reads=(grant.iova, PAGE), writes=(SLOW, PAGE)):
            attempts = [
                ground.attempt(trial, ground.g1.name, ground.a, first, "DONE"),
                ground.attempt(trial, ground.g1.name, ground.a, second, "REFUSED"),
            ]
            tickets = [ground.g1.submit_start(ground.a, first)]
            _asleep(ground, handle)
            with trial.refusal("ETIMEDOUT", "completion of a write that sleeps"):
                ground.g1.submit_wait(tickets[0], 0)
            tickets.append(ground.g1.submit_start(ground.a, second))
            leaving = ground.registrar.unregister_start(ground.a, grant.pasid)
            seconds = 20 * calibration()
            entry = ground.host.call(
                "wait_blocked", device=ground.a, pasid=grant.pasid, seconds=seconds
            )
            state = entry["state"]
            trial.answer(f"detach under way: entry {state}")
            early = state != "closed" or leaving.ends_within(EARLY_SECONDS)
            ground.host.call("slow_release", handle=handle)
            leaving.result(Deadline(45, "return of detach"))
            trial.require(not early, "the detach returned with a write in flight")
            ground.unlogged(ground.a)
            for attempt, ticket in zip(attempts, tickets, strict=True):
                (done,) = ground.g1.submit_wait(ticket)
                trial.settle(attempt, done)
        _landed(ground, trial, handle, grant, 0)


# A reset


def reset(ground: Ground, trial: Trial, what: str) -> None:
    """A reset drops the work that has not begun, and keeps the list."""
    with ground.spare():
        grant = ground.spare_grant()
        first = copy(grant.pasid, grant.iova, SLOW, PAGE)
        second = ground.work(grant.pasid, grant.iova)
        with (
            _slow(ground, grant.iommufd, grant.ioas, PAGE) as handle,
            ground.witnesses.around(trial, reads=(grant.iova, PAGE), writes=(SLOW, PAGE)),
        ):
            ground.host.call("device_submit_start", name=SPARE, descriptors=[first, second])
            _asleep(ground, handle)
            resetting = ground.host.start("device_reset", name=SPARE)
            _reset_begun(ground)
            ground.host.call("slow_release", handle=handle)
            resetting.result(Deadline(45, "return of the reset"))
            ground.unlogged(SPARE)
            told = ground.host.call("device_registers", name=SPARE)
        trial.answer(f"HEAD {told['HEAD']}, TAIL {told['TAIL']}, STATUS {told['STATUS']:#x}")
        if what == "work":
            trial.require(
                told["HEAD"] == told["TAIL"] == told["STATUS"] == 0, "the ring does not start over"
            )
            return
        ground.require_list(trial, SPARE, [grant.pasid])
        ground.allowed(trial, grant, "host")


def _reset_begun(ground: Ground) -> None:
    """Return when the reset is under way: then the device takes no doorbell (the ABI says so)."""
    deadline = Deadline(30, "begin of the reset")
    while True:
        tail = ground.host.call("device_registers", name=SPARE)["TAIL"]
        told = ground.host.call("device_doorbell", name=SPARE, tail=tail + 1)
        if told["TAIL"] == tail:
            return
        deadline.remaining()


# The table


def rows(config: RigConfig, parts: Mapping[str, str]) -> list[Row]:
    """The attacks under way on a rig."""
    a, phase = parts["a"], "under way"
    whiles = [
        Row(
            phase,
            f"toctou-{name}",
            f"{a}'s descriptor is rewritten to {rewrite.said} while it is carried out",
            rewritten,
            (name,),
        )
        for name, rewrite in REWRITES.items()
    ]
    queued = f"{a}'s descriptor is rewritten before it is begun"
    checked = f"{a}'s descriptor is rewritten when it is copied, and its PASID not yet found"
    drains = f"{a}'s PASID is detached while a write by it sleeps"
    return [
        *whiles,
        Row(phase, "toctou-queued", queued, rewritten_before),
        Row(phase, "toctou-checked", checked, rewritten_checked),
        Row(phase, "detach-drains", drains, drained),
        Row(phase, "reset-work", "a reset, with work queued", reset, ("work",)),
        Row(phase, "reset-list", "a reset, with a PASID registered", reset, ("list",)),
    ]
