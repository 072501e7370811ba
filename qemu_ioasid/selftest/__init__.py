# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own tests: built from the tree under test, run in host VMs, told as checks.

A host VM for each target and mode (`targets`), and another one for what is left of a target when
one did not survive a test. `program` runs a test program, `ktap` reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qemu_ioasid import config, hostvm, kernel, session, snapshot
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, KernelBroke
from qemu_ioasid.hostvm import HostMachine, HostParts
from qemu_ioasid.kernel.selftest import Programs
from qemu_ioasid.report import Check, Report, Verdict
from qemu_ioasid.selftest import expected, targets
from qemu_ioasid.selftest.expected import Expected
from qemu_ioasid.selftest.ktap import Outcome, Result
from qemu_ioasid.selftest.program import FOLDER, Gone, Made, Program
from qemu_ioasid.selftest.targets import Target
from qemu_ioasid.session import Options, Output

#: The disk with the programs, by its serial.
_SERIAL = "selftests"
_SETUP = f"mkdir -p {FOLDER} && mount -t erofs -o ro /run/disk/{_SERIAL} {FOLDER}"
_VERDICTS: dict[Outcome, Verdict] = {
    "ok": "pass",
    "xpass": "pass",
    "not ok": "fail",
    "xfail": "skip",
    "skip": "skip",
}


@dataclass(frozen=True)
class Order:
    """What is to be run: *names* of targets, in *modes*, these *programs*; none: all."""

    names: Sequence[str] = ()
    modes: Sequence[str] = ()
    programs: Sequence[str] = ()


def run(options: Options, order: Order, output: Output) -> Report:
    """Everything, as `session.run`; the kernel's profile is *options*' own."""
    if options.kernel.source.startswith("image:"):
        raise ConfigurationError(f"kernel {options.kernel.source}: tests are built from a source")
    chosen = targets.find(order.names, order.modes)
    known = expected.load()
    report = session.begun(options, "selftest", output)
    with session.told(report):
        parts, programs = _build(options, [target.name for target in chosen], output, report)
        release = str(report.versions["kernel"]["release"])
        tests = Tests(report, known, release, order.programs)
        tests.choose(programs)
        for target in chosen:
            for mode in target.modes:
                tests.run(target, mode, parts, programs)
        tests.close()
    return report


def _build(
    options: Options, names: Sequence[str], output: Output, report: Report
) -> tuple[HostParts, Programs]:
    bare = RigConfig(config.HostConfig(), {}, {}, "selftest", "")
    parts = session.build(options, bare, output, report)
    with report.phase("the kernel's tests"):
        programs = kernel.selftests(
            options.kernel,
            names,
            deadline=Deadline(session.BUILD_SECONDS, "the kernel's tests"),
            progress=output.progress,
        )
    report.versions["selftests"] = {"targets": list(names), "mended": list(programs.mended)}
    if programs.mended:
        lacking = ", ".join(programs.mended)
        output.say(f"this kernel's tests lack {lacking}, and compile only since we gave it")
    return replace(parts, disks={**parts.disks, _SERIAL: programs.disk}), programs


