# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by moment: work that was allowed, given or gone on with when it is not any more."""

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

# The memory goes, the PASID stays


def unmapped(ground: Ground, trial: Trial, device: str) -> None:
    """Unmapping ends what a PASID reaches, at once."""
    grant = ground.grant(device)
    _unmap(ground, grant)
    ground.faulted(trial, device, grant.pasid, grant.iova)


def _unmap(ground: Ground, grant: Grant) -> None:
    ground.host.call(
        "ioas_unmap",
        iommufd=grant.iommufd,
        ioas=grant.ioas,
        iova=grant.iova,
        length=grant.length,
    )


def mapped_anew(ground: Ground, trial: Trial, device: str) -> None:
    """What is mapped where something else was is what work finds there."""
    grant = ground.grant(device)
    _unmap(ground, grant)
    guest = ground.owner[device]
    offset = ground.slot(guest)
    op, args = ground.mapping(guest, grant.iommufd, grant.ioas, offset, SLOT, True)
    ground.host.call(op, **{**args, "iova": grant.iova})
    ground.allowed(trial, replace(grant, offset=offset))


def replaced(ground: Ground, trial: Trial, device: str) -> None:
    """A PASID that names another IOAS reaches nothing of the one it named."""
    grant = ground.grant(device)
    guest = ground.owner[device]
    ioas = ground.mapped(guest, guest.name, (ground.slot(guest), SLOT))
    ground.registrar.replace(device, grant.pasid, ioas)
    ground.faulted(trial, device, grant.pasid, grant.iova)
    ground.registrar.destroy(guest.name, grant.ioas)


# The device's file, and who has it


def closed(ground: Ground, trial: Trial) -> None:
    """The last close ends the list: a device opened again has none."""
    with ground.spare():
        grant = ground.spare_grant()
    _opened_anew(ground, trial, grant)


def _opened_anew(ground: Ground, trial: Trial, grant: Grant) -> None:
    with ground.spare():
        ground.require_list(trial, SPARE, [])
        table = ground.registrar.kernel_table()
        trial.require(grant.pasid not in table, f"the parent's table has it still: {table}")
        ground.denied(trial, SPARE, grant.pasid, grant.iova, "host")


def kept(ground: Ground, trial: Trial) -> None:
    """A duplicate of the file keeps the list, and is as good as the file."""
    with ground.spare():
        grant = ground.spare_grant()
        ground.host.call("file_keep", name="kept", device=SPARE)
    try:
        ground.require_list(trial, SPARE, [grant.pasid])
        _by_file(ground, trial, "kept", grant)
    finally:
        ground.host.call("file_close", name="kept")


def _by_file(ground: Ground, trial: Trial, file: str, grant: Grant) -> None:
    """Work through a bare file of the host side moves the grant's bytes."""
    work = ground.work(grant.pasid, grant.iova)
    with ground.moving(trial, grant):
        attempt = ground.attempt(trial, "host", grant.device, work, "DONE")
        seconds = 20 * calibration()
        (done,) = ground.host.call("file_submit", device=file, descriptors=[work], seconds=seconds)
        trial.settle(attempt, done)


def iommufd_closed(ground: Ground, trial: Trial) -> None:
    """Closing the iommufd alone changes nothing: the bound device holds it."""
    with ground.spare():
        grant = ground.spare_grant()
        ground.host.call("iommufd_close", iommufd=grant.iommufd)
        ground.require_list(trial, SPARE, [grant.pasid])
        ground.allowed(trial, grant, "host")
    _opened_anew(ground, trial, grant)


# A process that holds the files, and dies


@contextlib.contextmanager
def _holder(ground: Ground) -> Iterator[None]:
    """A process forked with the spare mdev's file and its iommufd; killed with the block."""
    ground.host.call("holder_start", name="holder", device=SPARE, iommufd=f"agent:{SPARE}")
    try:
        yield
    finally:
        ground.host.call("holder_kill", name="holder")


def _by_holder(ground: Ground, trial: Trial, grant: Grant) -> None:
    work = ground.work(grant.pasid, grant.iova)
    with ground.moving(trial, grant):
        attempt = ground.attempt(trial, "host", grant.device, work, "DONE")
        args = {"descriptors": [work], "seconds": 20 * calibration()}
        (done,) = ground.host.call("holder_call", name="holder", what="submit", args=args)
        trial.settle(attempt, done)


def _unregistered_grant(ground: Ground) -> Grant:
    grant = ground.spare_grant()
    ground.leave(grant)
    return grant


def forked(ground: Ground, trial: Trial) -> None:
    """The file is who has it: what a child registers stays when it dies."""
    with ground.spare():
        grant = _unregistered_grant(ground)
        with _holder(ground):
            entry = {"pasid": grant.pasid, "ioas": grant.ioas}
            ground.host.call("holder_call", name="holder", what="attach", args=entry)
        trial.answer("a child registered it and was killed")
        ground.require_list(trial, SPARE, [grant.pasid])
        ground.allowed(trial, grant, "host")


def parent_closed(ground: Ground, trial: Trial) -> None:
    """A child that inherited the file keeps the list when its parent closes its own."""
    with contextlib.ExitStack() as stack:
        with ground.spare():
            grant = ground.spare_grant()
            stack.enter_context(_holder(ground))
        ground.require_list(trial, SPARE, [grant.pasid])
        _by_holder(ground, trial, grant)


