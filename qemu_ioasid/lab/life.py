# SPDX-License-Identifier: GPL-2.0-or-later
"""The rig of a lab through its lives: as it came up, as it was saved, with another driver."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import rig, snapshot
from qemu_ioasid.config import RigConfig
from qemu_ioasid.console import Console, Report
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    InfrastructureError,
    KernelBroke,
    RigError,
)
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.machine import Machine
from qemu_ioasid.rig import LAST_WORDS_SECONDS, Phase, Rig

#: How long a command waits for another that has the rig for itself.
TURN_SECONDS = 300.0
#: For a QEMU to say whether its VM runs.
STATUS_SECONDS = 3.0


@dataclass(frozen=True)
class Kept:
    """A saved state of the lab, and `Life.modules` as they were then."""

    folder: Path
    modules: Path | None
    saved: float

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())


class Life:
    """The lab *name*: what runs now, and how another rig takes its place.

    *folder* is for saved states. Commands use the rig side by side; whoever
    replaces it has it `alone`.
    """

    def __init__(
        self, name: str, config: RigConfig, parts: HostParts, logs: Path, folder: Path
    ) -> None:
        self.name = name
        self.config = config
        self.parts = parts
        self.logs = logs
        #: The disk of modules that the host VM has loaded; None when nobody can tell.
        self.modules: Path | None = parts.disks["modules"]
        self.kept: dict[str, Kept] = {}
        #: What is being done with the rig alone, "" when nothing is.
        self.doing = ""
        #: The contexts of the rig that runs; what is entered here ends with it.
        self.stack = contextlib.ExitStack()
        self._folder = folder
        self._turn = threading.Condition()
        self._rig: Rig | None = None
        self._why: RigError | None = None
        # Reports on consoles, by VM: made by a driver that is gone, and told to somebody.
        self._past: dict[str, int] = {}
        self._told: dict[str, int] = {}

    # Who has the rig

    @contextlib.contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Have the rig for oneself, to do what *doing* says; the sessions on it may be cut."""
        with self._turn:
            self._wait_turn()
            self.doing = doing
        try:
            yield
        finally:
            with self._turn:
                self.doing = ""
                self._turn.notify_all()

    def _wait_turn(self) -> None:
        deadline = Deadline(TURN_SECONDS, f"end of {self.doing} in lab {self.name}")
        while self.doing:
            if not self._turn.wait(deadline.remaining()):
                raise deadline.exceeded()

    def rig(self) -> Rig:
        """The rig that runs, once nobody has it alone; raises the reason when none does."""
        with self._turn:
            self._wait_turn()
        return self.running()

    def running(self) -> Rig:
        """As `rig`, for whoever has it `alone`."""
        found = self._rig
        if found is None or not self._lives(found):
            raise self._down(found)
        return found

    @staticmethod
    def _lives(found: Rig) -> bool:
        if found.host.console.wait_end(0):
            # A QEMU that ends closes this first.
            with contextlib.suppress(DeadlineExceeded):
                found.host.child.wait(Deadline(STATUS_SECONDS, "end of the host VM's QEMU"))
        return found.host.child.poll() is None

    def _down(self, found: Rig | None) -> RigError:
        how = "qemu-ioasid lab restore brings a snapshot back" if self.kept else "lab down ends it"
        if found is None:
            why = self._why
            told = f"lab {self.name} has no rig: {why.message if why else 'it ended'}; {how}"
            kind = KernelBroke if why is not None and why.exit_code == 5 else InfrastructureError
            return kind(told, evidence=why.evidence if why else "")
        console = found.host.console
        console.wait_end(1.0)
        for report in self._new(console):
            return KernelBroke(
                f"lab {self.name} is down: host: {report.kind}: {report.text}; {how}",
                evidence=console.excerpt(report),
            )
        code, said = found.host.ending()
        last = said.strip().splitlines()[-1:]
        return InfrastructureError(
            f"lab {self.name} is down: the host VM's QEMU ended with exit code {code}; {how}",
            evidence="\n".join(last),
        )

    def _check_vm(self, name: str) -> None:
        names = ["host", *self.config.guests]
        if name not in names:
            raise ConfigurationError(f"no VM {name}: lab {self.name} has {', '.join(names)}")

    def console(self, name: str) -> Console:
        """The console of the VM called *name*, also of one that has ended."""
        self._check_vm(name)
        found = self._rig or self.rig()
        return found.host.console if name == "host" else found.host.guest_consoles[name]

    def machine(self, name: str) -> Machine:
        """The VM called *name*, which runs. Raises the reason when it does not."""
        self._check_vm(name)
        found = self.rig()
        if name == "host":
            return found.host
        guest = found.guests.get(name)
        if guest is not None and not guest.agent.lost:
            return guest.machine
        how = "qemu-ioasid lab reload boots the guests again"
        for report in self._new(found.host.guest_consoles[name]):
            raise KernelBroke(f"{name} is down: {report.kind}: {report.text}; {how}")
        raise InfrastructureError(f"{name} is down: its QEMU has ended; {how}")

    def awake(self, *names: str) -> None:
        """Raises ConfigurationError when the host VM or one of the guests *names* is stopped."""
        found = self.rig()
        # Every way to a guest leads through the host VM.
        for name in dict.fromkeys(["host", *names]):
            if self._stopped(found, name):
                raise ConfigurationError(
                    f"{name} is stopped, by a debugger or over QMP; "
                    f"qemu-ioasid lab qmp {name} cont lets it run"
                )

    def _stopped(self, found: Rig, name: str) -> bool:
        with contextlib.suppress(InfrastructureError):
            deadline = Deadline(STATUS_SECONDS, f"word of {name}'s QEMU")
            if name == "host":
                # It has a monitor from now on, whoever stops it.
                return found.host.qmp is not None and found.host.stopped(deadline)
            guest = found.guests.get(name)
            return guest is not None and not guest.agent.lost and guest.machine.stopped(deadline)
        return False

    # What the kernels say

    def _new(self, console: Console) -> list[Report]:
        return console.reports[self._past.get(console.name, 0) :]

    def reports(self) -> dict[str, list[dict[str, str]]]:
        """What the kernels of the VMs have reported, with the console around it."""
        return {
            console.name: [
                {"kind": each.kind, "text": each.text, "excerpt": console.excerpt(each)}
                for each in self._new(console)
            ]
            for console in (self._rig.consoles if self._rig else ())
        }

    def news(self) -> list[str]:
        """Reports that nobody has been told of, a line each; told now."""
        lines = []
        for console in self._rig.consoles if self._rig else ():
            reports = console.reports
            start = max(self._told.get(console.name, 0), self._past.get(console.name, 0))
            self._told[console.name] = len(reports)
            lines += [f"{console.name}: {each.kind}: {each.text}" for each in reports[start:]]
        return lines

    def seen(self) -> dict[str, int]:
        """How many reports there are, by console."""
        consoles = self._rig.consoles if self._rig else []
        return {console.name: len(console.reports) for console in consoles}

    def forgive(self) -> None:
        """What the kernels have reported so far is no concern of the driver that is loaded next."""
        self._past = self.seen()

    @contextlib.contextmanager
    def blamed(self, vm: str | None = None) -> Iterator[None]:
        """Turn a lost connection (to *vm*) or a missed deadline into its cause, if one is known."""
        found = self._rig
        try:
            yield
        except (ConnectionLost, DeadlineExceeded) as error:
            if found is None:
                raise
            if not any(self._new(console) for console in found.consoles):
                found.host.console.broken.wait(LAST_WORDS_SECONDS)
            found.check_consoles(self._past)
            if not isinstance(error, ConnectionLost):
                raise
            # The host VM's word of the end of a guest's QEMU comes when it comes.
            if vm in found.guests and found.guests[vm].agent.wait_lost(LAST_WORDS_SECONDS):
                self.machine(vm)
            raise found.host.explain(error) from error

    # Lives

    def begin(self, context: contextlib.AbstractContextManager[Rig], modules: Path | None) -> None:
        """Take over a rig, to be started now with *modules* loaded. Raises what that raises."""
        try:
            self._rig = self.stack.enter_context(context)
        except RigError as error:
            self._why = error
            raise
        self.modules = modules
        self._past, self._told = {}, {}

    def end(self) -> None:
        """End what runs. What its consoles have said was told when they said it."""
        stack, self.stack = self.stack, contextlib.ExitStack()
        ended, self._rig, self._why = self._rig, None, None
        if ended is not None:
            # Before its connections are: none of them has anything to say goodbye for.
            ended.host.kill()
        with contextlib.suppress(RigError):
            stack.close()
        for console in ended.consoles if ended else ():
            console.wake()

    def save(self, name: str, phase: Phase) -> Kept:
        """Save the rig under *name*; it goes on, restored from there."""
        with self.alone(f"snapshot {name}"):
            if name in self.kept:
                raise ConfigurationError(
                    f"lab {self.name} has a snapshot {name} already; take another name"
                )
            running = self.running()
            folder = self._folder / name
            folder.mkdir(mode=0o700)
            try:
                with phase("save the rig"), self.blamed():
                    running.save(folder, {})
            except (RigError, OSError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                why = error.message if isinstance(error, RigError) else error.strerror
                raise InfrastructureError(
                    f"lab {self.name} is not saved in {folder}: {why}; it runs on, its VMs out of "
                    "reach of SSH until qemu-ioasid lab restore or a new lab"
                ) from error
            kept = self.kept[name] = Kept(folder, self.modules, time.time())
            self._restore(kept, phase)
        return kept

    def restore(self, name: str, phase: Phase) -> None:
        """Have the rig as it was saved under *name*, whatever has become of it since."""
        with self.alone(f"restore {name}"):
            if name not in self.kept:
                known = f"there is {', '.join(self.kept)}" if self.kept else "there is none"
                raise ConfigurationError(f"lab {self.name} has no snapshot {name}: {known}")
            self._restore(self.kept[name], phase)

    def _restore(self, kept: Kept, phase: Phase) -> None:
        self.end()
        try:
            saved = self.stack.enter_context(snapshot.opened(kept.folder, verify=False))
        except snapshot.Unusable as why:
            self._why = InfrastructureError(f"{kept.folder}: {why}")
            raise self._why from None
        self.begin(rig.restore(self.config, self.parts, saved, phase, self.logs), kept.modules)

    def status(self) -> dict[str, Any]:
        """All there is to know; no VM is waited for."""
        found, reports = self._rig, self.reports()
        up = found is not None and self._lives(found)
        mdevs = {"host": (), **{name: each.mdevs for name, each in self.config.guests.items()}}
        states: dict[str, str] = {}
        for name in mdevs:
            guest = found.guests.get(name) if found else None
            alive = up and (name == "host" or (guest is not None and not guest.agent.lost))
            states[name] = "up" if alive else "down"
            if alive and found is not None and not self.doing:
                # A host VM that is stopped has none of its guests answer.
                asleep = states["host"] == "stopped" or self._stopped(found, name)
                states[name] = "stopped" if asleep else "up"
        why = "" if up or self.doing else self._down(found).message
        return {
            "state": "up" if up else "down",
            "doing": self.doing,
            "why": why,
            "vms": [
                {
                    "name": name,
                    "state": states[name],
                    "mdevs": list(owned),
                    "reports": reports.get(name, []),
                }
                for name, owned in mdevs.items()
            ],
            "snapshots": [
                {"name": name, "saved": kept.saved, "bytes": kept.size}
                for name, kept in self.kept.items()
            ],
        }
