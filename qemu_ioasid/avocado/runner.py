# SPDX-License-Identifier: GPL-2.0-or-later
"""The runners: ``ioasid`` makes one check, ``ioasid-kernel`` and ``ioasid-image`` build.

Each is a process of its own, which Avocado starts, may terminate and may kill.
What it has started ends with it, and it ends with Avocado.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import traceback
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from avocado.core.nrunner.app import BaseRunnerApp
from avocado.core.nrunner.runnable import Runnable
from avocado.core.nrunner.runner import BaseRunner
from avocado.core.utils import messages

from qemu_ioasid import image, kernel, process, session, text
from qemu_ioasid.avocado import options, settings
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import RigError
from qemu_ioasid.report import Check, Report
from qemu_ioasid.session import BUILD_SECONDS, Output, Terminated

#: By exit code. A kernel that broke has failed its test; a rig that broke has not been one.
RESULTS = {0: "pass", 1: "fail", 2: "error", 3: "cancel", 4: "error", 5: "fail"}
#: The status server's buffer is twice this; a message in base64 is a third longer.
MOST_BYTES = 16 << 20

Message = dict[str, Any]


@dataclass
class Told:
    """What a runner has to tell at its end: *lines* for the log, and why it ended as it did."""

    code: int = 4
    reason: str = ""
    lines: list[str] = field(default_factory=list)
    files: list[Message] = field(default_factory=list)
    made_with: dict[str, Any] = field(default_factory=dict)

    def of_error(self, error: RigError) -> None:
        """It ended with an error of ours."""
        self.code, self.reason = error.exit_code, error.message
        self.lines += error.evidence.splitlines()


class Runner(BaseRunner):
    """Turns what happened in `work` into Avocado's messages."""

    CONFIGURATION_USED = settings.USED

    @abstractmethod
    def work(self, runnable: Runnable, told: Told) -> None:
        """Do what *runnable* asks for; raises what went wrong, unless it is *told*."""

    def run(self, runnable: Runnable) -> Iterator[Message]:
        """Start, everything at once when it is over, end."""
        yield messages.StartedMessage.get()
        told, result = Told(), ""
        try:
            self.work(runnable, told)
        except RigError as error:
            told.of_error(error)
        except (KeyboardInterrupt, Terminated):
            told.reason, result = "interrupted", "interrupted"
        except Exception as error:
            told.reason = f"bug in the rig: {error!r}"
            told.lines += traceback.format_exc().splitlines()
        result = result or RESULTS[told.code]
        if result == "cancel" and runnable.config.get("ioasid.strict"):
            result = "error"
        if runnable.kwargs.get("attempt") and result != "interrupted":
            told.lines.append(told.reason)
            result = "pass"
        for line in told.lines:
            # What a VM said is in there.
            yield messages.LogMessage.get(text.visible(line))
        if told.made_with:
            yield messages.WhiteboardMessage.get(json.dumps(told.made_with, indent=2))
        yield from told.files
        yield messages.FinishedMessage.get(result, fail_reason=text.visible(told.reason) or None)


class CheckRunner(Runner):
    """Boots a rig and makes one check on it."""

    name = "ioasid"
    description = "Runner of qemu-ioasid's checks"

    def work(self, runnable: Runnable, told: Told) -> None:
        """As ``qemu-ioasid run --check``; the report goes to the test's folder."""
        wanted = options.asked(runnable)
        with _report_folder(runnable, told) as folder:
            report = session.run(replace(wanted, report=folder), Output(told.lines.append, _quiet))
            told.code = report.exit_code
            told.lines += _lines(report)
            told.reason = _reason(report)
            told.made_with = {"accelerator": report.accelerator, **report.versions}


class KernelRunner(Runner):
    """Builds the kernels of a run."""

    name = "ioasid-kernel"
    description = "Builds the kernel that qemu-ioasid's checks run on"

    def work(self, runnable: Runnable, told: Told) -> None:
        """The kernel under test, and the guests'."""
        spec = options.asked(runnable).kernel
        deadline = Deadline(BUILD_SECONDS, "kernel")
        for profile in dict.fromkeys((spec.profile, "default")):
            built = kernel.build(
                replace(spec, profile=profile), deadline=deadline, progress=told.lines.append
            )
            told.lines.append(f"{built.release} {built.hash}: {built.image}")
        told.code = 0


class ImageRunner(Runner):
    """Makes the images of a run."""

    name = "ioasid-image"
    description = "Makes the VM images that qemu-ioasid's checks run on"

    def work(self, runnable: Runnable, told: Told) -> None:
        """Host, guest, and the private QEMU where it is another image."""
        wanted = image.PRIVATE_QEMUS.get(options.asked(runnable).qemu, "host")
        deadline = Deadline(BUILD_SECONDS, "images")
        for name in dict.fromkeys(("host", "guest", wanted)):
            built = image.build(name, deadline=deadline, progress=told.lines.append)
            told.lines.append(f"{name} {built.hash}: {built.path}")
        told.code = 0


def _quiet(line: str) -> None:
    """Progress is for terminals."""


@contextlib.contextmanager
def _report_folder(runnable: Runnable, told: Told) -> Iterator[Path]:
    """Where the report goes. On a host that has not the test's folder, it is sent there."""
    own = Path(runnable.output_dir or ".")
    if base := runnable.config.get("ioasid.report"):
        yield Path(base) / own.parents[1].name / own.name
    elif own.is_dir():
        yield own / "report"
    else:
        with tempfile.TemporaryDirectory(dir=process.current_run().folder) as made:
            try:
                yield Path(made)
            finally:
                told.files += _sent(Path(made))


def _sent(folder: Path) -> Iterator[Message]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.stat().st_size <= MOST_BYTES:
            name = Path("report") / file.relative_to(folder)
            yield messages.FileMessage.get(file.read_bytes(), str(name))


def _lines(report: Report) -> Iterator[str]:
    """What a reader of the log wants: the check in full, then what ended the run."""
    for check in report.checks:
        yield f"{check.verdict}  {check.name}"
        yield f"  tried: {check.tried}"
        yield f"  answered: {check.answered}"
        yield f"  seen: {check.witnesses}"
        yield from check.evidence.splitlines()
    if report.error is not None:
        yield report.error["message"]
        yield from report.error["evidence"].splitlines()
    yield f"report: {report.folder}"


def _reason(report: Report) -> str:
    if report.error is not None:
        return report.error["message"]
    wrong: list[Check] = [check for check in report.checks if check.verdict != "pass"]
    return "; ".join(f"{check.answered}; {check.witnesses}" for check in wrong)


class RunnerApp(BaseRunnerApp):
    """The command that Avocado runs, for each of the kinds."""

    PROG_NAME = "avocado-runner-ioasid"
    PROG_DESCRIPTION = "nrunner application for qemu-ioasid's checks and builds"
    RUNNABLE_KINDS_CAPABLE = (CheckRunner.name, KernelRunner.name, ImageRunner.name)


def _terminate(number: int, frame: FrameType | None) -> None:
    # Whoever terminates us may do so again, or kill; the first is enough to unwind by.
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    """Entry point of ``avocado-runner-ioasid`` and of its namesakes for the builds."""
    process.die_with_parent()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _terminate)
    try:
        RunnerApp(print).run()
    finally:
        process.close_run()


if __name__ == "__main__":
    main()
