# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest inside the host VM: its QEMU's arguments, its boot, its end."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu_ioasid.client import Agent
from qemu_ioasid.config import GuestConfig
from qemu_ioasid.console import Console
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import (
    CallFailed,
    ConnectionLost,
    InfrastructureError,
    KernelBroke,
    RigError,
)
from qemu_ioasid.machine import COMMAND_LINE, Dial, Ending, Machine, blamed, common_argv, disk_argv

#: From QEMU's start to the first reply of the agent, in seconds of the reference machine.
BOOT_SECONDS = 90.0

#: A guest's mdev number n sits behind a root port of its own, at 0000:00:(FIRST_SLOT + n).0.
FIRST_SLOT = 0x10
#: For QEMU to answer, and for a guest to let go of a device or to find it.
PLUG_SECONDS = 30.0


def device_address(index: int) -> str:
    """The PCI address, in the guest, of its mdev number *index*.

    Firmware numbers the buses in the order of the root ports, and there is no other bridge.
    """
    return f"0000:{1 + index:02x}:00.0"


def _plugged(mdev: str, uuid: str) -> dict[str, str]:
    """QEMU's options for an mdev, but for its id and its fd."""
    return {
        "driver": "vfio-pci",
        "iommufd": "iommufd0",
        "sysfsdev": f"/sys/bus/mdev/devices/{uuid}",
        "bus": f"port.{mdev}",
    }


#: One huge page is the arena. vfio-pci takes each pdma as it comes (drivers/vfio/pdma).
_OWN_COMMAND_LINE = "hugepages=1 pcie_ports=native vfio_pci.ids=1234:70d1 ROLE=guest"


class Place:
    """Where guests run, and all that depends on it: inside a host VM, unless a subclass differs."""

    #: What runs a QEMU, and the accelerator it uses, ``kvm`` or ``tcg``.
    qemu: tuple[str, ...] = ("/usr/bin/qemu-system-x86_64",)
    accelerator = "kvm"
    #: What guests are booted from.
    kernel = "/boot/vmlinuz"
    disks: Mapping[str, str] = {"root": "/run/disk/guest", "agent": "/run/disk/agent"}
    #: With one, which Linux takes its first 30 ticks from, a guest's QEMU wakes up every 10 ms for
    #: ever (docs/findings.md): of two idle guests that is a third of a processor nested in TCG.
    hpet = "off"
    #: Which ports the agent binds as sockets.
    sockets: tuple[str, ...] = ("qmp", "ssh")

    def __init__(self, viommu: frozenset[str], slowness: float = 1.0) -> None:
        """*viommu* are the properties of that QEMU's intel-iommu; *slowness* is as in HostParts."""
        self.viommu = viommu
        self.slowness = slowness

    def huge(self, memory: int) -> bool:
        """Whether *memory* bytes of RAM are taken in huge pages."""
        return True

    def ports(self, name: str) -> list[str]:
        """QEMU's arguments for the chardevs of guest *name*: console, agent, qmp, ssh."""
        return [
            # These two ports of the host VM lead to us, whatever becomes of this QEMU.
            *("-chardev", f"file,id=console,path=/dev/virtio-ports/console.{name}"),
            *("-chardev", f"pipe,id=agent,path=/dev/virtio-ports/agent.{name}"),
            *("-chardev", "socket,id=qmp,fd={socket:qmp},server=on,wait=off"),
            *("-chardev", "socket,id=ssh,fd={socket:ssh},server=on,wait=off"),
        ]

    def inherited(self, name: str) -> list[int]:
        """The fds of the agent's process that `ports` names."""
        return []

    def dial(self, host: Machine, name: str, sockets: dict[str, str]) -> Dial:
        """The way to the guest's qmp and ssh; *sockets* are the paths of what the agent bound."""
        return _dial(host, name, sockets)


