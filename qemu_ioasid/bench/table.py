# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of a benchmark, and the rounds in which they are measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Figure's name = its value in one round.
Values = Mapping[str, float]


@dataclass(frozen=True)
class Measurement:
    """Figures that are taken together, in *unit*; *what* is for the one who waits."""

    what: str
    unit: str
    take: Callable[[], Values]


@dataclass(frozen=True)
class Ratio:
    """A figure made of others of the same round: the sum of *over* divided by that of *under*."""

    name: str
    over: tuple[str, ...]
    under: tuple[str, ...]

    def of(self, values: Values) -> float:
        """The ratio in one round."""
        return sum(values[name] for name in self.over) / sum(values[name] for name in self.under)


def measure(
    count: int,
    measurements: Sequence[Measurement],
    ratios: Sequence[Ratio],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Take all *measurements* *count* times, and make a row of each figure and ratio.

    A row has name, unit, median and runs: what each round had. In rounds, a busy
    moment of the machine hits all figures alike.
    """
    units: dict[str, str] = {}
    rounds: list[dict[str, float]] = []
    for number in range(1, count + 1):
        values: dict[str, float] = {}
        for measurement in measurements:
            progress(f"round {number} of {count}: {measurement.what}")
            taken = measurement.take()
            values.update(taken)
            units.update(dict.fromkeys(taken, measurement.unit))
        for ratio in ratios:
            values[ratio.name] = ratio.of(values)
            units[ratio.name] = "ratio"
        rounds.append(values)
    return [row(name, unit, [values[name] for values in rounds]) for name, unit in units.items()]


def row(name: str, unit: str, runs: Sequence[float]) -> dict[str, Any]:
    """A figure with its median over *runs*."""
    median = round(statistics.median(runs), 3)
    return {"name": name, "unit": unit, "median": median, "runs": [round(x, 3) for x in runs]}


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a terminal: the median, and what it lies between."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {'':{width}}  {'median':>10} {'lowest':>10} {'highest':>10}"]
    for row in rows:
        figures = (row["median"], min(row["runs"]), max(row["runs"]))
        numbers = " ".join(f"{figure:10.2f}" for figure in figures)
        lines.append(f"  {row['name']:{width}}  {numbers}  {row['unit']}")
    return "\n".join(lines)
