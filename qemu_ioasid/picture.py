# SPDX-License-Identifier: GPL-2.0-or-later
"""The pictures on a report's page: who tried which PASID, and the timeline."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any
from xml.etree.ElementTree import Element

from qemu_ioasid.attempts import Column, Matrix, Row, worst
from qemu_ioasid.markup import Child, Markup

#: The most phases there are.
PHASES = 100
#: How many PASIDs stand side by side, for which a sheet of paper has room.
BAND = 16
#: The most outcomes shown in one cell.
IN_CELL = 3

#: What each outcome means, and the strokes of its symbol on a field of 16 by 16.
OUTCOMES = {
    "allowed": ("allowed: registered, and it moved exactly its bytes", "M3 8.5 6.5 12 13 4.5"),
    "refused": (
        "refused: no byte moved",
        "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M4.2 4.2 11.8 11.8",
    ),
    "faulted": (
        "faulted: stopped at an address not mapped for it",
        "M1.5 8H9M6 5 9 8 6 11M12.5 2.5V13.5",
    ),
    "leaked": ("LEAKED: the witnesses saw what must not be", "M8 2V9.5M8 12.2V13.8"),
    "wrong": ("ended otherwise than it must, without a leak", "M3 6H13M3 10H13M11 2.5 5 13.5"),
    "unanswered": (
        "no answer",
        "M5 5.5C5 1.5 11 1.5 11 5.2C11 7.6 8 7.4 8 9.8M8 12.2V13.8",
    ),
}
#: The strokes of every symbol.
SYMBOLS = {name: path for name, (_, path) in OUTCOMES.items()} | {"failed": "M4 4 12 12M12 4 4 12"}
#: What stands where nothing was tried.
UNTRIED = "·"


def seconds(value: float) -> str:
    """A time, to the tenth where that tells something."""
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def holder(name: str) -> str:
    """Whose a PASID is, in words."""
    if name.startswith("agent:"):
        return f"host ({name.removeprefix('agent:')})"
    return name or "nobody"


def symbols(e: Markup) -> Element:
    """What `mark` draws; once a page."""
    return e(
        "svg",
        *(
            e("symbol", e("path", d=path), id=name, viewBox="0 0 16 16")
            for name, path in SYMBOLS.items()
        ),
        class_="symbols",
        aria_hidden="true",
    )


def mark(e: Markup, name: str, title: str = "") -> Element:
    """One of SYMBOLS; with a *title* it says itself to those who do not see it."""
    known = name if name in SYMBOLS else "unanswered"
    symbol = e("svg", e("use", href=f"#{known}"), viewBox="0 0 16 16", aria_hidden="true")
    if not title:
        return e("span", symbol, class_=f"mark {known}")
    words = e("span", name, class_="said")
    return e("span", symbol, words, class_=f"mark {known}", title=title)


def isolation(e: Markup, matrix: Matrix) -> Element:
    """Which device tried which PASID, and what came of it."""
    if not matrix.columns:
        why = "No device was given work, or this report was made before that was noted."
        return e("section", e("h2", "Isolation"), e("p", why))
    shown = {each.outcome for tried in matrix.cells.values() for each in tried}
    legend = [
        e("li", mark(e, name), meaning)
        for name, (meaning, _) in OUTCOMES.items()
        if name in shown or name in ("allowed", "refused", "leaked")
    ]
    legend.append(e("li", e("span", UNTRIED, class_="untried"), " not tried"))
    more = "{} more devices and {} more PASIDs are in report.json only.".format(*matrix.left_out)
    return e(
        "section",
        e("h2", "Isolation"),
        e(
            "p",
            "A row is a device in the hands of a VM; a column is a PASID, under who held it at "
            "the time. Shaded: the holder is that VM. Two symbols in a cell: two attempts, "
            "the first one first.",
        ),
        e("ul", *legend, class_="legend"),
        e("div", *(_band(e, matrix, band) for band in matrix.bands(BAND)), class_="bands"),
        e("p", more) if any(matrix.left_out) else None,
    )


def _band(e: Markup, matrix: Matrix, band: list[Column]) -> Element:
    owner, pasid = band[0]
    if pasid is None:
        title, names = "no PASID", ["own space"]
    else:
        whose = f"PASIDs of {holder(owner)}" if owner else "nobody's PASIDs"
        title, names = whose, [str(column.pasid) for column in band]
    rows: list[Child] = []
    # A device in other hands than its guest's is a row only where it tried something.
    present = [
        row
        for row in matrix.rows
        if row in matrix.in_rig or any((row, each) in matrix.cells for each in band)
    ]
    for by, group in groupby(present, key=lambda row: row.by):
        devices = list(group)
        for number, row in enumerate(devices):
            first = e("th", by, rowspan=str(len(devices)), scope="rowgroup", class_="vm")
            rows.append(
                e(
                    "tr",
                    first if number == 0 else None,
                    e("th", row.device, scope="row"),
                    *(_cell(e, matrix, row, column) for column in band),
                    class_="first" if number == 0 else "",
                )
            )
    return e(
        "table",
        e(
            "thead",
            e(
                "tr",
                e("th", e("span", "VM", class_="said"), rowspan="2", scope="col"),
                e("th", e("span", "device", class_="said"), rowspan="2", scope="col"),
                e("th", title, colspan=str(len(band)), scope="colgroup", class_="owner"),
            ),
            e("tr", *(e("th", name, scope="col") for name in names)),
        ),
        e("tbody", *rows),
        class_="matrix",
    )


def _cell(e: Markup, matrix: Matrix, row: Row, column: Column) -> Element:
    tried = matrix.cells.get((row, column), [])
    holders = (row.by, f"agent:{row.device}" if row.by == "host" else "")
    own = "own " if column.pasid is None or column.owner in filter(None, holders) else ""
    if not tried:
        return e("td", UNTRIED, class_=f"{own}untried")
    # The same thing again tells nothing; what must not be is never left out.
    runs = [list(group) for _, group in groupby(tried, key=lambda each: each.outcome)]
    shown = runs[:IN_CELL]
    if worst(tried) != worst([run[0] for run in shown]):
        shown[-1] = [each for each in tried if each.outcome == worst(tried)]
    which = "no PASID" if column.pasid is None else f"PASID {column.pasid}"
    marks = [
        mark(
            e,
            run[0].outcome,
            f"{row.device} of {row.by}, {which}: {run[0].outcome} in "
            + ", ".join(dict.fromkeys(each.check for each in run)),
        )
        for run in shown
    ]
    more = e("span", "+", title="more in report.json") if len(runs) > IN_CELL else None
    return e("td", *marks, more, class_=own + worst(tried))


def timeline(e: Markup, document: dict[str, Any]) -> Element | None:
    """The steps of the run, to scale."""
    phases = document["phases"][:PHASES]
    left_out = len(document["phases"]) - len(phases)
    if not phases:
        return None
    failed = Counter(
        check.get("phase") for check in document["checks"] if check["verdict"] in ("fail", "error")
    )
    spans, end = [], 0.0
    for phase in phases:
        start = phase.get("start", end)
        end = start + phase["seconds"]
        spans.append((start, end))
    total = max(end for _, end in spans) or 1.0
    step = _step(total)
    ticks = [step * n for n in range(int(total / step) + 1)]
    axis = e(
        "li",
        e("span"),
        e(
            "span",
            *(e("span", f"{tick:g} s", style=f"left:{tick / total:.2%}") for tick in ticks),
            class_="ticks",
        ),
        class_="axis",
    )
    rows = [
        _phase(e, phase, start / total, (end - start) / total, failed[phase["name"]])
        for phase, (start, end) in zip(phases, spans, strict=True)
    ]
    return e(
        "section",
        e("h2", f"Timeline: {seconds(total)}"),
        e("ol", axis, *rows, class_="timeline"),
        e("p", f"{left_out} more are in report.json only.") if left_out else None,
    )


def _phase(e: Markup, phase: dict[str, Any], start: float, share: float, failed: int) -> Element:
    notes = [f"{failed} failed"] * (failed > 0)
    notes += ["not finished"] * (not phase.get("finished", True))
    bar = e("span", class_="bar", style=f"left:{start:.2%};width:{share:.2%}")
    return e(
        "li",
        e(
            "span",
            phase["name"],
            e("strong", f" {', '.join(notes)}") if notes else None,
            class_="name",
        ),
        e("span", bar, class_="track"),
        e("span", seconds(phase["seconds"]), class_="number"),
        class_="bad" if notes else "",
    )


def _step(total: float) -> float:
    """A round number of seconds, so that about four to ten fit into *total*."""
    step = 0.001
    while True:
        for factor in (1, 2, 5):
            if step * factor * 10 >= total:
                return step * factor
        step *= 10
