# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of ours, each in a process of its own, and what they say of the kernel they ran."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qemu_ioasid import config, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    ConfigurationError,
    InfrastructureError,
    KernelBroke,
    KernelLacks,
    ProcessFailed,
    RequirementError,
)
from qemu_ioasid.kernel.options import NotGranted
from qemu_ioasid.kernel.tree import PatchRefused
from qemu_ioasid.process import Child
from qemu_ioasid.text import visible

#: For one run of a kernel whose build is incremental, in seconds of the reference machine.
SECONDS = 900.0
#: For one that may be the first of its tree, which is compiled whole.
WHOLE_SECONDS = 3900.0
#: A run that any kernel can make: its host VM alone comes up, without devices.
BARE = ("run", "boot", "--rig", str(config.DEFAULT.with_name("bare.toml")), "--cold")
#: How long a run that is interrupted may take to end its VMs and write its report.
GRACE_SECONDS = 20.0
#: How much of an error or of a log's last line tells why, in characters.
WHY = 160

#: *broke*: the kernel did not come up, or has reported something. *unbuildable*: there is no
#: such kernel. *lacking*: it came up, and has not what is tried: the driver, fault injection.
#: *unknown*: the rig failed, or its user did, and nothing is said about the kernel.
Verdict = Literal["held", "failed", "broke", "unbuildable", "lacking", "unknown"]
_NO_KERNEL = (ProcessFailed.__name__, PatchRefused.__name__, NotGranted.__name__)
#: The phases that build what is under test.
_BUILDS = ("kernel", "the kernel's tests")
#: What a compiler says of a full disk, which is no fault of what it compiles.
FULL = "No space left on device"
#: What a run ends with that tells nothing of its kernel.
_CODES = tuple(
    error.exit_code for error in (ConfigurationError, RequirementError, InfrastructureError)
)


@dataclass(frozen=True)
class Found:
    """A run that is over: its exit code (None: it was late), its report and its log."""

    code: int | None
    report: dict[str, Any]
    folder: Path
    log: Path

    @property
    def verdict(self) -> Verdict:
        """What it says of the kernel."""
        error = self.report["error"] or {}
        if self.code == 0:
            return "held"
        if self.code == 1 and any(check["verdict"] == "fail" for check in self.report["checks"]):
            return "failed"
        if self.code == 5:
            return "broke"
        kind = error.get("kind")
        if kind == KernelLacks.__name__:
            return "lacking"
        blamed = error.get("phase") in _BUILDS and kind in _NO_KERNEL
        full = FULL in error.get("evidence", "")
        return "unbuildable" if blamed and not full else "unknown"

    @property
    def exit_code(self) -> int:
        """What a command ends with that has no more to go by than this run, which says nothing."""
        return self.code if self.code in _CODES else InfrastructureError.exit_code

    @property
    def reported(self) -> bool:
        """Whether the kernel has said itself that it is broken: no slow machine looks so."""
        return self.code == 5 and (self.report["error"] or {}).get("kind") == KernelBroke.__name__

    @property
    def why(self) -> str:
        """The first check that failed, or what the kernel or the rig said, in a line."""
        if self.code is None:
            return "it was not over in time"
        failed = [check["name"] for check in self.report["checks"] if check["verdict"] == "fail"]
        if failed:
            return str(failed[0])
        if self.report["error"]:
            return visible(self.report["error"]["message"])[:WHY].strip()
        return _last(self.log)

    def seconds(self, *phases: str) -> float:
        """How long these phases took, or all."""
        return sum(
            float(each["seconds"])
            for each in self.report["phases"]
            if not phases or each["name"] in phases
        )


@contextlib.contextmanager
def started(words: Sequence[str], folder: Path) -> Iterator[Child]:
    """``qemu-ioasid`` with *words*; its report goes to *folder*, its output beside that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "qemu_ioasid.cli", *words, "--report", str(folder)]
    with (
        open(_log(folder), "wb") as log,
        process.spawn(argv, stdout=log, stderr=subprocess.STDOUT, grace=GRACE_SECONDS) as child,
    ):
        yield child


def found(code: int | None, folder: Path) -> Found:
    """What the run that ended with *code* has left in *folder*."""
    report: dict[str, Any] = {"phases": [], "checks": [], "error": None}
    with contextlib.suppress(OSError, ValueError):
        report = json.loads((folder / "report.json").read_text())
    return Found(code, report, folder, _log(folder))


def run(words: Sequence[str], folder: Path, progress: Callable[[str], None]) -> Found:
    """Run to the end; *progress* gets the last line that it said, now and then."""
    deadline = Deadline(WHOLE_SECONDS, "end of a run")
    code = None
    with started(words, folder) as child:
        while code is None and deadline.elapsed() < deadline.seconds:
            code = child.ended_within(1)
            with contextlib.suppress(OSError):
                progress(_last(_log(folder)))
    return found(code, folder)


def _last(log: Path) -> str:
    """The last line in *log*, as much as tells why."""
    return visible(log.read_text(errors="replace").strip().rpartition("\n")[2].strip())[:WHY]


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
