# SPDX-License-Identifier: GPL-2.0-or-later
"""One test program in a VM: run, read as it goes, ended where it hangs."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from qemu_ioasid.console import EXCERPT
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import RigError
from qemu_ioasid.hostvm import HostMachine
from qemu_ioasid.selftest.ktap import Parser, Result
from qemu_ioasid.text import lines, visible

#: Where the disk with the programs is mounted in the VM.
FOLDER = "/run/selftests"
#: After such a silence the kernel is asked what is blocked. The harness ends a test that takes
#: 30 s, on slow machines, too (kselftest_harness.h): before that, or there is nothing to be seen.
ASK_SECONDS, ASK_BEFORE = 12.0, 25.0
#: After such a silence the program is ended: its own harness has not.
END_SECONDS = 60.0
#: For a program that was killed to be gone: one that is not, sleeps in the kernel for ever.
GONE_SECONDS = 10.0
#: What a program's exit code means (kselftest.h).
SKIPPED, UNFIT = 4, (126, 127)

#: Whoever passes on what the program says goes before it, so that its last words are out when the
#: kernel dies of what it does next: which test that was is told by nothing else.
_HEARD = """
python3 -IS -c 'import os, sys
policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
for pid in sys.argv[1:]:
    os.sched_setscheduler(int(pid), policy, os.sched_param(1))' $(pidof dropbear socat)
"""
#: The tasks that sleep in the kernel, and where the program's own are.
_BLOCKED = """
for pid in $(pidof {name}); do
	grep -E '^(Name|State|Pid):' "/proc/$pid/status"
	cat "/proc/$pid/stack"
