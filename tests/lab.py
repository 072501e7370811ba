# SPDX-License-Identifier: GPL-2.0-or-later
"""Labs for tests: ``qemu-ioasid lab`` in an environment of its own, on terminals of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from qemu_ioasid import reaper
from tests.starter import Ended, Starter

BARE = '[host]\nmemory = "256M"\n'


class Player:
    """Somebody who uses labs: a runtime folder (a short path, for gdb's sockets) and a home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        runtime = folder / "r"
        runtime.mkdir(mode=0o700)
        programs = Path(sys.executable).parent
        cache = os.environ.get("QEMU_IOASID_CACHE") or Path.home() / ".cache/qemu_ioasid"
        self.environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(runtime),
            "HOME": str(folder),
            "QEMU_IOASID_CACHE": str(cache),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TERM": "xterm",
        }
        self.base = runtime / "qemu_ioasid"
        self._starter = Starter(calibrated=True)

    def lab(self, *words: str, text: str = "", timeout: float = 300) -> Ended:
        """Run ``qemu-ioasid lab`` with *words*, fed with *text*."""
        return self._starter.run(("lab", *words), self.folder, self.environment, text, timeout)

    def ok(self, *words: str, text: str = "") -> str:
        """As `lab`; its output, when all went well."""
        ended = self.lab(*words, text=text)
        assert ended.code == 0, (words, ended)
        return ended.out

    def start(self, *words: str, **how: Any) -> subprocess.Popen[str]:
        """As `lab`, without waiting for its end."""
        return subprocess.Popen(
            [sys.executable, "-m", "qemu_ioasid.cli", "lab", *words],
            cwd=self.folder,
            env=self.environment,
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **how},
        )

    def status(self, name: str = "lab") -> dict[str, Any]:
        """What ``lab status`` tells of one lab."""
        found: list[dict[str, Any]] = self.lab("status", "--name", name, "--json").json()
        return found[0]

    def bare(self) -> str:
        """A rig file without guests."""
        path = self.folder / "bare.toml"
        path.write_text(BARE)
        return str(path)

    def tokens(self) -> list[str]:
        """The run folders there are."""
        return sorted(path.name for path in self.base.iterdir()) if self.base.exists() else []

    def nothing_left(self, token: str, seconds: float = 5.0) -> None:
        """Within *seconds* no process, no folder and no saved state of that run is there."""
        end = time.monotonic() + seconds
        while reaper.marked(token) or self._remains(token):
            assert time.monotonic() < end, (reaper.marked(token), self._remains(token))
            time.sleep(0.05)

    def _remains(self, token: str) -> list[Path]:
        cache = Path(self.environment["QEMU_IOASID_CACHE"])
        return [*self.base.glob(token), *cache.glob(f"*/.{token}*")]

    def end(self) -> None:
        """End every lab, and what else there is."""
        if self.tokens():
            self.lab("down", "--all")
            self.lab("gc")
        assert not self.tokens()

    def close(self) -> None:
        """No more commands are to come."""
        self._starter.close()


@contextlib.contextmanager
def player() -> Iterator[Player]:
    """A `Player`, of whom nothing is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        playing = Player(folder)
        with contextlib.closing(playing):
            try:
                yield playing
            finally:
                playing.end()
    finally:
        shutil.rmtree(folder)


class Screen:
    """``qemu-ioasid`` on a terminal, driven as a person would: by typing and reading."""

    def __init__(self, playing: Player, *words: str, size: tuple[int, int] = (80, 24)) -> None:
        self.master, self._slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self._slave)
        self.seen = ""
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "qemu_ioasid.cli", *words],
            cwd=playing.folder,
            env=playing.environment,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
        )

    def resize(self, columns: int, rows: int) -> None:
        """Have the terminal's window be of another size."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Read until *text* is there; what was before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def prompt(self) -> None:
        """Wait for the shell's; busybox asks the terminal there where its cursor is."""
        self.wait_for("\x1b[6n")

    def run(self, command: str) -> str:
        """Have a shell run *command* at its next prompt; what it wrote."""
        self.prompt()
        # Of two words here, so that the echo of what is typed is not taken for the answer.
        self.type(f"{command}; echo done''-$?-\r")
        return self.wait_for("done-").rpartition("\r\n")[0]

    @property
    def raw(self) -> bool:
        """Whether every key is passed on."""
        return not termios.tcgetattr(self._slave)[3] & termios.ICANON

    def ends(self, seconds: float = 30.0) -> int:
        """The exit code; the terminal is as it was."""
        code = self.popen.wait(seconds)
        assert termios.tcgetattr(self._slave) == self.before
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGKILL)
            self.popen.wait()
        os.close(self.master)
        os.close(self._slave)
