# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lab's keeper and a command say to each other: frames on a connected unix socket.

A command says what it wants in one JSON object; then either says what it has to
say, in any order, and the keeper ends with ``{"ok": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any, Self

from qemu_ioasid.errors import RigError

#: Kinds of frames: a JSON object; bytes of a program's standard input, output and error.
TOLD, IN, OUT, ERR = b"j", b"0", b"1", b"2"
_HEAD = struct.Struct(">cI")
#: Nothing larger is ever sent at once.
_LARGEST = 64 << 20


class Refused(RigError):
    """The keeper's answer to a command: an error of its side, with its exit code."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"], evidence=error["evidence"])
        self.exit_code = error["exit_code"]


class Wire:
    """One end of a connection, which it takes over. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._sending = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        self.sock.close()

    def end(self) -> None:
        """Wake both ends: nothing more is said."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def send(self, kind: bytes, data: bytes) -> None:
        """One frame. Raises OSError when the other end is gone."""
        with self._sending:
            self.sock.sendall(_HEAD.pack(kind, len(data)) + data)

    def tell(self, **message: Any) -> None:
        """One JSON object."""
        self.send(TOLD, json.dumps(message).encode())

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next frame's kind and data; None at the end."""
        head = self._exactly(_HEAD.size)
        if head is None:
            return None
        kind, size = _HEAD.unpack(head)
        data = self._exactly(size) if size <= _LARGEST else None
        return None if data is None else (kind, data)

    def hear(self) -> dict[str, Any] | None:
        """The next frame, a JSON object; None at the end, and for any other frame."""
        frame = self.receive()
        if frame is None or frame[0] != TOLD:
            return None
        message: dict[str, Any] = json.loads(frame[1])
        return message

    def _exactly(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            try:
                data = self.sock.recv(min(size - len(parts), 1 << 20))
            except OSError:
                return None
            if not data:
                return None
            parts += data
        return bytes(parts)


def described(error: RigError) -> dict[str, Any]:
    """*error* as it is told to a command."""
    return {
        "exit_code": error.exit_code,
        "message": error.message,
        "evidence": error.evidence,
    }
