# SPDX-License-Identifier: GPL-2.0-or-later
"""A check as scenarios write it: tried, answered, seen, and whether that is what must be."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator, Sequence

from qemu_ioasid.console import Console
from qemu_ioasid.errors import CallFailed, RigError
from qemu_ioasid.report import Attempt, Check, Outcome, Report, Verdict
from qemu_ioasid.rig import Completion, Rig
from qemu_ioasid.scenarios.table import Row

#: What it means that work ended as expected, by its status.
OUTCOMES: dict[str, Outcome] = {
    "DONE": "allowed",
    "REFUSED": "refused",
    "INVALID": "refused",
    "FAULT": "faulted",
}


class Broken(Exception):
    """What must hold does not; ends the check that found it, and no other."""


class Skipped(Exception):
    """There is nothing here that the check could be made on; the message says why."""


class Trial:
    """The check being made: scenarios say on it what was tried, answered and seen."""

    def __init__(self, tried: str) -> None:
        self.tried = tried
        self.answered: list[str] = []
        self.witnesses: list[str] = []
        self.attempts: list[Attempt] = []

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

    def settle(self, attempt: Attempt, completion: Completion) -> None:
        """Note how *attempt* ended and require its status to be the expected one."""
        attempt.answered = str(completion["status"])
        as_expected = attempt.answered == attempt.expected
        attempt.outcome = OUTCOMES.get(attempt.answered, "wrong") if as_expected else "wrong"
        self.answer(told(completion))
        self.require(
            as_expected,
            f"the device answered {told(completion)} where it must be {attempt.expected}",
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


def _said(before: dict[Console, int]) -> list[str]:
    """What consoles have said since they had so many lines."""
    said = [
        f"the console of {console.name} meanwhile:\n{text}"
        for console, length in before.items()
        if (text := console.since(length))
    ]
    return said or ["no console said anything meanwhile"]


class Checks:
    """Makes checks one after another and enters each in the report."""

    def __init__(self, rig: Rig, report: Report) -> None:
        self._rig = rig
        self._report = report

    def make(self, rows: Sequence[Row], scenario: object) -> None:
        """One `check` for each of *rows*, made by *scenario*."""
        for row in rows:
            with self.check(row.name, row.tried) as trial:
                row.act(scenario, trial, *row.arguments)

    @contextlib.contextmanager
    def check(self, name: str, tried: str) -> Iterator[Trial]:
        """One check. It fails on `Broken` and on an errno nobody expected.

        A failure of the rig is entered as ``error`` and raised on. A report on a
        console meanwhile raises KernelBroke, whatever the verdict was.
        """
        trial = Trial(tried)
        started = time.monotonic()
        before = {console: console.length for console in self._rig.consoles}

        def enter(verdict: Verdict, evidence: str = "") -> None:
            if verdict != "pass":
                evidence = "\n".join(filter(None, [evidence, *_said(before)]))
            self._report.enter(
                Check(
                    name,
                    verdict,
                    trial.tried,
                    "; ".join(trial.answered) or "nothing",
                    "; ".join(trial.witnesses) or "not asked",
                    round(time.monotonic() - started, 3),
                    evidence,
                    attempts=trial.attempts,
                )
            )

        try:
            yield trial
        except Skipped as skipped:
            trial.answer(str(skipped))
            enter("skip")
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
