# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs to register PASIDs: one by one, in batches, from C, few and many.

All of it happens on one mdev of a host VM without guests: the agent has it open
while the agent is measured, the C loop while that is.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from qemu_ioasid.bench.cloop import CLoop
from qemu_ioasid.bench.table import Measurement, Ratio, Values
from qemu_ioasid.rig import Rig

#: The rig that is measured.
RIG = """\
[host]
memory = "1G"

[host.viommu]
scalable-mode = true
intremap = true

[mdev.a]
"""
DEVICE = "a"
#: The kernel walks all PASIDs of an address space whenever one comes or goes (facts.md).
PER_IOAS = 16
SIZES = (10, 100, 1_000, 10_000, 60_000)
#: The size at which the registrar is compared with the C loop.
BATCH = 10_000
SINGLE = 100
#: PASIDs on one address space, for what that walk costs.
CROWDS = (1, 16, 128, 1_000)


@dataclass(frozen=True)
class Stage:
    """The rig, the C loop in its host VM, and the mdev's character device there."""

    rig: Rig
    loop: CLoop
    cdev: str


def stage(rig: Rig, program: bytes) -> Stage:
    """Have a rig of `RIG` ready, and all that is measured run once: TCG translates it then."""
    with _open(rig) as (_, cdev):
        ready = Stage(rig, CLoop(rig.host, program), cdev)
    _one_by_one(ready, 10)
    _size(ready, 1_000)
    return ready


def measurements(stage: Stage) -> list[Measurement]:
    """What is measured in each round."""
    return [
        Measurement("one by one", "us", functools.partial(_one_by_one, stage, SINGLE)),
        *(
            Measurement(f"{size} PASIDs", "us", functools.partial(_size, stage, size))
            for size in SIZES
        ),
        *(
            Measurement(f"{crowd} PASIDs an IOAS", "us", functools.partial(_crowd, stage, crowd))
            for crowd in CROWDS
        ),
    ]


RATIOS = [
    Ratio(
        "batch-rate-to-c",
        ("attach-c", "detach-c"),
        ("register-batch", "unregister-batch"),
    ),
    Ratio(
        "batch-rate-to-one-by-one",
        ("register-one-by-one", "unregister-one-by-one"),
        ("register-batch", "unregister-batch"),
    ),
    *(
        Ratio(f"cost-60000-to-{few}-{how}", (f"register-60000-{how}",), (f"register-{few}-{how}",))
        for few in (100, 1_000)
        for how in ("batch", "c")
    ),
]


@contextlib.contextmanager
def _open(rig: Rig) -> Iterator[tuple[str, str]]:
    """The mdev, open in the agent: the name of its iommufd, and its character device's."""
    answer = rig.host.agent.call("device_open", name=DEVICE)
    try:
        yield answer["iommufd"], answer["vfio"]
    finally:
        rig.host.agent.call("device_close", name=DEVICE)


def _ioases(pasids: int, per_ioas: int = PER_IOAS) -> int:
    return (pasids - 1) // per_ioas + 1


@contextlib.contextmanager
def _timed(values: dict[str, float], name: str, items: int) -> Iterator[None]:
    """Add the microseconds that the block takes for each of *items* to a value."""
    started = time.perf_counter()
    yield
    values[name] += (time.perf_counter() - started) * 1e6 / items


def _one_by_one(stage: Stage, count: int) -> Values:
    registrar = stage.rig.registrar
    values = dict.fromkeys(("register-one-by-one", "unregister-one-by-one"), 0.0)
    with _open(stage.rig) as (iommufd, _):
        ioas = registrar.ioas(iommufd)
        with _timed(values, "register-one-by-one", count):
            for pasid in range(1, count + 1):
                registrar.register(DEVICE, iommufd, pasid, ioas)
        with _timed(values, "unregister-one-by-one", count):
            for pasid in range(1, count + 1):
                registrar.unregister(DEVICE, pasid)
    return values


def _times(size: int) -> int:
    return max(1, min(20, BATCH // size))


def _size(stage: Stage, size: int) -> Values:
    """Per PASID (or IOAS), in the agent and in C.

    With *size* in its name, a figure of the agent is by the VM's clock and
    leaves out the request's way there and back, which would make few PASIDs
    look dear and so growth look small; without, it is by ours.
    """
    outside, inside = _batch(stage, size)
    c = stage.loop.run(stage.cdev, size, _ioases(size), _times(size))
    values = {
        f"register-{size}-batch": inside["register"],
        f"unregister-{size}-batch": inside["unregister"],
        f"register-{size}-c": c["attach"],
        f"unregister-{size}-c": c["detach"],
    }
    if size == BATCH:
        values |= {f"{name}-batch": value for name, value in outside.items()}
        values |= {f"{kind.replace('_', '-')}-c": value for kind, value in c.items()}
    return values


def _batch(stage: Stage, size: int) -> tuple[Values, Values]:
    registrar = stage.rig.registrar
    pasids = [range(1, size + 1)]
    ioases, times = _ioases(size), _times(size)
    with _open(stage.rig) as (iommufd, _):
        inside = dict.fromkeys(("register", "unregister"), 0.0)
        outside = dict.fromkeys(("ioas-alloc", *inside, "ioas-destroy"), 0.0)
        with _timed(outside, "ioas-alloc", ioases):
            ioas = registrar.ioas_many(iommufd, ioases)
        for _ in range(times):
            with _timed(outside, "register", size * times):
                seconds = registrar.register_many(DEVICE, iommufd, pasids, ioas)
            inside["register"] += seconds * 1e6 / size / times
            with _timed(outside, "unregister", size * times):
                seconds = registrar.unregister_many(DEVICE, pasids)
            inside["unregister"] += seconds * 1e6 / size / times
        with _timed(outside, "ioas-destroy", ioases):
            registrar.destroy_many(iommufd, ioas)
    return outside, inside


def _crowd(stage: Stage, per_ioas: int) -> Values:
    count = 1_000
    c = stage.loop.run(stage.cdev, count, _ioases(count, per_ioas))
    return {f"register-{per_ioas}-an-ioas-c": c["attach"]}
