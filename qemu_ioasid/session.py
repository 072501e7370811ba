# SPDX-License-Identifier: GPL-2.0-or-later
"""One run from nothing to a verdict: kernel, images, QEMU, rig, scenario, report."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qemu_ioasid import (
    agentdisk,
    cache,
    config,
    gcov,
    image,
    kernel,
    localhost,
    parts,
    preflight,
    qemu,
    scenarios,
    standby,
)
from qemu_ioasid.cache import explained
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, RequirementError, RigError
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.localhost import LocalParts
from qemu_ioasid.process import current_run
from qemu_ioasid.qemu import Qemu
from qemu_ioasid.report import Enough, Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios import table
from qemu_ioasid.standby import Start

#: A clean build, of the reference machine with other work on it.
BUILD_SECONDS = 3000.0


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt."""


@dataclass(frozen=True)
class Options:
    """What a run is told. *report* None: a new folder below ``reports``."""

    rig: Path = config.DEFAULT
    scenario: str = "isolation"
    #: What the scenario takes by name (`Scenario.takes`), where the user said it.
    order: Mapping[str, Any] = field(default_factory=dict)
    #: The checks to make, by name; none: all.
    checks: tuple[str, ...] = ()
    #: Whether the first check that fails ends the run.
    first: bool = False
    accelerator: str = "auto"
    qemu: str = "auto"
    #: Laid over the rig file: see `config.load`.
    changes: Mapping[str, str] = field(default_factory=dict)
    kernel: kernel.Spec = field(default_factory=kernel.Spec)
    report: Path | None = None
    #: Added to the host VM's kernel command line.
    append: str = ""
    start: Start = field(default_factory=Start)
    #: ``vm``, or ``local``: this machine itself.
    host: str = "vm"
    #: What `parts.export` left, for a local host; None: build it.
    parts: Path | None = None


@dataclass(frozen=True)
class Output:
    """Where a run talks to: *say* a line that stays, *progress* how far the step is that *begins*.

    A step begins with its name; "" is the end of the last one.
    """

    say: Callable[[str], None]
    progress: Callable[[str], None]
    begins: Callable[[str], None] = lambda step: None