def module_killed(ground: Ground, trial: Trial) -> None:
    """With the process that held all files, killed, go its registrations."""
    with contextlib.ExitStack() as stack:
        with ground.spare():
            grant = ground.spare_grant()
            stack.enter_context(_holder(ground))
        ground.require_list(trial, SPARE, [grant.pasid])
    _opened_anew(ground, trial, grant)


def module_killed_kept(ground: Ground, trial: Trial) -> None:
    """As that, and somebody has kept a duplicate of the device's file: all is as it was."""
    with contextlib.ExitStack() as stack:
        with ground.spare():
            grant = ground.spare_grant()
            ground.host.call("file_keep", name="kept", device=SPARE)
            stack.callback(ground.host.call, "file_close", name="kept")
            with _holder(ground):
                pass
        ground.require_list(trial, SPARE, [grant.pasid])
        _by_file(ground, trial, "kept", grant)


# Work under way


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
    here, there = ground.several(
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
            ticket = ground.g1.submit_start(ground.a, first, second)
            _asleep(ground, handle)
            with trial.refusal("ETIMEDOUT", "completion of a write that sleeps"):
                ground.g1.submit_wait(ticket, 0)
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
            for attempt, done in zip(attempts, ground.g1.submit_wait(ticket), strict=True):
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


# The end of a guest


def dead_kept(ground: Ground, trial: Trial) -> None:
    """QEMU is killed, and a duplicate of its device's file lives: so does the list, and works."""
    grant = ground.grant(ground.c)
    listed = ground.registrar.kernel_list(ground.c)
    ground.host.call("file_keep", name="kept", device=ground.c)
    try:
        _kill(ground, ground.g2.name)
        ground.require_list(trial, ground.c, listed)
        _by_file(ground, trial, "kept", grant)
    finally:
        ground.host.call("file_close", name="kept")
    _host_opens(ground, trial, grant)


def _kill(ground: Ground, guest: str) -> None:
    ground.rig.stop_guest(guest)
    ground.witnesses.gone(guest)


def _host_opens(ground: Ground, trial: Trial, grant: Grant) -> None:
    """The device of a dead guest, opened anew, has no list."""
    ground.host.call("device_open", name=grant.device)
    ground.unlogged(grant.device)
    try:
        ground.require_list(trial, grant.device, [])
        ground.denied(trial, grant.device, grant.pasid, grant.iova, "host")
    finally:
        ground.host.call("device_close", name=grant.device)


def dead(ground: Ground, trial: Trial) -> None:
    """QEMU is killed, and nobody has kept anything: the lists of its devices are gone."""
    grants = [ground.grant(device) for device in ground.g1.mdevs]
    _kill(ground, ground.g1.name)
    for grant in grants:
        _host_opens(ground, trial, grant)
    table = ground.registrar.kernel_table()
    left = sorted({grant.pasid for grant in grants} & set(table))
    trial.require(not left, f"the parent's table has {left} still")


# The tables


def rows(config: RigConfig, parts: Mapping[str, str]) -> list[Row]:
    """The attacks by moment on a rig; those that kill a guest are the last."""
    a, c, g1, g2 = parts["a"], parts["c"], parts["g1"], parts["g2"]
    found: list[Row] = []

    def add(phase: str, name: str, said: str, act: Callable[..., None], *arguments: str) -> None:
        found.append(Row(phase, name, said, act, arguments))

    memory: Mapping[str, tuple[str, Callable[..., None]]] = {
        "unmapped": ("was unmapped", unmapped),
        "mapped-anew": ("was unmapped, and another mapped in its place", mapped_anew),
        "replaced": ("is of the IOAS that its PASID named before", replaced),
    }
    for name, (said, act) in memory.items():
        for device in (a, c):
            add(
                "after a change of memory",
                f"{name}-{device}",
                f"{device} copies what {said}",
                act,
                device,
            )
    under_way = "under way"
    for name, rewrite in REWRITES.items():
        said = f"{a}'s descriptor is rewritten to {rewrite.said} while it is carried out"
        add(under_way, f"toctou-{name}", said, rewritten, name)
    add(
        under_way,
        "toctou-queued",
        f"{a}'s descriptor is rewritten before it is begun",
        rewritten_before,
    )
    add(under_way, "detach-drains", f"{a}'s PASID is detached while a write by it sleeps", drained)
    add(under_way, "reset-work", "a reset, with work queued", reset, "work")
    add(under_way, "reset-list", "a reset, with a PASID registered", reset, "list")
    files: Mapping[str, tuple[str, Callable[..., None]]] = {
        "closed": ("closed by the last who had it, and opened again", closed),
        "kept": ("closed, but for a duplicate", kept),
        "iommufd-closed": ("open, and its iommufd closed", iommufd_closed),
        "fork-dies": ("left open by a child that registers and is killed", forked),
        "fork-parent-closes": ("closed by the parent of a child that has it", parent_closed),
        "module-killed": ("held by a process that is killed", module_killed),
        "module-killed-kept": (
            "held by a process that is killed, but for a duplicate",
            module_killed_kept,
        ),
    }
    for name, (said, act) in files.items():
        add("with the device's file", f"file-{name}", f"an mdev's file is {said}", act)
    add(
        "after a guest's death",
        f"dead-kept-{c}",
        f"{g2}'s QEMU is killed, a duplicate kept",
        dead_kept,
    )
    add("after a guest's death", f"dead-{g1}", f"{g1}'s QEMU is killed, nothing kept", dead)
    return found
