# SPDX-License-Identifier: GPL-2.0-or-later
"""This process's terminal and streams, joined to a program in a VM of a lab."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, BinaryIO

from qemu_ioasid.errors import InfrastructureError
from qemu_ioasid.lab.wire import ERR, IN, OUT, Refused, Wire

_PIECE = 32768
#: At the start of a line, as in ssh(1): ends the session, whatever the VM does.
_ESCAPE, _QUIT = ord("~"), ord(".")

Note = Callable[[str], None]


def terminal_size() -> tuple[int, int]:
    """Columns and rows of standard input's terminal."""
    size = os.get_terminal_size(sys.stdin.fileno())
    return size.columns, size.lines


def session(wire: Wire, note: Note, *, terminal: bool) -> int:
    """Have the program that *wire* asked for use our standard streams; its exit status.

    On a *terminal*, every key goes to it, Ctrl-C too, until it ends or the user
    types ``~.`` at the start of a line.
    """
    quit = threading.Event()
    with contextlib.ExitStack() as stack:

        def begun() -> None:
            if terminal:
                stack.enter_context(_raw(wire))
            threading.Thread(target=_send_keys, args=(wire, terminal, quit), daemon=True).start()

        try:
            return _joined(wire, note, begun, lambda data: _write(sys.stdout.fileno(), data))
        except InfrastructureError:
            if not quit.is_set():
                raise
            return 255


def transfer(wire: Wire, note: Note, source: BinaryIO | None, sink: BinaryIO | None) -> int:
    """As `session`, with files: what is read from *source*, and is written to *sink*."""

    def feed() -> None:
        with contextlib.suppress(OSError):
            while data := source.read(_PIECE) if source else b"":
                wire.send(IN, data)
            wire.send(IN, b"")

    def begun() -> None:
        threading.Thread(target=feed, daemon=True).start()

    return _joined(wire, note, begun, lambda data: sink.write(data) if sink else None)


def _joined(
    wire: Wire, note: Note, begun: Callable[[], None], out: Callable[[bytes], object]
) -> int:
    while (frame := wire.receive()) is not None:
        kind, data = frame
        if kind == OUT:
            out(data)
        elif kind == ERR:
            _write(sys.stderr.fileno(), data)
        else:
            message: dict[str, Any] = json.loads(data)
            if "note" in message:
                note(message["note"])
            elif "begun" in message:
                begun()
            elif "error" in message:
                raise Refused(message["error"])
            elif "ok" in message:
                return int(message["ok"]["status"])
    raise InfrastructureError("the session was ended")


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _raw(wire: Wire) -> Iterator[None]:
    """Standard input's terminal passes every key on; the VM hears of changes of its size."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def changed(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            wire.tell(size=terminal_size())

    handler = signal.signal(signal.SIGWINCH, changed)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)


def _send_keys(wire: Wire, terminal: bool, quit: threading.Event) -> None:
    keys = _Keys(terminal)
    with contextlib.suppress(OSError):
        while data := os.read(sys.stdin.fileno(), _PIECE):
            passed = keys.passed(data)
            if passed is None:
                quit.set()
                wire.end()
                return
            wire.send(IN, passed)
        wire.send(IN, b"")


class _Keys:
    """What is typed, up to the escape, where there is one."""

    def __init__(self, escape: bool) -> None:
        self._at_start = escape
        self._escape = escape
        self._held = False

    def passed(self, data: bytes) -> bytes | None:
        """What of *data*, and of what came before it, is for the program; None: the escape."""
        out = bytearray()
        for byte in data:
            if self._held:
                if byte == _QUIT:
                    return None
                out.append(_ESCAPE)
            self._held = not self._held and self._at_start and byte == _ESCAPE
            if not self._held:
                out.append(byte)
                self._at_start = self._escape and byte in b"\r\n"
        return bytes(out)