def private_qemu(
    output: Output, name: str = "private"
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """A private QEMU's argv prefix and environment, built if need be."""
    if not image.RECIPES.is_dir():
        raise RequirementError("this copy of qemu-ioasid builds none; install QEMU 10.0 or later")
    found = image.private_qemu(
        name, deadline=Deadline(BUILD_SECONDS, "private QEMU"), progress=output.progress
    )
    return found.argv, found.env


def choose_qemu(options: Options, output: Output) -> tuple[Qemu, str, str]:
    """The QEMU of the VMs we start, the accelerator, and why it is not KVM."""
    found = qemu.find(
        options.qemu,
        lambda name: private_qemu(output, name),
        output.say,
        Deadline(60, "answers of QEMU to the probe"),
    )
    chosen, why = qemu.accelerator(options.accelerator, found, nested=options.host == "vm")
    if why and options.accelerator == "auto":
        output.say(f"no KVM ({why}): everything runs under TCG")
    return found, chosen, why


def build(options: Options, configuration: RigConfig, output: Output, report: Report) -> HostParts:
    """Have kernel, images and QEMU ready; what is there already costs nothing.

    Refuses first what *configuration* asks of a QEMU or an accelerator that
    cannot do it.
    """
    deadline = Deadline(BUILD_SECONDS, "kernel and images")
    with report.phase("find QEMU and an accelerator"):
        found, accelerator, why = choose_qemu(options, output)
        check(configuration, found, accelerator)
    report.accelerator, report.accelerator_reason = accelerator, why
    with report.phase("kernel"):
        built = kernel.build(options.kernel, deadline=deadline, progress=output.progress)
        inner_kernel = built
        if configuration.guests:
            # The kernel under test is the host VM's. Nested in TCG, a debug kernel takes a guest
            # more than seven minutes to boot: guests get the default profile.
            inner_kernel = kernel.build(
                replace(options.kernel, profile="default", mutant=None),
                deadline=deadline,
                progress=output.progress,
            )
    with report.phase("images"):
        images = {
            name: image.build(name, deadline=deadline, progress=output.progress)
            for name in ("host", "guest")
        }
        agent = agentdisk.build(images["guest"], deadline=deadline)
        argv, env = private_qemu(output)
        inner = qemu.probe(argv, env, Deadline(60, "answers of the guests' QEMU"))
    report.versions.update(
        project={"version": importlib.metadata.version("qemu_ioasid"), "hash": project_hash()},
        agent=agentdisk.sources_hash(),
        kernel={"release": built.release, "source": built.source, "hash": built.hash},
        guests_kernel={"release": inner_kernel.release, "hash": inner_kernel.hash},
        series=built.series_hash,
        qemu={"host": found.version, "guests": inner.version},
        images={name: each.hash for name, each in images.items()},
        python=platform.python_version(),
    )
    return HostParts(
        qemu=found,
        accelerator=accelerator,
        kernel=built.image,
        disks={
            "root": images["host"].path,
            "agent": agent,
            "modules": built.modules,
            "kernel": inner_kernel.disk,
            "guest": images["guest"].path,
        },
        guest_viommu=inner.viommu,
        append=options.append,
        slowness=kernel.slowness(built.config),
        counting=built if built.gcov.is_dir() else None,
    )


def check(configuration: RigConfig, host_qemu: Qemu, accelerator: str) -> None:
    """Refuse what *configuration* asks of a QEMU or an accelerator that cannot do it.

    Raises ConfigurationError, RequirementError.
    """
    several = configuration.host.cpus > 1 and len(configuration.guests) > 1
    if accelerator == "tcg" and several:
        raise ConfigurationError(
            f"{configuration.path}: host.cpus: two guests under TCG take a host VM of 1 vCPU: "
            "on more it breaks now and then (docs/facts.md)"
        )
    configuration.host.viommu.device(host_qemu.viommu)


def check_local(options: Options) -> None:
    """Refuse options that mean nothing on the host they are given for.

    Raises ConfigurationError.
    """
    if options.host != "local":
        if options.parts is not None:
            raise ConfigurationError("--parts: goes with --host local")
        return
    for option, given in (
        ("--append", bool(options.append)),
        ("--coverage", options.kernel.profile == kernel.COVERAGE),
        ("--profile", options.kernel.profile != "default"),
        ("--kernel", bool(options.kernel.source)),
        ("--series", bool(options.kernel.series)),
        ("--mutant", options.kernel.mutant is not None),
        ("--config", bool(options.kernel.config)),
        ("--set host", any(key.partition(".")[0] == "host" for key in options.changes)),
    ):
        if given:
            raise ConfigurationError(
                f"{option}: a local host is this machine as it is, with the kernel that it runs"
            )


def build_local(
    options: Options, configuration: RigConfig, output: Output, report: Report
) -> LocalParts:
    """What a rig on this machine is made of.

    Refuses, with one RequirementError that tells all, a machine that lacks
    something; ConfigurationError, parts that are none.
    """
    with report.phase("look at this machine"):
        # Removes first what a run that was killed with its keeper may have left here.
        current_run()
        lacks = preflight.lacking(configuration)
        try:
            found, accelerator, why = choose_qemu(options, output)
            for guest in configuration.guests.values():
                guest.viommu.device(found.viommu)
        except RequirementError as error:
            lacks.append(f"a QEMU for the guests ({error.message})")
        if lacks:
            raise RequirementError(f"--host local: this machine lacks {'; '.join(lacks)}")
    with report.phase("the guests' kernel and image"):
        if options.parts is not None:
            guests = parts.load(options.parts)
        else:
            deadline = Deadline(BUILD_SECONDS, "guests' kernel and image")
            guests = parts.build(options.kernel, deadline=deadline, progress=output.progress)
    report.accelerator, report.accelerator_reason = accelerator, why
    report.versions.update(
        project={"version": importlib.metadata.version("qemu_ioasid"), "hash": project_hash()},
        kernel={"release": platform.release(), "source": "this machine's", "hash": ""},
        qemu={"guests": found.version},
        python=platform.python_version(),
        **guests.versions,
    )
    report.vms = [{"name": "host", "viommu": "this machine", "mdevs": []}]
    report.vms += _guests(configuration, found.viommu)
    return LocalParts(found, accelerator, guests)


def vms(configuration: RigConfig, parts: HostParts) -> list[dict[str, Any]]:
    """Each VM's name, its QEMU's argument for the virtual IOMMU, and its mdevs, for a report."""
    host = configuration.host.viommu.device(parts.qemu.viommu)
    found: list[dict[str, Any]] = [{"name": "host", "viommu": host, "mdevs": []}]
    return [*found, *_guests(configuration, parts.guest_viommu)]


def _guests(configuration: RigConfig, known: frozenset[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "viommu": guest.viommu.device(known), "mdevs": list(guest.mdevs)}
        for name, guest in configuration.guests.items()
    ]


def project_hash() -> str:
    """Names the Python of this checkout: every file of the package counts."""
    package = Path(__file__).parent
    files = sorted([*package.rglob("*.py"), *package.rglob("*.toml")])
    return cache.digest(
        *(part for file in files for part in (str(file.relative_to(package)), file.read_bytes()))
    )


def written(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Turns what a full disk answers to a report in *folder* into a RequirementError."""
    return explained(folder, "make room, or take another folder with --report")


#: Files of the folders that are this process's, locked until it ends.
_CLAIMS: list[int] = []


def _claimed(folder: Path) -> bool:
    """Whether an empty *folder* is this process's from now on: two that are told the same race."""
    found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not any(folder.iterdir()):
            _CLAIMS.append(found)
            return True
    os.close(found)
    return False


def report_folder(wanted: Path | None, scenario: str) -> Path:
    """Make the report's folder; raises ConfigurationError when *wanted* holds something already."""
    if wanted is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = Path("reports").absolute()
        tries = ["", *(f"-{number}" for number in range(2, 1000))]
        names = iter([f"{stamp}-{scenario}{suffix}" for suffix in tries])
    else:
        base, names = wanted.absolute().parent, iter([wanted.name])
    try:
        base.mkdir(parents=True, exist_ok=True)
        for name in names:
            folder = base / name
            with contextlib.suppress(FileExistsError):
                folder.mkdir(exist_ok=wanted is not None)
                if _claimed(folder):
                    return folder
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename}: {error.strerror}; --report takes another folder"
        ) from None
    raise ConfigurationError(f"--report {wanted}: is there already and not an empty folder")


