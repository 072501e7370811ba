# SPDX-License-Identifier: GPL-2.0-or-later
"""One virtual machine: its console and agent, and its monitor and SSH when somebody wants them.

Blame for a boot that fails: a QEMU that refuses its arguments is ours
(InfrastructureError with what it wrote); anything after the first instruction
is the kernel's (BootError with the last console lines).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from qemu_ioasid import qmp
from qemu_ioasid.client import Agent
from qemu_ioasid.console import Console
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    BootError,
    ConnectionLost,
    DeadlineExceeded,
    InfrastructureError,
)
from qemu_ioasid.qmp import Qmp
from qemu_ioasid.text import lines

if TYPE_CHECKING:
    from qemu_ioasid.ssh import Ssh

#: What both levels' kernels are told. A panic ends QEMU at once (panic=-1 with -no-reboot), and
#: an oops is a panic: what follows an oops proves nothing. The timer's check counts ticks in real
#: time, and panics on a machine so loaded that it sees none.
COMMAND_LINE = (
    "root=/dev/vda rootfstype=erofs ro init=/sbin/init console=ttyS0 loglevel=5 "
    "panic=-1 oops=panic intel_iommu=on,sm_on random.trust_cpu=on no_timer_check "
    # No bus is there that firmware does not tell of. The search for others reads 8,000 vendor ids,
    # two port accesses each (arch/x86/pci/legacy.c, pcibios_fixup_peer_bridges()): half of what a
    # guest's boot leaves the nested processor for.
    "pci=lastbus=0"
)

#: A guest's arena, and what its RAM is made of in the host VM.
HUGE_PAGE = 2 << 20

#: To connect a monitor or SSH, in seconds of the reference machine.
CONNECT_SECONDS = 30.0


class Dial(Protocol):
    """Connects to a VM's port ``qmp`` or ``ssh``; the connection ends with the block."""

    def __call__(
        self, port: str, deadline: Deadline, /
    ) -> contextlib.AbstractContextManager[Any]: ...


class Machine:
    """A running VM, usable until the block that made it is left. *logs* is the report's folder.

    *dial* gives a connected socket for ``qmp``, a `ssh.Stream` for ``ssh``.
    """

    #: Whether its QEMU runs inside the host VM.
    nested = False

    def __init__(self, name: str, console: Console, agent: Agent, dial: Dial, logs: Path) -> None:
        self.name = name
        self.console = console
        self.agent = agent
        self.hello: dict[str, Any] = {}
        self._dial = dial
        self._logs = logs
        self._lock = threading.RLock()
        # Those that end inside the VM, and the monitor of a QEMU that is outside of all.
        self._links = contextlib.ExitStack()
        self._outside = contextlib.ExitStack()
        self._qmp: Qmp | None = None
        self._ssh: Ssh | None = None

    @property
    def qmp(self) -> Qmp:
        """The monitor, connected at the first use. Raises ConnectionLost, DeadlineExceeded."""
        with self._lock:
            if self._qmp is None:
                deadline = Deadline(CONNECT_SECONDS, f"QMP of {self.name}")
                with contextlib.ExitStack() as stack:
                    sock = stack.enter_context(self._dial("qmp", deadline))
                    log = self._logs / f"{self.name}.qmp.log"
                    self._qmp = stack.enter_context(qmp.connect(sock, self.name, log, deadline))
                    links = self._links if self.nested else self._outside
                    links.push(stack.pop_all())
            return self._qmp

    @property
    def ssh(self) -> Ssh:
        """A login, connected at the first use. Raises ConnectionLost, DeadlineExceeded.

        The keys are made for this connection: the VM hears of them through its
        agent, and nothing of them is on any disk.
        """
        # Not at the top: a machine without paramiko can be the host itself (docs/local.md).
        from qemu_ioasid import ssh

        with self._lock:
            if self._ssh is None:
                deadline = Deadline(CONNECT_SECONDS, f"SSH to {self.name}")
                host_key, client_key = ssh.generate(), ssh.generate()
                with contextlib.ExitStack() as stack:
                    stream = stack.enter_context(self._dial("ssh", deadline))
                    self.agent.call(
                        "ssh_start",
                        deadline=deadline,
                        host_key=host_key.dropbear().hex(),
                        authorized_keys=client_key.authorized_keys(),
                    )
                    self._ssh = stack.enter_context(
                        ssh.connect(stream, self.name, host_key, client_key, deadline)
                    )
                    self._links.push(stack.pop_all())
            return self._ssh

    def stopped(self, deadline: Deadline) -> bool:
        """Whether somebody stopped it over its monitor, or a debugger did.

        Without a monitor connected nobody did. Raises as `Qmp.execute`.
        """
        # Not behind somebody who is connecting it.
        monitor = self._qmp
        return monitor is not None and not monitor.execute("query-status", deadline)["running"]

    def disconnect(self) -> None:
        """End what a host VM that is saved would believe in; the next use connects anew.

        SSH to the host VM itself does not come back: its port was born connected.
        """
        with self._lock:
            served = self._ssh is not None
            self._ssh = None
            if self.nested:
                self._qmp = None
            self._links.close()
            if served and not self.agent.lost:
                self.agent.call("ssh_stop")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._qmp = self._ssh = None
            with self._outside, self._links:
                pass


