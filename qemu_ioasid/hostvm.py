# SPDX-License-Identifier: GPL-2.0-or-later
"""The host VM: what it is made of, its QEMU's arguments, and its life, from cold or from a save."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid import client, console, logfile
from qemu_ioasid.client import Agent
from qemu_ioasid.config import GuestConfig, HostConfig
from qemu_ioasid.console import Console
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, KernelBroke, RigError
from qemu_ioasid.kernel import Kernel
from qemu_ioasid.logfile import Collected
from qemu_ioasid.machine import (
    COMMAND_LINE,
    HUGE_PAGE,
    Ending,
    Machine,
    blamed,
    common_argv,
    disk_argv,
    qemu_died,
)
from qemu_ioasid.process import Child, spawn
from qemu_ioasid.qemu import Qemu
from qemu_ioasid.snapshot import Memory
from qemu_ioasid.text import lines

#: From QEMU's start to the first reply of the agent, in seconds of the reference machine.
BOOT_SECONDS = 60.0


@dataclass(frozen=True)
class HostParts:
    """What a host VM is booted from, and its guests with it."""

    qemu: Qemu
    accelerator: str
    kernel: Path
    #: serial (guest-images/files/init knows it) = file; the first is the root.
    disks: dict[str, Path]
    #: intel-iommu's properties in the QEMU of the host image, which runs the guests.
    guest_viommu: frozenset[str]
    #: Added to the kernel's command line.
    append: str = ""
    #: What waits for a boot or a restore are stretched by: `kernel.slowness`.
    slowness: float = 1.0
    #: The kernel, where it counts what runs.
    counting: Kernel | None = None
    #: What QEMU's ``-device`` takes: each on a root port of its own, behind the virtual IOMMU.
    devices: tuple[str, ...] = ()


class Ends:
    """Connected sockets: QEMU is born with one end of each, so nothing ever listens."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.ours: dict[str, socket.socket] = {}
        self._theirs: list[socket.socket] = []

    def pair(self, name: str) -> int:
        """A new pair called *name*; gives the fd of the other end."""
        self.ours[name], theirs = socket.socketpair()
        self._theirs.append(theirs)
        self._stack.callback(self.ours[name].close)
        self._stack.callback(theirs.close)
        return theirs.fileno()

    def chardev(self, name: str) -> list[str]:
        """QEMU's arguments for a new pair called *name*."""
        return ["-chardev", f"socket,id={name},fd={self.pair(name)}"]

    def fds(self) -> list[int]:
        """What QEMU inherits."""
        return [end.fileno() for end in self._theirs]

    def handed_over(self) -> None:
        """Close the other ends: the death of QEMU is now the end of each stream."""
        for end in self._theirs:
            end.close()


def cpus(config: HostConfig, accelerator: str) -> int:
    """How many vCPUs the host VM gets: what *config* says, or as many as help and hold.

    Two break under TCG now and then, with QEMU 10.0 always (docs/facts.md).
    """
    return config.cpus or (2 if accelerator == "kvm" else 1)


def argv(
    parts: HostParts, config: HostConfig, guests: Mapping[str, GuestConfig], ends: Ends
) -> list[str]:
    """The host VM's QEMU, but for its memory."""
    kvm = parts.accelerator == "kvm"
    smp = cpus(config, parts.accelerator)
    # The guests' RAM is huge pages: nested paging under TCG walks every level it can save.
    pages = sum(guest.memory for guest in guests.values()) // HUGE_PAGE
    # Linux 7.2 ends a slice by a timer after 0.7 ms (HRTICK, with CONFIG_HRTIMER_REARM_DEFERRED),
    # and each change of the guest that runs costs TCG its TLB. Without high resolution slices end
    # with a jiffy, as do the timers that KVM has for guests: a rig is up in a sixth less time.
    timers = "" if kvm else "highres=off "
    append = f"{timers}hugepages={pages} ROLE=host {parts.append}"
    words = [
        *parts.qemu.argv,
        *(("-accel", "kvm") if kvm else ("-accel", "tcg,thread=multi")),
        *("-cpu", "host" if kvm else "max,+svm"),
        "-machine",
        f"q35,memory-backend=ram{',kernel-irqchip=split' if kvm else ''}",
        *("-m", f"{config.memory >> 20}M"),
        *("-kernel", str(parts.kernel), "-append", f"{COMMAND_LINE} {append}".strip()),
    ]
    guest_ports = [f"{port}.{guest}" for guest in guests for port in ("console", "agent")]
    for port in ("console", "qmp", "agent", "ssh", *guest_ports):
        words += ends.chardev(port)
    words += common_argv("host", config.viommu.device(parts.qemu.viommu), smp, guest_ports)
    words += disk_argv({serial: str(path) for serial, path in parts.disks.items()})
    for number, device in enumerate(parts.devices):
        port = f"port{number}"
        words += ["-device", f"pcie-root-port,id={port},chassis=1,slot={number + 1}"]
        words += ["-device", f"{device},bus={port}"]
    return words


