# SPDX-License-Identifier: GPL-2.0-or-later
"""A host VM and its guests as one thing with one lifetime."""

from __future__ import annotations

import contextlib
import secrets
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import guestvm, hostvm, snapshot
from qemu_ioasid.client import Agent
from qemu_ioasid.config import RigConfig
from qemu_ioasid.console import Console, classify
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import (
    AgentError,
    ConnectionLost,
    KernelLacks,
    RigError,
)

# What rigs are used with, for those who import it from here.
from qemu_ioasid.guest import Completion as Completion
from qemu_ioasid.guest import Descriptor as Descriptor
from qemu_ioasid.guest import Guest as Guest
from qemu_ioasid.guest import copy as copy
from qemu_ioasid.guestvm import GuestMachine, Place
from qemu_ioasid.hostvm import HostMachine, HostParts
from qemu_ioasid.registrar import Registrar
from qemu_ioasid.snapshot import Memory, Snapshot

#: What the host VM's agent asks its kernel for, and the option that gives it.
FEATURES = {
    "iommu": "CONFIG_IOMMUFD",
    "mdev_type": "CONFIG_VFIO_PDMA (kernel-patches/)",
    "debugfs": "CONFIG_DEBUG_FS (for pdma's files)",
    "tracefs": "CONFIG_FTRACE",
    "kprobe": "CONFIG_KPROBE_EVENTS",
    "userfaultfd": "CONFIG_USERFAULTFD",
}

#: From QEMU's start to the last agent's first reply, in seconds of the reference machine.
RESTORE_SECONDS = 30.0
SAVE_SECONDS = 60.0
SETTLE_SECONDS = 20.0
END_SECONDS = 10.0
#: How long after a connection ended a console may still bring the reason.
LAST_WORDS_SECONDS = 1.5


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


