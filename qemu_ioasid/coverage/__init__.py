# SPDX-License-Identifier: GPL-2.0-or-later
"""Which lines that a series changed no test has run: the counts of runs, added and judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qemu_ioasid import gcov
from qemu_ioasid.coverage.reasons import Reason
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.gcov import Coverage, Line

SCHEMA = 1
#: What a line is known by.
_NAMED = ("patch", "file", "number", "text", "function")


@dataclass
class Tally:
    """Of what one patch changed in one file: the lines that have code and those that ran.

    *branches*: the ways on from lines that ran; *taken*: those of them that were taken.
    """

    patch: str
    file: str
    lines: int = 0
    ran: int = 0
    branches: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Judgement:
    """What is told of the counts of *runs*."""

    coverage: Coverage
    runs: int
    #: The lines that have not run, by patch and file, each with the reason that is known for it.
    unreached: list[tuple[Line, Reason | None]]
    #: Reasons that no line needs, and why not.
    stale: list[tuple[Reason, str]]

    @property
    def untested(self) -> list[Line]:
        """The lines that have neither run nor a reason."""
        return [line for line, reason in self.unreached if reason is None]

    @property
    def held(self) -> bool:
        """Whether each changed line has run or has a reason."""
        return not self.untested and not self.coverage.missing

    def tallies(self) -> list[Tally]:
        """By patch, in the series' order, and file."""
        found: dict[tuple[str, str], Tally] = {}
        for line in self.coverage.in_series():
            tally = found.setdefault((line.patch, line.file), Tally(line.patch, line.file))
            tally.lines += 1
            if line.count:
                tally.ran += 1
                tally.branches += len(line.branches)
                tally.taken += sum(count > 0 for count in line.branches)
        return list(found.values())

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "kernel": self.coverage.kernel,
            "runs": self.runs,
            "held": self.held,
            "files": [asdict(tally) for tally in self.tallies()],
            "unreached": [
                {
                    **{name: getattr(line, name) for name in _NAMED},
                    "reason": reason.reason if reason else None,
                }
                for line, reason in self.unreached
            ],
            "missing": self.coverage.missing,
            "stale": [{**asdict(reason), "why": why} for reason, why in self.stale],
        }


def read(folders: Sequence[Path]) -> tuple[Coverage, int]:
    """The sum of all coverage.json in and below *folders*, and how many they are.

    Raises ConfigurationError for a folder without one, and for those of two kernels.
    """
    paths: list[Path] = []
    for folder in folders:
        found = sorted(folder.rglob(gcov.FILE))
        if not found:
            raise ConfigurationError(
                f"{folder}: holds no {gcov.FILE}: qemu-ioasid run --coverage leaves one"
            )
        paths += [path for path in found if path not in paths]
    whole = gcov.load(paths[0])
    for path in paths[1:]:
        whole.add(gcov.load(path))
    return whole, len(paths)


def judge(coverage: Coverage, runs: int, reasons: Sequence[Reason]) -> Judgement:
    """What has not run, and why not; each reason is one line's."""
    left = list(reasons)
    unreached: list[tuple[Line, Reason | None]] = []
    for line in coverage.in_series():
        if not line.count:
            reason = next((each for each in left if each.of(line)), None)
            if reason is not None:
                left.remove(reason)
            unreached.append((line, reason))
    changed = {line.file for line in coverage.lines}
    stale = [
        (reason, "has run" if any(map(reason.of, coverage.lines)) else "no such line")
        for reason in left
        if reason.file in changed
    ]
    return Judgement(coverage, runs, unreached, stale)


def text(judgement: Judgement) -> Iterator[str]:
    """What is told of it, line by line."""
    tallies = judgement.tallies()
    for patch in dict.fromkeys(tally.patch for tally in tallies):
        yield patch
        for tally in tallies:
            if tally.patch == patch:
                yield f"  {tally.ran:5} of {tally.lines:5}  {tally.file}"
    known = [(line, f"  ({reason.reason})") for line, reason in judgement.unreached if reason]
    untested = [(line, "") for line in judgement.untested]
    yield from _section("not run, and no reason is known", untested)
    yield from _section("not run, for a reason", known)
    yield from _listed("in no object of this kernel", judgement.coverage.missing)
    yield from _listed(
        "a reason that no line needs",
        [f"{each.file}  {each.function}: {each.line}  ({why})" for each, why in judgement.stale],
    )
    yield ""
    yield total(judgement)


def _section(title: str, found: Sequence[tuple[Line, str]]) -> Iterator[str]:
    if found:
        yield from ("", f"{title} ({len(found)}):")
    for patch, group in groupby(found, key=lambda each: each[0].patch):
        yield f"  {patch}"
        for line, why in group:
            yield f"    {line.file}:{line.number}  {line.function}: {line.text}{why}"


def _listed(title: str, found: Sequence[str]) -> Iterator[str]:
    if found:
        yield from ("", f"{title} ({len(found)}):")
        yield from (f"  {each}" for each in found)


def total(judgement: Judgement) -> str:
    """All of it in a line."""
    tallies = judgement.tallies()
    lines, ran, branches, taken = (
        sum(getattr(tally, name) for tally in tallies)
        for name in ("lines", "ran", "branches", "taken")
    )
    return (
        f"{ran} of {lines} changed lines ran, {len(judgement.unreached)} did not: "
        f"{len(judgement.untested)} without a reason; "
        f"of {branches} branches of those that ran, {taken} were taken"
    )
