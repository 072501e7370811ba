# SPDX-License-Identifier: GPL-2.0-or-later
"""Who tried which PASID, and what came of it: the attempts of a report as rows and columns."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

#: How many rows and columns there are at most.
ROWS, COLUMNS = 64, 200
#: What must not be: no row and no column with it is left out for one without.
BAD = ("leaked", "wrong", "unanswered")


class Row(NamedTuple):
    """A device in the hands of a guest, or of ``host``."""

    by: str
    device: str


class Column(NamedTuple):
    """A PASID while *owner* held it ("": nobody); *pasid* None: work without one."""

    owner: str
    pasid: int | None


class Tried(NamedTuple):
    """What came of one attempt, which *check* made."""

    outcome: str
    check: str


class Matrix:
    """*cells* holds what was tried, in order; *left_out* rows and columns did not fit.

    *in_rig* are the rows of the guests' own mdevs.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        """Of a report.json's document, as `report.load` has it."""
        given = document.get("vms", [])
        rows = [Row(vm["name"], device) for vm in given for device in vm["mdevs"]]
        self.in_rig = frozenset(rows)
        guests = [row.by for row in rows]
        self.cells: dict[tuple[Row, Column], list[Tried]] = {}
        for check in document["checks"]:
            for attempt in check.get("attempts", []):
                pasid = attempt["pasid"]
                column = Column("" if pasid is None else attempt["owner"], pasid)
                row = Row(attempt["by"], attempt["device"])
                tried = Tried(attempt["outcome"], check["name"])
                self.cells.setdefault((row, column), []).append(tried)

        def place(column: Column) -> tuple[bool, int, str, int]:
            known = guests.index(column.owner) if column.owner in guests else len(guests)
            last = known if column.owner else len(guests) + 1
            return column.pasid is not None, last, column.owner, column.pasid or 0

        bad = {place for place, tried in self.cells.items() if worst(tried)}
        rows = list(dict.fromkeys([*rows, *(row for row, _ in self.cells)]))
        columns = sorted({column for _, column in self.cells}, key=place)
        self.rows = _some(rows, {row for row, _ in bad}, ROWS)
        self.columns = _some(columns, {column for _, column in bad}, COLUMNS)
        self.left_out = len(rows) - len(self.rows), len(columns) - len(self.columns)

    def bands(self, width: int) -> list[list[Column]]:
        """The columns, at most *width* in a band, each band of one owner."""
        bands: list[list[Column]] = []
        for column in self.columns:
            last = bands[-1] if bands else []
            same = bool(last) and last[0].owner == column.owner
            if same and (last[0].pasid is None) == (column.pasid is None) and len(last) < width:
                last.append(column)
            else:
                bands.append([column])
        return bands


def worst(tried: list[Tried]) -> str:
    """The worst of the outcomes that must not be, "" where there is none."""
    found = {each.outcome for each in tried}
    return next((outcome for outcome in BAD if outcome in found), "")


def _some(all_of_them: list[T], first: set[T], most: int) -> list[T]:
    """*most* of them at most, in their order: those of *first*, then whoever has room."""
    kept = set(sorted(all_of_them, key=lambda each: each not in first)[:most])
    return [each for each in all_of_them if each in kept]
