# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark's table. What it measures is tried on a VM in test_batch.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from qemu_ioasid.bench.table import Measurement, Ratio, measure, text
from qemu_ioasid.kernel import Kernel
from tests.conftest import Command


def counting(*names: str) -> Measurement:
    """Takes 1, 2, 4, 8 in turn for the first name, twice as much for the next."""
    powers: Iterator[int] = (1 << number for number in itertools.count())

    def take() -> dict[str, float]:
        value = next(powers)
        return {name: float(value * (index + 1)) for index, name in enumerate(names)}

    return Measurement("powers", "us", take)


def test_rows_have_median_and_every_round() -> None:
    progress: list[str] = []
    rows = measure(
        3,
        [counting("a", "b"), counting("c")],
        [Ratio("both-to-c", ("a", "b"), ("c",))],
        progress.append,
    )
    assert rows == [
        {"name": "a", "unit": "us", "median": 2.0, "runs": [1.0, 2.0, 4.0]},
        {"name": "b", "unit": "us", "median": 4.0, "runs": [2.0, 4.0, 8.0]},
        {"name": "c", "unit": "us", "median": 2.0, "runs": [1.0, 2.0, 4.0]},
        {"name": "both-to-c", "unit": "ratio", "median": 3.0, "runs": [3.0, 3.0, 3.0]},
    ]
    assert progress[0] == "round 1 of 3: powers"
    header, first, *_ = text(rows).splitlines()
    assert header.split() == ["median", "lowest", "highest"]
    assert first.split() == ["a", "2.00", "1.00", "4.00", "us"]


def test_no_rounds_is_exit_2(command: Command) -> None:
    ended = command("bench", "--rounds", "0")
    assert ended.code == 2
    assert "--rounds: 0: must be" in ended.err
    assert command("bench", "--restores", "-5").code == 2


@pytest.mark.parametrize("name", ["drivers/nonesuch.c", "Makefile"])
def test_an_edit_of_no_c_file_is_exit_2(built_kernel: Kernel, command: Command, name: str) -> None:
    ended = command("bench", "--edit", name)
    assert ended.code == 2
    assert f"--edit {name}: no C file of the kernel" in ended.err
