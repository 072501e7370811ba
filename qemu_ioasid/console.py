# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's console: kept, and read for what a kernel says when it breaks."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid import logfile
from qemu_ioasid.errors import KernelBroke
from qemu_ioasid.logfile import LogFile
from qemu_ioasid.text import visible

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

#: A line that is longer is several, of this many bytes.
LINE = 4096
#: A console of more lines is flooded, as is one of more than `logfile.LIMIT` bytes.
MOST_LINES = 1 << 19
#: How many of the last lines, and of the first reports, are at hand.
LINES, REPORTS_KEPT = 20_000, 100

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
    """Collects one VM's console in *path* and recognises reports as they arrive.

    A VM that says more than `logfile.LIMIT` bytes, or `MOST_LINES`, is broken: that is a report
    of its own, ``flood``, and nothing after it is kept or judged.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        #: The last of them, and how many there were before those.
        self._lines: deque[str] = deque(maxlen=LINES)
        self._before = 0
        self._flooded = False
        self._reports: list[Report] = []
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._log = LogFile(path, logfile.LIMIT)
        self._ended = threading.Event()
        self.broken = threading.Event()
        self._awaited: dict[str, threading.Event] = {}
        self._excused = False

    def _take(self, text: str) -> None:
        with self._lock:
            clean = visible(_ESCAPE.sub("", text).rstrip().expandtabs())
            for text, arrived in self._awaited.items():
                if text in clean:
                    arrived.set()
            self._enter(clean, classify(clean) if clean else None)

    def _enter(self, line: str, kind: str | None) -> None:
        self._before += len(self._lines) == self._lines.maxlen
        self._lines.append(line)
        if kind is not None:
            if len(self._reports) < REPORTS_KEPT:
                self._reports.append(Report(kind, self._count - 1, line))
            self.broken.set()

    def _pump(self, stream: socket.socket) -> None:
        rest = b""
        try:
            # To the end, whatever comes: a VM blocks on a console that nobody reads.
            while data := self._receive(stream):
                if self._flooded:
                    continue
                with self._grown:
                    self._log.write(data)
                    self._grown.notify_all()
                    if self._log.full or self._count > MOST_LINES:
                        most = f"{self._log.limit >> 10} KiB or {MOST_LINES} lines"
                        self._flooded = True
                        self._enter(f"more than {most} on the console", "flood")
                        continue
                *lines, rest = (rest + data).split(b"\n")
                while len(rest) > LINE:
                    lines.append(rest[:LINE])
                    rest = rest[LINE:]
                for line in lines:
                    for start in range(0, max(1, len(line)), LINE):
                        self._take(line[start : start + LINE].decode(errors="replace"))
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
                    if file.tell() < self._log.size:
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
            return self._between(self._count - lines, self._count)

    @property
    def _count(self) -> int:
        return self._before + len(self._lines)

    def _between(self, start: int, end: int) -> str:
        """The lines from *start* to before *end*, of those at hand."""
        indexes = range(max(start - self._before, 0), min(end - self._before, len(self._lines)))
        return "\n".join(self._lines[index] for index in indexes)

    @property
    def length(self) -> int:
        """How many lines there are so far."""
        with self._lock:
            return self._count

    def since(self, line: int) -> str:
        """The last lines, of those from *line* (from 0) on."""
        with self._lock:
            return self._between(max(line, self._count - EXCERPT), self._count)

    def excerpt(self, report: Report, before: int = 3) -> str:
        """The console around *report*."""
        with self._lock:
            return self._between(report.line - before, report.line + EXCERPT)

    def excuse(self) -> None:
        """What this kernel reports, before and after, is what somebody wants to see: no verdict."""
        self._excused = True

    def check(self, seen: int = 0) -> None:
        """Raise KernelBroke for the first report past the *seen* first ones."""
        if self._excused:
            return
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
        while lines != (lines := self.length) and time.monotonic() < end:
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
    with console._log:
        try:
            yield console
        finally:
            # The writer is dead by now as a rule: read what it left before closing our end.
            if not console.wait_end(1.0):
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            stream.close()
