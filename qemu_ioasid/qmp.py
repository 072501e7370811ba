# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM's QMP monitor, through `qemu.qmp`, for code that does not use asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, InfrastructureError
from qemu_ioasid.logfile import LogFile

T = TypeVar("T")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="qmp", daemon=True).start()
    return loop


def _wait(coroutine: Coroutine[Any, Any, T], deadline: Deadline) -> T:
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result(deadline.remaining())
    except concurrent.futures.TimeoutError:
        raise deadline.exceeded() from None
    finally:
        future.cancel()


#: Told of each event.
OnEvent = Callable[[dict[str, Any]], None]


class CommandFailed(InfrastructureError):
    """QEMU answered a QMP command with an error; *reason* are its own words."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class Qmp:
    """A connected monitor. Commands and events are appended to *log*, one JSON object a line."""

    def __init__(self, client: QMPClient, name: str, log: LogFile) -> None:
        self._client = client
        self._name = name
        self._log = log
        self._on_event: set[OnEvent] = set()

    @property
    def greeting(self) -> dict[str, Any]:
        """What QEMU said first: its version, its capabilities."""
        assert self._client.greeting is not None
        return dict(self._client.greeting._asdict())

    @contextlib.contextmanager
    def events(self, told: OnEvent) -> Iterator[None]:
        """Have *told* called with each event; it must not wait."""
        self._on_event.add(told)
        try:
            yield
        finally:
            self._on_event.discard(told)

    def _keep(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record).encode() + b"\n")

    async def _take_events(self) -> None:
        async for event in self._client.events:
            self._keep(dict(event))
            for told in list(self._on_event):
                told(dict(event))

    def execute(self, command: str, deadline: Deadline, /, **arguments: Any) -> Any:
        """Run *command* and return its value.

        Raises CommandFailed with QEMU's own words, ConnectionLost when QEMU is
        gone, DeadlineExceeded.
        """
        record: dict[str, Any] = {"execute": command, "arguments": arguments}
        try:
            value: Any = _wait(self._client.execute(command, arguments), deadline)
            record["return"] = value
        except ExecuteError as error:
            record["error"] = str(error)
            raise CommandFailed(f"{self._name}: QMP {command}: {error}", str(error)) from None
        except QMPError as error:
            record["error"] = str(error)
            raise ConnectionLost(f"{self._name}: QMP {command}: {error}") from None
        finally:
            self._keep(record)
        return value

    def migrate(self, target: str, capabilities: dict[str, bool], deadline: Deadline) -> None:
        """Save the VM to *target* (``file:PATH``); afterwards it is stopped, until "cont".

        Raises CommandFailed with QEMU's reason; the VM then runs on.
        """
        wanted = [
            {"capability": name, "state": state}
            for name, state in {**capabilities, "events": True}.items()
        ]
        self.execute("migrate-set-capabilities", deadline, capabilities=wanted)
        # Made for networks, 128 MiB/s by default; 0 is QEMU's word for as fast as it goes.
        self.execute("migrate-set-parameters", deadline, **{"max-bandwidth": 0})
        with self._client.listener("MIGRATION") as events:
            self.execute("migrate", deadline, uri=target)
            ended = _wait(_migrated(self._client, events), deadline)
        if ended != "completed":
            told = self.execute("query-migrate", deadline)
            raise CommandFailed(
                f"{self._name}: QMP migrate: {ended}: {told.get('error-desc', 'no reason given')}"
            )

    def monitor(self, line: str, deadline: Deadline) -> str:
        """The output of a human monitor command, for what QMP does not show."""
        text: str = self.execute("human-monitor-command", deadline, **{"command-line": line})
        return text


async def _migrated(client: QMPClient, events: EventListener) -> str:
    async def ended() -> str:
        async for event in events:
            data: Any = event["data"]
            status = str(data["status"])
            if status in ("completed", "failed", "cancelled"):
                return status
        return "ended"

    async def lost() -> str:
        await client.runstate_changed()
        return "QEMU went away"

    tasks = [asyncio.ensure_future(ended()), asyncio.ensure_future(lost())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()


@contextlib.contextmanager
def connect(sock: socket.socket, name: str, log: Path, deadline: Deadline) -> Iterator[Qmp]:
    """Negotiate on a connected socket, which it takes over; disconnects at the end.

    Raises ConnectionLost when QEMU does not speak, DeadlineExceeded.
    """
    client = QMPClient(name)
    try:
        _wait(client.connect(sock), deadline)
    except QMPError as error:
        raise ConnectionLost(f"{name}: no QMP greeting: {error}") from None
    with LogFile(log) as kept:
        monitor = Qmp(client, name, kept)
        events = asyncio.run_coroutine_threadsafe(monitor._take_events(), _loop())
        try:
            yield monitor
        finally:
            events.cancel()
            # A monitor whose QEMU is gone already has nothing to say goodbye to.
            with contextlib.suppress(QMPError, EOFError, OSError, InfrastructureError):
                _wait(client.disconnect(), Deadline(5, f"{name}: end of QMP"))