class Tests:
    """Runs programs in VMs and enters what comes of them in *report*."""

    def __init__(
        self, report: Report, known: Sequence[Expected], release: str, only: Sequence[str]
    ) -> None:
        self._report = report
        self._known = known
        self._release = release
        self._only = only
        #: The first thing that a kernel complained of.
        self._broke: KernelBroke | None = None

    def choose(self, programs: Programs) -> None:
        """Raises ConfigurationError for a program that there is not, or a target that has none."""
        for target, names in programs.tests.items():
            if not names:
                raise ConfigurationError(
                    f"selftest {target}: this kernel has no test of it for this architecture"
                )
        there = {name for names in programs.tests.values() for name in names}
        for name in self._only:
            if name not in there:
                known = ", ".join(sorted(there))
                raise ConfigurationError(f"program {name}: unknown; known are {known}")

    def run(self, target: Target, mode: str, parts: HostParts, programs: Programs) -> None:
        """All programs of *target*, each in a VM that no other has broken."""
        names = [
            name
            for name in programs.tests[target.name]
            if (name in self._only or not self._only) and target.runs(name, mode)
        ]
        where = f"{target.name}, {mode}" if target.by_mode else target.name
        lives = 0
        while names:
            lives += 1
            logs = self._report.folder / f"{target.name.replace('/', '-')}-{mode}-{lives}"
            logs.mkdir()
            append = f"{parts.append} {target.append}".strip()
            made = replace(parts, append=append, devices=target.devices)
            with _booted(target, mode, made, self._report, logs) as (host, words):
                if lives == 1:
                    self._vm(where, host, made, target, mode)
                with self._report.phase(f"{where}{'' if lives == 1 else ', the rest'}"):
                    names = self._some(target, mode, host, words, names, programs, logs)

    def _vm(
        self, where: str, host: HostMachine, parts: HostParts, target: Target, mode: str
    ) -> None:
        viommu = target.host(mode).viommu.device(parts.qemu.viommu)
        self._report.vms.append({"name": f"host ({where})", "viommu": viommu, "mdevs": []})

    def _some(
        self,
        target: Target,
        mode: str,
        host: HostMachine,
        words: Sequence[str],
        names: Sequence[str],
        programs: Programs,
        logs: Path,
    ) -> list[str]:
        """Run the programs *names*; those that are left when the VM is no more."""
        left = list(names)
        while left:
            name = left.pop(0)

            def enter(made: Made, name: str = name) -> None:
                self._enter(target, mode, name, made)

            if f"{target.name}/{name}" in programs.scripts:
                reason = "a script: the VM has no shell for it"
                enter(Made(Result("", "skip", reason), 0.0))
                continue
            program = Program(host, target.name, name, logs / f"{name}.log")
            try:
                program.run(target.arguments(name, words), enter)
                complaint = program.reported(Deadline(60, "word of ours on the console"))
            except Gone as gone:
                self._broken(f"{target.name}/{name}: {gone}", host)
                return left
            if complaint is not None:
                enter(complaint)
                self._broken(f"{target.name}/{name}: {complaint.result.reason}", host)
        return left

    def _broken(self, why: str, host: HostMachine) -> None:
        if self._broke is None and host.console.reports:
            excerpt = host.console.excerpt(host.console.reports[0])
            self._broke = KernelBroke(f"host: {why}", evidence=excerpt)

    def close(self) -> None:
        """Raises KernelBroke when a kernel has complained of anything."""
        if self._broke is not None:
            raise self._broke

    def _enter(self, target: Target, mode: str, program: str, made: Made) -> None:
        self._report.enter(check(target, mode, program, made, self._known, self._release))


def check(
    target: Target, mode: str, program: str, made: Made, known: Sequence[Expected], release: str
) -> Check:
    """What is told of a test that was made."""
    result = made.result
    name = "/".join(filter(None, [target.name, program, result.name]))
    verdict = _VERDICTS[result.outcome]
    answered = result.outcome + (f": {result.reason}" if result.reason else "")
    entry = expected.find(known, name, mode, release)
    if entry is not None and verdict == "fail":
        verdict = "skip"
        answered = f"fails as expected: {entry.reason} ({entry.link}); {answered}"
    elif entry is not None and verdict == "pass" and not entry.sometimes:
        verdict = "fail"
        answered = f"passes, and {expected.FILE.name} expects a failure: {entry.reason}"
    said = result.diagnostics if verdict != "pass" else []
    return Check(
        name=name + (f" [{mode}]" if target.tells_mode(program) else ""),
        verdict=verdict,
        tried=f"{program}: {result.name}" if result.name else program,
        answered=answered,
        witnesses=said[-1] if said and verdict == "fail" else "its own word",
        seconds=made.seconds,
        evidence="\n".join(filter(None, ["\n".join(said), made.evidence])),
    )


@contextlib.contextmanager
def _booted(
    target: Target, mode: str, parts: HostParts, report: Report, logs: Path
) -> Iterator[tuple[HostMachine, Sequence[str]]]:
    """A host VM with what *target* needs, and the words that its programs are told."""
    host_config = target.host(mode)
    with contextlib.ExitStack() as stack:
        with report.phase(f"boot a host VM ({target.name}, {mode})"):
            memory = snapshot.anonymous(host_config.memory)
            host = stack.enter_context(hostvm.boot(parts, host_config, {}, memory, logs))
            deadline = Deadline(30, f"what {target.name} needs")
            said = host.ssh.output(f"set -e\n{_SETUP}\n{target.setup}", deadline)
        yield host, said.decode(errors="replace").split()
