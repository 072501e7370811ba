# SPDX-License-Identifier: GPL-2.0-or-later
"""Which QEMU runs the host VM, what its intel-iommu can do, and which accelerator works."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qemu_ioasid import cache, qmp
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    ConfigurationError,
    InfrastructureError,
    ProcessFailed,
    RequirementError,
    RigError,
)
from qemu_ioasid.image import PRIVATE_QEMUS
from qemu_ioasid.process import current_run, run, spawn
from qemu_ioasid.viommu import OLD_NAMES

PROGRAM = "qemu-system-x86_64"
ACCELERATORS = ("auto", "kvm", "tcg")


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be run: what precedes its arguments, and what was found out about it."""

    argv: tuple[str, ...]
    version: str
    viommu: frozenset[str]
    env: Mapping[str, str] = field(default_factory=dict)
    private: bool = False

    @property
    def new_enough(self) -> bool:
        """Whether its intel-iommu has first-stage translation, the newest thing the rig uses."""
        return any(name in self.viommu for name in ("fsts", OLD_NAMES["fsts"]))


def probe(argv: tuple[str, ...], env: Mapping[str, str], deadline: Deadline) -> Qemu:
    """Ask a QEMU for its version and its intel-iommu's properties, over QMP.

    Raises RequirementError when it cannot be run, or has no intel-iommu.
    """
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        log = stack.enter_context(tempfile.NamedTemporaryFile(dir=current_run().folder))
        with theirs:
            stack.enter_context(
                spawn(
                    [
                        *argv,
                        *("-machine", "none", "-nodefaults", "-display", "none"),
                        *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon"),
                        "chardev=qmp,mode=control",
                    ],
                    env=env,
                    pass_fds=[theirs.fileno()],
                    stderr=log,
                )
            )
        try:
            monitor = stack.enter_context(qmp.connect(ours, argv[-1], Path(os.devnull), deadline))
            version = monitor.execute("query-version", deadline)
            names = monitor.execute("device-list-properties", deadline, typename="intel-iommu")
        except InfrastructureError as error:
            said = Path(log.name).read_text(errors="replace").strip()
            raise RequirementError(
                f"{argv[-1]}: does not work as a QEMU: {said or error.message}"
            ) from None
    number, package = version["qemu"], version["package"]
    return Qemu(
        argv=argv,
        version=f"{number['major']}.{number['minor']}.{number['micro']}"
        + (f" ({package})" if package else ""),
        viommu=frozenset(item["name"] for item in names),
        env=env,
    )


def find(
    wanted: str,
    private: Callable[[str], tuple[tuple[str, ...], Mapping[str, str]]],
    say: Callable[[str], None],
    deadline: Deadline,
) -> Qemu:
    """The QEMU for the host VM.

    *wanted* is ``auto`` (the system's where new enough, else the private copy),
    one of `PRIVATE_QEMUS`, or a program. Raises RequirementError when there is none.
    """
    if wanted not in ("auto", *PRIVATE_QEMUS):
        found = shutil.which(wanted)
        if found is None:
            raise RequirementError(f"--qemu {wanted}: no such program")
        chosen = probe((found,), {}, deadline)
        if not chosen.new_enough:
            raise RequirementError(
                f"--qemu {wanted}: QEMU {chosen.version} has no first-stage translation in its "
                "intel-iommu; 10.0 is the oldest that has"
            )
        return chosen
    why = "as asked"
    if wanted == "auto":
        system = shutil.which(PROGRAM)
        if system is None:
            why = f"no {PROGRAM} on this machine"
        else:
            try:
                candidate = probe((system,), {}, deadline)
            except RequirementError as error:
                why = error.message
            else:
                if candidate.new_enough:
                    return candidate
                why = f"the system's QEMU {candidate.version} is too old"
    try:
        argv, env = private("private" if wanted == "auto" else wanted)
    except RequirementError as error:
        raise RequirementError(
            f"no QEMU to run ({why}), and no private copy: {error.message}"
        ) from None
    chosen = probe(argv, env, deadline)
    say(f"private QEMU {chosen.version} ({why})")
    return Qemu(chosen.argv, chosen.version, chosen.viommu, env, private=True)


# The reset vector of a 64 KiB ROM: mov $0x10, %al; out %al, $0xf4; hlt. A guest that runs at
# all thereby ends QEMU with (0x10 << 1) | 1 through isa-debug-exit.
_ROM = bytes(0xFFF0) + b"\xb0\x10\xe6\xf4\xf4" + bytes(11)
_ROM_EXIT = 0x21
_HANGS = "/dev/kvm opens, but a tiny guest hangs in it"


def _nested(parameters: Path = Path("/sys/module")) -> bool:
    for module in ("kvm_intel", "kvm_amd"):
        with contextlib.suppress(OSError):
            return (parameters / module / "parameters/nested").read_text().strip() in ("1", "Y")
    return False


def _try_kvm(qemu: Qemu, nested: bool) -> str:
    """Why KVM cannot be used, or an empty string."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    if nested and not _nested():
        return "the kvm module offers no nested virtualization, and guests run in the host VM"
    with tempfile.NamedTemporaryFile(dir=current_run().folder) as rom:
        rom.write(_ROM)
        rom.flush()
        try:
            run(
                [
                    *qemu.argv,
                    *("-accel", "kvm", "-cpu", "host", "-machine", "q35", "-nodefaults"),
                    *("-display", "none", "-m", "16", "-no-reboot", "-bios", rom.name),
                    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
                ],
                env=qemu.env,
                deadline=Deadline(4, "exit of a tiny KVM guest"),
            )
        except ProcessFailed as error:
            return "" if error.returncode == _ROM_EXIT else error.message
        except RigError:
            return _HANGS
    return "a tiny KVM guest ended without running"


def accelerator(wanted: str, qemu: Qemu, *, nested: bool) -> tuple[str, str]:
    """``("kvm" or "tcg", why not KVM)``, found by running a tiny VM; once per boot and QEMU.

    *wanted* is one of `ACCELERATORS`. Raises RequirementError when ``kvm`` was
    asked for and does not work.
    """
    if wanted not in ACCELERATORS:
        raise ConfigurationError(f"--accel {wanted}: must be one of {', '.join(ACCELERATORS)}")
    if wanted == "tcg":
        return "tcg", "as asked"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    key = cache.digest(boot, qemu.version, *qemu.argv, str(nested), str(os.getuid()))

    # Kept is what takes seconds to find out, a hang; all else is asked anew, and so is everything
    # when KVM is insisted on. Only whether the entry is there says anything: others remove it.
    hangs = cache.entry("kvm", key)
    if wanted != "kvm" and hangs.is_dir():
        why = _HANGS
    else:
        why = _try_kvm(qemu, nested)
        if why == _HANGS:
            deadline = Deadline(60, "note of the KVM probe")
            cache.get_or_build("kvm", key, lambda folder: None, deadline=deadline)
        else:
            shutil.rmtree(hangs, ignore_errors=True)
    if why and wanted == "kvm":
        raise RequirementError(f"--accel kvm: {why}")
    return ("tcg", why) if why else ("kvm", "")
