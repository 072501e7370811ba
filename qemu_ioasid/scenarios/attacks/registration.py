# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by registration: calls that must not put a PASID into a list, nor move or end another's.

They go past the registrar, straight to the kernel, as whoever holds the fds can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.scenarios.acts import LENGTH, OWN_IOVA, SLOT, SOURCE_AT
from qemu_ioasid.scenarios.attacks.ground import (
    BASE,
    DONE,
    REFUSED,
    SPARE,
    UNMAPPED,
    WIDTH,
    Grant,
    Ground,
)
from qemu_ioasid.scenarios.checks import Skipped, Trial
from qemu_ioasid.scenarios.table import Row

#: q35's SATA controller: a PCI function behind the host VM's IOMMU that nothing of a rig uses.
FUNCTION = "0000:00:1f.2"
#: More objects than an iommufd of a rig has at a time.
MANY = 64

Args = dict[str, Any]


class Call(NamedTuple):
    """A call on device c of g2 that must fail; *args* brings about what the call names."""

    said: str
    error: str
    args: Callable[[Ground], Args]
    op: str = "raw_attach"


def _attach(ground: Ground, **changed: Any) -> Args:
    """An attach to c that would succeed, but for what is *changed*."""
    made: Args = {"pasid": ground.pasid(ground.g2.name), "ioas": ground.standing(ground.c).ioas}
    return {"device": ground.c, **made, **changed}


def _registered(ground: Ground, **changed: Any) -> Args:
    """A detach of what c has, but for what is *changed*."""
    return {"device": ground.c, "pasid": ground.standing(ground.c).pasid, **changed}


def _foreign(ground: Ground) -> Args:
    # An iommufd gives the lowest free id, so the other one's are below its few objects.
    ioas = ground.registrar.ioas_many(ground.g1.name, MANY)[-1]
    offset = ground.slot(ground.g1)
    ground.host.several(ground.mapping(ground.g1, ground.g1.name, ioas, offset, SLOT, True))
    return _attach(ground, ioas=ioas)


def _destroyed(ground: Ground) -> Args:
    ioas = ground.registrar.ioas(ground.g2.name)
    ground.registrar.destroy(ground.g2.name, ioas)
    return _attach(ground, ioas=ioas)


def _queue(ground: Ground) -> Args:
    made = ground.host.call("fault_queue_alloc", iommufd=ground.g2.name)
    return _attach(ground, ioas=made["fault_queue"])


def _second_owner(ground: Ground) -> Args:
    return _attach(ground, pasid=ground.standing(ground.a).pasid)


def _second_owner_equal(ground: Ground) -> Args:
    ours, theirs = ground.equal
    return _attach(ground, pasid=ours.pasid, ioas=theirs.ioas)


def _second_space(ground: Ground) -> Args:
    grant = ground.standing(ground.a)
    ioas = ground.registrar.ioas(ground.g1.name)
    return {"device": ground.b, "pasid": grant.pasid, "ioas": ioas}


def _shared(ground: Ground) -> Grant:
    """A grant of a, whose PASID b has too."""
    grant = ground.grant(ground.a, slots=2)
    ground.registrar.register(ground.b, ground.g1.name, grant.pasid, grant.ioas)
    return grant


def _replace_shared(ground: Ground) -> Args:
    ioas = ground.registrar.ioas(ground.g1.name)
    return {"device": ground.a, "pasid": _shared(ground).pasid, "ioas": ioas}


def _replace_foreign(ground: Ground) -> Args:
    return _attach(ground, pasid=ground.standing(ground.c).pasid, ioas=(1 << 32) - 1)


