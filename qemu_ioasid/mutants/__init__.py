# SPDX-License-Identifier: GPL-2.0-or-later
"""The suite against broken kernels: which check kills each mutant, and how long that takes.

A mutant is tried as a user would try it, by ``qemu-ioasid run`` with one scenario after another,
the cheapest first, until a check fails or the kernel breaks.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qemu_ioasid import config, runs, scenarios
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel.mutant import Mutant
from qemu_ioasid.process import Child
from qemu_ioasid.session import Output

#: *unclear*: the rig failed, and no scenario killed the mutant.
Verdict = Literal["killed", "survived", "unclear"]


class Stage(NamedTuple):
    """A scenario of the suite, what it is told, and the profile of the kernel that it wants."""

    scenario: str
    words: tuple[str, ...] = ()
    profile: str = "default"
    #: This check of it, alone.
    check: str = ""

    @property
    def name(self) -> str:
        """What it is called in results."""
        return self.scenario + (f"-{self.profile}" if self.profile != "default" else "")


#: The cheapest first.
SUITE = (
    Stage("model", ("--steps", "2500", "--seed", "1")),
    Stage("flight"),
    Stage("abi"),
    Stage("stress", ("--seconds", "15", "--seed", "1")),
    Stage("attacks"),
    Stage("isolation"),
    Stage("hostile", ("--operations", "4000", "--seed", "1")),
    Stage("faults", profile="debug"),
    Stage("stress", ("--seed", "1"), "debug"),
)


def suite(names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages of these names, in the suite's order; without a name, all.

    Raises ConfigurationError for a name that no stage has.
    """
    known = [stage.name for stage in SUITE]
    for name in names:
        if name not in known:
            raise ConfigurationError(f"stage {name}: the suite has {', '.join(known)}")
    return tuple(stage for stage in SUITE if stage.name in names or not names)


def first(stages: Sequence[Stage], killer: str) -> list[Stage]:
    """*stages*, the one that killed a mutant the last time first, by `Result.by`.

    Before that goes the check that failed, alone: not all of them fail without the others.
    """
    name, _, check = killer.partition(": ")
    found = [stage for stage in stages if stage.name == name]
    alone = []
    for stage in found:
        scenario = scenarios.find(stage.scenario)
        rows = scenario.rows(config.load(scenario.rig))
        if len(rows) > 1 and check in {row.name for row in rows}:
            alone.append(stage._replace(check=check))
    return [*alone, *found, *(stage for stage in stages if stage not in found)]


@dataclass
class Result:
    """What became of a mutant.

    *by* names the scenario and the check, or what the kernel or the rig said. *seconds* are those
    of all runs up to there; *build_seconds*, those that went into its kernel, are not in them.
    """

    name: str
    breaks: str
    control: bool
    verdict: Verdict = "survived"
    by: str = ""
    seconds: float = 0.0
    build_seconds: float = 0.0
    #: The exit code of the run that decided.
    code: int = 0

    @property
    def exit_code(self) -> int:
        """0: as it must be; 1: a check is missing, or one is wrong; else why nobody knows."""
        if self.verdict == "unclear":
            return self.code
        return int((self.verdict == "survived") != self.control)


