# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``model``: random programs, and the kernel does what the rules say of each step.

No guest takes part: the host side opens the mdevs itself. A program that differs is made small,
told, and left in the report's folder, from where ``qemu-ioasid run --replay`` plays it again.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qemu_ioasid import model
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import ConfigurationError, RigError
from qemu_ioasid.model import outcomes, program
from qemu_ioasid.model.iommufd import MEMORY
from qemu_ioasid.model.minimal import minimal
from qemu_ioasid.model.program import DEVICES, Difference, Step
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios.checks import Checks, Skipped, Trial
from qemu_ioasid.scenarios.table import Row

APPEND = f"vfio_pdma.max_pasids={program.MAX_PASIDS}"
RIG = Path(model.__file__).parents[1] / "host-only.toml"
STEPS = 10_000
#: From so many steps on, every outcome there is must come.
ENOUGH = 5_000
#: How often a fifth as many steps are tried for outcomes that have not come.
MORE = 10
#: For one descriptor, and for a program, in seconds of the reference machine.
STEP_SECONDS = 10.0
PROGRAM_SECONDS = 60.0
#: How long a program that differs is made smaller.
SHRINK_SECONDS = 60.0
FILE = "program.txt"


class _Broke(BaseException):
    """The rig failed or the kernel broke: nothing that a search may take for another difference."""

    def __init__(self, cause: RigError) -> None:
        super().__init__()
        self.cause = cause


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises ConfigurationError for a rig whose guests have the mdevs, or none has."""
    if not set(DEVICES) <= set(config.spare):
        raise ConfigurationError(
            f"{config.path}: scenario model needs mdevs {', '.join(DEVICES)} that no guest has"
        )
    return [
        Row("programs", "model", "random steps, each as the rules say", Programs.agree),
        Row("programs", "outcomes", "whether every outcome there is has come", Programs.covered),
    ]


def run(
    rig: Rig,
    report: Report,
    rows: Sequence[Row],
    steps: int = STEPS,
    seed: int | None = None,
    replay: Sequence[Step] | None = None,
) -> None:
    """Play *steps* random steps from *seed*, or the program *replay* alone."""
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    programs = Programs(rig, report, steps, chosen, replay)
    checks = Checks(rig, report)
    with report.phase("programs"):
        checks.make(rows, programs)


class Programs:
    """Programs on a rig, and what has come of them."""

    def __init__(
        self,
        rig: Rig,
        report: Report,
        steps: int,
        seed: int,
        replay: Sequence[Step] | None,
    ) -> None:
        self._rig = rig
        self._report = report
        self._steps, self._seed, self._replay = steps, seed, replay
        self.played = 0
        self.met: Counter[tuple[str, str]] = Counter()
        self._found: tuple[list[Step], Difference] | None = None
        self._until = 0.0
        self._max_pasids = program.MAX_PASIDS

    # --- checks ---------------------------------------------------------------------------

    def agree(self, trial: Trial) -> None:
        """The kernel does what the rules say."""
        started = time.monotonic()
        if self._replay is not None:
            self._play(list(self._replay))
        else:
            self._report.say(f"seed {self._seed}")
            self._search(self._seed, self._steps)
            for more in range(1, MORE + 1):
                if self._found is not None or not (self._few() or self._lacking()):
                    break
                self._search(self._seed + more, max(1, self._steps // 5))
        seconds = time.monotonic() - started
        trial.answer(f"{self.played} steps in {seconds:.1f} s, seed {self._seed}")
        trial.answer(f"{len(self.met)} kinds of answers")
        if self._found is not None:
            self._tell(trial, *self._found)
        trial.saw("after each step the answer, all memory, the table and the lists as they must be")

    def covered(self, trial: Trial) -> None:
        """Every outcome there is has come."""
        if self._found is not None or self._replay is not None or self._steps < ENOUGH:
            raise Skipped("only where many steps went as they must")
        for operation, seen in sorted(outcomes.OUTCOMES.items()):
            counts = ", ".join(f"{name} {self.met[operation, name]}" for name in seen)
            self._report.say(f"  {operation}: {counts}")
        lacking = self._lacking()
        trial.answer(f"{len(outcomes.ALL) - len(lacking)} of {len(outcomes.ALL)}")
        trial.require(not lacking, f"never came: {'; '.join(lacking)}")
        trial.saw("every outcome that is asked for")

    def _few(self) -> bool:
        # Hypothesis may stop short of what it was told
        return self.played < self._steps

    def _lacking(self) -> list[str]:
        if self._steps < ENOUGH:
            return []
        return [f"{op}: {name}" for op, name in outcomes.ALL if not self.met[op, name]]

    # --- programs -------------------------------------------------------------------------

    def _search(self, seed: int, steps: int) -> None:
        from qemu_ioasid.model import machine

        try:
            machine.search(self._judged, seed, steps)
        except _Broke as broke:
            raise broke.cause from None
        if self._found is not None:
            first = self._found[1]
            self._report.say(f"step {self.played + 1}: {first.expected}; seen: {first.seen}")
            if self._report.first:
                return
            self._until = time.monotonic() + SHRINK_SECONDS * calibration()
            minimal(self._found[0], self._smaller)

    def _judged(self, steps: list[Step]) -> bool:
        """Whether the kernel does as it must; a rig that breaks meanwhile ends the search."""
        try:
            return self._play(steps) is None
        except RigError as error:
            self._report.say(f"what the kernel was doing then: {FILE}")
            raise _Broke(error) from error

    def _smaller(self, steps: list[Step]) -> list[Step] | None:
        return self._play(steps) if time.monotonic() < self._until else None

    def _play(self, steps: list[Step]) -> list[Step] | None:
        """Have the kernel do *steps*: None, or those up to the first that differs."""
        path = self._report.folder / FILE
        # Should this be the last that the kernel does
        path.write_text("".join(f"{program.line(step)}\n" for step in steps))
        answer = self._rig.host.agent.call(
            "program",
            deadline=Deadline(PROGRAM_SECONDS, f"answer to a program of {len(steps)} steps"),
            devices=list(DEVICES),
            length=MEMORY,
            seed=program.SEED,
            steps=steps,
            seconds=STEP_SECONDS * calibration(),
        )
        self._rig.check_consoles()
        path.unlink()
        if self._found is not None and any(answer["observed"][0].get("lists", {}).values()):
            # It left something that does not go away: from here on nothing begins with nothing
            self._until = 0.0
            return None
        self._max_pasids = int(answer["max_pasids"])
        expected = program.predict(steps, self._max_pasids)
        difference = program.compare(expected, answer["observed"])
        if difference is not None:
            if self._found is None:
                self.played += difference.step
            self._found = steps[: difference.step + 1], difference
            self._report.progress(f"{self.played} steps; one differs: {len(self._found[0])} steps")
            return self._found[0]
        if self._found is None:
            self.played += len(steps)
            for (operation, _), must in zip(steps, expected, strict=False):
                self.met[operation, must.answer.outcome] += 1
            self._report.progress(f"{self.played} steps")
        return None

    def _tell(self, trial: Trial, steps: list[Step], difference: Difference) -> None:
        text = program.text(steps, self._max_pasids, difference)
        path = self._report.folder / FILE
        path.write_text(text)
        for line in text.splitlines():
            self._report.say(f"  {line}")
        trial.answer(f"one that is not as it must be, in a program of {len(steps)}")
        where = program.line(steps[difference.step]) if difference.step < len(steps) else "close"
        trial.require(
            False, f"{where}: expected {difference.expected}, seen {difference.seen}; {path.name}"
        )
