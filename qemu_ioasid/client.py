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
from qemu_ioasid.errors import (
    AgentError,
    CallFailed,
    ConnectionLost,
    DeadlineExceeded,
    InfrastructureError,
)
from qemu_ioasid.logfile import LogFile
from qemu_ioasid.shape import misfit
from qemu_ioasid.text import cut, lines, visible

#: An operation and its arguments.
Call = tuple[str, dict[str, Any]]

#: How an agent's first line begins.
_BEGIN = b'{"event": "ready"'
#: The longest line that an agent may say, in bytes: most of it is memory that was read, in hex.
LONGEST = 64 << 20
#: How much of its words goes into a message, in characters.
QUOTED, TRACEBACK = 2000, 20_000
#: Arguments that no log keeps: a key, and what a VM's chance comes from.
_SECRET = ("host_key", "entropy")
_ERROR = {"type": str, "message": str, "traceback?": str, "errno?": int | None}
_RANGE = {"offset": int, "length": int}
_CHANGES = {"changed": [_RANGE], "unexpected": [_RANGE]}
_COMPLETION = {"status": str | int, "pasid": int, "error": int, "addr": int, "done": int}
#: What the answers to operations must be like (docs/agent.md): guests say what they like.
_ANSWERS: dict[str, Any] = {
    "hello": {"role": str, "release": str, "cpus": int, "kernel": dict},
    "arena": {"gpa": int, "size": int},
    "nonce": {"hex": str},
    "read": {"hex": str},
    "watch": {"nonce": str},
    "changes": _CHANGES,
    "submit": [_COMPLETION],
    "submit_wait": [_COMPLETION],
    "submit_start": {"ticket": int},
    "bind_request": {"iova": int, "gpa": int, "length": int},
    "news": {"news": [str]},
    "reset": {"news": [str]},
    "wake": {"now": int},
    "ssh_start": {"pid": int},
    "gcov": {"files": dict},
}

#: What an operation may take that says nothing else, in seconds of the reference machine.
CALL_SECONDS = 45.0


class Pending:
    """An operation under way."""

    def __init__(self, agent: str, op: str) -> None:
        self._name = f"{agent}: {op}"
        self.op = op
        self._done = threading.Event()
        self._answer: dict[str, Any] | None = None
        self._lost: InfrastructureError | None = None

    def _finish(
        self, answer: dict[str, Any] | None, lost: InfrastructureError | None = None
    ) -> None:
        self._answer, self._lost = answer, lost
        self._done.set()

    def ends_within(self, seconds: float) -> bool:
        """Whether the answer is here, or comes within *seconds*."""
        return self._done.wait(seconds)

    def result(self, deadline: Deadline) -> Any:
        """The operation's value.

        Raises CallFailed when it ended with an errno (ETIMEDOUT: what it waited
        for did not happen), AgentError when with something else or with no
        answer that can be one, ConnectionLost, DeadlineExceeded.
        """
        if not self._done.wait(deadline.remaining()):
            raise deadline.exceeded()
        if self._answer is None:
            raise self._lost or ConnectionLost(f"{self._name}: the agent went away")
        error = self._answer.get("error")
        if error is None:
            wrong = misfit(self._answer, {"ok": _ANSWERS.get(self.op, object)})
            if wrong:
                raise AgentError(f"{self._name}: what the agent says is no answer: {wrong}")
            return self._answer["ok"]
        wrong = misfit(error, _ERROR)
        if wrong:
            raise AgentError(f"{self._name}: what the agent says is no error: {wrong}")
        message = f"{self._name}: {_quoted(error['message'])}"
        evidence = "\n".join(lines(cut(error.get("traceback", ""), TRACEBACK)))
        if error["type"] == "TimeoutError":
            # What the agent waited for is the kernel's to do: its silence is an answer too.
            raise CallFailed(message, errno.ETIMEDOUT, evidence=evidence)
        if error.get("errno"):
            raise CallFailed(message, error["errno"], evidence=evidence)
        raise AgentError(f"{message} ({_quoted(error['type'])})", evidence=evidence)