CALLS: Mapping[str, Call] = {
    "ioas-foreign": Call("an IOAS id that only the other iommufd has", "ENOENT", _foreign),
    "ioas-destroyed": Call("the id of an IOAS that was destroyed", "ENOENT", _destroyed),
    "ioas-zero": Call("IOAS id 0", "ENOENT", lambda g: _attach(g, ioas=0)),
    "ioas-all-ones": Call("IOAS id 2^32 - 1", "ENOENT", lambda g: _attach(g, ioas=(1 << 32) - 1)),
    "ioas-queue": Call("the id of a fault queue", "ENOENT", _queue),
    "pasid-zero": Call("PASID 0", "EINVAL", lambda g: _attach(g, pasid=0)),
    "pasid-width": Call("PASID 2^20", "EINVAL", lambda g: _attach(g, pasid=WIDTH)),
    "pasid-alias": Call(
        "a PASID of its own plus 2^20",
        "EINVAL",
        lambda g: _attach(g, pasid=g.standing(g.c).pasid + WIDTH),
    ),
    "pasid-all-ones": Call("PASID 2^32 - 1", "EINVAL", lambda g: _attach(g, pasid=(1 << 32) - 1)),
    "argsz-zero": Call("argsz 0", "EINVAL", lambda g: _attach(g, argsz=0)),
    "argsz-short": Call("argsz one byte short", "EINVAL", lambda g: _attach(g, argsz=11)),
    "argsz-no-pasid": Call("argsz without the PASID", "EINVAL", lambda g: _attach(g, argsz=12)),
    "flag-unknown": Call("a flag there is not", "EINVAL", lambda g: _attach(g, flags=3)),
    "flags-all-ones": Call("flags 2^32 - 1", "EINVAL", lambda g: _attach(g, flags=(1 << 32) - 1)),
    "owner-second": Call("a PASID of the other guest's", "EBUSY", _second_owner),
    "owner-second-equal": Call(
        "a PASID of the other guest's, for an IOAS of the same number", "EBUSY", _second_owner_equal
    ),
    "space-second": Call(
        "its guest's other device's PASID, for another IOAS", "EBUSY", _second_space
    ),
    "replace-shared": Call("another IOAS for a PASID that two share", "EBUSY", _replace_shared),
    "replace-unknown": Call("an unknown IOAS for a PASID it has", "ENOENT", _replace_foreign),
    "detach-argsz": Call(
        "a detach with argsz without the PASID",
        "EINVAL",
        lambda g: _registered(g, argsz=8),
        "raw_detach",
    ),
    "detach-flag": Call(
        "a detach with a flag there is not",
        "EINVAL",
        lambda g: _registered(g, flags=3),
        "raw_detach",
    ),
    "destroy-used": Call(
        "to destroy an IOAS that a PASID names",
        "EBUSY",
        lambda g: {"iommufd": g.g2.name, "ioas": g.standing(g.c).ioas},
        "ioas_destroy",
    ),
    "bind-again": Call(
        "to bind once more", "EINVAL", lambda g: {"device": g.c, "iommufd": g.g1.name}, "raw_bind"
    ),
    "bind-argsz": Call(
        "to bind with argsz 0",
        "EINVAL",
        lambda g: {"device": g.c, "iommufd": g.g1.name, "argsz": 0},
        "raw_bind",
    ),
    "bind-flag": Call(
        "to bind with a flag there is not",
        "EINVAL",
        lambda g: {"device": g.c, "iommufd": g.g1.name, "flags": 2},
        "raw_bind",
    ),
}


def refused(ground: Ground, trial: Trial, name: str) -> None:
    """The call fails as it must, the kernel's books are as before, and so is all memory.

    What it named, if it named a PASID that the device has not, is refused by the device.
    """
    case = CALLS[name]
    grant = ground.standing(ground.c)
    args = case.args(ground)
    device = args.get("device", ground.c)
    with ground.witnesses.around(trial), ground.unchanged(trial):
        with trial.refusal(case.error, case.op.removeprefix("raw_")):
            ground.host.call(case.op, **args)
        if case.op != "raw_attach" or case.args in (_replace_shared, _replace_foreign):
            return
        work = ground.work(args["pasid"], grant.iova)
        ground.does(trial, ground.owner[device].name, device, work, REFUSED)


# What a device that is not bound, or another kind of object, is good for


@contextlib.contextmanager
def _file(ground: Ground, device: str) -> Iterator[str]:
    """A file of its own of *device*, bound to nothing."""
    ground.host.call("file_open", name="stray", device=device)
    try:
        yield "stray"
    finally:
        ground.host.call("file_close", name="stray")


def _access(how: str, region: int) -> Callable[[Ground, str], Args]:
    # Where a region lies is told of a bound file only, and the same for all devices.
    return lambda g, file: {"device": file, "like": g.c, "region": region, "how": how}


class Reach(NamedTuple):
    """A way to a device, by its operation and the arguments for a file."""

    said: str
    op: str
    args: Callable[[Ground, str], Args]


