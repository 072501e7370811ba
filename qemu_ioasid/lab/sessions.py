# SPDX-License-Identifier: GPL-2.0-or-later
"""A program in a VM, joined to the standard streams of a command."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable

import paramiko

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, InfrastructureError
from qemu_ioasid.lab.life import Life
from qemu_ioasid.lab.wire import ERR, IN, OUT, Wire
from qemu_ioasid.machine import Machine
from qemu_ioasid.ssh import Ssh, Terminal

OPEN_SECONDS = 45.0
_PIECE = 32768


def _login(machine: Machine) -> Ssh:
    """The VM's SSH connection, a new one where the last was lost and another can be had."""
    ssh = machine.ssh
    if ssh.alive:
        return ssh
    machine.disconnect()
    return machine.ssh


def run(wire: Wire, life: Life, vm: str, command: str, terminal: Terminal | None) -> int:
    """Run *command* ("": a shell) in *vm* to its end; its exit status, or 255.

    Raises ConnectionLost when the connection ends before the program does.
    """
    deadline = Deadline(OPEN_SECONDS, f"session in {vm}")
    machine = life.machine(vm)
    life.awake(vm)
    ssh = _login(machine)
    with contextlib.closing(ssh.run(command, deadline, terminal)) as channel:
        wire.tell(begun=True)
        readers = [
            _thread(_outward, wire, OUT, channel.recv),
            _thread(_outward, wire, ERR, channel.recv_stderr),
        ]
        _thread(_inward, wire, channel)
        for reader in readers:
            reader.join()
        status = channel.recv_exit_status()
    if status >= 0:
        return status
    if ssh.alive:
        # A signal ended it, say: the connection stands.
        return 255
    if life.doing:
        raise InfrastructureError(f"{vm}: the session was cut: {life.doing}")
    raise ConnectionLost(f"{vm}: the session was cut")


def _thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _outward(wire: Wire, kind: bytes, receive: Callable[[int], bytes]) -> None:
    with contextlib.suppress(OSError):
        while data := receive(_PIECE):
            wire.send(kind, data)


def _inward(wire: Wire, channel: paramiko.Channel) -> None:
    """What the command has to say; when it is gone, so is the program's terminal."""
    with contextlib.suppress(OSError, paramiko.SSHException):
        while frame := wire.receive():
            kind, data = frame
            if kind == IN and data:
                channel.sendall(data)
            elif kind == IN:
                channel.shutdown_write()
            else:
                columns, rows = json.loads(data)["size"]
                channel.resize_pty(columns, rows)
    channel.close()
