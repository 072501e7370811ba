# SPDX-License-Identifier: GPL-2.0-or-later
"""This machine as the host of a rig: its own /dev/iommu and mdevs, guests as its processes.

The agent is a child of ours, and each guest is born with its end of connected
sockets, as a host VM is: nothing listens. What the agent makes in the kernel,
mdevs and a trace, it takes away when its input ends; a run that is killed has
its keeper do that (`reaper`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import client, console, hostvm, rig
from qemu_ioasid.client import Agent
from qemu_ioasid.config import RigConfig
from qemu_ioasid.console import Console
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InfrastructureError,
    KernelBroke,
    RequirementError,
    RigError,
)
from qemu_ioasid.guestvm import Place
from qemu_ioasid.hostvm import Ends, HostMachine
from qemu_ioasid.machine import Dial, Machine
from qemu_ioasid.parts import GuestParts
from qemu_ioasid.process import Child, current_run, spawn
from qemu_ioasid.qemu import Qemu
from qemu_ioasid.rig import Phase, Rig

#: For the agent's first reply, and for it to end all that it has, in seconds.
START_SECONDS = 20.0
END_SECONDS = 60.0
WAKE_SECONDS = 20.0

_PORTS = ("console", "agent", "qmp", "ssh")
_PARENT = "/sys/class/mdev_bus/pdma"
_MDEVS = "/sys/bus/mdev/devices"
_TRACEFS = "/sys/kernel/tracing"
_FREE_HUGE = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
#: What one read of /dev/kmsg may give (kernel/printk/printk.c, CONSOLE_EXT_LOG_MAX).
_RECORD = 8192
#: The word that `Rig.settle` waits for.
_MARK = re.compile(rb"~[0-9a-f]{6}")


@dataclass(frozen=True)
class LocalParts:
    """The QEMU for the guests, its accelerator, and what they are booted from."""

    qemu: Qemu
    accelerator: str
    guests: GuestParts


class _Here(Place):
    """Guests beside us: each port is a socket whose other end we have."""

    sockets = ()

    def __init__(self, parts: LocalParts, ends: Ends, guests: list[str]) -> None:
        super().__init__(parts.qemu.viommu)
        self.qemu = parts.qemu.argv
        self.accelerator = parts.accelerator
        self.kernel = str(parts.guests.kernel)
        self.disks = {serial: str(path) for serial, path in parts.guests.disks.items()}
        self._ours = ends.ours
        self._fds = {
            name: {port: ends.pair(f"{port}.{name}") for port in _PORTS} for name in guests
        }
        self._lock = threading.Lock()
        self._huge = _free_huge_pages() << 21

    def huge(self, memory: int) -> bool:
        """Whether there are as many huge pages to spare: their number is not ours to change."""
        with self._lock:
            enough = memory <= self._huge
            self._huge -= memory if enough else 0
            return enough

    def ports(self, name: str) -> list[str]:
        """The sockets that this guest's QEMU inherits from the agent, and that from us."""
        words = []
        for port, fd in self._fds[name].items():
            words += ["-chardev", f"socket,id={port},fd={fd}"]
        return words

    def inherited(self, name: str) -> list[int]:
        """Their numbers."""
        return list(self._fds[name].values())

    def dial(self, host: Machine, name: str, sockets: dict[str, str]) -> Dial:
        """Our ends, which were born connected."""

        @contextlib.contextmanager
        def dial(port: str, deadline: Deadline) -> Iterator[Any]:
            yield self._ours[f"{port}.{name}"]

        return dial


def _free_huge_pages() -> int:
    with contextlib.suppress(OSError):
        return int(Path(_FREE_HUGE).read_text())
    return 0


