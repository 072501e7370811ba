# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding, probing and talking to a real QEMU."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from qemu_ioasid import cache, qemu, qmp
from qemu_ioasid.config import DEFAULT, load
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, RequirementError
from qemu_ioasid.process import spawn
from qemu_ioasid.qemu import Qemu


def quiet(line: str) -> None:
    """What `find` says is not asked for."""


def test_probe_of_the_private_copy(private_qemu: Qemu) -> None:
    assert private_qemu.version.startswith("11.")
    assert {"scalable-mode", "fsts", "pasid-bits"} <= private_qemu.viommu
    assert private_qemu.new_enough
    for guest in load(DEFAULT).guests.values():
        assert "pasid-bits=20" in guest.viommu.device(private_qemu.viommu)


def test_system_qemu_is_taken_only_when_new_enough(
    private_qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without QEMU, then one whose `qemu-system-x86_64` is the private copy itself."""

    def private(name: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
        return private_qemu.argv, private_qemu.env

    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    found = qemu.find("auto", private, said.append, Deadline(30, "QEMU"))
    assert found.private and "no qemu-system-x86_64" in said[0]

    wrapper = tmp_path / qemu.PROGRAM
    exports = "".join(f"export {name}='{value}'\n" for name, value in private_qemu.env.items())
    arguments = " ".join(f"'{part}'" for part in private_qemu.argv)
    wrapper.write_text(f'#!/bin/sh\n{exports}exec {arguments} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    found = qemu.find("auto", private, quiet, Deadline(30, "QEMU"))
    assert not found.private
    assert found.argv == (str(wrapper),)


def test_no_private_copy_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def private(name: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
        raise RequirementError("no mmdebstrap")

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequirementError, match=r"no QEMU to run .* no private copy: no mmdebstrap"):
        qemu.find("auto", private, quiet, Deadline(30, "QEMU"))


def test_the_probe_rom_runs_and_ends_qemu(private_qemu: Qemu, tmp_path: Path) -> None:
    """The tiny VM that decides about KVM is right: TCG runs it to its exit code."""
    rom = tmp_path / "rom"
    rom.write_bytes(qemu._ROM)
    with spawn(
        [
            *private_qemu.argv,
            *("-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-m", "16"),
            *("-no-reboot", "-bios", str(rom), "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        ],
        env=private_qemu.env,
    ) as child:
        assert child.wait(Deadline(30, "exit of the ROM")) == qemu._ROM_EXIT


def test_accelerator_is_probed_once_and_kvm_never_falls_back(
    private_qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path))
    assert qemu.accelerator("tcg", private_qemu, nested=True) == ("tcg", "as asked")
    found, why = qemu.accelerator("auto", private_qemu, nested=False)
    assert (found == "kvm") == (why == "")
    if found == "tcg":
        with pytest.raises(RequirementError, match="--accel kvm: "):
            qemu.accelerator("kvm", private_qemu, nested=False)
    kept = list(cache.entry("kvm", "").glob("[!.]*"))
    assert bool(kept) == (why == qemu._HANGS), "what takes no time to find out is asked anew"


def test_qmp_speaks_logs_and_notices_the_end(private_qemu: Qemu, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    log = tmp_path / "qmp.log"
    deadline = Deadline(30, "QEMU")
    with (
        spawn(
            [
                *private_qemu.argv,
                *("-machine", "none", "-nodefaults", "-display", "none"),
                *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                *("-mon", "chardev=qmp,mode=control"),
            ],
            env=private_qemu.env,
            pass_fds=[theirs.fileno()],
        ) as child,
        qmp.connect(ours, "vm", log, deadline) as monitor,
    ):
        theirs.close()
        assert monitor.execute("query-status", deadline)["status"] == "running"
        assert "unknown command" in monitor.monitor("nonesuch", deadline)
        with pytest.raises(qmp.CommandFailed, match="nonesuch"):
            monitor.execute("nonesuch", deadline)
        child.end()
        with pytest.raises(ConnectionLost):
            monitor.execute("query-status", deadline)
    text = log.read_text()
    assert '"execute": "query-status"' in text and "nonesuch" in text


def test_qmp_on_something_that_is_no_qemu() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with (
        pytest.raises(ConnectionLost, match="no QMP greeting"),
        qmp.connect(ours, "vm", Path(os.devnull), Deadline(5, "greeting")),
    ):
        pass
