# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's disk, run by the Python it was compiled for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qemu_ioasid import agentdisk, image
from qemu_ioasid.deadline import Deadline


def _disk() -> tuple[Path, image.Image]:
    deadline = Deadline(300, "the agent's disk")
    guest = image.build("guest", deadline=deadline, progress=print)
    return agentdisk.build(guest, deadline=deadline), guest


def test_both_roles_run_from_it(tmp_path: Path) -> None:
    disk, guest = _disk()
    folder = tmp_path / "disk"
    subprocess.run(["fsck.erofs", f"--extract={folder}", disk], check=True, capture_output=True)
    assert not list(folder.rglob("*.py")), "byte code alone: a VM must not compile"
    python = image.in_root(guest.root, image.recipe("guest")["python"])
    for role in ("host", "guest"):
        done = subprocess.run(
            [*python, "-I", "-S", str(folder), role],
            input=b'{"id": 1, "op": "hello", "args": {}}\n',
            env={"PYTHONHOME": str(guest.root / "usr")},
            capture_output=True,
            timeout=30,
        )
        assert json.loads(done.stdout.splitlines()[0])["role"] == role
        assert done.stderr == b""


def test_the_same_bytes_twice(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, guest = _disk()
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path_factory.mktemp("elsewhere")))
    again = agentdisk.build(guest, deadline=Deadline(300, "the agent's disk"))
    assert again != disk
    assert again.read_bytes() == disk.read_bytes()
