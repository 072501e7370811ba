# SPDX-License-Identifier: GPL-2.0-or-later
"""The orchestrator's end of an agent: calls by name, answers by number, over one channel.

The agent (`qemu_ioasid.agent`) has a virtio-serial port of its own in its VM.
Its operations and their arguments are listed in docs/agent.md.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import AgentError, CallFailed, ConnectionLost, DeadlineExceeded

#: How an agent's first line begins.
_BEGIN = '{"event": "ready"'
#: What an operation may take that says nothing else, in seconds of the reference machine.
CALL_SECONDS = 45.0


class Pending:
    """An operation under way."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._done = threading.Event()
        self._answer: dict[str, Any] | None = None

    def _finish(self, answer: dict[str, Any] | None) -> None:
        self._answer = answer
        self._done.set()

    def ends_within(self, seconds: float) -> bool:
        """Whether the answer is here, or comes within *seconds*."""
        return self._done.wait(seconds)

    def result(self, deadline: Deadline) -> Any:
        """The operation's value.

        Raises CallFailed when it ended with an errno (ETIMEDOUT: what it waited
        for did not happen), AgentError when with something else,
        ConnectionLost, DeadlineExceeded.
        """
        if not self._done.wait(deadline.remaining()):
            raise deadline.exceeded()
        if self._answer is None:
            raise ConnectionLost(f"{self._name}: the agent went away")
        error = self._answer.get("error")
        if error is None:
            return self._answer["ok"]
        message = f"{self._name}: {error['message']}"
        evidence = error.get("traceback", "")
        if error["type"] == "TimeoutError":
            # What the agent waited for is the kernel's to do: its silence is an answer too.
            raise CallFailed(message, errno.ETIMEDOUT, evidence=evidence)
        if error.get("errno"):
            raise CallFailed(message, error["errno"], evidence=evidence)
        raise AgentError(f"{message} ({error['type']})", evidence=evidence)


class Agent:
    """A running agent. Calls from several threads are independent of each other."""

    def __init__(self, name: str, send: Callable[[bytes], None], log: Path) -> None:
        self.name = name
        self._send = send
        self._log = log
        self._lock = threading.Lock()
        self._log_lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._next = 0
        self._lost = threading.Event()
        self._ready = threading.Event()
        self._on_event: Callable[[dict[str, Any]], None] = lambda event: None

    def on_event(self, handler: Callable[[dict[str, Any]], None]) -> None:
        """Have *handler* called with each event, from the reading thread."""
        self._on_event = handler

    @property
    def requests(self) -> int:
        """How many operations were begun."""
        return self._next

    @property
    def lost(self) -> bool:
        """Whether the agent is gone."""
        return self._lost.is_set()

    def wait_lost(self, seconds: float) -> bool:
        """Whether the agent is gone within *seconds*."""
        return self._lost.wait(seconds)

    def start(self, op: str, /, **args: Any) -> Pending:
        """Begin an operation and return at once."""
        with self._lock:
            if self.lost:
                raise ConnectionLost(f"{self.name}: the agent went away")
            self._next += 1
            number = self._next
            pending = self._pending[number] = Pending(f"{self.name}: {op}")
            line = json.dumps({"id": number, "op": op, "args": args})
            self._write_log(">", line)
            try:
                self._send(line.encode() + b"\n")
            except OSError:
                raise ConnectionLost(f"{self.name}: the agent went away") from None
        return pending

    def call(self, op: str, /, *, deadline: Deadline | None = None, **args: Any) -> Any:
        """Run an operation and return its value; raises as `Pending.result`."""
        deadline = deadline or Deadline(CALL_SECONDS, f"answer of {self.name} to {op}")
        try:
            return self.start(op, **args).result(deadline)
        except DeadlineExceeded as error:
            # Each operation has a thread of its own: an agent that still answers is not to blame
            # for a call that does not return, the kernel is.
            self.start("hello").result(Deadline(10, f"any answer of {self.name}"))
            raise CallFailed(f"{self.name}: {error.message}", errno.ETIMEDOUT) from None

    def wait_ready(self, deadline: Deadline) -> None:
        """Return when the agent has said that it runs."""
        if not self._ready.wait(deadline.remaining()):
            raise deadline.exceeded()
        if self.lost:
            raise ConnectionLost(f"{self.name}: the agent did not start")

    def renew(self) -> None:
        """Expect another agent on the same channel: its VM has ended, and is to be booted again."""
        with self._lock:
            self._lost.clear()
            self._ready.clear()

    def _write_log(self, direction: str, line: str) -> None:
        with self._log_lock, open(self._log, "a") as file:
            file.write(f"{time.time():.3f} {direction} {line}\n")

    def _take(self, line: str) -> None:
        self._write_log("<", line)
        try:
            message = json.loads(line)
        except ValueError:
            if self._ready.is_set() and not self.lost:
                raise
            # An agent that was killed left it half said, and the next one begins behind that.
            _, begin, rest = line.rpartition(_BEGIN)
            if not begin:
                return
            message = json.loads(begin + rest)
        if "event" in message:
            if message["event"] == "ready":
                self._ready.set()
            self._on_event(message)
            return
        with self._lock:
            pending = self._pending.pop(message["id"], None)
        if pending is not None:
            pending._finish(message)

    def lose(self) -> None:
        """The agent is gone, as far as its VM is known to be: every wait on it ends."""
        with self._lock:
            self._lost.set()
            pending, self._pending = self._pending, {}
        for each in pending.values():
            each._finish(None)
        self._ready.set()


def _read(agent: Agent, recv: Callable[[int], bytes]) -> None:
    rest = b""
    try:
        with contextlib.suppress(OSError):
            while data := recv(65536):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    agent._take(line.decode())
    finally:
        agent.lose()


@contextlib.contextmanager
def attach(stream: socket.socket, name: str, log: Path) -> Iterator[Agent]:
    """The agent behind *stream*, a connected socket that is taken over.

    What is said both ways goes to *log*. A request that the VM does not read ends
    with ConnectionLost after `CALL_SECONDS`.
    """
    seconds = calibration() * CALL_SECONDS
    # Of the socket's options this one bounds sendall() alone: the reader waits for ever.
    stream.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", math.ceil(seconds), 0)
    )
    agent = Agent(name, stream.sendall, log)
    reader = threading.Thread(target=_read, args=(agent, stream.recv), daemon=True)
    reader.start()
    try:
        yield agent
    finally:
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        reader.join(5)
        stream.close()
