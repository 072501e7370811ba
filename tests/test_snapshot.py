# SPDX-License-Identifier: GPL-2.0-or-later
"""Saved rigs: what may be trusted is restored, what may not is made anew; nothing is shared."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_ioasid import cache, config, snapshot
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.machine import Machine
from qemu_ioasid.rig import Rig, copy, restore
from qemu_ioasid.rigpool import Pool
from qemu_ioasid.session import Options, Output
from qemu_ioasid.snapshot import Unusable
from tests.conftest import Command

BARE = '[host]\nmemory = "256M"\n'


def _saved(folder: Path) -> Path:
    """A snapshot of a VM that never was: files as `save` leaves them, sealed."""
    folder.mkdir()
    with snapshot.saveable(folder, 8 << 20) as memory:
        fd = memory.fds[0]
        os.pwrite(fd, b"some", 0)
        os.pwrite(fd, b"more", 5 << 20)
    (folder / "state").write_bytes(os.urandom(4096))
    snapshot._tell(folder, ("ram", "state"), {"identity": {"kernel": "k"}, "rig": 7})
    snapshot.seal(folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return _saved(tmp_path / "snapshot")


def _refused(folder: Path, verify: bool = False) -> str:
    with pytest.raises(Unusable) as caught, snapshot.opened(folder, verify=verify):
        pass
    return str(caught.value)


def test_whole_and_sparse(saved: Path) -> None:
    for verify in (False, True):
        with snapshot.opened(saved, verify=verify) as found:
            assert found.known["rig"] == 7
            assert set(found.fds) == {"ram", "state"}
    assert (saved / "ram").stat().st_blocks * 512 < 1 << 20
    assert (saved / "ram").stat().st_mode & 0o777 == 0o400
    assert (saved / "snapshot.json").stat().st_mode & 0o077 == 0


def _change(path: Path, offset: int, keep_time: bool) -> None:
    before = path.stat()
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["ram", "state"])
def test_truncated(saved: Path, name: str) -> None:
    (saved / name).chmod(0o600)
    os.truncate(saved / name, 1000)
    assert "has 1000 bytes" in _refused(saved)


@pytest.mark.parametrize("name", ["ram", "state"])
def test_touched_or_gone(saved: Path, name: str) -> None:
    os.utime(saved / name)
    assert "changed after it was saved" in _refused(saved)
    (saved / name).unlink()
    assert f"{name}: No such file" in _refused(saved)


def test_a_flipped_byte_of_the_state(saved: Path) -> None:
    _change(saved / "state", 2000, keep_time=True)
    assert "other bytes" in _refused(saved)


@pytest.mark.parametrize("offset", [1, 4 << 20, (8 << 20) - 1])
def test_a_flipped_byte_of_the_memory(saved: Path, offset: int) -> None:
    """Found by --verify, and by the first use after the machine was started anew."""
    _change(saved / "ram", offset, keep_time=True)
    with snapshot.opened(saved, verify=False):
        pass
    assert "ram has other bytes" in _refused(saved, verify=True)
    told = json.loads((saved / "snapshot.json").read_text())["told"]
    snapshot._write_told(saved, {**told, "boot_id": "another"})
    assert "ram has other bytes" in _refused(saved)


def test_after_a_restart_it_is_read_once(saved: Path) -> None:
    told = json.loads((saved / "snapshot.json").read_text())["told"]
    snapshot._write_told(saved, {**told, "boot_id": "another"})
    with snapshot.opened(saved, verify=False):
        pass
    told = json.loads((saved / "snapshot.json").read_text())["told"]
    assert told["boot_id"] == snapshot._boot_id()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "list"])
def test_a_damaged_record(saved: Path, damage: str) -> None:
    path = saved / "snapshot.json"
    text = path.read_text()
    changed = {
        "flip": text.replace('"rig": 7', '"rig": 8'),
        "cut": text[: len(text) // 2],
        "empty": "",
        "list": "[]",
    }[damage]
    assert changed != text
    path.write_text(changed)
    assert "snapshot.json is damaged" in _refused(saved)


def test_a_copy_is_as_good(saved: Path, tmp_path: Path) -> None:
    """A cache that is packed and unpacked elsewhere keeps sizes, times and bytes."""
    subprocess.run(["cp", "-a", "--sparse=never", saved, tmp_path / "copy"], check=True)
    with snapshot.opened(tmp_path / "copy", verify=True):
        pass


def test_the_least_recently_used_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path))
    (tmp_path / "snapshot").mkdir()
    folders = [_saved(tmp_path / "snapshot" / name) for name in "abcd"]
    for age, folder in enumerate(folders):
        os.utime(folder, (1000 - age, 1000 - age))
    with snapshot.opened(folders[3], verify=False):
        cache.prune(snapshot.KIND, 2)
        assert sorted(path.name for path in (tmp_path / "snapshot").iterdir()) == ["a", "d"]
    assert snapshot.nearest({"kernel": "other"}) == "there is none; the nearest differs in kernel"


# With real VMs


@pytest.fixture
def private_cache(tmp_path: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A cache of the test's own for snapshots, with everything else that is built in it."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for entry in cache.root().iterdir():
        if entry.name != "snapshot":
            (folder / entry.name).symlink_to(entry)
    environment["QEMU_IOASID_CACHE"] = str(folder)
    (tmp_path / "bare.toml").write_text(BARE)
    yield folder
    shutil.rmtree(folder)


def _run(command: Command, *more: str, code: int = 0) -> tuple[str, list[str]]:
    """What a run of the host VM alone says, and its phases."""
    ended = command("run", "boot", "--rig", "bare.toml", "--json", *more)
    assert ended.code == code, ended.err
    return ended.err, [phase["name"] for phase in ended.json()["phases"]]


def _only(folder: Path) -> Path:
    (found,) = (folder / "snapshot").glob("[!.]*")
    return found


def test_made_once_then_restored_and_rebuilt_when_damaged(
    command: Command, private_cache: Path
) -> None:
    said, phases = _run(command)
    assert said.count("no snapshot to restore (there is none)") == 1, said
    assert phases.index("save the rig") < phases.index("restore the rig")
    made = _only(private_cache)
    for more in ([], ["--verify"]):
        said, phases = _run(command, *more)
        assert "no snapshot" not in said
        assert "restore the rig" in phases and "boot the host VM" not in phases
    _, phases = _run(command, "--cold")
    assert "boot the host VM" in phases and "restore the rig" not in phases

    def rebuilt(because: str, *more: str) -> None:
        said, phases = _run(command, *more)
        assert because in said
        assert "boot the host VM" in phases and "restore the rig" in phases
        assert _only(private_cache) == made

    _change(made / "state", 5000, keep_time=True)
    rebuilt("no snapshot to restore (state has other bytes than were saved)")
    _change(made / "ram", 100 << 20, keep_time=True)
    rebuilt("no snapshot to restore (ram has other bytes than were saved)", "--verify")


def test_another_option_is_another_rig(command: Command, private_cache: Path) -> None:
    _run(command)
    said, phases = _run(command, "--set", "host.viommu.caching-mode=true")
    assert "the nearest differs in command line, host)" in said
    assert "boot the host VM" in phases
    assert len(list((private_cache / "snapshot").glob("[!.]*"))) == 2


def test_killed_in_mid_save(
    private_cache: Path, tmp_path: Path, environment: dict[str, str], command: Command
) -> None:
    """What a SIGKILL leaves of a save is no snapshot, and is removed."""
    argv = [sys.executable, "-m", "qemu_ioasid.cli", "run", "boot", "--rig", "bare.toml"]
    run = subprocess.Popen(argv, cwd=tmp_path, env={**environment}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list((private_cache / "snapshot").glob(".*/state")):
        assert time.monotonic() < end
        assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 5
    while [path for path in (private_cache / "snapshot").iterdir() if path.is_dir()]:
        assert time.monotonic() < end, "the save of a killed process was left behind"
        time.sleep(0.05)
    said, _ = _run(command)
    assert "no snapshot to restore (there is none)" in said


def _mount(kind: str, target: Path, data: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(target).encode(), kind.encode(), 0, data.encode()):
        raise OSError(ctypes.get_errno(), "mount")


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("size", ["200M", "256M"])
def test_a_full_disk(command: Command, private_cache: Path, size: str) -> None:
    """No room for the memory, or for it and not for the state: the rig runs all the same."""
    place = private_cache / "snapshot"
    place.mkdir()
    _mount("tmpfs", place, f"size={size}")
    try:
        said, phases = _run(command)
        assert "No space left on device" in said
        assert "restore the rig" not in phases
        assert not [path for path in place.iterdir() if path.is_dir()]
    finally:
        ctypes.CDLL(None).umount2(str(place).encode(), 2)


def _uuid(machine: Machine) -> bytes:
    return machine.ssh.get("/proc/sys/kernel/random/uuid", Deadline(20, "random bytes"))


def _machines(rig: Rig) -> list[Machine]:
    return [rig.host, *(guest.machine for guest in rig.guests.values())]


def test_restored_rigs_are_not_twins() -> None:
    """Each VM of two rigs restored from one file has the right time and chance of its own."""
    pool = Pool(Output(print, print))
    shape = config.shape({"g1": ["a", "b"], "g2": ["c"]})
    with (
        contextlib.closing(pool),
        pool.fresh(shape, Options()) as one,
        pool.fresh(shape, Options()) as two,
    ):
        machines = [*_machines(one.rig), *_machines(two.rig)]
        assert len({_uuid(machine) for machine in machines}) == len(machines)
        for machine in machines:
            now = float(machine.ssh.output("date +%s", Deadline(20, "time")))
            assert abs(now - time.time()) < 5, machine.name
        held = one.rig.bind("g1", "a", 0x4000, 0x4000)
        work = copy(held.pasid, held.iova, held.iova + 64, 64)
        (done,) = one.rig.guests["g1"].submit("a", work)
        assert done["status"] == "DONE"
        (done,) = two.rig.guests["g1"].submit("a", work)
        assert done["status"] == "REFUSED"


def test_a_running_rig_is_saved_and_goes_on(rig: Rig, tmp_path: Path) -> None:
    """With SSH to all its VMs open: the saved one believes in none of those connections."""
    for machine in _machines(rig):
        _uuid(machine)
    held = rig.bind("g1", "a", 0x4000, 0x4000)
    work = copy(held.pasid, held.iova, held.iova + 64, 64)
    folder = tmp_path / "kept"
    folder.mkdir()
    rig.save(folder, {})
    (done,) = rig.guests["g1"].submit("a", work)
    assert done["status"] == "DONE"
    parts = Pool(Output(print, print)).parts(rig.config, Options())
    with (
        snapshot.opened(folder, verify=True) as found,
        restore(rig.config, parts, found, lambda name: contextlib.nullcontext(), tmp_path) as two,
    ):
        (done,) = two.guests["g1"].submit("a", work)
        assert done["status"] == "DONE"
        assert two.registrar.audit()["agrees"]
        for machine in _machines(two):
            _uuid(machine)
