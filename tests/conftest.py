# SPDX-License-Identifier: GPL-2.0-or-later
"""What many tests need: the built kernel and images, and the command as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import image, kernel, process, qemu
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.kernel import Kernel
from qemu_ioasid.qemu import Qemu

# A shell's background job has it ignored, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def progress(line: str) -> None:
    """Builds in a test run tell pytest's captured output."""
    print(line)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """This process's own run folder goes with it, after the plugin has ended its last rig."""
    process.close_run()


@pytest.fixture(scope="session")
def built_kernel() -> Kernel:
    """The default kernel, from the cache or built now."""
    return kernel.build(kernel.Spec(), deadline=Deadline(3000, "kernel"), progress=progress)


@pytest.fixture(scope="session")
def private_qemu() -> Qemu:
    """The rig's own QEMU 11.1, probed."""
    found = image.private_qemu(deadline=Deadline(3000, "private QEMU"), progress=progress)
    return qemu.probe(found.argv, found.env, Deadline(30, "answers of QEMU"))


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its standard output, which is JSON and nothing else."""
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user's environment whose run folders are the test's own, so that leftovers show."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    return {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}


@pytest.fixture
def command(tmp_path: Path, environment: dict[str, str]) -> Command:
    """Runs ``qemu-ioasid`` with arguments, in the test's folder, and leaves nothing behind."""

    def call(*arguments: str, timeout: float = 900, **extra: str) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "qemu_ioasid.cli", *arguments],
            cwd=tmp_path,
            env={**environment, **extra},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        base = Path(environment["XDG_RUNTIME_DIR"]) / "qemu_ioasid"
        assert not base.exists(), "a run folder was left behind"
        return Ended(done.returncode, done.stdout, done.stderr)

    return call
