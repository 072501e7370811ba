# SPDX-License-Identifier: GPL-2.0-or-later
"""A check as scenarios write it: tried, answered, seen, and whether that is what must be."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from typing import Any

from qemu_ioasid.errors import CallFailed, RigError
from qemu_ioasid.report import Check, Report
from qemu_ioasid.rig import Completion, Rig


class Broken(Exception):
    """What must hold does not; ends the check that found it, and no other."""


class Trial:
    """The check being made: scenarios say on it what was tried, answered and seen."""

    def __init__(self, tried: str) -> None:
        self.tried = tried
        self.answered: list[str] = []
        self.witnesses: list[str] = []

    def answer(self, text: str) -> None:
        """Note what the kernel or the device answered."""
        self.answered.append(text)

    def saw(self, text: str) -> None:
        """Note what the witnesses saw."""
        self.witnesses.append(text)

    def require(self, holds: bool, otherwise: str) -> None:
        """End the check as failed, with *otherwise* as what is wrong, unless it *holds*."""
        if not holds:
            raise Broken(otherwise)

    def require_status(self, completion: Completion, *allowed: str) -> None:
        """Note a completion and require its status to be one of *allowed*."""
        self.answer(told(completion))
        self.require(
            completion["status"] in allowed,
            f"the device answered {told(completion)} where it must be {' or '.join(allowed)}",
        )

    @contextlib.contextmanager
    def refusal(self, name: str, what: str) -> Iterator[None]:
        """Require the calls in the block to fail with the errno *name*."""
        try:
            yield
        except CallFailed as error:
            self.answer(f"{what}: {error.name}")
            self.require(error.name == name, f"{what} answered {error.name}, not {name}")
        else:
            self.answer(f"{what}: 0")
            raise Broken(f"{what} succeeded where it must answer {name}")


def told(completion: Completion) -> str:
    """A completion record in words."""
    status = str(completion["status"])
    if status == "DONE":
        return f"DONE, {completion['done']} bytes"
    if status == "FAULT":
        name = errno.errorcode.get(completion["error"], str(completion["error"]))
        return f"FAULT {name} at {completion['addr']:#x}"
    return status


class Checks:
    """Makes checks one after another and enters each in the report."""

    def __init__(self, rig: Rig, report: Report) -> None:
        self._rig = rig
        self._report = report

    @contextlib.contextmanager
    def check(self, name: str, tried: str) -> Iterator[Trial]:
        """One check. It fails on `Broken` and on an errno nobody expected.

        A failure of the rig is entered as ``error`` and raised on. A report on a
        console meanwhile raises KernelBroke, whatever the verdict was.
        """
        trial = Trial(tried)
        started = time.monotonic()

        def enter(verdict: Any, evidence: str = "") -> None:
            self._report.checks.append(
                Check(
                    name,
                    verdict,
                    tried,
                    "; ".join(trial.answered) or "nothing",
                    "; ".join(trial.witnesses) or "not asked",
                    round(time.monotonic() - started, 3),
                    evidence,
                )
            )

        try:
            yield trial
        except Broken as broken:
            trial.saw(str(broken))
            enter("fail")
        except CallFailed as error:
            trial.answer(f"{error.message} ({error.name})")
            enter("fail", error.evidence)
        except Exception as error:
            trial.answer(str(error))
            enter("error", error.evidence if isinstance(error, RigError) else "")
            raise
        else:
            enter("pass")
        self._rig.check_consoles()
