# SPDX-License-Identifier: GPL-2.0-or-later
"""The state machine: Hypothesis draws programs and has them played.

Hypothesis is an optional dependency, of this module alone: a program that was found is played
again, and made small, without it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from qemu_ioasid.model import program
from qemu_ioasid.model.program import Step
from qemu_ioasid.model.steps import following

#: A program's length. Longer ones find no more, and take longer to make small.
LENGTH = 100

#: Has a kernel carry out a program: whether it does as the rules say.
Play = Callable[[list[Step]], bool]


class Differs(Exception):
    """A kernel did otherwise than the rules say; ends one program."""


class Programs(RuleBasedStateMachine):
    """A program, step by step along the model, and played at its end."""

    play: Play

    def __init__(self) -> None:
        super().__init__()
        self.model = program.fresh(program.MAX_PASIDS)
        self.steps: list[Step] = []

    # Choices of Hypothesis's own would favour what it chose before: whole seeds met no replace
    @rule(chance=st.randoms(use_true_random=True))
    def step(self, chance: Random) -> None:
        """One more step."""
        operation, arguments = following(self.model, chance.choice)
        self.model.step(operation, arguments)
        self.steps.append((operation, arguments))

    def teardown(self) -> None:
        """The program is as long as it gets."""
        if self.steps and not type(self).play(self.steps):
            raise Differs


def search(play: Play, number: int, steps: int) -> None:
    """Have *play* do programs of *steps* steps in all, from seed *number*, until one differs."""
    differed = False

    def played(program: list[Step]) -> bool:
        nonlocal differed
        same = play(program)
        differed = differed or not same
        return same

    machine = type("Programs", (Programs,), {"play": staticmethod(played)})
    how = settings(
        max_examples=max(1, steps // LENGTH),
        stateful_step_count=min(LENGTH, steps),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )
    try:
        run_state_machine_as_test(seed(number)(machine), settings=how)
    except Differs:
        return
    except Flaky:
        # Hypothesis plays it once more: what it left, or a race, may have it differ no more.
        if not differed:
            raise