class _Trial:
    """A mutant under way: one run after another, each in a folder of its own."""

    def __init__(
        self, mutant: Mutant, stages: Iterable[Stage], words: Sequence[str], folder: Path
    ) -> None:
        self.result = Result(mutant.name, mutant.breaks, mutant.control)
        self._patch = mutant.patch
        self._stages = deque(stages)
        self._words = words
        self._folder = folder / mutant.name
        self._stack = contextlib.ExitStack()
        self._stage = Stage("")
        self._child: Child | None = None
        self._began = 0.0
        self._deadline = Deadline(runs.SECONDS, "")

    def close(self) -> None:
        """End the run under way."""
        self._stack.close()

    @property
    def _place(self) -> Path:
        return self._folder / " ".join(filter(None, [self._stage.name, self._stage.check]))

    def late(self) -> bool:
        """Whether the run under way has had all the time it may have."""
        return self._deadline.elapsed() > self._deadline.seconds

    def start(self) -> int:
        """Start the next run; gives an fd that is readable when it has ended."""
        self._stage = self._stages.popleft()
        words = ["run", self._stage.scenario, "--cold", "--first", "--mutant", str(self._patch)]
        words += ["--profile", self._stage.profile, *self._stage.words, *self._words]
        words += ["--check", self._stage.check] if self._stage.check else []
        self._began = time.monotonic()
        self._deadline = Deadline(runs.SECONDS, f"end of {self._stage.name}")
        self._child = self._stack.enter_context(runs.started(words, self._place))
        fd = os.pidfd_open(self._child.pid)
        self._stack.callback(os.close, fd)
        return fd

    def over(self) -> bool:
        """Take in what the run found, which has ended or is late; whether it was the last."""
        assert self._child is not None
        code = self._child.poll()
        self.close()
        found = runs.found(code, self._place)
        built = found.seconds("kernel")
        self.result.build_seconds += built
        self.result.seconds += time.monotonic() - self._began - built
        # A VM that did not come up may be a slow machine's.
        killed = found.verdict == "failed" or found.reported
        if code != 0 and not (self._stage.check and not killed):
            self.result.verdict = "killed" if killed else "unclear"
            self.result.by = f"{self._stage.name}: {found.why}"
            # An exit code of a Python that broke, or of a signal, is a failure of ours.
            self.result.code = code if code is not None and (killed or code > 1) else 4
        # What one scenario could not tell another may; what the user got wrong, none.
        return killed or self.result.code in (2, 3, 130, 143) or not self._stages


def run(
    mutants: Sequence[Mutant],
    stages: Sequence[Stage],
    words: Sequence[str],
    jobs: int,
    folder: Path,
    output: Output,
    known: Mapping[str, str],
) -> list[Result]:
    """Try *mutants*, *jobs* at a time; each ends at the first run that kills it.

    *words* are added to each ``qemu-ioasid run``; their reports are in *folder*. What is *known*
    to have killed a mutant, by its name, is tried `first` on it.
    """
    waiting = deque(
        _Trial(mutant, first(stages, known.get(mutant.name, "")), words, folder)
        for mutant in mutants
    )
    running: dict[int, _Trial] = {}
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        for trial in waiting:
            stack.callback(trial.close)
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = waiting.popleft()
                running[trial.start()] = trial
            output.progress(f"{len(results)} of {len(mutants)}")
            for fd in _ended(running):
                trial = running.pop(fd)
                if not trial.over():
                    running[trial.start()] = trial
                    continue
                results.append(trial.result)
                output.say(told(trial.result))
    return results


def _ended(running: Mapping[int, _Trial]) -> list[int]:
    """The pidfds of the runs that have ended or are late; waits for one, a second at most."""
    poll = select.poll()
    for fd in running:
        poll.register(fd, select.POLLIN)
    over = {fd for fd, _ in poll.poll(1000)}
    return [fd for fd, trial in running.items() if fd in over or trial.late()]


def told(result: Result) -> str:
    """A result in one line."""
    how = f" by {result.by}" if result.by else ""
    return (
        f"{result.seconds:7.1f} s  {result.name}: {result.verdict}{how}"
        f" (built in {result.build_seconds:.0f} s)"
    )


def exit_code(results: Iterable[Result]) -> int:
    """That of all *results*: what nobody knows counts most, then what must not be."""
    codes = {each.exit_code for each in results}
    return max(codes - {0, 1}, default=max(codes, default=0))


def document(results: Sequence[Result]) -> dict[str, Any]:
    """The results as an object for JSON."""
    return {"schema": 1, "mutants": [asdict(each) for each in results]}
