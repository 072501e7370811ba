# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that differs, made small: what is left is needed for it to differ.

Hypothesis would draw again with fewer draws, and those mean something else once an earlier step is
gone. What was seen is a program of plain numbers, and that gets small fast by leaving steps out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from qemu_ioasid.model import program
from qemu_ioasid.model.iommufd import Context
from qemu_ioasid.model.program import Step
from qemu_ioasid.model.rules import File, Model

#: Plays a program: its steps up to the one that differs, or None.
Differing = Callable[[list[Step]], list[Step] | None]
#: What a number is tried to be instead.
SIMPLE = (0, 1, 16)


def minimal(steps: Sequence[Step], differing: Differing) -> list[Step]:
    """The smallest program that is found; *steps* differs at its last step."""
    best = _without_steps(list(steps), differing)
    for index in range(len(best) - 1, -1, -1):
        for simpler in _simpler(best, index) if index < len(best) else ():
            if (found := differing(simpler)) is not None:
                best = found
                break
    return _without_steps(best, differing)


def _without_steps(best: list[Step], differing: Differing) -> list[Step]:
    size = len(best) // 2
    while size:
        at = len(best) - size
        while at >= 0:
            shorter = differing(without(best, range(at, at + size)))
            best = best if shorter is None else shorter
            at = min(at, len(best)) - size
        size //= 2
    return best


def without(steps: Sequence[Step], left_out: range) -> list[Step]:
    """A program without some steps; ids mean what the same steps make as before."""
    old, new = _Ids(), _Ids()
    found = []
    for index, (operation, arguments) in enumerate(steps):
        if index not in left_out:
            step = operation, new.renamed(operation, arguments, old)
            found.append(step)
            new.follow(index, *step)
        old.follow(index, operation, arguments)
    return found


class _Ids:
    """Which step made the object that an id names."""

    def __init__(self) -> None:
        self.model: Model = program.fresh(program.MAX_PASIDS)
        self.made: dict[object, int] = {}

    def follow(self, index: int, operation: str, arguments: dict[str, int | str]) -> None:
        """The step of that index in the whole program is carried out."""
        self.model.step(operation, arguments)
        for context in self.model.contexts():
            for thing in context.objects.values():
                self.made.setdefault(thing, index)

    def context(self, arguments: dict[str, int | str]) -> Context | None:
        """The iommufd whose ids a step means."""
        found = self.model.slots.get(str(arguments.get("fd")))
        if isinstance(found, File):
            return found.own.context if found.own else None
        return found if isinstance(found, Context) else None

    def renamed(
        self, operation: str, arguments: dict[str, int | str], old: _Ids
    ) -> dict[str, int | str]:
        """The arguments, with the ids that name here what they named in *old*."""
        before, now = old.context(arguments), self.context(arguments)
        found = dict(arguments)
        for name in ("ioas", "pt_id", "ident"):
            thing = before.objects.get(int(arguments[name])) if before and name in found else None
            for ident, other in now.objects.items() if now and thing else ():
                if self.made[other] == old.made[thing]:
                    found[name] = ident
        return found


def _simpler(steps: list[Step], index: int) -> Iterator[list[Step]]:
    """Programs in which a step is a simpler one, or a duplicate of an fd is the fd."""
    operation, arguments = steps[index]
    head, tail = steps[:index], steps[index + 1 :]
    if operation == "dup":
        names = {arguments["fd"]: arguments["of"]}
        yield [*head, *((op, {k: names.get(v, v) for k, v in a.items()}) for op, a in tail)]
    for name, value in arguments.items():
        for simple in SIMPLE if isinstance(value, int) else ():
            if simple < value:
                yield [*head, (operation, {**arguments, name: simple}), *tail]
