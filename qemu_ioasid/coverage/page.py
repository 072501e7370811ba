# SPDX-License-Identifier: GPL-2.0-or-later
"""coverage.html: what no test has run, as a page that people look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from qemu_ioasid.coverage import Judgement, total
from qemu_ioasid.gcov import Line
from qemu_ioasid.markup import Markup, serialized
from qemu_ioasid.page import BUDGET, whole

_LINE = ("patch", "file", "line", "function", "text")


def render(judgement: Judgement) -> str:
    """The page of a judgement."""
    e = Markup(BUDGET)
    kernel = judgement.coverage.kernel
    verdict = "Each changed line ran, or has a reason" if judgement.held else "Not all was tested"
    known = [(line, reason.reason) for line, reason in judgement.unreached if reason]
    body = (
        e(
            "header",
            e("p", f"qemu_ioasid · coverage · {kernel['source']} · {judgement.runs} runs"),
            e("h1", verdict, class_="good" if judgement.held else "bad"),
            e("p", f"{total(judgement)}."),
        ),
        _rows(
            e,
            "Not run, and no reason is known",
            _LINE,
            (_line(line) for line in judgement.untested),
        ),
        _rows(
            e,
            "Not run, for a reason",
            (*_LINE, "reason"),
            ([*_line(line), reason] for line, reason in known),
        ),
        _rows(
            e,
            "In no object of this kernel",
            ("file",),
            ([file] for file in judgement.coverage.missing),
        ),
        _rows(
            e,
            "Reasons that no line needs",
            ("file", "function", "text", "reason", "why not"),
            (
                [each.file, each.function, each.line, each.reason, why]
                for each, why in judgement.stale
            ),
        ),
        _rows(
            e,
            "By patch and file",
            ("patch", "file", "ran", "of lines", "branches taken", "of branches"),
            (
                [
                    each.patch,
                    each.file,
                    *map(str, (each.ran, each.lines, each.taken, each.branches)),
                ]
                for each in judgement.tallies()
            ),
        ),
    )
    return serialized(whole(e, f"{verdict}: coverage, qemu_ioasid", *body))


def _line(line: Line) -> list[str]:
    return [line.patch, line.file, str(line.number), line.function, line.text]


def _rows(
    e: Markup, title: str, names: Sequence[str], rows: Iterable[Sequence[str]]
) -> Element | None:
    made = [e("tr", *(e("td", cell) for cell in row)) for row in rows]
    if not made:
        return None
    return e(
        "section",
        e("h2", title),
        e(
            "table",
            e("thead", e("tr", *(e("th", name, scope="col") for name in names))),
            e("tbody", *made),
            class_="attempts",
        ),
    )