UNBOUND = {
    "attach": Reach("to register a PASID", "raw_attach", lambda g, file: _attach(g, device=file)),
    "detach": Reach(
        "to take away a PASID", "raw_detach", lambda g, file: _registered(g, device=file)
    ),
    "bind": Reach("to bind", "raw_bind", lambda g, file: {"device": file, "iommufd": g.g1.name}),
    "submit": Reach(
        "to submit work",
        "file_submit",
        lambda g, file: {
            "device": file,
            "descriptors": [g.work(g.standing(g.c).pasid, g.standing(g.c).iova)],
            "seconds": 1,
        },
    ),
    "read": Reach("to read a register", "file_access", _access("read", 0)),
    "write": Reach("to write a register", "file_access", _access("write", 0)),
    "map": Reach("to map the rings", "file_access", _access("map", 2)),
}


def unbound(ground: Ground, trial: Trial, name: str, whose: str) -> None:
    """A file that is bound to nothing gives no way in, whether its device is open or not."""
    device = SPARE if whose == SPARE else ground.c
    with ground.spare(opened=False), _file(ground, device) as file:
        args = UNBOUND[name].args(ground, file)
        with (
            ground.witnesses.around(trial),
            ground.unchanged(trial),
            trial.refusal("EINVAL", name),
        ):
            ground.host.call(UNBOUND[name].op, **args)


OBJECTS = {"hwpt": "a page table (HWPT)", "device": "a physical device"}


def object_id(ground: Ground, trial: Trial, kind: str) -> None:
    """A PASID names an IOAS, and no other object of the iommufd that a device is bound to."""
    reason = ground.rig.host.cannot_tell_stage()
    if reason:
        raise Skipped(f"the functions of this machine are not ours to take: {reason}")
    host, iommufd = ground.host, f"agent:{SPARE}"
    with ground.spare() as spare, _file(ground, FUNCTION) as file:
        found = host.call("raw_bind", device=file, iommufd=iommufd)["devid"]
        if kind == "hwpt":
            ioas = ground.registrar.ioas(iommufd)
            found = host.call("hwpt_alloc", iommufd=iommufd, devid=found, ioas=ioas)["hwpt"]
        trial.answer(f"{OBJECTS[kind]} has id {found}")
        pasid = ground.pasid(iommufd)
        with ground.witnesses.around(trial), ground.unchanged(trial):
            with trial.refusal("ENOENT", "attach"):
                host.call("raw_attach", device=spare, pasid=pasid, ioas=found)
            ground.does(trial, "host", spare, ground.work(pasid, OWN_IOVA), REFUSED)


def equal_ids(ground: Ground, trial: Trial) -> None:
    """An id that both iommufds have names, for a device, the memory of its own."""
    _, theirs = ground.equal
    grant = replace(theirs, pasid=ground.enter(ground.c, ground.g2, theirs.ioas))
    ground.allowed(trial, grant)
    ground.leave(grant)


def last_pasid(ground: Ground, trial: Trial) -> None:
    """The last PASID that there is can be registered, and works."""
    grant = ground.grant(ground.c)
    ground.leave(grant)
    ground.host.call("raw_attach", device=ground.c, pasid=WIDTH - 1, ioas=grant.ioas)
    ground.allowed(trial, replace(grant, pasid=WIDTH - 1))
    ground.host.call("raw_detach", device=ground.c, pasid=WIDTH - 1)


# The copy-out that fails (docs/facts.md): nothing may be registered by a call that answers EFAULT


COPY_OUTS = {
    "list": "no PASID is registered",
    "own": "the device's own address space stays attached",
    "replace": "a PASID that was registered is so no more, whatever it named",
}


def copy_out(ground: Ground, trial: Trial, what: str) -> None:
    """An attach whose argument cannot be written back answers EFAULT, and has done nothing."""
    iommufd = f"agent:{SPARE}"
    with ground.spare() as spare:
        offset = ground.slot(ground.g1)
        ground.host.several(
            ground.mapping(ground.g1, iommufd, ground.spare_own, offset, SLOT, True)
        )
        ioas = ground.mapped(ground.g1, iommufd, (offset, SLOT))
        pasid, name = ground.pasid(iommufd), ground.g1.name
        grant = Grant(spare, name, iommufd, pasid, ioas, BASE + offset, offset, SLOT)
        if what == "replace":
            empty = ground.registrar.ioas(iommufd)
            ground.host.call("raw_attach", device=spare, pasid=pasid, ioas=empty)
        with trial.refusal("EFAULT", "attach"):
            ground.host.call("raw_attach", device=spare, pasid=pasid, ioas=ioas, readonly=True)
        if what == "own":
            with ground.moving(trial, grant):
                ground.does(trial, "host", spare, ground.work(None, grant.iova), DONE)
        else:
            ground.require_list(trial, spare, [])
            ground.denied(trial, spare, pasid, grant.iova, "host")


