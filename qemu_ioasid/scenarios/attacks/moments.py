# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by moment: work that was allowed, given or gone on with when it is not any more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import calibration
from qemu_ioasid.scenarios.acts import SLOT
from qemu_ioasid.scenarios.attacks.ground import SPARE, Grant, Ground
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.table import Row

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


# The table


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