class Agent:
    """A running agent. Calls from several threads are independent of each other."""

    def __init__(self, name: str, send: Callable[[bytes], None], log: LogFile) -> None:
        self.name = name
        self._send = send
        self._log = log
        self._lock = threading.Lock()
        self._broken: AgentError | None = None
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
                raise self._broken or ConnectionLost(f"{self.name}: the agent went away")
            self._next += 1
            number = self._next
            pending = self._pending[number] = Pending(self.name, op)
            told = {name: "(not kept)" if name in _SECRET else args[name] for name in args}
            self._write_log(">", _request(number, op, told))
            try:
                self._send(_request(number, op, args) + b"\n")
            except OSError:
                raise ConnectionLost(f"{self.name}: the agent went away") from None
        return pending

    def call(self, op: str, /, *, deadline: Deadline | None = None, **args: Any) -> Any:
        """Run an operation and return its value; raises as `Pending.result`."""
        return self._answer(self.start(op, **args), deadline)

    def _answer(self, pending: Pending, deadline: Deadline | None) -> Any:
        deadline = deadline or Deadline(CALL_SECONDS, f"answer of {self.name} to {pending.op}")
        try:
            return pending.result(deadline)
        except DeadlineExceeded as error:
            # Each operation has a thread of its own: an agent that still answers is not to blame
            # for a call that does not return, the kernel is.
            self.start("hello").result(Deadline(10, f"any answer of {self.name}"))
            raise CallFailed(f"{self.name}: {error.message}", errno.ETIMEDOUT) from None

    def start_several(self, *calls: Call) -> Pending:
        """Begin operations that are done one after another; the first error is the answer."""
        return self.start("several", calls=[{"op": op, "args": args} for op, args in calls])

    def several(self, *calls: Call, deadline: Deadline | None = None) -> list[Any]:
        """Answers to operations that are done one after another; raises as `call`."""
        answers: list[Any] = self._answer(self.start_several(*calls), deadline)
        return answers

    def wait_ready(self, deadline: Deadline) -> None:
        """Return when the agent has said that it runs."""
        if not self._ready.wait(deadline.remaining()):
            raise deadline.exceeded()
        if self.lost:
            raise self._broken or ConnectionLost(f"{self.name}: the agent did not start")

    def renew(self) -> None:
        """Expect another agent on the same channel: its VM has ended, and is to be booted again."""
        with self._lock:
            self._lost.clear()
            self._ready.clear()
            self._broken = None

    def _write_log(self, direction: str, line: bytes) -> None:
        self._log.write(f"{time.time():.3f} {direction} ".encode() + line + b"\n")

    def _take(self, line: bytes) -> None:
        """Raises ValueError for what no agent says."""
        self._write_log("<", line)
        try:
            message = _message(line)
        except ValueError:
            if self._ready.is_set() and not self.lost:
                raise
            # An agent that was killed left it half said, and the next one begins behind that.
            _, begin, rest = line.rpartition(_BEGIN)
            if not begin:
                return
            message = _message(begin + rest)
        if "event" in message:
            if message["event"] == "ready":
                self._ready.set()
            self._on_event(message)
            return
        with self._lock:
            pending = self._pending.pop(message["id"], None)
        if pending is not None:
            # That of a VM that was restored has said so in another life.
            self._ready.set()
            pending._finish(message)

    def _break(self, why: str, said: bytes) -> None:
        """The agent breaks the protocol: nothing it says is believed any more."""
        with self._lock:
            self._broken = AgentError(
                f"{self.name}: what the agent says is no answer: {_quoted(why)}",
                evidence=_quoted(said[: QUOTED + 1].decode(errors="replace")),
            )
        self.lose()

    def lose(self) -> None:
        """The agent is gone, as far as its VM is known to be: every wait on it ends."""
        with self._lock:
            self._lost.set()
            pending, self._pending = self._pending, {}
        for each in pending.values():
            each._finish(None, self._broken)
        self._ready.set()


def _quoted(text: str) -> str:
    """What a VM said, for a line of ours."""
    return cut(visible(cut(text, QUOTED)), QUOTED)


def _request(number: int, op: str, args: dict[str, Any]) -> bytes:
    return json.dumps({"id": number, "op": op, "args": args}).encode()


def _message(line: bytes) -> dict[str, Any]:
    """What an agent says in a line. Raises ValueError when it is nothing that one says."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for shape in ({"event": str}, {"id": int, "ok": object}, {"id": int | None, "error": dict}):
        if misfit(message, shape) is None:
            return dict(message)
    raise ValueError("neither event nor answer")


def _read(agent: Agent, recv: Callable[[int], bytes]) -> None:
    parts: list[bytes] = []
    size = 0
    try:
        with contextlib.suppress(OSError):
            while data := recv(65536):
                *ends, rest = data.split(b"\n")
                for end in ends:
                    _take(agent, b"".join([*parts, end]))
                    parts, size = [], 0
                size += len(rest)
                if size <= LONGEST:
                    parts.append(rest)
                elif parts:
                    agent._break(f"a line of more than {LONGEST >> 20} MiB", parts[0])
                    parts = []
    finally:
        agent.lose()


def _take(agent: Agent, line: bytes) -> None:
    try:
        agent._take(line)
    except ValueError as error:
        # To the end, whatever comes: the VM blocks when nobody reads, and may get another agent.
        agent._break(str(error), line)


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
    kept = LogFile(log)
    agent = Agent(name, stream.sendall, kept)
    reader = threading.Thread(target=_read, args=(agent, stream.recv), daemon=True)
    reader.start()
    try:
        yield agent
    finally:
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        reader.join(5)
        stream.close()
        kept.close()
