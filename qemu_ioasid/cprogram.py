# SPDX-License-Identifier: GPL-2.0-or-later
"""C programs for VMs without a C library: compiled here, carried over SSH."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qemu_ioasid import cache, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.kernel import make
from qemu_ioasid.machine import Machine

KIND = "bench"


def build(sources: Sequence[Path], headers: Path, deadline: Deadline) -> bytes:
    """The program of *sources*, headers of its own among them, against a kernel's *headers*.

    Raises ProcessFailed with the compiler's words, RequirementError.
    """
    files = [str(source) for source in sources if source.suffix == ".c"]
    argv = ["gcc", "-static", "-pthread", "-O2", "-Wall", "-Wextra", "-s"]
    argv += ["-isystem", str(headers / "include"), *files, "-o"]
    read = [source.read_bytes() for source in sources]
    key = cache.digest(*read, str(headers), make.compiler(deadline), *argv)
    folder, _ = cache.get_or_build(
        KIND,
        key,
        lambda folder: process.run([*argv, str(folder / "program")], deadline=deadline),
        deadline=deadline,
    )
    return (folder / "program").read_bytes()


def put(machine: Machine, path: str, program: bytes) -> None:
    """Have *program* at *path* in *machine*, to be run."""
    deadline = Deadline(60, f"{path} in {machine.name}")
    machine.ssh.put({path: program}, deadline)
    machine.ssh.output(f"chmod 700 {path}", deadline)
