# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run shows while it goes on, on a real pseudo-terminal and in a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_ioasid.report import Check
from qemu_ioasid.terminal import CALM_SECONDS, Terminal, indented
from tests.screen import screen

COLUMNS = 60
HOSTILE = "\x1b[2J\x1b]0;owned\x07\rall checks held\n  pass   intra-vm\u202e\x9b31m"


class Pty:
    """A terminal of 60 columns whose other end is read all the time."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.written = ""
        self._over = False
        self._grew = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.ours, 4096):
                with self._grew:
                    self.written += data.decode()
                    self._grew.notify_all()
        with self._grew:
            self._over = True
            self._grew.notify_all()

    def wait_for(self, pattern: str, seconds: float = 10) -> None:
        """Wait until *pattern* is in what was written."""
        with self._grew:
            self._grew.wait_for(lambda: self._over or re.search(pattern, self.written), seconds)
        assert re.search(pattern, self.written), f"no {pattern} in {self.written!r}"

    def hand_over(self) -> None:
        """Whoever else has the terminal open alone keeps it: it ends with them."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def close(self) -> None:
        """No more will be written: let the reader come to the end."""
        self.hand_over()
        self._reader.join(10)
        self.hang_up()

    def hang_up(self) -> None:
        """The terminal goes away."""
        if self.ours >= 0:
            os.close(self.ours)
            self.ours = -1


