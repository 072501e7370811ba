# SPDX-License-Identifier: GPL-2.0-or-later
"""A host VM and its guests as one thing with one lifetime."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import ssh
from qemu_ioasid.config import RigConfig
from qemu_ioasid.console import Console
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import ConfigurationError, ConnectionLost, RequirementError
from qemu_ioasid.machine import (
    HostMachine,
    HostParts,
    Machine,
    boot_guest,
    boot_host,
    device_address,
    make_keys,
)
from qemu_ioasid.registrar import Registrar

#: What the host VM's agent asks its kernel for, and the option that gives it.
FEATURES = {
    "iommu": "CONFIG_IOMMUFD",
    "mdev_type": "CONFIG_VFIO_PDMA (kernel-patches/)",
    "debugfs": "CONFIG_DEBUG_FS",
    "tracefs": "CONFIG_FTRACE",
    "kprobe": "CONFIG_KPROBE_EVENTS",
    "userfaultfd": "CONFIG_USERFAULTFD",
}

#: How long after a connection ended a console may still bring the reason.
LAST_WORDS_SECONDS = 1.5

#: A descriptor for `Guest.submit`, as docs/agent.md describes it.
Descriptor = dict[str, Any]
#: A completion record, likewise.
Completion = dict[str, Any]


def copy(pasid: int | None, source: int, destination: int, length: int) -> Descriptor:
    """Work that copies *length* bytes; *pasid* None goes through the device's own address space."""
    return {"pasid": pasid, "src": source, "dst": destination, "length": length}


@dataclass(frozen=True)
class Binding:
    """What a guest asked for and was given: *pasid* reaches its arena's bytes at *iova*."""

    guest: str
    device: str
    pasid: int
    ioas: int
    iova: int
    offset: int
    length: int


class Guest:
    """A booted guest, its arena and its devices, which are open in it."""

    def __init__(self, machine: Machine, mdevs: tuple[str, ...]) -> None:
        self.machine = machine
        self.name = machine.name
        self.agent = machine.agent
        self.mdevs = mdevs
        arena = self.agent.call("arena")
        self.gpa: int = arena["gpa"]
        self.size: int = arena["size"]
        for index, mdev in enumerate(mdevs):
            self.agent.call("device_open", name=mdev, bdf=device_address(index))

    def submit(self, device: str, *work: Descriptor, seconds: float = 20) -> list[Completion]:
        """Have *device* do *work*; the completion records in order, refusals included."""
        deadline = Deadline(seconds + 5, f"completions of {device} in {self.name}")
        done: list[Completion] = self.agent.call(
            "submit",
            deadline=deadline,
            name=device,
            descriptors=list(work),
            seconds=seconds * calibration(),
        )
        return done

    def submit_start(self, device: str, *work: Descriptor) -> int:
        """Ring the doorbell for *work* and return a ticket for `submit_wait`."""
        answer = self.agent.call("submit_start", name=device, descriptors=list(work))
        return int(answer["ticket"])

    def submit_wait(self, ticket: int, seconds: float = 20) -> list[Completion]:
        """The completion records of work begun with `submit_start`."""
        deadline = Deadline(seconds + 5, f"completions in {self.name}")
        done: list[Completion] = self.agent.call(
            "submit_wait", deadline=deadline, ticket=ticket, seconds=seconds * calibration()
        )
        return done


class Rig:
    """A running rig. The kernel under test is the host VM's."""

    def __init__(self, config: RigConfig, host: HostMachine) -> None:
        self.config = config
        self.host = host
        self.registrar = Registrar(host.agent)
        self.mdevs: dict[str, str] = {}
        self.guests: dict[str, Guest] = {}

    def bind(
        self, guest: str, device: str, offset: int, length: int, pasid: int | None = None
    ) -> Binding:
        """Carry a guest's request to the registrar: a PASID for *length* bytes of its arena.

        Allocates a PASID unless one is given, makes an IOAS of the guest's
        iommufd that maps those bytes and nothing else, registers it on
        *device*. Raises CallFailed with the kernel's errno; what was made for a
        failed request is gone again.
        """
        agent = self.guests[guest].agent
        request = agent.call("bind_request", name=device, offset=offset, length=length)
        with contextlib.ExitStack() as undo:
            ioas = self.registrar.ioas(guest)
            undo.callback(self.registrar.destroy, guest, ioas)
            self.registrar.map(guest, ioas, request["iova"], request["gpa"], request["length"])
            given = pasid
            if given is None:
                given = self.registrar.alloc(guest)
                undo.callback(self.registrar.free, given)
            self.registrar.register(device, guest, given, ioas)
            undo.pop_all()
        agent.call(
            "bound", name=device, pasid=given, iova=request["iova"], offset=offset, length=length
        )
        return Binding(guest, device, given, ioas, request["iova"], offset, length)

    def unbind(self, binding: Binding) -> None:
        """Unregister a binding; its PASID stays allocated until `Registrar.free`."""
        self.registrar.unregister(binding.device, binding.pasid)
        self.forget(binding)

    def forget(self, binding: Binding) -> None:
        """What follows an unregistration: the guest is told, the address space destroyed."""
        self.guests[binding.guest].agent.call("unbound", name=binding.device, pasid=binding.pasid)
        self.registrar.destroy(binding.guest, binding.ioas)

    @property
    def consoles(self) -> list[Console]:
        """The consoles of all VMs, the host's first."""
        return [self.host.console, *self.host.guest_consoles.values()]

    def check_consoles(self) -> None:
        """Raise KernelBroke if any kernel has reported anything since it started."""
        for console in self.consoles:
            console.check()

    def stop_guest(self, name: str) -> None:
        """SIGKILL the guest's QEMU; its devices are closed when this returns."""
        self.host.agent.call("guest_stop", name=name)