#: A QEMU's exit code (None while it runs) and what it wrote to standard error.
Ending = tuple[int | None, str]


@contextlib.contextmanager
def blamed(name: str, log: Console, ending: Callable[[], Ending]) -> Iterator[None]:
    """Turn a lost connection or a missed deadline while *name* boots into its true cause."""
    try:
        yield
    except (ConnectionLost, DeadlineExceeded) as error:
        # A VM that died has closed its console; one that hangs has said all it will.
        log.wait_end(1.0)
        code, raw = ending()
        said = "\n".join(lines(raw))
        reports = log.reports
        evidence = f"{log.tail() or '(nothing on the console)'}\n{said}".strip()
        if code and not reports:
            raise qemu_died(name, code, said, evidence) from error
        what = f"{reports[0].kind}: {reports[0].text}" if reports else error.message
        raise BootError(f"{name} did not boot: {what}", evidence=evidence) from error


def qemu_died(name: str, code: int, said: str, evidence: str) -> InfrastructureError:
    """The error for a QEMU that ended with *code* having said *said*."""
    last = said.strip().splitlines()[-1:] or ["it wrote nothing"]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return InfrastructureError(f"{name}: QEMU ended with {how}: {last[0]}", evidence=evidence)


def common_argv(name: str, viommu: str, cpus: int, more_ports: Sequence[str] = ()) -> list[str]:
    """What the QEMUs of both levels are told, whose chardevs are the caller's.

    These are console, qmp and one for each port, by its name: agent, ssh, and *more_ports*.
    """
    ports = ("agent", "ssh", *more_ports)
    # Each port that there may be has two queues, and setting one up takes 14 accesses to registers,
    # each a trap: the usual 31 ports are a twentieth of all that a guest's boot traps for. The
    # first one is for a console that is none of ours.
    argv = [
        *("-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-smp", str(cpus), "-device", viommu),
        *("-device", f"virtio-serial-pci,max_ports={1 + len(ports)}"),
        *("-serial", "chardev:console", "-mon", "chardev=qmp,mode=control"),
    ]
    for port in ports:
        argv += ["-device", f"virtserialport,chardev={port},name={port}"]
    return argv


def disk_argv(disks: dict[str, str]) -> list[str]:
    """Read-only disks: serial (guest-images/files/init knows it) = file. The first is the root."""
    argv = []
    for number, (serial, path) in enumerate(disks.items()):
        argv += [
            "-drive",
            f"if=none,id=disk{number},file={path},format=raw,readonly=on,file.locking=off",
            "-device",
            f"virtio-blk-pci,drive=disk{number},serial={serial}",
        ]
    return argv
