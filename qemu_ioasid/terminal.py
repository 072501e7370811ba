# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run shows while it goes on: lines that stay, and one that lives.

On a terminal the last line is the step under way, its seconds and how far it is, rewritten in
place. Elsewhere a step that takes long says so now and then. All that is written is spelled out
first (`text.visible`): a VM's words cannot move the cursor, nor pass for a line of ours.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TextIO

from qemu_ioasid.report import Check
from qemu_ioasid.text import cut, visible

#: How often the living line is written anew, and how often a long step is told of elsewhere.
LIVE_SECONDS, CALM_SECONDS = 0.2, 15.0
#: What a terminal shows of our Ctrl-C.
_ECHO = len("^C")

#: The longest line there is; what is cut off is in report.json.
LINE = 4000

_COLOURS = {"pass": "32", "fail": "1;31", "error": "1;31", "skip": "33"}


class Terminal:
    """Writes to *stream* while the block lasts; after it nothing is left of the living line.

    No escape sequence is written unless *stream* is a terminal and ``NO_COLOR`` unset.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="terminal", daemon=True)
        self._step = self._detail = ""
        self._began = self._told = 0.0
        #: How many characters of the living line there are to wipe.
        self._shown = 0

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        # Not for ever: a signal may have ended this thread's writing with the lock held.
        self._ticker.join(1)
        self._step = ""
        # A terminal that has gone away is no news to whoever ends.
        with contextlib.suppress(OSError):
            self._write("")

    @property
    def width(self) -> int:
        """Columns of the terminal, or of a page where there is none."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 160

    def say(self, text: str, verdict: str = "") -> None:
        """A line that stays; with a *verdict* before it, coloured where colours are."""
        head = f"  {verdict:5}  " if verdict else ""
        if self._colour and verdict in _COLOURS:
            head = f"\x1b[{_COLOURS[verdict]}m{head}\x1b[0m"
        self._write(f"{head}{line(text)}\n")

    def begins(self, step: str) -> None:
        """A step begins, of which nothing is left when it ends; "" when none follows."""
        with self._lock:
            self._step, self._detail = visible(step), ""
            self._began = self._told = time.monotonic()
            if step:
                self._write("")

    def progress(self, detail: str) -> None:
        """How far the step is; the next call replaces it."""
        with self._lock:
            self._detail = visible(detail)
            if self._live:
                self._write("")

    def checks(self, checks: Iterable[Check]) -> None:
        """A line for each check, all there is to know where it did not pass."""
        checks = list(checks)
        longest = max((len(check.name) for check in checks), default=0)
        for check in checks:
            told = f"{check.answered}; {check.witnesses}"
            room = max(20, self.width - longest - 11)
            if check.verdict == "pass" and len(told) > room:
                told = told[: room - 1] + "…"
            self.say(f"{check.name:{longest}}  {told}", check.verdict)
            if check.verdict != "pass":
                self.say(f"         {'':{longest}}  tried: {check.tried}")

    def _tick(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.wait(LIVE_SECONDS if self._live else 1.0):
                with self._lock:
                    if self._live and self._step:
                        self._write("")
                    elif self._step and time.monotonic() - self._told >= CALM_SECONDS:
                        self._told = time.monotonic()
                        detail = self._detail or f"{self._told - self._began:.0f} s so far"
                        self._write(f"           {self._step}: {detail}\n")

    def _living(self) -> str:
        if not (self._live and self._step):
            return ""
        text = f"{time.monotonic() - self._began:7.1f} s  {self._step}"
        if self._detail:
            text += f": {self._detail}"
        # Room for what Ctrl-C shows, and the last column stays empty: terminals wrap there.
        return text[: max(0, self.width - _ECHO - 1)]

    def _write(self, text: str) -> None:
        """Write *text*, then the living line: in one piece, over what it was, so none flickers."""
        with self._lock:
            living = self._living()
            shown, self._shown = self._shown, len(living)
            if living and not text:
                before, after = "\r" if shown else "", " " * (shown - len(living))
            else:
                before, after = f"\r{' ' * (shown + _ECHO)}\r" if shown else "", ""
            if before or text or living:
                self._stream.write(f"{before}{text}{living}{after}")
                self._stream.flush()


def line(text: str) -> str:
    """*text* as one line of a terminal."""
    return visible(cut(text, LINE))


def indented(text: str, most: int = 45) -> str:
    """The last lines of evidence, to be read below the line they prove."""
    return "\n".join(f"    {line(each.expandtabs())}" for each in text.rstrip().split("\n")[-most:])
