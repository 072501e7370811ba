# SPDX-License-Identifier: GPL-2.0-or-later
"""The orchestrator's end of an agent: calls by name, answers by number, over one channel.

The agent (`qemu_ioasid.agent`) is sent over the channel itself and leaves
nothing in the VM's image. Its operations and their arguments are listed in
docs/agent.md.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qemu_ioasid import cache
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import AgentError, CallFailed, ConnectionLost, DeadlineExceeded
from qemu_ioasid.ssh import Ssh, bounded

# -I -S: nothing but the standard library and the archive is ever imported.
_BOOTSTRAP = """
import os, sys
left = {size}
archive = os.memfd_create("agent")
while left:
    data = os.read(0, left)
    if not data: sys.exit("agent: no archive")
    os.write(archive, data)
    left -= len(data)
sys.path.insert(0, "/proc/self/fd/%d" % archive)
from qemu_ioasid.agent.server import main
main("{role}")
"""

#: What an operation may take that says nothing else, in seconds of the reference machine.
CALL_SECONDS = 45.0


@functools.cache
def archive() -> bytes:
    """The agent as a zip file, the same bytes for the same sources."""
    package = Path(__file__).parent
    files = sorted([package / "__init__.py", *package.glob("agent/**/*.py")])
    return _packed({str(file.relative_to(package.parent)): file.read_bytes() for file in files})


def _packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    # Inflating costs a VM less than decrypting three times as much.
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            target.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def agent_hash() -> str:
    """Names the agent's code in a report."""
    return cache.digest(archive())


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
        self._lost = False
        self._ready = threading.Event()
        self._on_event: Callable[[dict[str, Any]], None] = lambda event: None

    def on_event(self, handler: Callable[[dict[str, Any]], None]) -> None:
        """Have *handler* called with each event, from the reading thread."""
        self._on_event = handler

    def start(self, op: str, **args: Any) -> Pending:
        """Begin an operation and return at once."""
        with self._lock:
            if self._lost:
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

    def call(self, op: str, *, deadline: Deadline | None = None, **args: Any) -> Any:
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
        if self._lost:
            raise ConnectionLost(f"{self.name}: the agent did not start")

    def _write_log(self, direction: str, line: str) -> None:
        with self._log_lock, open(self._log, "a") as file:
            file.write(f"{time.time():.3f} {direction} {line}\n")

    def _take(self, line: str) -> None:
        self._write_log("<", line)
        message = json.loads(line)
        if "event" in message:
            if message["event"] == "ready":
                self._ready.set()
            self._on_event(message)
            return
        with self._lock:
            pending = self._pending.pop(message["id"], None)
        if pending is not None:
            pending._finish(message)

    def _lose(self) -> None:
        with self._lock:
            self._lost = True
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
        agent._lose()


def _compiled_path(image: str) -> Path:
    return cache.entry("agent", cache.digest(archive(), image)) / "agent.zip"


def _keep_compiled(agent: Agent, image: str, deadline: Deadline) -> None:
    """Have the VM's own Python compile the agent: under TCG that takes longer than it runs."""
    path = _compiled_path(image)
    compiled = base64.b64decode(agent.call("compiled_package", deadline=deadline)["zip"])
    with zipfile.ZipFile(io.BytesIO(compiled)) as package:
        data = _packed({name: package.read(name) for name in package.namelist()})
    cache.get_or_build(
        "agent",
        path.parent.name,
        lambda folder: (folder / path.name).write_bytes(data),
        deadline=deadline,
    )


@contextlib.contextmanager
def start(
    ssh: Ssh, role: str, name: str, image: str, log: Path, deadline: Deadline
) -> Iterator[Agent]:
    """Start the agent as *role* ("host" or "guest") and wait until it says so.

    *image* is the hash of the VM's image, whose Python the agent is compiled
    for once. Its standard error goes to *log* beside what is said both ways.
    Raises ConnectionLost when it does not start, DeadlineExceeded.
    """
    compiled = _compiled_path(image)
    known = compiled.exists()
    code = compiled.read_bytes() if known else archive()
    bootstrap = _BOOTSTRAP.format(size=len(code), role=role)
    channel = ssh.run(f"exec python3 -I -S -c '{bootstrap}'", deadline)
    agent = Agent(name, channel.sendall, log)

    def errors() -> None:
        with contextlib.suppress(OSError):
            while data := channel.recv_stderr(65536):
                for line in data.decode(errors="replace").splitlines():
                    agent._write_log("!", line)

    threads = [
        threading.Thread(target=_read, args=(agent, channel.recv), daemon=True),
        threading.Thread(target=errors, daemon=True),
    ]
    try:
        for thread in threads:
            thread.start()
        try:
            with bounded(channel, deadline):
                channel.sendall(code)
        except OSError:
            raise ConnectionLost(f"{name}: the agent did not start") from None
        agent.wait_ready(deadline)
        if not known:
            _keep_compiled(agent, image, deadline)
        yield agent
    finally:
        channel.close()
        for thread in threads:
            thread.join(5)
