# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel's own test programs write: KTAP, TAP 13 and what kselftest makes of both.

Documentation/dev-tools/ktap.rst, tools/testing/selftests/kselftest_harness.h. The text comes from
a kernel under test: none of it is believed to be whole, or to be in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["ok", "not ok", "skip", "xfail", "xpass"]

#: What goes before a subtest's line: blanks in KTAP, a comment's sign where kselftest's runner
#: passes a program's output on.
_PREFIX = re.compile(r"(?:# | )*")
_VERSION = re.compile(r"K?TAP version \d+$", re.IGNORECASE)
_PLAN = re.compile(r"1\.\.(\d+)(?:\s+#\s*(?:SKIP\b\s*)?(.*))?$", re.IGNORECASE)
_RESULT = re.compile(r"(not )?ok(?: (\d+))?(?: (.*))?$")
_BAIL = re.compile(r"Bail out!\s*(.*)$")
_RUN = re.compile(r"RUN\s+(\S+) \.\.\.$")
_SUBTEST = re.compile(r"Subtest: (.*)$")
#: What the harness says beside the result itself.
_ECHO = re.compile(r"#\s+(OK|FAIL)  \S+$")
_TAIL = re.compile(r"(?:^|\s)#\s*")
_DIRECTIVES: dict[str, Outcome] = {
    "SKIP": "skip",
    "TODO": "skip",
    "XFAIL": "xfail",
    "XPASS": "xpass",
}

#: The most diagnostics that are kept of one test: the last lines.
MOST_LINES = 200


@dataclass
class Result:
    """One test: *reason* is what its directive says, *diagnostics* what was written before it."""

    name: str
    outcome: Outcome
    reason: str = ""
    diagnostics: list[str] = field(default_factory=list)
    children: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether it, or a subtest of it, did not pass."""
        return self.outcome == "not ok" or any(child.failed for child in self.children)

    def leaves(self, above: str = "") -> Iterator[Result]:
        """Its subtests with whole names; itself where it has none, or fails without one that does.

        A parent says what its subtests said, and is no test of its own.
        """
        name = f"{above}/{self.name}" if above else self.name
        for child in self.children:
            yield from child.leaves(name)
        alone = self.outcome == "not ok" and not any(child.failed for child in self.children)
        if alone or not self.children:
            yield Result(name, self.outcome, self.reason, self.diagnostics)


class Parser:
    """Takes one program's lines; gives results when they are whole."""

    def __init__(self) -> None:
        #: How many tests the program says it has; None as long as it does not say.
        self.plan: int | None = None
        #: How many there were of those.
        self.made = 0
        #: Why it gave up, where it did.
        self.bail: str | None = None
        #: The test under way, by the name that the harness says first.
        self.running = ""
        self._said: list[str] = []
        #: Subtests whose parent is yet to come, with the width of their prefix.
        self._waiting: list[tuple[int, Result]] = []
        #: Widths at which there is a version or a plan, and so tests.
        self._open = {0}
        self._subtests: dict[int, str] = {}

    def feed(self, line: str) -> list[Result]:
        """The tests that end with *line*."""
        line = line.rstrip()
        width = len(_PREFIX.match(line)[0])  # type: ignore[index]
        rest = line[width:]
        if width in self._open and (found := _RESULT.match(rest)):
            return self._result(width, found)
        if _VERSION.match(rest):
            self._open.add(width)
        elif found := _PLAN.match(rest):
            self._open.add(width)
            if width == 0:
                self.plan = int(found[1])
                self._note(found[2] or "")
        elif width == 0 and (found := _BAIL.match(rest)):
            self.bail = found[1] or "no reason given"
        elif found := _SUBTEST.match(rest):
            self._subtests[width - 2] = found[1]
        elif width and (found := _RUN.match(rest)):
            self.running = found[1]
            self._said.clear()
        elif not _ECHO.match(line):
            self._note(line)
        return []

    @property
    def said(self) -> list[str]:
        """What was written since the last result."""
        return list(self._said)

    def rest(self) -> list[Result]:
        """Subtests whose parent never came."""
        waiting, self._waiting = self._waiting, []
        found: list[Result] = []
        for width, result in waiting:
            named = [name for at, name in sorted(self._subtests.items()) if at <= width]
            found += result.leaves("/".join(named))
        return found

    def _note(self, line: str) -> None:
        text = line.removeprefix("#").strip() if line.startswith("#") else line
        if text:
            self._said.append(text)
            del self._said[:-MOST_LINES]

    def _result(self, width: int, found: re.Match[str]) -> list[Result]:
        result = _read(found)
        result.diagnostics, self._said = self._said, []
        self._open = {each for each in self._open if each <= width}
        self._subtests = {at: name for at, name in self._subtests.items() if at <= width}
        while self._waiting and self._waiting[-1][0] > width:
            result.children.insert(0, self._waiting.pop()[1])
        self.running = ""
        if width:
            self._waiting.append((width, result))
            return []
        self.made += 1
        return list(result.leaves())


def _read(found: re.Match[str]) -> Result:
    text = (found[3] or "").removeprefix("- ")
    name, *tail = _TAIL.split(text, maxsplit=1)
    word, _, reason = (tail[0] if tail else "").partition(" ")
    outcome = _DIRECTIVES.get(word.upper().rstrip(":"))
    if outcome is None:
        outcome, reason = "not ok" if found[1] else "ok", tail[0] if tail else ""
    elif found[1] and outcome == "xpass":
        outcome = "not ok"
    # Those without a name have their message after the directive (kselftest.h).
    return Result(name or reason or f"test {found[2]}", outcome, reason.strip())
