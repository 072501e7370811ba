# SPDX-License-Identifier: GPL-2.0-or-later
"""One virtual machine with its console, monitor, SSH and agent, and how each level boots.

Blame for a boot that fails: a QEMU that refuses its arguments is ours
(InfrastructureError with what it wrote); anything after the first instruction
is the kernel's (BootError with the last console lines).
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu_ioasid import client, console, qmp, ssh
from qemu_ioasid.client import Agent
from qemu_ioasid.config import GuestConfig, HostConfig
from qemu_ioasid.console import Console
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    BootError,
    CallFailed,
    ConnectionLost,
    DeadlineExceeded,
    InfrastructureError,
    KernelBroke,
    RigError,
)
from qemu_ioasid.process import Child, current_run, spawn
from qemu_ioasid.qemu import Qemu
from qemu_ioasid.qmp import Qmp
from qemu_ioasid.ssh import KeyPair, Ssh

#: From QEMU's start to the first reply of the agent, in seconds of the reference machine.
HOST_BOOT_SECONDS = 60.0
GUEST_BOOT_SECONDS = 90.0

#: What both levels' kernels are told. A panic ends QEMU at once (panic=-1 with -no-reboot), and
#: an oops is a panic: what follows an oops proves nothing. The timer's check counts ticks in real
#: time, and panics on a machine so loaded that it sees none.
COMMAND_LINE = (
    "root=/dev/vda rootfstype=erofs ro init=/sbin/init console=ttyS0 loglevel=5 "
    "panic=-1 oops=panic intel_iommu=on,sm_on random.trust_cpu=on no_timer_check"
)

_FW_CFG = "opt/org.qemu_ioasid"
#: A guest's arena, and what its RAM is made of in the host VM.
HUGE_PAGE = 2 << 20

#: Where the parts of a rig's guests are, inside the host VM.
GUEST_DISK = "/run/disk/guest"
GUEST_KERNEL = "/boot/vmlinuz"
GUEST_FOLDER = "/run/rig"


@dataclass
class Machine:
    """A booted VM. Usable until the block that booted it is left."""

    name: str
    console: Console
    qmp: Qmp
    ssh: Ssh
    agent: Agent
    #: In seconds from the start of QEMU to the first reply of the agent.
    boot_seconds: float = 0.0
    hello: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keys:
    """What one VM is recognised by and who may log in."""

    host: KeyPair
    client: KeyPair

    @staticmethod
    def fw_cfg(folder: str) -> list[str]:
        """QEMU's arguments that hand the files of `files`, stored in *folder*, to the VM."""
        return [
            part
            for name in ("host_key", "authorized_keys")
            for part in ("-fw_cfg", f"name={_FW_CFG}/{name},file={folder}/{name}")
        ]

    def files(self) -> dict[str, bytes]:
        """What guest-images/files/init takes from fw_cfg."""
        return {
            "host_key": self.host.dropbear(),
            "authorized_keys": self.client.authorized_keys().encode(),
        }


def make_keys(client_key: KeyPair) -> Keys:
    """Keys for one more VM of a run whose client key is *client_key*."""
    return Keys(host=ssh.generate(), client=client_key)


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
        code, said = ending()
        reports = log.reports
        evidence = f"{log.tail() or '(nothing on the console)'}\n{said}".strip()
        if code and not reports:
            raise _qemu_died(name, code, said, evidence) from error
        what = f"{reports[0].kind}: {reports[0].text}" if reports else error.message
        raise BootError(f"{name} did not boot: {what}", evidence=evidence) from error


def _qemu_died(name: str, code: int, said: str, evidence: str) -> InfrastructureError:
    last = said.strip().splitlines()[-1:] or ["it wrote nothing"]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return InfrastructureError(f"{name}: QEMU ended with {how}: {last[0]}", evidence=evidence)


