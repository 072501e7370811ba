# SPDX-License-Identifier: GPL-2.0-or-later
"""What many tests need: the built kernel and images, and the command as a user runs it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_ioasid import image, kernel, process, qemu
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.kernel import Kernel
from qemu_ioasid.qemu import Qemu
from tests.starter import Ended, Starter

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


Command = Callable[..., Ended]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user's environment whose run folders are the test's own, so that leftovers show."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    return {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """What `command` runs in."""
    with contextlib.closing(Starter()) as made:
        yield made


@pytest.fixture
def command(tmp_path: Path, environment: dict[str, str], starter: Starter) -> Command:
    """Runs ``qemu-ioasid`` with arguments, in the test's folder, and leaves nothing behind."""

    def call(*arguments: str, timeout: float = 900, **extra: str) -> Ended:
        ended = starter.run(arguments, tmp_path, {**environment, **extra}, timeout=timeout)
        base = Path(environment["XDG_RUNTIME_DIR"]) / "qemu_ioasid"
        assert not base.exists(), "a run folder was left behind"
        return ended

    return call