def unwritten_own(ground: Ground, trial: Trial) -> None:
    """As `copy_out`, of the device's own address space, which Linux as released does right."""
    with ground.spare() as spare:
        offset = ground.slot(ground.g1)
        ioas = ground.mapped(ground.g1, f"agent:{SPARE}", (offset, SLOT))
        with trial.refusal("EFAULT", "attach"):
            ground.host.call("raw_attach", device=spare, ioas=ioas, readonly=True)
        iova = BASE + offset
        at = iova + SOURCE_AT
        with ground.witnesses.around(trial, reads=(at, LENGTH)):
            ground.does(trial, "host", spare, ground.work(None, iova), UNMAPPED["source"], at)


# One PASID on two devices


SHARING = {
    "first-leaves": "the device that had a shared PASID first leaves it",
    "second-leaves": "the device that joined a shared PASID leaves it",
    "both-leave": "both devices leave a shared PASID",
    "detach-other": "a device detaches a PASID that it has not",
    "again": "both devices register a shared PASID again, for the IOAS that it names",
}


def sharing(ground: Ground, trial: Trial, name: str) -> None:
    """Each loses its own entry only, and the last one takes the table's along."""
    if name == "detach-other":
        grant = ground.grant(ground.a)
        with ground.unchanged(trial):
            ground.host.call("raw_detach", device=ground.c, pasid=grant.pasid)
            ground.host.call("raw_detach", device=ground.b, pasid=grant.pasid)
        trial.answer("detach: 0, twice")
        ground.allowed(trial, grant)
        return
    grant = _shared(ground)
    if name == "again":
        for device in (ground.a, ground.b):
            ground.host.call("raw_attach", device=device, pasid=grant.pasid, ioas=grant.ioas)
        ground.allowed(trial, replace(grant, device=ground.b))
        return
    leaves, stays = (ground.a, ground.b) if name == "first-leaves" else (ground.b, ground.a)
    ground.registrar.unregister(leaves, grant.pasid)
    if name == "both-leave":
        ground.registrar.unregister(stays, grant.pasid)
        with trial.refusal("ENOENT", "unregister again"):
            ground.registrar.unregister(stays, grant.pasid)
        table = ground.registrar.kernel_table()
        trial.require(grant.pasid not in table, f"the parent's table has it still: {table}")
        ground.denied(trial, stays, grant.pasid, grant.iova)
    else:
        ground.allowed(trial, replace(grant, device=stays))
    ground.denied(trial, leaves, grant.pasid, grant.iova)


# The tables


def rows(config: RigConfig, parts: Mapping[str, str]) -> list[Row]:
    """The attacks by registration on a rig."""
    c = parts["c"]
    phase = "by registration"
    found = [
        Row(phase, f"register-{name}", f"{c} is told {case.said}", refused, (name,))
        for name, case in CALLS.items()
    ]
    found += [
        Row(phase, f"register-id-{kind}", f"an mdev's PASID is to name {said}", object_id, (kind,))
        for kind, said in OBJECTS.items()
    ]
    found += [
        Row(phase, "register-id-equal", f"{c} registers an id that both iommufds have", equal_ids),
        Row(phase, "register-pasid-last", f"{c} registers PASID 2^20 - 1", last_pasid),
    ]
    found += [
        Row(
            "with a file that is not bound",
            f"unbound-{way}-{name}",
            f"{reach.said} through a file of {whose} that is not bound",
            unbound,
            (way, whose),
        )
        for whose, name in ((SPARE, "closed"), (c, "open"))
        for way, reach in UNBOUND.items()
        if not (way == "bind" and whose == SPARE)
    ]
    found += [
        Row(
            "copy-out",
            f"copy-out-{name}",
            f"the argument may only be read: {said}",
            copy_out,
            (name,),
        )
        for name, said in COPY_OUTS.items()
    ]
    found.append(
        Row(
            "copy-out",
            "unwritten-own",
            "the argument may only be read: work without a PASID has no address space",
            unwritten_own,
        )
    )
    found += [
        Row("shared", f"shared-{name}", said, sharing, (name,)) for name, said in SHARING.items()
    ]
    return found