@pytest.fixture
def terminal_pty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pty]:
    """A pseudo-terminal, in an environment that allows colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    opened = Pty()
    yield opened
    opened.close()


def on(opened: Pty, act: Callable[[Terminal], None]) -> str:
    """What *act* writes to the terminal."""
    with os.fdopen(os.dup(opened.theirs), "w") as stream, Terminal(stream) as terminal:
        act(terminal)
    opened.close()
    return opened.written.replace("\r\n", "\n")


def piped(tmp_path: Path, act: Callable[[Terminal], None]) -> str:
    """What *act* writes to a file."""
    path = tmp_path / "out"
    with open(path, "w") as stream, Terminal(stream) as terminal:
        act(terminal)
    return path.read_text()


def steps(terminal: Terminal) -> None:
    """A run in short."""
    terminal.say("no KVM")
    terminal.begins("kernel")
    terminal.progress("compiling: 3 files")
    terminal.progress("linking")
    terminal.begins("")
    terminal.say("    2.0 s  kernel")
    terminal.checks([Check("intra-vm", "fail", "tried", "DONE", "LEAK: here")])


def test_the_living_line_ticks_and_is_gone_in_the_end(terminal_pty: Pty) -> None:
    def act(terminal: Terminal) -> None:
        terminal.begins("boot 2 guests in it")
        terminal.progress("3 pass")
        terminal_pty.wait_for(r"0\.[2-9] s  boot 2 guests in it: 3 pass")
        terminal.say("a line that stays")
        terminal_pty.wait_for(r"stays\r?\n.* s  boot 2 guests in it: 3 pass")

    written = on(terminal_pty, act)
    assert screen(written) == ["a line that stays", ""]
    assert "\x1b" not in written


def test_it_is_written_over_and_never_cleared_first(terminal_pty: Pty) -> None:
    def act(terminal: Terminal) -> None:
        terminal.begins("kernel")
        terminal.progress("a long word on how far it is")
        terminal.progress("short")
        terminal_pty.wait_for("short")

    written = on(terminal_pty, act)
    # From one living line to the next there is no blank one: it cannot flicker.
    living = [part for part in written.split("\r") if part.strip()]
    assert len(living) >= 3 and all("kernel" in part for part in living)
    assert screen(written) == [""]


def test_a_long_line_does_not_wrap(terminal_pty: Pty) -> None:
    def act(terminal: Terminal) -> None:
        terminal.begins("x" * 200)
        terminal_pty.wait_for("xxx")

    written = on(terminal_pty, act)
    assert max(len(part) for part in re.split("[\r\n]", written)) < COLUMNS
    assert screen(written) == [""]


def test_verdicts_have_colours_on_a_terminal(terminal_pty: Pty) -> None:
    written = on(terminal_pty, steps)
    assert "\x1b[1;31m  fail   \x1b[0mintra-vm" in written
    assert screen(written)[:2] == ["no KVM", "    2.0 s  kernel"]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_escapes_where_they_are_not_wanted(
    terminal_pty: Pty, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert "\x1b" not in on(terminal_pty, steps)


def test_calm_in_a_pipe(tmp_path: Path) -> None:
    assert piped(tmp_path, steps).splitlines() == [
        "no KVM",
        "    2.0 s  kernel",
        "  fail   intra-vm  DONE; LEAK: here",
        "                   tried: tried",
    ]


def test_a_long_step_is_told_of_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CALM_SECONDS >= 10
    monkeypatch.setattr("qemu_ioasid.terminal.CALM_SECONDS", 0.5)
    out = tmp_path / "out"

    def told(text: str) -> None:
        end = time.monotonic() + 10
        while text not in out.read_text():
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.02)

    def act(terminal: Terminal) -> None:
        terminal.begins("kernel")
        told("           kernel: 1 s so far\n")
        terminal.progress("compiling: 3 files")
        told("           kernel: compiling: 3 files\n")

    assert "\r" not in piped(tmp_path, act)


def test_what_a_vm_says_is_spelled_out(terminal_pty: Pty, tmp_path: Path) -> None:
    def act(terminal: Terminal) -> None:
        terminal.begins(HOSTILE)
        terminal.progress(HOSTILE)
        terminal.begins("")
        terminal.say(HOSTILE)
        terminal.checks([Check(HOSTILE, "pass", HOSTILE, HOSTILE, HOSTILE)])

    assert len(piped(tmp_path, act).splitlines()) == 2
    seen = "".join(screen(on(terminal_pty, act)))
    assert r"\x1b[2J\x1b]0;owned\x07\rall checks held\n  pass   intra-vm\u202e\x9b31m" in seen
    assert indented("one\rtwo\x1b[2J\nthree") == "    one\\rtwo\\x1b[2J\n    three"


def test_a_terminal_that_went_away_is_no_error(terminal_pty: Pty) -> None:
    with (
        contextlib.suppress(OSError),
        os.fdopen(os.dup(terminal_pty.theirs), "w") as stream,
        Terminal(stream) as terminal,
    ):
        terminal.begins("boot")
        terminal_pty.hang_up()
        terminal._ticker.join(10)
        assert not terminal._ticker.is_alive()


def test_ctrl_c_leaves_a_clean_line(
    tmp_path: Path, environment: dict[str, str], terminal_pty: Pty
) -> None:
    run = subprocess.Popen(
        [
            *("setsid", "--ctty", sys.executable, "-m", "qemu_ioasid.cli"),
            *("run", "--cold", "--report", "report"),
        ],
        cwd=tmp_path,
        env={**environment, "TERM": "xterm"},
        stdin=terminal_pty.theirs,
        stdout=terminal_pty.theirs,
        stderr=terminal_pty.theirs,
    )
    terminal_pty.hand_over()
    try:
        terminal_pty.wait_for(r"0\.[2-9] s  boot the host VM", 900)
        os.write(terminal_pty.ours, b"\x03")
        assert run.wait(30) == 130
    finally:
        run.kill()
        run.wait()
    terminal_pty.close()
    seen = screen(terminal_pty.written.replace("\r\n", "\n"))
    assert seen[-1] == ""
    assert seen[-2] == "qemu-ioasid: interrupted"
    assert re.fullmatch(r" +\d+\.\d s  boot the host VM  \(not finished\)", seen[-3])
    assert not [line for line in seen if "^C" in line]
    assert "Interrupted" in (tmp_path / "report/report.html").read_text()