done
echo w >/proc/sysrq-trigger
dmesg | sed -n '/Show Blocked State/h; //!H; ${{x;p}}' | tail -n 150
"""


class Channel(Protocol):
    """What is asked of an SSH channel."""

    def settimeout(self, seconds: float, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def exit_status_ready(self) -> bool: ...
    def recv_exit_status(self) -> int: ...
    def close(self) -> None: ...


@dataclass
class Made:
    """One test that was made, or was to be: *evidence* is more than it said itself."""

    result: Result
    seconds: float
    evidence: str = ""


class Gone(Exception):
    """The VM is of no use any more; the message says why."""


class Program:
    """A program of *target*; what it writes goes to *log*, too."""

    def __init__(self, host: HostMachine, target: str, name: str, log: Path) -> None:
        self._host = host
        self._target = target
        self._name = name
        self._log = log
        self._parser = Parser()
        self._since = time.monotonic()
        #: What the kernel said of its blocked tasks when the test under way had been silent.
        self._dump = ""
        self._dumped = self._hung = False
        self._reports = len(host.console.reports)
        self._failures = 0
        #: The test at whose end the kernel's report was first seen; the console comes late.
        self._suspect = ""

    def run(self, arguments: Sequence[str], enter: Callable[[Made], None]) -> None:
        """Run it to its end; *enter* is given each test when it is over.

        Raises Gone when the VM did not survive it, after having entered what that is due to.
        """
        words = shlex.join([f"./{self._name}", *arguments])
        script = f"{_HEARD}cd {FOLDER}/{self._target} && {words} 2>&1; exit $?"
        try:
            channel = self._host.ssh.run(script, Deadline(30, f"start of {self._name}"))
            try:
                with open(self._log, "w", encoding="utf-8") as log:
                    for line in self._lines(channel):
                        log.write(f"{line}\n")
                        for result in self._parser.feed(line):
                            enter(self._made(result))
                status = channel.recv_exit_status() if not self._stuck(channel) else None
            finally:
                channel.close()
        except RigError as error:
            self._lost(error.message, enter)
        if status is None:
            enter(self._unfinished("hangs, and cannot be killed"))
            raise Gone(f"{self._name} cannot be killed")
        if status == -1 and not self._host.ssh.alive:
            self._lost("the VM is gone", enter)
        for made in self._ended(status):
            enter(made)

    # --- what it writes -------------------------------------------------------------------

    def _lines(self, channel: Channel) -> Iterator[str]:
        """Its lines, to its end, or to where waiting for it makes no sense any more."""
        rest = b""
        while True:
            try:
                channel.settimeout(self._patience())
                data = channel.recv(65536)
            except TimeoutError:
                if self._silent():
                    return
                continue
            if not data:
                break
            self._dumped = False
            *whole, rest = (rest + data).split(b"\n")
            for each in whole:
                yield visible(each.decode(errors="replace").expandtabs())
        if rest:
            yield visible(rest.decode(errors="replace").expandtabs())

    def _patience(self) -> float:
        """For how many seconds more it may say nothing."""
        asked = min(ASK_SECONDS * calibration(), ASK_BEFORE)
        if self._hung:
            return GONE_SECONDS * calibration()
        return END_SECONDS * calibration() - asked if self._dumped else asked

    def _silent(self) -> bool:
        """It has said nothing for so long; whether that is to be the end of it."""
        if self._hung:
            return True
        if not self._dumped:
            self._dump, self._dumped = self._blocked(), True
            return False
        self._hung = True
        script = f"pids=$(pidof {self._name}) && kill -9 $pids"
        try:
            self._host.ssh.output(script, Deadline(20, f"end of {self._name}"))
        except RigError:
            return True
        return False

    def _stuck(self, channel: Channel) -> bool:
        """Whether it outlives its own end."""
        return self._hung and not channel.exit_status_ready()

    def _blocked(self) -> str:
        """What sleeps in the kernel, by its own word; by the console where nobody can ask it."""
        deadline = Deadline(20, "the kernel's blocked tasks")
        before = self._host.console.length
        try:
            script = _BLOCKED.format(name=self._name)
            said = self._host.ssh.output(script, deadline).decode(errors="replace")
            return "\n".join(lines(said))
        except RigError as error:
            return f"{error.message}\n{self._host.console.since(before)}"

    # --- what came of it ------------------------------------------------------------------

    def reported(self, deadline: Deadline) -> Made | None:
        """What the kernel complained of meanwhile, where it lives on: a test that failed."""
        console, word = self._host.console, f"~{secrets.token_hex(3)}"
        with console.awaiting(word) as arrived:
            self._host.agent.call("mark", deadline=deadline, text=word)
            if not arrived.wait(deadline.remaining()):
                raise deadline.exceeded()
        reports = console.reports[self._reports :]
        if not reports:
            return None
        first = reports[0]
        when = f", seen when {self._suspect} ended" if self._suspect else ""
        reason = f"{first.kind}: {first.text}{when}; {len(reports)} in all"
        return Made(Result("kernel", "not ok", reason), 0.0, console.excerpt(first))

    def _made(self, result: Result, evidence: str = "") -> Made:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self._failures += result.failed
        if not self._suspect and len(self._host.console.reports) > self._reports:
            self._suspect = result.name
        dump, self._dump = self._dump, ""
        if dump and result.failed:
            evidence = f"{evidence}\nblocked, while it said nothing:\n{dump}".strip()
        return Made(result, round(seconds, 3), evidence)

    def _unfinished(self, why: str, evidence: str = "") -> Made:
        """The test under way did not come to its end."""
        parser = self._parser
        of = f"{parser.made} of {parser.plan} tests made" if parser.plan else "no test made"
        name = parser.running or ("" if not parser.plan else "the end")
        reason = f"{why}: {of}"
        return self._made(Result(name, "not ok", reason, parser.said), evidence)

    def _lost(self, why: str, enter: Callable[[Made], None]) -> NoReturn:
        console = self._host.console
        console.wait_end(2.0)
        reports = console.reports[self._reports :]
        said = console.excerpt(reports[0]) if reports else console.tail(EXCERPT)
        what = f"{reports[0].kind}: {reports[0].text}" if reports else why
        enter(self._unfinished(f"ended with the VM: {what}", said))
        raise Gone(what)

    def _ended(self, status: int) -> Iterator[Made]:
        """What is to be said of a program that has ended with *status*, beside its results."""
        parser = self._parser
        for result in parser.rest():
            yield self._made(result)
        said = parser.said
        if self._hung:
            yield self._unfinished(f"hangs: nothing said for {END_SECONDS * calibration():.0f} s")
        elif parser.bail is not None:
            yield self._unfinished(f"gave up: {parser.bail}")
        elif parser.made == 0 and status in (0, SKIPPED) and not parser.plan:
            # Its plan of none is a skip, too.
            skipped = status == SKIPPED or parser.plan == 0
            reason = next((line for line in said if line.strip()), "") if skipped else ""
            yield self._made(Result("", "skip" if skipped else "ok", reason, said))
        elif parser.running or parser.made < (parser.plan or 0) or not parser.made:
            yield self._unfinished(_ending(status))
        elif status not in (0, SKIPPED) and not self._failures:
            yield self._made(Result("", "not ok", _ending(status), said))


def _ending(status: int) -> str:
    if status in UNFIT:
        return f"cannot be run (exit code {status})"
    return f"killed by signal {status - 128}" if status > 128 else f"ended with exit code {status}"
