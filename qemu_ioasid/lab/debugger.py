# SPDX-License-Identifier: GPL-2.0-or-later
"""Doors for gdb: the stubs of the VMs' QEMUs on unix sockets in the lab's folder."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from qemu_ioasid import gdbstub
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import InfrastructureError, RigError
from qemu_ioasid.lab import swap
from qemu_ioasid.lab.life import Life
from qemu_ioasid.machine import Machine

#: sockaddr_un, without the NUL.
_LONGEST = 107
#: Sections that a debugger can place; those of the initialisation are gone.
_WANTED = (".text", ".data", ".bss", ".rodata")

RELAY_SECONDS = 30.0
#: Where the agent in the host VM has the guests' sockets, a folder each.
RUNTIME = "/run/qemu-ioasid"

Json = dict[str, Any]


class Stubs:
    """The doors that were opened, by VM: a VM that a debugger has stopped answers no question."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._doors: dict[str, tuple[Machine, Path]] = {}
        self._symbols: tuple[Machine, Path | None, list[Json]] | None = None

    def ready(self, life: Life, vm: str, deadline: Deadline) -> Json:
        """Open *vm*'s door where it is not: {socket, vmlinux, modules: [{path, sections}]}."""
        machine = life.machine(vm)
        with self._lock:
            # Another machine of the same name is another life of the VM.
            door = self._doors.get(vm)
            if door is None or door[0] is not machine:
                path = _path(self._folder, f"gdb.{vm}")
                path.unlink(missing_ok=True)
                if vm == "host":
                    gdbstub.serve(machine.qmp, vm, str(path), deadline)
                else:
                    _open_guest(life, machine, path, deadline)
                door = self._doors[vm] = machine, path
            kernel = life.parts.kernel
            if vm != "host":
                kernel = life.parts.disks["kernel"].with_name(kernel.name)
            modules = self._modules(life, machine, deadline) if vm == "host" else []
        told: Json = {"socket": str(door[1]), "vmlinux": str(kernel), "modules": modules}
        # KVM nested in TCG does not catch the instruction that a breakpoint in memory is: the
        # guest oopses on it. In memory that it takes for read-only, gdb uses the processor's.
        return {**told, "commands": ["mem 0 0 ro"] if vm != "host" else []}

    def _modules(self, life: Life, host: Machine, deadline: Deadline) -> list[Json]:
        known = self._symbols
        if known is not None and known[0] is host and known[1] == life.modules:
            return known[2]
        found = []
        if life.modules is not None:
            folder = Path(tempfile.mkdtemp(prefix="gdb-", dir=self._folder)) / "modules"
            for name in swap.unpacked(life.modules, folder).order:
                sections = _sections(host, swap.symbol(name), deadline)
                if sections:
                    found.append({"path": str(folder / name), "sections": sections})
        self._symbols = host, life.modules, found
        return found


def _sections(host: Machine, module: str, deadline: Deadline) -> dict[str, str]:
    """Where the sections of a loaded *module* are; none when it is not loaded."""
    script = f"cd /sys/module/{module}/sections 2>/dev/null && grep '' {' '.join(_WANTED)} 2>&-; :"
    said = host.ssh.output(script, deadline).decode()
    return dict(line.split(":", 1) for line in said.splitlines() if ":0x" in line)


def _open_guest(life: Life, guest: Machine, path: Path, deadline: Deadline) -> None:
    """A guest's stub is a socket in the host VM: *path* leads there while this rig runs."""
    inside = f"{RUNTIME}/{guest.name}/gdb"
    gdbstub.serve(guest.qmp, guest.name, inside, deadline)
    host = life.running().host
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    life.stack.callback(listener.close)
    listener.bind(str(path))
    listener.listen(4)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(
                    target=_relay, args=(connection, host, inside), daemon=True
                ).start()

    threading.Thread(target=accept, daemon=True).start()
    life.stack.callback(lambda: _wake(listener))


def _wake(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _relay(connection: socket.socket, host: Machine, inside: str) -> None:
    with connection, contextlib.suppress(OSError, RigError):
        deadline = Deadline(RELAY_SECONDS, "way to the guest's stub")
        command = f"exec socat -b 65536 - UNIX-CONNECT:{inside}"
        with contextlib.closing(host.ssh.run(command, deadline)) as channel:

            def inward() -> None:
                with contextlib.suppress(OSError):
                    while data := connection.recv(65536):
                        channel.sendall(data)
                channel.close()

            threading.Thread(target=inward, daemon=True).start()
            while data := channel.recv(65536):
                connection.sendall(data)


def _path(folder: Path, name: str) -> Path:
    path = folder / name
    if len(str(path)) > _LONGEST:
        raise InfrastructureError(
            f"{path}: too long for a socket; set XDG_RUNTIME_DIR to a shorter path before lab up"
        )
    return path
