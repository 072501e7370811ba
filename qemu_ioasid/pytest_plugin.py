# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest fixtures: rigs that are up in a second, and kernels that answer for what they say.

``rig`` is fresh for each test, ``shared_rig`` is kept and reset from test to
test; ``host``, ``guests`` and ``mdev`` are parts of whichever of them the test
uses. docs/pytest.md tells more.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import config, kernel, matrix, process
from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import (
    ConfigurationError,
    InfrastructureError,
    KernelBroke,
    RequirementError,
)
from qemu_ioasid.hostdevice import HostDevice
from qemu_ioasid.hostvm import HostMachine
from qemu_ioasid.kernel import Spec
from qemu_ioasid.matrix import Variant
from qemu_ioasid.qemu import ACCELERATORS
from qemu_ioasid.requirement import unmet
from qemu_ioasid.rig import Guest, Rig
from qemu_ioasid.rigpool import Pool, Used
from qemu_ioasid.session import Options, Output, vms
from qemu_ioasid.standby import Start

RIG_MARKER = (
    "ioasid_rig(file=None, *, mdevs=(), **guests): the rig's shape: a rig file (beside the test), "
    'or guests with their mdevs, as in ioasid_rig(g1=["a", "b"], g2=["c"]); mdevs=["x"] are '
    "nobody's"
)
REQUIRES_MARKER = (
    'ioasid_requires(*features): what the test needs: options of QEMU\'s intel-iommu ("fsts", '
    '"pasid-bits=20"), or accelerators ("kvm"). Missing: skipped, '
    "or failed where CI is set"
)

_POOL = pytest.StashKey[Pool]()
_VARIANTS = pytest.StashKey[list[Variant]]()
_USED = pytest.StashKey[list[tuple[Used, dict[str, int]]]]()
_FOLDER = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ioasid", "qemu_ioasid: rigs of a host VM with guests in it")
    add = group.addoption
    add("--ioasid-rig", type=Path, metavar="FILE", help="the rig of tests that name none")
    add("--ioasid-qemu", default="auto", metavar="PROGRAM", help="the host VM's QEMU")
    add("--ioasid-accel", default="auto", choices=ACCELERATORS, help="kvm refuses to fall back")
    add("--ioasid-profile", default="default", choices=kernel.PROFILES, help="the kernel's")
    add("--ioasid-kernel", default="", metavar="NAME", help=kernel.FORMS)
    add("--ioasid-series", default="", metavar="SERIES", help=kernel.SERIES_FORMS)
    add("--ioasid-report", type=Path, metavar="DIR", help="where failures are kept")
    add("--ioasid-matrix", type=Path, metavar="FILE", help="run each test over its combinations")
    add("--ioasid-keep-rig", action="store_true", help="save the rig of a test that failed")
    add("--ioasid-cold", action="store_true", help="boot rigs instead of restoring them")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (RIG_MARKER, REQUIRES_MARKER):
        config.addinivalue_line("markers", marker)
    given = config.getoption("--ioasid-matrix")
    try:
        config.stash[_VARIANTS] = matrix.load(given) if given else []
    except ConfigurationError as error:
        raise pytest.UsageError(error.message) from None
    # Workers of pytest-xdist keep their failures where the first process keeps its own.
    started: Mapping[str, str] = getattr(config, "workerinput", {})
    stamp = started.get("ioasid_stamp") or time.strftime("%Y%m%d-%H%M%S")
    folder = config.getoption("--ioasid-report") or Path("reports", f"pytest-{stamp}")
    config.stash[_FOLDER] = Path(os.path.abspath(folder))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["ioasid_stamp"] = node.config.stash[_FOLDER].name.removeprefix("pytest-")


def pytest_unconfigure(config: pytest.Config) -> None:
    pool = config.stash.get(_POOL, None)
    if pool is not None:
        pool.close()
        process.close_run()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    variants = metafunc.config.stash[_VARIANTS]
    if variants and "ioasid_variant" in metafunc.fixturenames:
        names = [variant.name for variant in variants]
        metafunc.parametrize("ioasid_variant", variants, ids=names, indirect=True)


# What a test asks for


def _pool(config: pytest.Config) -> Pool:
    if _POOL not in config.stash:

        def say(line: str) -> None:
            sys.stderr.write(f"ioasid: {line}\n")

        counts = config.stash[_FOLDER] / "coverage"
        config.stash[_POOL] = Pool(Output(say, lambda line: None), counts)
    return config.stash[_POOL]


def _options(config: pytest.Config) -> Options:
    spec = Spec(profile=config.getoption("--ioasid-profile"))
    return Options(
        accelerator=config.getoption("--ioasid-accel"),
        qemu=config.getoption("--ioasid-qemu"),
        kernel=spec.naming(*map(config.getoption, ("--ioasid-kernel", "--ioasid-series"))),
        start=Start(cold=config.getoption("--ioasid-cold")),
    )


def _shape(item: pytest.Item, changes: Mapping[str, str]) -> RigConfig:
    mark = item.get_closest_marker("ioasid_rig")
    if mark is None:
        given = item.config.getoption("--ioasid-rig")
        return config.load(given or config.DEFAULT, changes)
    guests = dict(mark.kwargs)
    mdevs = guests.pop("mdevs", ())
    if len(mark.args) > 1 or (mark.args and mark.kwargs):
        raise pytest.UsageError(f"{item.nodeid}: a marker is used wrongly: {RIG_MARKER}")
    if mark.args:
        return config.load(item.path.parent / mark.args[0], changes)
    if not all(isinstance(owned, list | tuple) for owned in [mdevs, *guests.values()]):
        raise pytest.UsageError(f"{item.nodeid}: a marker is used wrongly: {RIG_MARKER}")
    return config.shape(guests, mdevs, changes)


