# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that a debugger has stopped runs on after it, whatever became of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_ioasid import gdbstub
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import DeadlineExceeded
from qemu_ioasid.rig import Rig

#: The start of the kernel's code (arch/x86/include/asm/page_64_types.h): nobody stores there.
CODE = 0xFFFFFFFF81000000


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A folder whose name is longer than that of a socket may be."""
    found = tmp_path / ("d" * 120)
    found.mkdir()
    return found


@pytest.mark.ioasid_rig(mdevs=["a"])
def test_it_stands_still_and_runs_on(shared_rig: Rig, deep: Path) -> None:
    monitor, deadline = shared_rig.host.qmp, Deadline(20, "a stop")
    for _ in range(2):
        with gdbstub.stopped(monitor, "host", deep, deadline) as stub:
            assert not monitor.execute("query-status", deadline)["running"]
            assert len(stub.registers()) == 16
            assert len(stub.read(CODE, 64)) == 64
            assert stub.read(0xFFFF_8000_0000_0000, 8) == b""
        assert monitor.execute("query-status", deadline)["running"]
        shared_rig.host.agent.call("kernel_table")
        assert not list(deep.iterdir())


@pytest.mark.ioasid_rig(mdevs=["a"])
def test_a_store_that_never_comes(shared_rig: Rig, deep: Path) -> None:
    monitor, deadline = shared_rig.host.qmp, Deadline(20, "a stop")
    late = Deadline(1, "a store that never comes")
    with (
        pytest.raises(DeadlineExceeded, match="a store that never comes"),
        gdbstub.stopped(monitor, "host", deep, late) as stub,
    ):
        stub.run_to_store(CODE, 4)
    assert monitor.execute("query-status", deadline)["running"]
    shared_rig.host.agent.call("kernel_table")
    assert not list(deep.iterdir())
