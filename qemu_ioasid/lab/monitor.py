# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's QMP monitor for people: one command, or a connection that is a monitor itself.

QEMU has one monitor, which the rig uses; here commands of several people are
passed on to it, so that any QMP client finds what it expects.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, RigError
from qemu_ioasid.lab.wire import Wire
from qemu_ioasid.machine import Machine
from qemu_ioasid.qmp import CommandFailed, Qmp

Json = dict[str, Any]
#: What is longer, and still no JSON, will never be any.
_LONGEST = 1 << 20


def execute(machine: Machine, command: str, arguments: Json, seconds: float) -> Any:
    """Run one command; ConfigurationError with QEMU's words when it refuses it."""
    deadline = Deadline(seconds, f"answer of {machine.name} to {command}")
    try:
        return machine.qmp.execute(command, deadline, **arguments)
    except CommandFailed as error:
        raise ConfigurationError(f"{machine.name}: {command}: {error.reason}") from None


def serve(wire: Wire, machine: Machine, seconds: float) -> None:
    """Have *wire* be a QMP monitor of *machine*, to its end."""
    monitor = machine.qmp
    wire.tell(ok=None)
    # Events come on a thread that must not wait for a reader.
    said: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(wire, said), daemon=True)
    writer.start()
    try:
        said.put(monitor.greeting)
        with monitor.events(said.put):
            for request in _requests(wire):
                said.put(_answered(monitor, machine.name, request, seconds))
    except OSError:
        pass
    finally:
        said.put(None)
        writer.join(5)
        wire.end()


def _write(wire: Wire, said: queue.SimpleQueue[Json | None]) -> None:
    with contextlib.suppress(OSError):
        while (message := said.get()) is not None:
            wire.sock.sendall(json.dumps(message).encode() + b"\r\n")


def _requests(wire: Wire) -> Iterator[Any]:
    """The JSON values that arrive; a client need not end them with a line. None: not JSON."""
    decoder, text = json.JSONDecoder(), ""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    while data := wire.sock.recv(65536):
        text = (text + decode(data)).lstrip()
        while text:
            try:
                value, end = decoder.raw_decode(text)
            except ValueError:
                if len(text) < _LONGEST:
                    break
                value, end = None, len(text)
            yield value
            text = text[end:].lstrip()


def _answered(monitor: Qmp, name: str, request: Any, seconds: float) -> Json:
    ident: Json = {}
    try:
        ident = {"id": request["id"]} if "id" in request else {}
        command = str(request["execute"])
        arguments = dict(request.get("arguments", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {**_error('no QMP command: it must have "execute"'), **ident}
    if command == "qmp_capabilities":
        return {"return": {}, **ident}
    try:
        deadline = Deadline(seconds, f"answer of {name} to {command}")
        return {"return": monitor.execute(command, deadline, **arguments), **ident}
    except CommandFailed as error:
        return {**_error(error.reason), **ident}
    except RigError as error:
        return {**_error(error.message), **ident}


def _error(text: str) -> Json:
    return {"error": {"class": "GenericError", "desc": text}}
