# SPDX-License-Identifier: GPL-2.0-or-later
"""A command's end of a lab: asking its keeper, starting one, ending one."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from qemu_ioasid import process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import InfrastructureError
from qemu_ioasid.lab import place
from qemu_ioasid.lab.order import Order
from qemu_ioasid.lab.place import Entry
from qemu_ioasid.lab.wire import TOLD, Refused, Wire
from qemu_ioasid.session import Output

#: How long a keeper may take to say how its lab is, and to end it.
STATUS_SECONDS, DOWN_SECONDS = 10.0, 30.0
#: For a keeper that was told to give up to do so.
GIVE_UP_SECONDS = 20.0

Note = Callable[[str], None]
Json = dict[str, Any]


def ask(entry: Entry, output: Output, note: Note, op: str, **arguments: Any) -> Any:
    """Have the keeper do *op*, telling *output* how far it is; its answer.

    Raises `Refused` with the keeper's reason, InfrastructureError when it is gone.
    """
    with Wire(entry.connect()) as wire:
        wire.tell(op=op, **arguments)
        return answer(wire, output, note, f"lab {entry.name}: its keeper is gone")


def answer(wire: Wire, output: Output, note: Note, gone: str) -> Any:
    """What the keeper answers in the end; *gone* is the message for when it does not."""
    while (message := wire.hear()) is not None:
        if "ok" in message:
            return message["ok"]
        if "error" in message:
            raise Refused(message["error"])
        if "note" in message:
            note(message["note"])
        if "say" in message:
            output.say(message["say"])
        if "progress" in message:
            output.progress(message["progress"])
        if "begins" in message:
            output.begins(message["begins"])
    raise InfrastructureError(gone)


def start(order: Order, output: Output) -> Json:
    """Start a keeper for *order*; the lab's status when it is up.

    Raises `Refused` with what kept it from that. It gives up with us.
    """
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(Wire(ours))
        with theirs:
            words = [sys.executable, "-P", "-m", "qemu_ioasid.lab.keeper", str(theirs.fileno())]
            process.detach(words, pass_fds=[theirs.fileno()], log=2)
        wire.send(TOLD, pickle.dumps(order))
        try:
            status = answer(wire, output, output.say, f"lab {order.name}: its keeper ended")
        except BaseException as error:
            if not isinstance(error, Refused):
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_WR)
            # It is through when its end of the connection is gone.
            _drain(ours, GIVE_UP_SECONDS)
            raise
    return dict(status)


def _drain(sock: socket.socket, seconds: float) -> bool:
    """Read to the end; whether that came within *seconds*."""
    deadline = Deadline(seconds, "end of the keeper")
    with contextlib.suppress(OSError, InfrastructureError):
        while select.select([sock], [], [], deadline.remaining())[0]:
            if not sock.recv(65536):
                return True
    return False


def status(entry: Entry) -> Json:
    """The lab's status; what its entry says, and why it is no more, when its keeper is silent."""
    told = {
        "name": entry.name,
        "pid": entry.pid,
        "rig": entry.rig,
        "report": entry.report,
        "started": entry.started,
    }
    silent = {**told, "state": "gone", "doing": "", "vms": [], "snapshots": []}
    try:
        with Wire(entry.connect()) as wire:
            wire.tell(op="status")
            if not select.select([wire.sock], [], [], STATUS_SECONDS)[0]:
                return {**silent, "state": "silent", "why": "its keeper does not answer"}
            message = wire.hear()
    except (InfrastructureError, OSError):
        message = None
    if message is None or "ok" not in message:
        return {**silent, "why": "its keeper is gone"}
    return dict(message["ok"])


def down(entry: Entry, note: Note) -> None:
    """End the lab; nothing of it is left when this returns. Raises DeadlineExceeded."""
    with contextlib.suppress(InfrastructureError, OSError), Wire(entry.connect()) as wire:
        wire.tell(op="down")
        deadline = Deadline(DOWN_SECONDS, f"end of lab {entry.name}")
        with contextlib.suppress(InfrastructureError):
            while select.select([wire.sock], [], [], deadline.remaining())[0]:
                message = wire.hear()
                if message is None:
                    break
                if "note" in message:
                    note(message["note"])
        if not _drain(wire.sock, 0.1):
            # It hangs. Its reaper does what it does not.
            pid = struct.unpack(
                "3i", wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    place.sweep()
