# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs ``qemu-ioasid`` in forks of one process that has imported it all already.

To start Python and import all takes longer than most commands do.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAM = """
import json, os, socket, sys
from qemu_ioasid import cli, deadline
from qemu_ioasid.lab import command
if len(sys.argv) > 2:
    deadline.calibration()
asked = socket.socket(fileno=int(sys.argv[1]))
while True:
    told, fds, _, _ = socket.recv_fds(asked, 1 << 20, 4)
    if not told:
        break
    pid = os.fork()
    if pid == 0:
        asked.close()
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        with open(fds[3]) as file:
            words, folder, environment = json.load(file)
        os.closerange(3, 1 + max(fds))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.exit(cli.main(words))
    for fd in fds:
        os.close(fd)
    asked.send(b"%d" % pid)
    asked.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its standard output, which is JSON and nothing else."""
        return json.loads(self.out)


class Starter:
    """One command at a time.

    *calibrated*: how slow the machine is they do not measure anew, each for itself.
    """

    def __init__(self, calibrated: bool = False) -> None:
        self._ask, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())),
                    *(["calibrated"] if calibrated else []),
                ],
                pass_fds=[theirs.fileno()],
            )

    def run(
        self,
        words: tuple[str, ...],
        folder: Path,
        environment: Mapping[str, str],
        text: str = "",
        timeout: float = 300,
    ) -> Ended:
        """Run it in *folder*, fed with *text*; a command that takes longer is killed."""
        with contextlib.ExitStack() as stack:
            given, out, err, told = (
                stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)
            )
            given.write(text.encode())
            told.write(json.dumps([words, str(folder), dict(environment)]).encode())
            for file in (given, told):
                file.seek(0)
            fds = [file.fileno() for file in (given, out, err, told)]
            socket.send_fds(self._ask, [b"run"], fds)
            pid = int(self._ask.recv(100))
            if not select.select([self._ask], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                self._ask.recv(100)
                raise AssertionError(f"no end of {words} after {timeout} s")
            code = int(self._ask.recv(100))
            for file in (out, err):
                file.seek(0)
            return Ended(code, *(file.read().decode(errors="replace") for file in (out, err)))

    def close(self) -> None:
        """No more commands are to come."""
        self._ask.close()
        self._process.wait(10)