class LocalHost(HostMachine):
    """This machine: its agent is *child*, its console the kernel's log."""

    def __init__(
        self,
        log: Console,
        agent: Agent,
        ends: Ends,
        child: Child,
        logs: Path,
        guest_consoles: dict[str, Console],
        guest_agents: dict[str, Agent],
    ) -> None:
        super().__init__(None, log, agent, ends, child, logs, guest_consoles, guest_agents)
        self._said = logs / "host.agent.stderr"
        self.folder = str(current_run().folder)

    def fetch(self, path: str, deadline: Deadline) -> bytes:
        """The content of a file; its QEMU wrote it before it answered."""
        return Path(path).read_bytes()

    def cannot_tell_stage(self) -> str:
        """Why the check of the host's IOMMU is not made, and what is known all the same."""
        units = sorted(Path("/sys/class/iommu").glob("dmar*"))
        if not units:
            return "this machine's kernel uses no Intel IOMMU (pdma's mdevs need none)"
        ecap = [int((unit / "intel-iommu/ecap").read_text(), 16) for unit in units]
        kinds = [
            path.read_text().strip() for path in Path("/sys/kernel/iommu_groups").glob("*/type")
        ]
        translated = sum(kind.startswith("DMA") for kind in kinds)
        able = all(value >> 43 & 1 for value in ecap)
        return (
            "the registers cannot be read: this machine is no VM with a monitor. sysfs: "
            f"{len(units)} VT-d units, scalable mode {'offered' if able else 'not offered'}, "
            f"{translated} of {len(kinds)} groups translated"
        )

    def explain(self, error: ConnectionLost) -> RigError:
        """What a lost connection is due to: the agent's own end, where that is it."""
        with contextlib.suppress(DeadlineExceeded):
            code = self.child.wait(Deadline(2, "end of the agent"))
            said = self._said.read_text(errors="replace").strip()
            return InfrastructureError(
                f"host: the agent ended with exit code {code}", evidence=said
            )
        return error

    def kill(self) -> None:
        """Every wait on the guests fails now; the agent ends them when its input ends."""
        for agent in self.guest_agents.values():
            agent.lose()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the parent for this run: two at a time would take each other's work for their own.

    The lock is on the parent's own folder, so that it leaves nothing behind.
    """
    fd = os.open(_PARENT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequirementError(
                "another run with --host local is under way on this machine: wait for its end"
            ) from None
        yield
    finally:
        os.close(fd)


def _line(record: bytes) -> bytes:
    """A record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg) as a console shows it.

    Empty for what a process wrote there, unless it is a mark of ours: only the kernel is judged.
    """
    head, _, text = record.partition(b";")
    priority, _, microseconds = head.split(b",")[:3]
    text = text.split(b"\n")[0]
    if int(priority) >> 3 and not _MARK.fullmatch(text):
        return b""
    return b"[%12.6f] %s\n" % (int(microseconds) / 1e6, text)


def _follow(fd: int, ended: int, out: socket.socket) -> None:
    """Copy the kernel's log to *out* until *ended* can be read."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(ended, select.POLLIN)
    with contextlib.suppress(OSError), out:
        while True:
            ready = {number for number, _ in poll.poll()}
            while True:
                try:
                    out.sendall(_line(os.read(fd, _RECORD)))
                except BlockingIOError:
                    break
                except BrokenPipeError:
                    # The kernel's own word for records that were overwritten before this read.
                    out.sendall(b"(messages of the kernel were lost)\n")
            if ended in ready:
                return


@contextlib.contextmanager
def _kernel_log(logs: Path) -> Iterator[Console]:
    """What the kernel says from now on, as the host's console."""
    with contextlib.ExitStack() as stack:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        os.lseek(fd, 0, os.SEEK_END)
        ended = os.eventfd(0)
        stack.callback(os.close, ended)
        ours, theirs = socket.socketpair()
        found = stack.enter_context(console.attach(ours, "host", logs / "host.console.log"))
        follower = threading.Thread(target=_follow, args=(fd, ended, theirs), daemon=True)
        follower.start()
        stack.callback(follower.join, 5)
        stack.callback(os.eventfd_write, ended, 1)
        yield found