def _missing(reason: str) -> None:
    """A requirement is not met: a reason to skip for a person, a failure where nobody looks."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{reason} (a skip here would go unseen in CI)", pytrace=False)
    pytest.skip(reason)


class _Wish:
    """The configuration and options of one test, its requirements met."""

    def __init__(self, item: pytest.Item, variant: Variant | None) -> None:
        try:
            self.options = _options(item.config)
            if variant is not None:
                self.options = variant.options(self.options)
            self.config = _shape(item, self.options.changes)
            self.parts = _pool(item.config).parts(self.config, self.options)
            for mark in item.iter_markers("ioasid_requires"):
                for feature in mark.args:
                    reason = unmet(str(feature), self.parts)
                    if reason:
                        _missing(reason)
        except ConfigurationError as error:
            pytest.fail(error.message, pytrace=False)
        except RequirementError as error:
            _missing(error.message)


def _use(item: pytest.Item, used: Used) -> None:
    """Have *item* answer for what this rig's kernels say from now on."""
    seen = {console.name: len(console.reports) for console in used.rig.consoles}
    item.stash.setdefault(_USED, []).append((used, seen))
    kernel, qemu = used.versions["kernel"], used.versions["qemu"]
    told = {
        "kernel": f"{kernel['release']} {kernel['hash']}",
        "series": used.versions["series"],
        "qemu": qemu["host"],
        "guests_qemu": qemu["guests"],
        "accelerator": used.accelerator,
        **{f"viommu.{vm['name']}": vm["viommu"] for vm in vms(used.config, used.parts)},
    }
    item.user_properties += [(f"ioasid.{name}", value) for name, value in told.items()]


# Fixtures


@pytest.fixture
def ioasid_variant(request: pytest.FixtureRequest) -> Variant | None:
    """The combination of ``--ioasid-matrix`` that this test runs on."""
    return getattr(request, "param", None)


@pytest.fixture
def rig(request: pytest.FixtureRequest, ioasid_variant: Variant | None) -> Iterator[Rig]:
    """A rig of this test's own, as it was when its last guest had come up."""
    wish = _Wish(request.node, ioasid_variant)
    with contextlib.ExitStack() as stack:
        used = stack.enter_context(_pool(request.config).fresh(wish.config, wish.options))
        _use(request.node, used)
        yield used.rig
        # What its consoles say was judged in the test's own name: pytest_runtest_call.
        stack.push(lambda kind, error, where: isinstance(error, KernelBroke))


@pytest.fixture
def shared_rig(request: pytest.FixtureRequest, ioasid_variant: Variant | None) -> Iterator[Rig]:
    """A rig kept from test to test, as long as they ask for the same one.

    After each test every registration and mapping is undone, and the kernel's
    lists must be empty. A rig that a test has damaged is not used again.
    """
    wish = _Wish(request.node, ioasid_variant)
    pool = _pool(request.config)
    used = pool.shared(wish.config, wish.options)
    _use(request.node, used)
    try:
        yield used.rig
        if any(console.broken.is_set() for console in used.rig.consoles):
            pool.discard()
            return
        left = used.rig.reset()
    except BaseException:
        pool.discard()
        raise
    if left:
        pool.discard()
        gone = [each for each in left if each.endswith(" is gone")]
        if left != gone:
            pytest.fail(f"after the test and a reset, {'; '.join(left)}", pytrace=False)


def _either(request: pytest.FixtureRequest) -> Rig:
    name = "shared_rig" if "shared_rig" in request.fixturenames else "rig"
    found: Rig = request.getfixturevalue(name)
    return found


@pytest.fixture
def host(request: pytest.FixtureRequest, ioasid_variant: Variant | None) -> HostMachine:
    """The host VM of the test's rig."""
    return _either(request).host


@pytest.fixture
def guests(request: pytest.FixtureRequest, ioasid_variant: Variant | None) -> dict[str, Guest]:
    """The guests of the test's rig, by name."""
    return _either(request).guests


@pytest.fixture
def mdev(request: pytest.FixtureRequest, ioasid_variant: Variant | None) -> Iterator[HostDevice]:
    """A new mdev of the host VM, opened there: no guest has it, and it is gone after the test."""
    with HostDevice(_either(request), "mdev") as device:
        yield device


# Blame


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A report of a kernel during a test is this test's failure, and the cause of any other."""
    try:
        result = yield
    except Exception:
        _judge(item, final=False)
        raise
    _judge(item, final=True)
    return result


def _judge(item: pytest.Item, *, final: bool) -> None:
    said = ""
    for used, seen in item.stash.get(_USED, []):
        try:
            # A rig that is broken otherwise may not answer: that failure is there already.
            with contextlib.nullcontext() if final else contextlib.suppress(InfrastructureError):
                if not used.rig.host.agent.lost:
                    used.rig.settle()
            used.rig.check_consoles(seen)
        except KernelBroke as error:
            said = said or f"{error.message}\n{error.evidence}"
    if said:
        raise pytest.fail.Exception(said, pytrace=False) from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the consoles and logs of a test that failed, while its rig still stands."""
    report = yield
    used = item.stash.get(_USED, [])
    if report.when == "call" and report.failed and used:
        folder = item.config.stash[_FOLDER] / re.sub(r"[^\w.\[\]-]+", "_", item.nodeid)[-120:]
        snapshot = bool(item.config.getoption("--ioasid-keep-rig"))
        for each, _ in used:
            each.keep(folder, item.nodeid, snapshot=snapshot)
        told = f"consoles and logs: {os.path.relpath(folder)}"
        if (folder / "snapshot").is_dir():
            told += f"\nthe rig as it stood: qemu-ioasid lab open {os.path.relpath(folder)}"
        report.sections.append(("qemu_ioasid", told))
    return report
