# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's console: kept, and read for what a kernel says when it breaks."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid.errors import KernelBroke

#: How a report begins (lib/bug.c, kernel/panic.c, kernel/locking/lockdep.c, mm/kasan/report.c,
#: kernel/hung_task.c, kernel/watchdog.c, kernel/rcu/tree_stall.h, arch/x86/mm/fault.c).
#: In the order in which a report naming several is called by the first.
REPORTS = (
    ("KASAN", re.compile(r"BUG: KASAN:|BUG: KFENCE:|BUG: KMSAN:|BUG: KCSAN:")),
    ("UBSAN", re.compile(r"UBSAN:")),
    ("hung task", re.compile(r"INFO: task .* blocked for more than")),
    ("lockup", re.compile(r"BUG: soft lockup|watchdog: BUG:|hard LOCKUP|BUG: workqueue lockup")),
    ("rcu stall", re.compile(r"rcu: INFO: \S+ (self-)?detected|rcu: INFO: .*stall")),
    (
        "lockdep",
        re.compile(
            r"WARNING: (possible |inconsistent lock|suspicious RCU|bad unlock|bad contention"
            r"|[Nn]ested lock|lock held|chain_key|.*lock order detected|.*still has locks held"
            r"|.*held lock freed)|INFO: trying to register non-static key"
        ),
    ),
    ("BUG", re.compile(r"kernel BUG at|\bBUG: ")),
    # At the start of a message only: "Spectre V2 : WARNING: ..." is advice.
    ("WARNING", re.compile(r"^(\[[^\]]*\] ?)*WARNING: ")),
    ("oops", re.compile(r"Oops: |general protection fault|double fault:|invalid opcode:")),
    ("panic", re.compile(r"Kernel panic - not syncing")),
)

#: How many lines of the console go with an error.
EXCERPT = 40
#: A report is whole when the console has been silent for this long, in seconds.
SILENCE = 0.3

_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[c78])")


@dataclass(frozen=True)
class Report:
    """One thing the kernel complained of: what kind, on which line (from 0) of the console."""

    kind: str
    line: int
    text: str


def classify(text: str) -> str | None:
    """What kind of report begins on this console line, if one does."""
    for kind, pattern in REPORTS:
        if pattern.search(text):
            return kind
    return None


class Console:
    """Collects one VM's console in *path* and recognises reports as they arrive."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._lines: list[str] = []
        self._reports: list[Report] = []
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._size = path.stat().st_size if path.exists() else 0
        self._ended = threading.Event()
        self.broken = threading.Event()
        self._awaited: dict[str, threading.Event] = {}

    def _take(self, text: str) -> None:
        with self._lock:
            clean = _ESCAPE.sub("", text).rstrip()
            self._lines.append(clean)
            for text, arrived in self._awaited.items():
                if text in clean:
                    arrived.set()
            kind = classify(clean)
            if kind is not None:
                self._reports.append(Report(kind, len(self._lines) - 1, clean))
                self.broken.set()

    def _pump(self, stream: socket.socket) -> None:
        rest = b""
        try:
            with open(self.path, "ab", buffering=0) as file:
                while data := self._receive(stream):
                    # A full disk must not stop the reading: the VM would block on its console.
                    with contextlib.suppress(OSError):
                        file.write(data)
                        with self._grown:
                            self._size += len(data)
                            self._grown.notify_all()
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._take(line.decode(errors="replace"))
        finally:
            if rest:
                self._take(rest.decode(errors="replace"))
            with self._grown:
                self._ended.set()
                self._grown.notify_all()

    @staticmethod
    def _receive(stream: socket.socket) -> bytes:
        try:
            return stream.recv(65536)
        except OSError:
            return b""

    @contextlib.contextmanager
    def awaiting(self, text: str) -> Iterator[threading.Event]:
        """An event that is set when a line with *text* comes while the block runs."""
        with self._lock:
            arrived = self._awaited[text] = threading.Event()
        try:
            yield arrived
        finally:
            with self._lock:
                del self._awaited[text]

    def follow(self, stopped: Callable[[], bool]) -> Iterator[bytes]:
        """All there is on the console, then what arrives, as it was said; to the VM's end.

        Ends before that when *stopped* says so, which is asked whenever `wake` was called.
        """
        with open(self.path, "rb") as file:
            while True:
                while data := file.read(65536):
                    yield data
                with self._grown:
                    if stopped():
                        return
                    if file.tell() < self._size:
                        continue
                    if self._ended.is_set():
                        return
                    self._grown.wait()

    def wake(self) -> None:
        """Have those who `follow` ask whether to stop."""
        with self._grown:
            self._grown.notify_all()

    @property
    def reports(self) -> list[Report]:
        """All reports so far."""
        with self._lock:
            return list(self._reports)

    def tail(self, lines: int = EXCERPT) -> str:
        """The last lines."""
        with self._lock:
            return "\n".join(self._lines[-lines:])

    @property
    def length(self) -> int:
        """How many lines there are so far."""
        with self._lock:
            return len(self._lines)

    def since(self, line: int) -> str:
        """The last lines, of those from *line* (from 0) on."""
        with self._lock:
            return "\n".join(self._lines[max(line, len(self._lines) - EXCERPT) :])

    def excerpt(self, report: Report, before: int = 3) -> str:
        """The console around *report*."""
        with self._lock:
            return "\n".join(self._lines[max(0, report.line - before) : report.line + EXCERPT])

    def check(self, seen: int = 0) -> None:
        """Raise KernelBroke for the first report past the *seen* first ones."""
        reports = self.reports[seen:]
        if reports:
            self._settle()
            first = reports[0]
            raise KernelBroke(
                f"{self.name}: {first.kind}: {first.text}", evidence=self.excerpt(first)
            )

    def _settle(self, seconds: float = 3.0) -> None:
        """Let the rest of a report arrive: until silence, the end, or *seconds* have passed."""
        end = time.monotonic() + seconds
        lines = -1
        while lines != (lines := len(self._lines)) and time.monotonic() < end:
            if self._ended.wait(SILENCE):
                return

    def wait_end(self, seconds: float) -> bool:
        """Wait for the VM's end of the console to close: a dead VM's last words are in then."""
        return self._ended.wait(seconds)


@contextlib.contextmanager
def attach(stream: socket.socket, name: str, path: Path) -> Iterator[Console]:
    """A console fed from a connected socket, which it takes over."""
    console = Console(name, path)
    thread = threading.Thread(
        target=console._pump, args=(stream,), name=f"{name} console", daemon=True
    )
    thread.start()
    try:
        yield console
    finally:
        # The writer is dead by now as a rule: read what it left before closing our end.
        if not console.wait_end(1.0):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        stream.close()