def check_accelerator(config: RigConfig, accelerator: str) -> None:
    """Refuse, with ConfigurationError, what is known to kill guests under *accelerator*."""
    if accelerator == "tcg" and config.host.cpus > 1 and len(config.guests) > 1:
        raise ConfigurationError(
            f"{config.path}: host.cpus: with two guests under TCG the host VM takes 1 vCPU: "
            "QEMU's SVM emulation kills guests on more (docs/facts.md)"
        )


def _check_features(host: HostMachine) -> None:
    missing = [option for name, option in FEATURES.items() if not host.hello["kernel"].get(name)]
    if missing:
        raise RequirementError(
            f"kernel {host.hello['release']} lacks {', '.join(missing)} for the host VM"
        )


@contextlib.contextmanager
def boot(
    config: RigConfig,
    parts: HostParts,
    phase: Callable[[str], contextlib.AbstractContextManager[None]],
    logs: Path,
) -> Iterator[Rig]:
    """Boot the host VM, then all guests at once; everything ends with the block.

    *phase* times a step. When the block ends without an exception, a report on any
    console raises KernelBroke; when it ends with one, such a report replaces
    it, since it is the cause.
    """
    client_key = ssh.generate()
    with contextlib.ExitStack() as stack:
        with phase("boot the host VM"):
            host = stack.enter_context(
                boot_host(parts, config.host, config.guests, make_keys(client_key), logs)
            )
        rig = Rig(config, host)
        stack.enter_context(_console_verdict(rig))
        _check_features(host)
        with phase("create the mdevs"):
            stack.enter_context(_mdevs(rig))
        with phase(f"boot {len(config.guests)} guests in it"):
            machines = stack.enter_context(_all_guests(rig, parts, client_key, logs))
        with phase("open the devices in the guests"):
            for name, machine in machines.items():
                rig.guests[name] = Guest(machine, config.guests[name].mdevs)
        yield rig


@contextlib.contextmanager
def _console_verdict(rig: Rig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A dying VM's connection and its last words travel on different ports.
        if not any(console.broken.is_set() for console in rig.consoles):
            rig.host.console.broken.wait(LAST_WORDS_SECONDS)
        rig.check_consoles()
        if isinstance(error, ConnectionLost):
            raise rig.host.explain(error) from error
        raise
    rig.check_consoles()


@contextlib.contextmanager
def _mdevs(rig: Rig) -> Iterator[None]:
    """Create the mdevs, and take them away again where the run came to its end."""
    for name in rig.config.mdevs:
        rig.mdevs[name] = str(uuid.uuid4())
        rig.host.agent.call("mdev_create", name=name, uuid=rig.mdevs[name])
    yield
    for name in rig.config.mdevs:
        rig.host.agent.call("mdev_remove", name=name)


@contextlib.contextmanager
def _all_guests(
    rig: Rig, parts: HostParts, client_key: ssh.KeyPair, logs: Path
) -> Iterator[dict[str, Machine]]:
    """All guests, booted side by side, each on a thread and ended on this one."""

    def enter(name: str, stack: contextlib.ExitStack) -> Machine:
        return stack.enter_context(
            boot_guest(
                rig.host,
                parts,
                name,
                rig.config.guests[name],
                rig.mdevs,
                make_keys(client_key),
                logs,
            )
        )

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(rig.config.guests))))
        futures: dict[str, Future[Machine]] = {}
        try:
            for name in rig.config.guests:
                own = stack.enter_context(contextlib.ExitStack())
                futures[name] = pool.submit(enter, name, own)
            machines = {name: future.result() for name, future in futures.items()}
        except BaseException:
            # Nobody waits for the other guests' deadlines: without the host VM they end now.
            rig.host.kill()
            pool.shutdown()
            raise
        yield machines
