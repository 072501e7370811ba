# SPDX-License-Identifier: GPL-2.0-or-later
"""The reference model: a kernel that keeps to it, one that does not, and programs as texts."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.model import program
from qemu_ioasid.model.minimal import minimal
from qemu_ioasid.model.outcomes import ALL
from qemu_ioasid.model.program import Step
from qemu_ioasid.model.rules import Answer, Model
from qemu_ioasid.model.steps import following
from tests.conftest import Command
from tests.starter import Ended


def agreed(ended: Ended) -> dict[str, Any]:
    """What the check of a run says that agreed with the model."""
    assert ended.code == 0, ended.err
    checks = {check["name"]: check for check in ended.json()["checks"]}
    assert {check["verdict"] for check in checks.values()} == {"pass"}
    return dict(checks["model"])


def test_ten_thousand_steps_of_a_fixed_seed(command: Command) -> None:
    check = agreed(command("run", "model", "--json", "--seed", "1"))
    found = re.match(r"(\d+) steps in .*, seed 1;", check["answered"])
    assert found and int(found[1]) >= 10_000


def test_ten_thousand_steps_of_a_fresh_seed(
    command: Command, record_property: Callable[[str, object], None]
) -> None:
    ended = command("run", "model", "--json")
    print(ended.err)
    found = re.match(r"(\d+) steps in .*, seed (\d+);", agreed(ended)["answered"])
    assert found and int(found[1]) >= 10_000
    assert f"seed {found[2]}\n" in ended.err
    record_property("seed", found[2])


def test_guests(command: Command) -> None:
    ended = command("run", "model-guests", "--json", "--steps", "30", "--seed", "1")
    print(ended.err)
    assert ended.code == 0, ended.err
    (check,) = ended.json()["checks"]
    assert "30 steps" in check["answered"]
    assert {"refused", "allowed"} <= {attempt["outcome"] for attempt in check["attempts"]}


def test_a_driver_without_its_list_is_found_and_the_program_plays_again(
    command: Command, tmp_path: Path
) -> None:
    broken = ("--json", "--mutant", "no-list-check")
    ended = command("run", "model", "--report", "found", *broken)
    assert ended.code == 1, ended.err
    text = (tmp_path / "found/program.txt").read_text()
    # iommufd, open, bind, submit
    assert len(program.parse(text, "program.txt")) == 4
    assert re.search(r"submit .* # REFUSED: .*\n#   expected: .*\n#   seen:     0 \[1, '", text)
    again = command("run", "--replay", "found/program.txt", *broken)
    assert again.code == 1, again.err
    assert "expected REFUSED" in again.json()["checks"][0]["witnesses"]
    good = command("run", "--replay", "found/program.txt", "--json")
    assert good.code == 0, good.err


# --- what needs no kernel ---------------------------------------------------------------------


def drawn(seed: int, count: int) -> list[Step]:
    """A random program."""
    chance = random.Random(seed)
    model = program.fresh(program.MAX_PASIDS)
    steps = []
    for _ in range(count):
        steps.append(following(model, lambda options: chance.choice(options)))
        model.step(*steps[-1])
    return steps


def test_every_outcome_is_drawn_by_chance_alone() -> None:
    met = set()
    for seed in range(200):
        steps = drawn(seed, 100)
        for step, expected in zip(steps, program.predict(steps, program.MAX_PASIDS), strict=False):
            met.add((step[0], expected.answer.outcome))
    assert set(ALL) <= met


def test_a_program_is_the_same_from_its_text() -> None:
    steps = drawn(5, 100)
    assert program.parse("\n".join(map(program.line, steps)), "text") == steps


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("open fd=d0 device=z", "file:1: open: device=z: must be one of a, b, c"),
        ("\nopn fd=d0", "file:2: opn: no step opn; there are attach"),
        ("detach", "file:1: detach: missing a required argument: 'fd'"),
        ("attach fd=d0 pt_id=x", "file:1: attach: invalid literal"),
        ("attach fd=d0 pt_id=0x10000000000000000", "out of range"),
        ("attach fd", "file:1: attach: fd: must be name=value"),
    ],
)
def test_what_is_no_program(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        program.parse(text, "file")


class Careless(Model):
    """A model of a driver whose first leaver takes a shared PASID from all."""

    def detach_pasid(self, fd: str, pasid: int) -> Answer:
        """As ever, and then it is gone from every list."""
        answer = super().detach_pasid(fd, pasid)
        for file in self.bound():
            file.pasids.pop(pasid, None)
        return answer


def differing(steps: list[Step]) -> list[Step] | None:
    """The steps to the first after which the careless one's lists are others."""
    content = random.Random(program.SEED).randbytes(1)
    good, bad = (cls(content, program.DEVICES, 3) for cls in (Model, Careless))
    for index, step in enumerate(steps):
        if good.step(*step) != bad.step(*step) or good.kernel() != bad.kernel():
            return steps[: index + 1]
    return None


def test_what_is_found_is_made_small() -> None:
    long = next(found for seed in range(99) if (found := differing(drawn(seed, 100))))
    small = minimal(long, differing)
    # An iommufd with an IOAS, two devices opened, bound and given the PASID, one of which leaves
    assert len(small) <= 9, list(map(program.line, small))


def test_what_differs_once_and_not_again_is_found() -> None:
    """A kernel that keeps what it must not begins the same program with something else."""
    from qemu_ioasid.model import machine

    played: list[int] = []

    def play(steps: list[Step]) -> bool:
        played.append(len(steps))
        return len(played) != 2

    machine.search(play, 1, 1000)
    assert len(played) == 3


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequirementError, match=r"qemu_ioasid\[model\]"):
        program.require_hypothesis()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("isolation", "--steps", "5"), "--steps: scenario isolation takes none"),
        (("--replay", "nonesuch"), "nonesuch: No such file or directory"),
        (("model", "--rig", "RIG"), "scenario model needs mdevs a, b, c that no guest has"),
    ],
)
def test_usage(command: Command, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "RIG").write_text("[mdev.a]\n")
    ended = command("run", *arguments)
    assert ended.code == 2, ended.err
    assert said in ended.err