@contextlib.contextmanager
def _started(
    options: Options, configuration: RigConfig, output: Output, report: Report
) -> Iterator[Rig]:
    if options.host == "local":
        local = build_local(options, configuration, output, report)
        started = localhost.start(configuration, local, report.phase, output.say, report.folder)
    else:
        made = build(options, configuration, output, report)
        report.vms = vms(configuration, made)
        started = standby.start(
            configuration, made, options.start, report.phase, output.say, report.folder
        )
    with started as running:
        yield running


def run(options: Options, output: Output) -> Report:
    """Everything. The report says what happened and is on disk, whatever that was.

    Raises ConfigurationError before there is a report, and KeyboardInterrupt
    and `Terminated` after having written it.
    """
    check_local(options)
    scenario = scenarios.find(options.scenario)
    if options.host == "local" and scenario.rig != config.DEFAULT:
        raise ConfigurationError(f"scenario {options.scenario}: needs a host VM, not --host local")
    configuration = config.load(options.rig, options.changes)
    rows = table.choose(scenario.rows(configuration), options.checks)
    report = begun(options, options.scenario, output, configuration.text)
    with (
        told(report),
        _started(options, configuration, output, report) as running,
        counted(running, report.folder, report.say),
    ):
        scenario.run(running, report, rows, **options.order)
        with report.phase("take it apart"):
            running.dismantle()
    return report


@contextlib.contextmanager
def counted(running: Rig, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Leave what a kernel that counts has counted in *folder*, however the block ends.

    *say* is told of it, also where there is none; nothing is raised for that. Only an interrupted
    run has no time for it.
    """
    try:
        yield
    except Exception:
        _count(running, folder, say)
        raise
    _count(running, folder, say)


def _count(running: Rig, folder: Path, say: Callable[[str], None]) -> None:
    parts = running.host.parts
    if parts is None or parts.counting is None:
        return
    try:
        found = gcov.collect(running.host.agent, parts.counting)
        found.write(folder)
    except (RigError, OSError) as error:
        say(f"no coverage of this run: {error}")
    else:
        ran = sum(line.count > 0 for line in found.lines)
        say(f"coverage: {ran} of {len(found.lines)} changed lines ran since the boot")


def begun(options: Options, name: str, output: Output, rig: str = "") -> Report:
    """The report of a run, in a folder of its own; *rig* is its file. Raises as `report_folder`."""
    return Report(
        report_folder(options.report, name),
        name,
        output.say,
        rig=rig,
        first=options.first,
        begins=output.begins,
        progress=output.progress,
    )


@contextlib.contextmanager
def told(report: Report) -> Iterator[None]:
    """What becomes of the block is in *report*, which is then on disk.

    Raises KeyboardInterrupt and `Terminated` after having written it, and nothing else.
    """
    try:
        yield
        report.exit_code = 1 if report.failed else 0
    except Enough:
        report.exit_code = 1
    except RigError as error:
        report.fail(error.exit_code, error.message, error.evidence, type(error).__name__)
    except (KeyboardInterrupt, Terminated) as signal:
        name, code = ("Ctrl-C", 130) if isinstance(signal, KeyboardInterrupt) else ("SIGTERM", 143)
        report.fail(code, f"interrupted by {name}", "")
        raise
    except Exception as error:
        report.fail(4, f"bug in the rig: {error!r}", traceback.format_exc())
    finally:
        with written(report.folder):
            report.write()
