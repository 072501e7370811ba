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
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, InfrastructureError

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


class CommandFailed(InfrastructureError):
    """QEMU answered a QMP command with an error."""


class Qmp:
    """A connected monitor. Commands and events are appended to *log*, one JSON object a line."""

    def __init__(self, client: QMPClient, name: str, log: Path) -> None:
        self._client = client
        self._name = name
        self._log = log

    def execute(self, command: str, deadline: Deadline, **arguments: Any) -> Any:
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
            raise CommandFailed(f"{self._name}: QMP {command}: {error}") from None
        except QMPError as error:
            record["error"] = str(error)
            raise ConnectionLost(f"{self._name}: QMP {command}: {error}") from None
        finally:
            with open(self._log, "a") as file:
                file.write(json.dumps(record) + "\n")
        return value

    def monitor(self, line: str, deadline: Deadline) -> str:
        """The output of a human monitor command, for what QMP does not show."""
        text: str = self.execute("human-monitor-command", deadline, **{"command-line": line})
        return text


async def _log_events(client: QMPClient, log: Path) -> None:
    async for event in client.events:
        with open(log, "a") as file:
            file.write(json.dumps(dict(event)) + "\n")


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
    events = asyncio.run_coroutine_threadsafe(_log_events(client, log), _loop())
    try:
        yield Qmp(client, name, log)
    finally:
        events.cancel()
        # A monitor whose QEMU is gone already has nothing to say goodbye to.
        with contextlib.suppress(QMPError, EOFError, OSError, InfrastructureError):
            _wait(client.disconnect(), Deadline(5, f"{name}: end of QMP"))
