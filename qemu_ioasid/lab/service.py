# SPDX-License-Identifier: GPL-2.0-or-later
"""What a keeper does for the commands that come to its socket, a thread for each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import CallFailed, InfrastructureError, RigError
from qemu_ioasid.kernel import Spec
from qemu_ioasid.lab import debugger, monitor, pasids, place, sessions, swap
from qemu_ioasid.lab.audience import Audience
from qemu_ioasid.lab.life import Life
from qemu_ioasid.lab.place import Entry
from qemu_ioasid.lab.wire import OUT, Wire, described
from qemu_ioasid.rig import Phase, Rig
from qemu_ioasid.ssh import Terminal

QMP_SECONDS = 120.0

Json = dict[str, Any]


class Service:
    """The operations of the lab *entry*; *spec* is the kernel that `reload` builds."""

    def __init__(self, entry: Entry, spec: Spec, phase: Phase, audience: Audience) -> None:
        self.entry = entry
        self.life: Life | None = None
        self.ended = threading.Event()
        self._spec = spec
        self._phase = phase
        self._audience = audience
        self._stubs = debugger.Stubs(entry.folder)
        #: Those that must answer about a lab that is coming up or busy; the rest need its rig.
        self._always: dict[str, Callable[..., Any]] = {"status": self._status, "down": self._down}
        self._operations: dict[str, Callable[..., Any]] = {
            name: getattr(self, name)
            for name in (
                *("ssh", "console", "qmp", "qmp_shell", "gdb", "reload", "snapshot", "restore"),
                *("pasid_list", "pasid_register", "pasid_unregister"),
            )
        }

    @contextlib.contextmanager
    def serving(self, sock: socket.socket) -> Iterator[None]:
        """Answer on the listening *sock* while the block runs."""
        thread = threading.Thread(target=self._accept, args=(sock,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        # A command that is gone is nobody to tell.
        with contextlib.suppress(OSError), Wire(connection) as wire:
            request = wire.hear()
            if request is None:
                return
            try:
                with self._audience.told(wire):
                    answer = self._answer(wire, str(request.pop("op")), request)
            except CallFailed as error:
                # The kernel's answer to what a person asked for: neither is the rig's failure.
                told = {**described(error), "exit_code": 1}
                wire.tell(error={**told, "message": f"{error.message} ({error.name})"})
            except RigError as error:
                wire.tell(error=described(error))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                traceback.print_exc()
                bug = RigError(f"bug in the lab: {error!r}", evidence=traceback.format_exc())
                wire.tell(error=described(bug))
            else:
                wire.tell(ok=answer)

    def _answer(self, wire: Wire, op: str, arguments: Json) -> Any:
        if op in self._always:
            return self._always[op](wire, **arguments)
        if self.life is None:
            raise InfrastructureError(f"lab {self.entry.name} is still coming up")
        for line in self.life.news():
            wire.tell(note=line)
        with self.life.blamed(arguments.get("vm")):
            return self._operations[op](wire, self.life, **arguments)

    # About the lab

    def status(self) -> Json:
        """All there is to know of the lab, without waiting for anything."""
        told = {
            "name": self.entry.name,
            "pid": self.entry.pid,
            "rig": self.entry.rig,
            "report": self.entry.report,
            "started": self.entry.started,
        }
        if self.life is None:
            return {
                **told,
                "state": "coming up",
                "doing": "",
                "why": "",
                "vms": [],
                "snapshots": [],
            }
        self.life.news()
        return {**told, **self.life.status()}

    def _status(self, wire: Wire) -> Json:
        return self.status()

    def _down(self, wire: Wire) -> None:
        for line in self.life.news() if self.life else ():
            wire.tell(note=line)
        if self.life is None:
            os.kill(os.getpid(), signal.SIGTERM)
        self.ended.set()
        # The connection ends when nothing is left of us.
        threading.Event().wait()

    # Sessions

    def ssh(
        self, wire: Wire, life: Life, vm: str, command: str, terminal: list[Any] | None
    ) -> Json:
        """A command or shell in a VM, joined to the command's terminal; its exit status."""
        shown = Terminal(*terminal) if terminal else None
        return {"status": sessions.run(wire, life, vm, command, shown)}

    def console(self, wire: Wire, life: Life, vm: str) -> None:
        """A VM's console, from its beginning, as long as it and the command live."""
        console, gone = life.console(vm), threading.Event()

        def watch() -> None:
            while wire.receive() is not None:
                pass
            gone.set()
            console.wake()

        threading.Thread(target=watch, daemon=True).start()
        for data in console.follow(gone.is_set):
            wire.send(OUT, data)

    def qmp(self, wire: Wire, life: Life, vm: str, command: str, arguments: Json) -> Any:
        """One QMP command."""
        return monitor.execute(life.machine(vm), command, arguments, QMP_SECONDS)

    def qmp_shell(self, wire: Wire, life: Life, vm: str) -> None:
        """The connection becomes a QMP monitor of the VM."""
        monitor.serve(wire, life.machine(vm), QMP_SECONDS)

    def gdb(self, wire: Wire, life: Life, vm: str) -> Json:
        """Where a debugger of the VM finds it, and its symbols."""
        return self._stubs.ready(life, vm, Deadline(30, f"debugger's door to {vm}"))

    # PASIDs

    def pasid_list(self, wire: Wire, life: Life) -> Json:
        """See `pasids.listed`."""
        return pasids.listed(_awake(life))

    def pasid_register(self, wire: Wire, life: Life, **arguments: Any) -> Json:
        """See `pasids.register`."""
        return pasids.register(_awake(life), **arguments)

    def pasid_unregister(self, wire: Wire, life: Life, **arguments: Any) -> None:
        """See `pasids.unregister`."""
        pasids.unregister(_awake(life), **arguments)

    # Another rig

    def reload(self, wire: Wire, life: Life, series: str) -> Json:
        """See `swap.reload`; *series* counts from now on."""
        if series:
            self._spec = replace(self._spec, series=series)
        life.awake()
        swapped = swap.reload(life, self._spec, self._phase, self._audience.output)
        return {"swapped": swapped}

    def snapshot(self, wire: Wire, life: Life, name: str) -> Json:
        """See `Life.save`."""
        place.check_name(name, "snapshot")
        life.awake(*life.config.guests)
        kept = life.save(name, self._phase)
        return {"name": name, "bytes": kept.size}

    def restore(self, wire: Wire, life: Life, name: str) -> None:
        """See `Life.restore`."""
        life.restore(name, self._phase)


def _awake(life: Life) -> Rig:
    """The rig, whose VMs can be asked."""
    life.awake(*life.config.guests)
    return life.rig()