class Rig:
    """A running rig. The kernel under test is the host VM's."""

    def __init__(self, config: RigConfig, host: HostMachine, logs: Path) -> None:
        self.config = config
        self.host = host
        self.logs = logs
        self.registrar = Registrar(host.agent)
        self.mdevs: dict[str, str] = {}
        self.guests: dict[str, Guest] = {}
        #: By VM, how many requests its agent had had when it was as `reset` leaves it.
        self._reset_at: dict[str, int] = {}

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

    def check_consoles(self, seen: Mapping[str, int] | None = None) -> None:
        """Raise KernelBroke if any kernel has reported anything.

        *seen* has, by console, how many reports are known and not to be raised again.
        """
        for console in self.consoles:
            console.check((seen or {}).get(console.name, 0))

    def settle(self) -> None:
        """Return when every report that the kernels have made so far is on the consoles.

        The agents read the kernels' logs, which costs little; only where there is
        a report in one are the consoles waited for, which take a trap a character.
        """
        used = self._used()
        self._heard(self._everywhere("news", self._agents()))
        self._as_reset({name: each for name, each in self._agents().items() if name not in used})

    def reset(self) -> list[str]:
        """As `settle`; and undo every registration and mapping, close what was opened, in all VMs.

        A guest that was asked nothing since is left alone: that is 8 ms under TCG.
        Gives what is left of it, in words; then this rig is not to be used again.
        """
        used = self._used()
        answers = self._everywhere("reset", used)
        self._as_reset(used)
        told = answers["host"]
        left = [f"the parent's table has {told['table']}"] if told["table"] else []
        left += [f"{name}'s list has {rows}" for name, rows in told["lists"].items() if rows]
        left += [f"guest {name} is gone" for name in self.guests if name not in told["running"]]
        left += [
            f"{name} is unplugged"
            for guest in self.guests.values()
            for name in guest.mdevs
            if guest.name in told["running"] and name not in told["lists"]
        ]
        self._heard(answers)
        return left

    def _agents(self) -> dict[str, Agent]:
        """Those of the VMs that live, the host's first."""
        every = [self.host.agent, *(guest.agent for guest in self.guests.values())]
        return {agent.name: agent for agent in every if not agent.lost}

    def _used(self) -> dict[str, Agent]:
        """The host's agent, and those of guests that were asked anything since the last reset."""
        return {
            name: agent
            for name, agent in self._agents().items()
            if agent is self.host.agent or self._reset_at.get(name) != agent.requests
        }

    def _as_reset(self, agents: Mapping[str, Agent]) -> None:
        self._reset_at.update({name: agent.requests for name, agent in agents.items()})

    def _everywhere(self, op: str, agents: Mapping[str, Agent]) -> dict[str, Any]:
        """The answers of *agents* to *op*, by name."""
        deadline = Deadline(SETTLE_SECONDS, f"answer of all agents to {op}")
        # In turn: they share a vCPU under TCG, and competing for it costs more than it saves.
        return {name: agent.start(op).result(deadline) for name, agent in agents.items()}

    def _heard(self, answers: Mapping[str, Any]) -> None:
        """Wait for the consoles of kernels that have reported anything by *answers*."""
        deadline = Deadline(SETTLE_SECONDS, "word of ours on the consoles")
        consoles = {console.name: console for console in self.consoles}
        with contextlib.ExitStack() as stack:
            word = f"~{secrets.token_hex(3)}"
            arrivals = []
            for name, agent in self._agents().items():
                if any(classify(line) for line in answers.get(name, {"news": ()})["news"]):
                    arrivals.append(stack.enter_context(consoles[name].awaiting(word)))
                    agent.call("mark", text=word)
            for arrived in arrivals:
                if not arrived.wait(deadline.remaining()):
                    raise deadline.exceeded()

    def unplug(self, device: str) -> None:
        """Take *device* out of the guest that has it, which runs on and lets go of it.

        All that was registered on it is gone. Raises CallFailed.
        """
        guest = self._owner(device)
        guestvm.unplug(self.host, guest.machine, device, guest.mdevs.index(device))

    def plug(self, device: str) -> None:
        """Give *device* back to its guest, which opens it. Raises CallFailed."""
        guest = self._owner(device)
        index = guest.mdevs.index(device)
        guestvm.plug(self.host, guest.machine, device, index, self.mdevs[device])

    def _owner(self, device: str) -> Guest:
        return next(guest for guest in self.guests.values() if device in guest.mdevs)

    def stop_guest(self, name: str) -> None:
        """SIGKILL the guest's QEMU; its devices are closed when this returns."""
        self.host.agent.call("guest_stop", name=name)

    def known(self) -> dict[str, Any]:
        """What `restore` must know of a rig that was saved as it is now."""
        guests = {
            name: {
                "hello": guest.machine.hello,
                "sockets": guest.machine.sockets,
                "arena": guest.arena,
            }
            for name, guest in self.guests.items()
            if not guest.agent.lost
        }
        return {"hello": self.host.hello, "mdevs": self.mdevs, "guests": guests}

    def disconnect(self) -> None:
        """End QMP and SSH of all VMs: a rig that is saved believes in no connection."""
        for guest in self.guests.values():
            guest.machine.disconnect()
        self.host.disconnect()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The guests are stopped meanwhile, so that a VM that is saved is in none of them.

        QEMU's emulation of SVM has an interrupt that was injected into a guest arrive once more,
        wherever the guest then is, when the host VM's processor is kicked out of it before it left
        by itself, as it is to be stopped (target/i386/tcg/system/svm_helper.c, helper_vmrun():
        exception_index keeps the vector). A guest that holds a lock then waits for itself for ever,
        in every rig restored from there. The series has KVM avoid it; not every kernel
        has that.
        """
        try:
            self.host.agent.call("freeze", seconds=SETTLE_SECONDS * calibration())
            yield
        finally:
            self.host.agent.call("thaw")

    def save(self, folder: Path, identity: dict[str, Any]) -> None:
        """Save all VMs as they are into the new *folder*, and have them run on.

        Their QMP and SSH connections end. SSH to the host VM comes back only in a
        rig restored from there. Raises CommandFailed, OSError.
        """
        self.disconnect()
        deadline = Deadline(SAVE_SECONDS, "state of the host VM, saved")
        known = {"identity": identity, "rig": self.known()}
        with self.frozen():
            try:
                snapshot.save_whole(self.host.qmp, folder, known, deadline)
                snapshot.seal(folder)
            finally:
                # The first one may have been spent.
                self.host.qmp.execute("cont", Deadline(SAVE_SECONDS, "the host VM to go on"))

    def dismantle(self, seen: Mapping[str, int] | None = None) -> None:
        """Stop the guests and remove the mdevs: what a host does at its end, and may break at.

        Raises KernelBroke when the kernel does not let go of them, or has reported
        anything that is not among the *seen* (`check_consoles`).
        """
        for name in list(self.guests):
            guestvm.stop(self.host, name, self.logs)
            del self.guests[name]
        for name in list(self.mdevs):
            self.host.agent.call("mdev_remove", name=name)
            del self.mdevs[name]
        self.settle()
        self.check_consoles(seen)


def _check_features(host: HostMachine, config: RigConfig) -> None:
    wanted = dict(FEATURES)
    if not config.mdevs:
        # Both are of the driver, which a kernel without our series has not.
        del wanted["mdev_type"], wanted["debugfs"]
    missing = [option for name, option in wanted.items() if not host.hello["kernel"].get(name)]
    if missing:
        raise KernelLacks(
            f"kernel {host.hello['release']} lacks {', '.join(missing)} for the host VM"
        )


#: Times a step of a rig's start.
Phase = Callable[[str], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def boot(
    config: RigConfig, parts: HostParts, phase: Phase, logs: Path, memory: Memory | None = None
) -> Iterator[Rig]:
    """Boot the host VM, then the guests; everything ends with the block.

    When the block ends without an exception, a report on any console raises
    KernelBroke; when it ends with one, such a report replaces it, since it is
    the cause.
    """
    if memory is None:
        memory = snapshot.anonymous(config.host.memory)
    with contextlib.ExitStack() as stack:
        with phase("boot the host VM"):
            host = stack.enter_context(hostvm.boot(parts, config.host, config.guests, memory, logs))
        place = Place(parts.guest_viommu, parts.slowness)
        rig = stack.enter_context(furnished(config, host, place, fresh(config), phase, logs))
        # A guest's hardware clock is as old as its QEMU, and drifts while that is busy.
        deadline = Deadline(SETTLE_SECONDS, "answer of the agents to the time")
        hostvm.wake({"host": host.agent, **host.guest_agents}, deadline)
        yield rig


def fresh(config: RigConfig) -> dict[str, str]:
    """New uuids for the mdevs of *config*."""
    return {name: str(uuid.uuid4()) for name in config.mdevs}


@contextlib.contextmanager
def furnished(
    config: RigConfig,
    host: HostMachine,
    place: Place,
    uuids: Mapping[str, str],
    phase: Phase,
    logs: Path,
) -> Iterator[Rig]:
    """A rig of a *host* that runs: its mdevs made, by *uuids*, and its guests booted at *place*.

    Ends as `boot` does.
    """
    with contextlib.ExitStack() as stack:
        rig = Rig(config, host, logs)
        stack.enter_context(_console_verdict(rig))
        _check_features(host, config)
        stack.enter_context(assembled(rig, place, uuids, phase))
        yield rig


@contextlib.contextmanager
def assembled(rig: Rig, place: Place, uuids: Mapping[str, str], phase: Phase) -> Iterator[None]:
    """Make the mdevs of *rig*, by *uuids*, and boot its guests at *place*: its host has neither.

    They end with `Rig.dismantle`, or with the host. Raises as `boot`; no guest is left then.
    """
    with contextlib.ExitStack() as stack:
        with phase("create the mdevs"):
            for name, given in uuids.items():
                rig.host.agent.call("mdev_create", name=name, uuid=given)
                rig.mdevs[name] = given
        if rig.config.guests:
            with phase(f"boot {len(rig.config.guests)} guests in it"):
                machines = stack.enter_context(_all_guests(rig, place))
            with phase("open the devices in the guests"):
                for name, machine in machines.items():
                    rig.guests[name] = Guest(machine, rig.config.guests[name].mdevs)
        yield


@contextlib.contextmanager
def restore(
    config: RigConfig, parts: HostParts, saved: Snapshot, phase: Phase, logs: Path
) -> Iterator[Rig]:
    """A rig from a snapshot of one of the same configuration and parts, as `boot` gives it."""
    known = saved.known["rig"]
    with contextlib.ExitStack() as stack:
        with phase("restore the rig"):
            deadline = Deadline(
                RESTORE_SECONDS * parts.slowness, "first reply of the restored agents"
            )
            memory = saved.memory(config.host.memory)
            host = stack.enter_context(hostvm.run(parts, config.host, config.guests, memory, logs))
            rig = Rig(config, host, logs)
            stack.enter_context(_console_verdict(rig))
            memory.receive(host.qmp, deadline)
            for name in config.guests.keys() - known["guests"].keys():
                # It had ended before the rig was saved.
                host.guest_agents[name].lose()
            alive = {name: host.guest_agents[name] for name in known["guests"]}
            hostvm.wake({"host": host.agent, **alive}, deadline)
            host.hello, rig.mdevs = known["hello"], dict(known["mdevs"])
            place = Place(parts.guest_viommu, parts.slowness)
            for name, told in known["guests"].items():
                words = guestvm.argv(name, config.guests[name], place, rig.mdevs)
                guestvm.log_argv(logs, name, words)
                machine = stack.enter_context(
                    GuestMachine(
                        host,
                        name,
                        host.guest_consoles[name],
                        host.guest_agents[name],
                        told["sockets"],
                        logs,
                        place,
                    )
                )
                machine.hello = told["hello"]
                rig.guests[name] = Guest(machine, config.guests[name].mdevs, told["arena"])
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
def _all_guests(rig: Rig, place: Place) -> Iterator[dict[str, GuestMachine]]:
    """All guests, each booted on a thread and ended on this one; as many at once as have a CPU.

    On one CPU nothing is won by competing for it (40 to 43 s for two, either way, while they had an
    HPET), and so each has the time of its deadline for itself.
    """
    cpus: int = rig.host.hello["cpus"]

    def enter(name: str, stack: contextlib.ExitStack) -> GuestMachine:
        config = rig.config.guests[name]
        return stack.enter_context(
            guestvm.boot(
                rig.host,
                name,
                config,
                place,
                rig.mdevs,
                rig.host.guest_consoles[name],
                rig.host.guest_agents[name],
                rig.logs,
            )
        )

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(cpus))
        machines: dict[str, GuestMachine] = {}
        names = list(rig.config.guests)
        try:
            for first in range(0, len(names), cpus):
                futures: dict[str, Future[GuestMachine]] = {}
                for name in names[first : first + cpus]:
                    own = stack.enter_context(contextlib.ExitStack())
                    futures[name] = pool.submit(enter, name, own)
                machines.update({name: future.result() for name, future in futures.items()})
        except BaseException:
            # Nobody waits for the other guests' deadlines: they end now.
            _end_guests(rig)
            pool.shutdown()
            raise
        yield machines


def _end_guests(rig: Rig) -> None:
    """Have the host VM stop and forget every guest; when it does not answer it ends, too."""
    deadline = Deadline(END_SECONDS, "end of the guests")
    try:
        for op in ("guest_stop", "guest_forget"):
            for pending in [rig.host.agent.start(op, name=name) for name in rig.config.guests]:
                # It was never started, or is forgotten already.
                with contextlib.suppress(AgentError):
                    pending.result(deadline)
    except RigError:
        rig.host.kill()