class HostMachine(Machine):
    """The host VM, with the consoles of the guests that run in it and the ways to their agents."""

    def __init__(
        self,
        parts: HostParts | None,
        console: Console,
        agent: Agent,
        ends: Ends,
        child: Child,
        logs: Path,
        guest_consoles: dict[str, Console],
        guest_agents: dict[str, Agent],
    ) -> None:
        @contextlib.contextmanager
        def dial(port: str, deadline: Deadline) -> Iterator[socket.socket]:
            # Born connected, and never again: one connection of each is a life.
            if ends.ours[port].fileno() < 0:
                raise ConnectionLost(f"{self.name}: the one connection to its port {port} was used")
            yield ends.ours[port]

        super().__init__("host", console, agent, dial, logs)
        #: What it was booted from; None: it is this machine.
        self.parts = parts
        self.child = child
        self.guest_consoles = guest_consoles
        self.guest_agents = guest_agents
        #: What QEMU said; set by who starts it.
        self.output: Collected | None = None
        #: A folder on the host side for files that are `fetch`ed.
        self.folder = "/run"
        agent.on_event(self._event)

    def _event(self, event: dict[str, object]) -> None:
        # A guest's port stays open when the guest dies: this is the end of its connection.
        if event["event"] == "guest-exit" and event["name"] in self.guest_agents:
            self.guest_agents[str(event["name"])].lose()

    def fetch(self, path: str, deadline: Deadline) -> bytes:
        """The content of a file on the host side."""
        return self.ssh.get(path, deadline)

    def cannot_tell_stage(self) -> str:
        """Why nobody can look at this host's IOMMU from outside; empty when the monitor can."""
        return ""

    def ending(self) -> Ending:
        """How QEMU ended, and what it said."""
        code = self.child.poll()
        said = self.output.text(ended=code is not None) if self.output else ""
        return code, said

    def explain(self, error: ConnectionLost) -> RigError:
        """What a connection that was lost in mid-run is due to, where that can be told."""
        self.console.wait_end(2.0)
        code, raw = self.ending()
        said = "\n".join(lines(raw))
        if code is None:
            return error
        evidence = f"{self.console.tail()}\n{said}".strip()
        if code:
            return qemu_died(self.name, code, said, evidence)
        return KernelBroke("host: the VM ended without a word on its console", evidence=evidence)

    def kill(self) -> None:
        """End it at once, with all that runs in it; every wait on it fails now."""
        self.child.end()


@contextlib.contextmanager
def run(
    parts: HostParts,
    config: HostConfig,
    guests: Mapping[str, GuestConfig],
    memory: Memory,
    logs: Path,
) -> Iterator[HostMachine]:
    """Start QEMU; it ends with the block. Nothing is waited for.

    *logs* receives ``host.console.log`` and the like.
    """
    with contextlib.ExitStack() as stack:
        ends = Ends(stack)
        words = [*argv(parts, config, guests, ends), *memory.argv]
        (logs / "host.qemu.txt").write_text(shlex.join(words) + "\n")
        names = {"host": "console", **{guest: f"console.{guest}" for guest in guests}}
        # On the stack before QEMU is: what a dying VM still says is read.
        consoles = {
            name: stack.enter_context(
                console.attach(ends.ours[port], name, logs / f"{name}.console.log")
            )
            for name, port in names.items()
        }
        said = stack.enter_context(logfile.collected(logs / "host.qemu.log"))
        child = stack.enter_context(
            spawn(
                words,
                env=parts.qemu.env,
                pass_fds=[*ends.fds(), *memory.fds],
                stdout=said.fd,
                stderr=subprocess.STDOUT,
            )
        )
        ends.handed_over()
        said.handed_over()
        agents = {
            name: stack.enter_context(
                client.attach(
                    ends.ours["agent" if name == "host" else f"agent.{name}"],
                    name,
                    logs / f"{name}.agent.log",
                )
            )
            for name in names
        }
        host = HostMachine(
            parts, consoles.pop("host"), agents.pop("host"), ends, child, logs, consoles, agents
        )
        host.output = said
        yield stack.enter_context(host)


@contextlib.contextmanager
def boot(
    parts: HostParts,
    config: HostConfig,
    guests: Mapping[str, GuestConfig],
    memory: Memory,
    logs: Path,
) -> Iterator[HostMachine]:
    """As `run`, to the agent's first reply. Raises BootError, InfrastructureError."""
    seconds = BOOT_SECONDS * parts.slowness
    deadline = Deadline(seconds, "first reply of the host VM's agent")
    with run(parts, config, guests, memory, logs) as host:
        with blamed("host", host.console, host.ending):
            host.agent.wait_ready(deadline)
            host.hello = host.agent.call("hello", deadline=deadline)
        yield host


#: By how many nanoseconds a restored VM's clock may be late.
LATE = 250_000_000


def wake(agents: Mapping[str, Agent], deadline: Deadline) -> None:
    """Tell restored VMs the time and give each randomness of its own; returns when all answered."""
    pending = {
        agent: agent.start("wake", now=time.time_ns(), entropy=os.urandom(64).hex())
        for agent in agents.values()
    }
    for agent, each in pending.items():
        late = time.time_ns() - int(each.result(deadline)["now"])
        # The first message waits for a VM whose code is yet to be translated; the second does not.
        if late > LATE:
            agent.call("clock", by=late)