@contextlib.contextmanager
def _agent(parts: LocalParts, ends: Ends, logs: Path) -> Iterator[Child]:
    """The agent as a child, its input and output our end ``agent``; it ends with that."""
    of_guests = ends.fds()
    theirs = ends.pair("agent")
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(open(logs / "host.agent.stderr", "wb"))
        child = stack.enter_context(
            spawn(
                [sys.executable, "-P", "-m", "qemu_ioasid.agent", "host"],
                stdin=theirs,
                stdout=theirs,
                stderr=said,
                # The guests' ends: the agent hands each guest its own.
                pass_fds=of_guests,
                env={**parts.qemu.env, "PYTHONPATH": str(Path(__file__).parent.parent)},
                cwd=Path("/"),
                grace=END_SECONDS,
            )
        )
        ends.handed_over()
        _undone_at_our_end(child.pid)
        try:
            yield child
        finally:
            with contextlib.suppress(OSError):
                ends.ours["agent"].shutdown(socket.SHUT_RDWR)
            child.wait(Deadline(END_SECONDS, "end of the agent, with its guests and mdevs"))


def _undone_at_our_end(pid: int) -> None:
    """Have the keeper remove the agent's trace (agent/tracing.py), should the agent not."""
    current_run().dies_with_us(Path(f"{_TRACEFS}/instances/qemu_ioasid-{pid}"))
    event = f"-:qemu_ioasid/access_rw_{pid}"
    current_run().written_at_our_end(f"{_TRACEFS}/kprobe_events", event)


def _uuids(config: RigConfig) -> dict[str, str]:
    """A uuid for each mdev; the keeper removes it, should the agent not."""
    found = {name: str(uuid.uuid4()) for name in config.mdevs}
    for each in found.values():
        current_run().written_at_our_end(f"{_MDEVS}/{each}/remove", "1")
    return found


def _require_gone(uuids: Mapping[str, str]) -> None:
    left = [each for each in uuids.values() if os.path.exists(f"{_MDEVS}/{each}")]
    if left:
        raise KernelBroke(f"host: the kernel has not let go of the mdevs {', '.join(left)}")


@contextlib.contextmanager
def _host(parts: LocalParts, ends: Ends, guests: list[str], logs: Path) -> Iterator[HostMachine]:
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_kernel_log(logs))
        consoles = {
            name: stack.enter_context(
                console.attach(ends.ours[f"console.{name}"], name, logs / f"{name}.console.log")
            )
            for name in guests
        }
        child = stack.enter_context(_agent(parts, ends, logs))
        ports = {"host": "agent", **{name: f"agent.{name}" for name in guests}}
        agents = {
            name: stack.enter_context(
                client.attach(ends.ours[port], name, logs / f"{name}.agent.log")
            )
            for name, port in ports.items()
        }
        host = LocalHost(log, agents.pop("host"), ends, child, logs, consoles, agents)
        stack.enter_context(host)
        deadline = Deadline(START_SECONDS, "first reply of the agent")
        try:
            host.agent.wait_ready(deadline)
            host.hello = host.agent.call("hello", deadline=deadline)
        except ConnectionLost as error:
            raise host.explain(error) from error
        yield host


@contextlib.contextmanager
def start(
    config: RigConfig,
    parts: LocalParts,
    phase: Phase,
    say: Callable[[str], None],
    logs: Path,
) -> Iterator[Rig]:
    """A rig whose host is this machine; all that it made here is gone after the block.

    `preflight.lacking` found nothing. Raises as `rig.boot`; RequirementError
    when another such run is under way.
    """
    say("a local host is not saved: its guests boot cold")
    guests = list(config.guests)
    uuids: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if config.mdevs:
            stack.enter_context(_alone())
            uuids = _uuids(config)
            stack.callback(_require_gone, uuids)
        ends = Ends(stack)
        place = _Here(parts, ends, guests)
        with phase("start the agent"):
            host = stack.enter_context(_host(parts, ends, guests, logs))
        running = stack.enter_context(rig.furnished(config, host, place, uuids, phase, logs))
        # This machine knows the time.
        deadline = Deadline(WAKE_SECONDS, "answer of the guests to the time")
        hostvm.wake(host.guest_agents, deadline)
        yield running
