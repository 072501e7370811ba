"""QMP to a guest's QEMU, over a socket that both were born with (QEMU: docs/interop/qmp-spec).

The agent is the one that must hear of a device that is gone, whoever unplugged it.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Json = dict[str, Any]

# QEMU's own limit for what it reads is 64 MiB (qobject/json-streamer.c); ours for what it says
LONGEST = 1 << 20


class Refused(Exception):
    """QEMU answered a command with an error; the message are its own words."""


class Monitor:
    """A monitor over a connected socket, which it takes over.

    receive() is called by the one thread that waits for the socket; execute() by any other.
    """

    def __init__(self, ours: socket.socket, on_event: Callable[[str, Json], None]) -> None:
        """on_event is told name and data of each event, in the thread that calls receive()."""
        self._socket = ours
        self._on_event = on_event
        self._rest = b""
        self._changed = threading.Condition()
        self._answers: dict[int, Json] = {}
        self._number = 0
        self._lost = False
        # QEMU takes it when it has said its greeting; events come only after that.
        self._send({"execute": "qmp_capabilities", "id": 0}, ())

    def fileno(self) -> int:
        """What to wait on."""
        return self._socket.fileno()

    def _send(self, command: Json, fds: Sequence[int]) -> None:
        data = json.dumps(command).encode() + b"\n"
        if fds:
            sent = socket.send_fds(self._socket, [data], list(fds))
            data = data[sent:]
        if data:
            self._socket.sendall(data)

    def execute(
        self, command: str, arguments: Json, seconds: float, fds: Sequence[int] = ()
    ) -> Any:
        """Runs a command, with copies of fds sent along; returns its value.

        Raises Refused, TimeoutError; ConnectionError when QEMU has closed the socket.
        """
        end = time.monotonic() + seconds
        with self._changed:
            if self._lost:
                raise ConnectionResetError(f"no QEMU for {command}")
            self._number += 1
            number = self._number
            self._answers[number] = {}
            try:
                self._send({"execute": command, "arguments": arguments, "id": number}, fds)
                while not self._answers[number]:
                    if self._lost:
                        raise ConnectionResetError(f"QEMU went away before it answered {command}")
                    if not self._changed.wait(max(0.0, end - time.monotonic())):
                        raise TimeoutError(f"QEMU's answer to {command}: not within {seconds:g} s")
                answer = self._answers[number]
            finally:
                del self._answers[number]
        if "error" in answer:
            raise Refused(f"{command}: {answer['error'].get('desc')}")
        return answer.get("return")

    def receive(self) -> bool:
        """Takes what QEMU has said; whether there may be more. What is not QMP ends it."""
        with suppress(ConnectionError, ValueError):
            data = self._socket.recv(65536)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            if data and len(self._rest) <= LONGEST:
                return True
        self.close()
        return False

    def _take(self, message: Json) -> None:
        if "event" in message:
            self._on_event(message["event"], message.get("data", {}))
            return
        with self._changed:
            # Nobody waits for one that came too late, or for the capabilities.
            if message.get("id") in self._answers:
                self._answers[message["id"]] = message
                self._changed.notify_all()

    def close(self) -> None:
        """Ends every wait, and the connection."""
        with self._changed:
            self._lost = True
            self._changed.notify_all()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