def _common(name: str, viommu: str, cpus: int) -> list[str]:
    return [
        *("-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-smp", str(cpus), "-device", viommu, "-device", "virtio-serial-pci"),
        *("-serial", "chardev:console", "-mon", "chardev=qmp,mode=control"),
        *("-device", "virtserialport,chardev=ssh,name=ssh"),
    ]


def _disk(number: int, path: str, serial: str) -> list[str]:
    return [
        "-drive",
        f"if=none,id=disk{number},file={path},format=raw,readonly=on,file.locking=off",
        "-device",
        f"virtio-blk-pci,drive=disk{number},serial={serial}",
    ]


@dataclass(frozen=True)
class HostParts:
    """What a host VM is booted from, and its guests with it."""

    qemu: Qemu
    accelerator: str
    kernel: Path
    image: Path
    image_hash: str
    #: serial (guest-images/files/init knows it) = file.
    disks: dict[str, Path]
    guest_image_hash: str
    #: intel-iommu's properties in the QEMU of the host image, which runs the guests.
    guest_viommu: frozenset[str]
    #: Added to the kernel's command line.
    append: str = ""


class _Ends:
    """Connected sockets: QEMU is born with one end of each, so nothing ever listens."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.ours: dict[str, socket.socket] = {}
        self.theirs: dict[str, socket.socket] = {}

    def chardev(self, name: str) -> list[str]:
        self.ours[name], self.theirs[name] = socket.socketpair()
        self._stack.callback(self.ours[name].close)
        self._stack.callback(self.theirs[name].close)
        return ["-chardev", f"socket,id={name},fd={self.theirs[name].fileno()}"]

    def handed_over(self) -> None:
        """Close the other ends: the death of QEMU is now the end of each stream."""
        for end in self.theirs.values():
            end.close()


def _host_argv(
    parts: HostParts,
    config: HostConfig,
    folder: Path,
    guests: Mapping[str, GuestConfig],
    ends: _Ends,
) -> list[str]:
    kvm = parts.accelerator == "kvm"
    # The guests' RAM is huge pages: nested paging under TCG walks every level it can save.
    pages = sum(guest.memory for guest in guests.values()) // HUGE_PAGE
    append = f"hugepages={pages} kvm_amd.nested=0 {parts.append}"
    argv = [
        *parts.qemu.argv,
        *(("-accel", "kvm") if kvm else ("-accel", "tcg,thread=multi")),
        *("-cpu", "host" if kvm else "max,+svm"),
        *("-machine", "q35,kernel-irqchip=split" if kvm else "q35"),
        *("-m", f"{config.memory >> 20}M"),
        *("-kernel", str(parts.kernel), "-append", f"{COMMAND_LINE} {append}".strip()),
        *ends.chardev("console"),
        *ends.chardev("qmp"),
        *ends.chardev("ssh"),
        *_common("host", config.viommu.device(parts.qemu.viommu), config.cpus),
        *Keys.fw_cfg(str(folder)),
    ]
    disks = {"root": parts.image, **parts.disks}
    for number, (serial, path) in enumerate(disks.items()):
        argv += _disk(number, str(path), serial)
    for guest in guests:
        port = f"console.{guest}"
        argv += [*ends.chardev(port), "-device", f"virtserialport,chardev={port},name={port}"]
    return argv


def _consoles(
    stack: contextlib.ExitStack, ends: _Ends, names: list[str], logs: Path
) -> dict[str, Console]:
    """A console per VM, on *stack* before QEMU is: what a dying VM still says is read."""
    return {
        name: stack.enter_context(
            console.attach(
                ends.ours["console" if name == "host" else f"console.{name}"],
                name,
                logs / f"{name}.console.log",
            )
        )
        for name in names
    }


@dataclass
class HostMachine(Machine):
    """The host VM, with the consoles of the guests that will run in it."""

    guest_consoles: dict[str, Console] = field(default_factory=dict)
    child: Child | None = None

    stderr: Path = Path("/dev/null")

    def explain(self, error: ConnectionLost) -> RigError:
        """What a connection that was lost in mid-run is due to, where that can be told."""
        self.console.wait_end(2.0)
        code = self.child.poll() if self.child is not None else None
        if code is None:
            return error
        said = self.stderr.read_text(errors="replace")
        evidence = f"{self.console.tail()}\n{said}".strip()
        if code:
            return _qemu_died(self.name, code, said, evidence)
        return KernelBroke("host: the VM ended without a word on its console", evidence=evidence)

    def kill(self) -> None:
        """End it at once, with all that runs in it; every wait on it fails now."""
        if self.child is not None:
            self.child.end()


@contextlib.contextmanager
def boot_host(
    parts: HostParts,
    config: HostConfig,
    guests: Mapping[str, GuestConfig],
    keys: Keys,
    logs: Path,
) -> Iterator[HostMachine]:
    """Boot the host VM to its agent's first reply; it ends with the block.

    *logs* receives ``host.console.log`` and the like. Raises BootError,
    InfrastructureError.
    """
    deadline = Deadline(HOST_BOOT_SECONDS, "first reply of the host VM's agent")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=current_run().folder)))
        for name, data in keys.files().items():
            (folder / name).write_bytes(data)
        ends = _Ends(stack)
        argv = _host_argv(parts, config, folder, guests, ends)
        (logs / "host.qemu.txt").write_text(shlex.join(argv) + "\n")
        consoles = _consoles(stack, ends, ["host", *guests], logs)
        log = consoles.pop("host")
        stderr = stack.enter_context(open(logs / "host.qemu.log", "w+b"))
        child = stack.enter_context(
            spawn(
                argv,
                env=parts.qemu.env,
                pass_fds=[end.fileno() for end in ends.theirs.values()],
                stdout=stderr,
                stderr=subprocess.STDOUT,
            )
        )
        ends.handed_over()

        def ending() -> Ending:
            return child.poll(), (logs / "host.qemu.log").read_text(errors="replace")

        with blamed("host", log, ending):
            monitor = stack.enter_context(
                qmp.connect(ends.ours["qmp"], "host", logs / "host.qmp.log", deadline)
            )
            login = stack.enter_context(
                ssh.connect(ends.ours["ssh"], "host", keys.host, keys.client, deadline)
            )
            agent = stack.enter_context(
                client.start(
                    login, "host", "host", parts.image_hash, logs / "host.agent.log", deadline
                )
            )
            hello = agent.call("hello", deadline=deadline)
        yield HostMachine(
            *("host", log, monitor, login, agent, deadline.elapsed(), hello),
            guest_consoles=consoles,
            child=child,
            stderr=logs / "host.qemu.log",
        )


#: A guest's function number n of its mdevs sits at 0000:00:(FIRST_SLOT + n).0.
FIRST_SLOT = 0x10


def device_address(index: int) -> str:
    """The PCI address, in the guest, of its mdev number *index*."""
    return f"0000:00:{FIRST_SLOT + index:02x}.0"


def _guest_argv(
    name: str, config: GuestConfig, known: frozenset[str], mdevs: dict[str, str]
) -> list[str]:
    argv = [
        *("/usr/bin/qemu-system-x86_64", "-accel", "kvm", "-cpu", "host"),
        *("-machine", "q35,kernel-irqchip=split,memory-backend=ram"),
        *("-m", f"{config.memory >> 20}M"),
        "-object",
        f"memory-backend-file,id=ram,share=on,mem-path=/proc/self/fd/{{memory}},size={config.memory}",
        *("-kernel", GUEST_KERNEL),
        *("-append", f"{COMMAND_LINE} hugepages=1"),
        *("-chardev", f"file,id=console,path=/dev/virtio-ports/console.{name}"),
        *("-chardev", "socket,id=qmp,fd={socket:qmp},server=on,wait=off"),
        # With wait=on the port is connected before the first instruction: its reader never polls.
        *("-chardev", "socket,id=ssh,fd={socket:ssh},server=on,wait=on"),
        *_common(name, config.viommu.device(known), config.cpus),
        *_disk(0, GUEST_DISK, "root"),
        *Keys.fw_cfg(f"{GUEST_FOLDER}/keys/{name}"),
        *("-object", "iommufd,id=iommufd0,fd={iommufd}"),
    ]
    for index, mdev in enumerate(config.mdevs):
        argv += [
            "-device",
            f"vfio-pci,id={mdev},fd={{device:{mdev}}},iommufd=iommufd0,"
            f"sysfsdev=/sys/bus/mdev/devices/{mdevs[mdev]},addr={FIRST_SLOT + index:#x}",
        ]
    return argv


@contextlib.contextmanager
def _dial(host: Machine, path: str, name: str, deadline: Deadline) -> Iterator[Any]:
    """A channel to a unix socket in the host VM."""
    channel = host.ssh.run(f"exec socat -b 65536 - UNIX-CONNECT:{path}", deadline)
    try:
        yield channel
    finally:
        channel.close()


@contextlib.contextmanager
def boot_guest(
    host: HostMachine,
    parts: HostParts,
    name: str,
    config: GuestConfig,
    mdevs: dict[str, str],
    keys: Keys,
    logs: Path,
) -> Iterator[Machine]:
    """Boot guest *name* in the host VM to its agent's first reply; it ends with the block.

    *mdevs* are the uuids of the mdevs by name. Raises BootError, InfrastructureError.
    """
    deadline = Deadline(GUEST_BOOT_SECONDS, f"first reply of {name}'s agent")
    log = host.guest_consoles[name]
    with contextlib.ExitStack() as stack:
        folder = f"{GUEST_FOLDER}/keys/{name}"
        host.ssh.put({f"{folder}/{file}": data for file, data in keys.files().items()}, deadline)
        argv = _guest_argv(name, config, parts.guest_viommu, mdevs)
        (logs / f"{name}.qemu.txt").write_text(shlex.join(argv) + "\n")
        started = host.agent.call(
            "guest_start",
            deadline=deadline,
            name=name,
            argv=argv,
            memory=int(config.memory),
            huge=True,
            devices={mdev: mdevs[mdev] for mdev in config.mdevs},
            sockets=["qmp", "ssh"],
        )
        stack.callback(_stop_guest, host, name, logs)

        with blamed(name, log, lambda: _guest_ending(host, name)):
            # SSH first: QEMU goes on when its port is connected.
            channel = stack.enter_context(_dial(host, started["sockets"]["ssh"], name, deadline))
            qmp_channel = stack.enter_context(
                _dial(host, started["sockets"]["qmp"], name, deadline)
            )
            sock = stack.enter_context(ssh.as_socket(qmp_channel, f"{name} qmp"))
            monitor = stack.enter_context(
                qmp.connect(sock, name, logs / f"{name}.qmp.log", deadline)
            )
            login = stack.enter_context(
                ssh.connect(channel, name, keys.host, keys.client, deadline)
            )
            agent = stack.enter_context(
                client.start(
                    login,
                    "guest",
                    name,
                    parts.guest_image_hash,
                    logs / f"{name}.agent.log",
                    deadline,
                )
            )
            hello = agent.call("hello", deadline=deadline)
        yield Machine(name, log, monitor, login, agent, deadline.elapsed(), hello)


def _guest_ending(host: Machine, name: str) -> Ending:
    with contextlib.suppress(InfrastructureError):
        status = host.agent.call("guest_status", name=name)
        return status["returncode"], status["stderr"]
    return None, ""


def _stop_guest(host: Machine, name: str, logs: Path) -> None:
    # A host VM that is gone has taken its guests with it.
    with contextlib.suppress(ConnectionLost):
        try:
            status = host.agent.call("guest_stop", name=name)
        except CallFailed as error:
            raise KernelBroke(
                f"host: {name}'s QEMU, killed, does not end, or its devices do not close: "
                f"{error.message}",
                evidence=host.console.tail(),
            ) from error
        (logs / f"{name}.qemu.log").write_text(status.get("stderr") or "")
        host.agent.call("guest_forget", name=name)
