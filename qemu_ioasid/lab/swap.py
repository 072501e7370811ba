# SPDX-License-Identifier: GPL-2.0-or-later
"""Another driver for a host VM that runs: its modules are swapped, its guests booted again."""

from __future__ import annotations

import filecmp
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid import erofs, hostvm, kernel, process, rig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError, KernelBroke
from qemu_ioasid.guestvm import Place
from qemu_ioasid.kernel import Kernel, Spec
from qemu_ioasid.lab.life import Life
from qemu_ioasid.machine import Machine
from qemu_ioasid.rig import Phase
from qemu_ioasid.session import BUILD_SECONDS, Output

SWAP_SECONDS = 60.0
#: Where new modules are put in the host VM.
PLACE = "/run/reload"
#: KVM keeps what it found when it was loaded (guest-images/files/init).
_STAYS = "kvm"
_AGAIN = "qemu-ioasid lab down and lab up take it"


@dataclass(frozen=True)
class Modules:
    """The modules of a kernel, unpacked into *folder*; *order* is that of their loading."""

    folder: Path
    order: tuple[str, ...]


def unpacked(disk: Path, folder: Path) -> Modules:
    """The modules in the erofs *disk* (`Kernel.modules`), put into the new *folder*."""
    erofs.unpack(disk, folder, deadline=Deadline(SWAP_SECONDS, "modules, unpacked"))
    return Modules(folder, tuple((folder / "order").read_text().split()))


def symbol(module: str) -> str:
    """The name by which the kernel knows the module in the file *module*."""
    return module.removesuffix(".ko").replace("-", "_")


def reload(life: Life, spec: Spec, phase: Phase, output: Output) -> list[str]:
    """Build *spec*'s kernel and have its modules in the lab; the files that were swapped.

    The guests are booted anew, also when no file differs but a guest has ended.
    Raises ConfigurationError when more than modules differ, ProcessFailed when
    it does not compile: then nothing was touched.
    """
    with phase("kernel"):
        deadline = Deadline(BUILD_SECONDS, "kernel")
        built = kernel.build(spec, deadline=deadline, progress=output.progress)
    if not filecmp.cmp(built.vmlinux, life.parts.kernel, shallow=False):
        raise ConfigurationError(
            f"more than modules changed: kernel {built.hash} differs from the lab's "
            f"{life.parts.kernel.parent.name}; {_AGAIN}"
        )
    with (
        life.alone("reload"),
        tempfile.TemporaryDirectory(dir=process.current_run().folder) as scratch,
    ):
        return _swap(life, built, Path(scratch), phase)


def _swap(life: Life, built: Kernel, scratch: Path, phase: Phase) -> list[str]:
    running = life.running()
    new = unpacked(built.modules, scratch / "new")
    if life.modules is None:
        old = new
        changed = [name for name in new.order if not name.startswith(_STAYS)]
    else:
        old = unpacked(life.modules, scratch / "old")
        changed = [
            name
            for name in dict.fromkeys([*old.order, *new.order])
            if not _same(old.folder / name, new.folder / name)
        ]
    held = [name for name in changed if name.startswith(_STAYS)]
    if held:
        raise ConfigurationError(f"{', '.join(held)} changed, and cannot be swapped; {_AGAIN}")
    whole = all(not guest.agent.lost for guest in running.guests.values())
    if not changed and whole and running.guests.keys() == life.config.guests.keys():
        life.modules = built.modules
        return []
    with life.blamed():
        with phase("stop the guests and remove the mdevs"):
            try:
                running.dismantle(life.seen())
            except KernelBroke:
                # An old driver may complain of its end, when it comes to it.
                if running.mdevs or running.guests:
                    raise
        life.forgive()
        if changed:
            with phase(f"swap {', '.join(changed)}"):
                life.modules = None
                _exchange(running.host, old, new, changed)
            life.modules = built.modules
        place, uuids = Place(life.parts.guest_viommu, life.parts.slowness), rig.fresh(life.config)
        life.stack.enter_context(rig.assembled(running, place, uuids, phase))
        deadline = Deadline(SWAP_SECONDS, "answer of the guests to the time")
        hostvm.wake({name: guest.agent for name, guest in running.guests.items()}, deadline)
    return changed


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and filecmp.cmp(one, other, shallow=False)


def _exchange(host: Machine, old: Modules, new: Modules, changed: list[str]) -> None:
    deadline = Deadline(SWAP_SECONDS, "modules, swapped")
    users = _users(host, deadline)
    # A module goes with those that use it.
    leaving = {symbol(name) for name in changed}
    while more := {user for name in leaving for user in users.get(name, ())} - leaving:
        leaving |= more
    script = ["set -e"]
    script += [f"rmmod {symbol(name)}" for name in reversed(old.order) if symbol(name) in leaving]
    coming = [name for name in new.order if symbol(name) in leaving]
    script += [f"insmod {PLACE}/{shlex.quote(name)}" for name in coming]
    host.ssh.put({f"{PLACE}/{name}": (new.folder / name).read_bytes() for name in coming}, deadline)
    loaded = [line for line in script if not line.startswith("rmmod ") or line[6:] in users]
    try:
        host.ssh.output("\n".join(loaded), deadline)
    except InfrastructureError as error:
        if not host.ssh.alive:
            raise
        said = error.message.rpartition("exit code ")[2].partition(": ")[2]
        raise KernelBroke(
            f"host: the modules cannot be swapped: {said}; the guests are down until the next "
            "lab reload",
            evidence=host.console.tail(),
        ) from error


def _users(host: Machine, deadline: Deadline) -> dict[str, list[str]]:
    """Each module that is loaded, and those that use it (proc(5), /proc/modules)."""
    users = {}
    for line in host.ssh.output("cat /proc/modules", deadline).decode().splitlines():
        name, _, _, by = line.split()[:4]
        users[name] = [each for each in by.split(",") if each not in ("", "-")]
    return users
