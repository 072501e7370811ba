# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache: an entry is whole or absent, and built once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qemu_ioasid import cache
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import DeadlineExceeded, RequirementError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path / "cache"))


def test_digest_counts_the_borders_of_its_parts() -> None:
    assert cache.digest("ab", "c") != cache.digest("a", "bc")
    assert cache.digest("ab") == cache.digest(b"ab")
    assert len(cache.digest()) == 16


def test_second_call_finds_the_first_ones_work() -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("x")

    first = cache.get_or_build("kind", "key", build, deadline=Deadline(5, "build"))
    second = cache.get_or_build("kind", "key", build, deadline=Deadline(5, "build"))
    assert (first[1], second[1]) == (False, True)
    assert first[0] == second[0]
    assert (first[0] / "file").read_text() == "x"
    assert len(calls) == 1


def test_failed_build_leaves_nothing_and_can_be_tried_again() -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build("kind", "key", fail, deadline=Deadline(5, "build"))
    left = [name for name in os.listdir(cache.root() / "kind") if not name.endswith(".lock")]
    assert left == []
    path, found = cache.get_or_build(
        "kind", "key", lambda folder: None, deadline=Deadline(5, "build")
    )
    assert path.is_dir() and not found


def test_two_at_once_build_once() -> None:
    builds: list[int] = []
    waits: list[int] = []
    inside = threading.Event()
    go_on = threading.Event()

    def build(folder: Path) -> None:
        builds.append(1)
        inside.set()
        assert go_on.wait(10)

    def waiting() -> None:
        waits.append(1)
        go_on.set()

    def call() -> None:
        cache.get_or_build("kind", "key", build, deadline=Deadline(10, "build"), on_wait=waiting)

    threads = [threading.Thread(target=call) for _ in range(2)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(15)
    assert (builds, waits) == ([1], [1])


def test_waiting_for_a_lock_has_a_deadline_and_frees_it_later() -> None:
    path = cache.root() / "a.lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,2);"
            "print(flush=True); input()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(DeadlineExceeded, match="turn"), cache.locked(path, Deadline(0.3, "turn")):
        pass
    holder.communicate("\n", timeout=10)
    with cache.locked(path, Deadline(5, "turn")):
        pass


def test_a_place_that_cannot_be_written_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU_IOASID_CACHE", "/dev/full/cache")
    with pytest.raises(RequirementError, match="Not a directory"):
        cache.root()
    # A file that is full for everyone, root included.
    with (
        pytest.raises(RequirementError, match="make room"),
        cache.explained(tmp_path),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