def argv(name: str, config: GuestConfig, place: Place, mdevs: dict[str, str]) -> list[str]:
    """The guest's QEMU; *mdevs* are uuids by name.

    What is in braces is for the host side's agent to fill in (docs/agent.md, guest_start).
    """
    kvm = place.accelerator == "kvm"
    words = [
        *place.qemu,
        *(("-accel", "kvm") if kvm else ("-accel", "tcg,thread=multi")),
        *("-cpu", "host" if kvm else "max"),
        "-machine",
        f"q35,hpet={place.hpet}{',kernel-irqchip=split' if kvm else ''},memory-backend=ram",
        # Root ports' own hotplug (PCI Express 6.7): the kernel has no other.
        *("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),
        *("-m", f"{config.memory >> 20}M"),
        "-object",
        f"memory-backend-file,id=ram,share=on,mem-path=/proc/self/fd/{{memory}},size={config.memory}",
        *("-kernel", place.kernel, "-append", f"{COMMAND_LINE} {_OWN_COMMAND_LINE}"),
        *place.ports(name),
        # The agent's own way to QEMU, to hear what is unplugged.
        *("-chardev", "socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
        *common_argv(name, config.viommu.device(place.viommu), config.cpus),
        *disk_argv(dict(place.disks)),
        *("-object", "iommufd,id=iommufd0,fd={iommufd}"),
    ]
    for index, mdev in enumerate(config.mdevs):
        slot = FIRST_SLOT + index
        options = {"id": mdev, "fd": f"{{device:{mdev}}}", **_plugged(mdev, mdevs[mdev])}
        driver = options.pop("driver")
        words += [
            *("-device", f"pcie-root-port,id=port.{mdev},chassis=1,slot={slot},addr={slot:#x}"),
            *("-device", ",".join([driver, *(f"{k}={v}" for k, v in options.items())])),
        ]
    return words


def _dial(host: Machine, name: str, sockets: dict[str, str]) -> Dial:
    """The guest's ports are unix sockets in the host VM, reached through SSH to that."""

    @contextlib.contextmanager
    def dial(port: str, deadline: Deadline) -> Iterator[Any]:
        command = f"exec socat -b 65536 - UNIX-CONNECT:{sockets[port]}"
        with contextlib.closing(host.ssh.run(command, deadline)) as channel:
            if port == "ssh":
                yield channel
            else:
                from qemu_ioasid import ssh

                with ssh.as_socket(channel, f"{name} {port}") as sock:
                    yield sock

    return dial


class GuestMachine(Machine):
    """A guest that runs; *sockets* are the paths of its ports on the host side."""

    nested = True

    def __init__(
        self,
        host: Machine,
        name: str,
        console: Console,
        agent: Agent,
        sockets: dict[str, str],
        logs: Path,
        place: Place,
    ) -> None:
        super().__init__(name, console, agent, place.dial(host, name, sockets), logs)
        self.sockets = sockets


def log_argv(logs: Path, name: str, words: list[str]) -> None:
    """Keep the guest's command line in the report's folder."""
    (logs / f"{name}.qemu.txt").write_text(shlex.join(words) + "\n")


@contextlib.contextmanager
def boot(
    host: Machine,
    name: str,
    config: GuestConfig,
    place: Place,
    mdevs: dict[str, str],
    console: Console,
    agent: Agent,
    logs: Path,
) -> Iterator[GuestMachine]:
    """Boot guest *name* to its agent's first reply; it ends with the host side.

    Raises BootError, InfrastructureError; the host VM then has no such guest.
    """
    words = argv(name, config, place, mdevs)
    deadline = Deadline(BOOT_SECONDS * place.slowness, f"first reply of {name}'s agent")
    log_argv(logs, name, words)
    agent.renew()
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as undo:
        started = host.agent.call(
            "guest_start",
            deadline=deadline,
            name=name,
            argv=words,
            memory=int(config.memory),
            huge=place.huge(config.memory),
            devices={mdev: mdevs[mdev] for mdev in config.mdevs},
            sockets=list(place.sockets),
            inherit=place.inherited(name),
        )
        undo.callback(_give_up, host, name, logs)
        machine = GuestMachine(host, name, console, agent, started["sockets"], logs, place)
        stack.enter_context(machine)
        with blamed(name, console, lambda: _ending(host, name)):
            agent.wait_ready(deadline)
            machine.hello = agent.call("hello", deadline=deadline)
        undo.pop_all()
        yield machine


def unplug(host: Machine, guest: Machine, mdev: str, index: int) -> None:
    """Take *mdev*, number *index* of the guest's, out of the running *guest*; the guest lets go.

    Its PASID list is gone with it when this returns. Raises CallFailed (ETIMEDOUT).
    """
    host.agent.call("guest_unplug", guest=guest.name, device=mdev)
    guest.agent.call("device_eject", name=mdev, bdf=device_address(index))
    unplugged(host, guest.name, mdev)


def unplugged(host: Machine, name: str, mdev: str) -> None:
    """Return when *mdev* is out of guest *name*, whoever unplugs it. Raises CallFailed."""
    deadline = Deadline(PLUG_SECONDS + 5, f"{mdev} out of {name}")
    seconds = PLUG_SECONDS * calibration()
    host.agent.call("guest_unplugged", deadline=deadline, guest=name, device=mdev, seconds=seconds)


def plug(host: Machine, guest: Machine, mdev: str, index: int, uuid: str) -> None:
    """Plug *mdev* into the running *guest*, where it was, and have the guest open it.

    Raises CallFailed: EBUSY where it is open, ETIMEDOUT when the guest does not find it.
    """
    deadline = Deadline(PLUG_SECONDS + 5, f"{mdev} in {guest.name}")
    arguments = _plugged(mdev, uuid)
    host.agent.call("guest_plug", guest=guest.name, device=mdev, uuid=uuid, arguments=arguments)
    guest.agent.call(
        "device_open",
        deadline=deadline,
        name=mdev,
        bdf=device_address(index),
        seconds=PLUG_SECONDS * calibration(),
    )


def _give_up(host: Machine, name: str, logs: Path) -> None:
    # The failure that led here is the one to tell.
    with contextlib.suppress(RigError):
        stop(host, name, logs)


def _ending(host: Machine, name: str) -> Ending:
    with contextlib.suppress(InfrastructureError):
        status = host.agent.call("guest_status", name=name)
        return status["returncode"], status["stderr"]
    return None, ""


def stop(host: Machine, name: str, logs: Path) -> None:
    """Kill the guest's QEMU and forget the guest; a host VM that is gone has done so already.

    Raises KernelBroke when it does not end or its devices do not close.
    """
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
