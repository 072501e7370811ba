# SPDX-License-Identifier: GPL-2.0-or-later
"""Labs without guests: how they begin and end, what is left, what is refused, who is let in."""

from __future__ import annotations

import contextlib
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

from qemu_ioasid import cache, config, reaper, snapshot
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.lab import attach, reopen
from qemu_ioasid.rigpool import Pool
from qemu_ioasid.session import Options, Output
from tests.lab import Player, player
from tests.starter import Ended


@pytest.fixture(scope="module")
def someone() -> Iterator[Player]:
    with player() as found:
        yield found


@pytest.fixture
def playing(someone: Player) -> Iterator[Player]:
    """Of whom no lab and no report is left to the next test."""
    yield someone
    someone.end()
    for path in someone.folder.iterdir():
        if path.name != "r":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def refused(ended: Ended, code: int) -> str:
    """The one line that a command which was refused with *code* wrote."""
    assert ended.code == code, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1 and not ended.out.strip(), ended
    return lines[0].removeprefix("qemu-ioasid: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ssh", "g1"], "no lab is up"),
        (["down"], "no lab is up"),
        (["down", "--name", "x"], "no lab x: none is up"),
        (["down", "--name", "x", "--all"], "one of them"),
        (["up", "nonesuch.toml"], "nonesuch.toml: No such file"),
        (["up", "--name", "a/b"], "a name is of letters"),
        (["up", "--report", "/proc/x/y"], "--report takes another folder"),
        (["open", "nonesuch"], "nonesuch: no such folder"),
        (["open", "."], "no rig was kept there"),
    ],
)
def test_misuse_without_a_lab(playing: Player, words: list[str], said: str) -> None:
    assert said in refused(playing.lab(*words), 2)
    assert not playing.tokens()
    assert not (playing.folder / "reports").exists() or words[0] == "open"


def test_no_lab_is_no_error(playing: Player) -> None:
    assert playing.ok("status") == "no lab is up\n"
    assert json.loads(playing.ok("status", "--json")) == []
    assert playing.ok("down", "--all") == "no lab is up\n"
    # Whatever this machine had from before.
    playing.ok("gc")
    assert "nothing is left" in playing.ok("gc")


def test_side_by_side_to_their_ends(playing: Player) -> None:
    bare = playing.bare()
    assert "lab one: up" in playing.ok("up", bare, "--name", "one")
    assert "lab one is up already" in refused(playing.lab("up", bare, "--name", "one"), 2)
    told = json.loads(playing.ok("up", bare, "--name", "two", "--report", "mine", "--json"))
    assert told["state"] == "up" and told["report"] == str(playing.folder / "mine")
    assert "--name takes one of one, two" in refused(playing.lab("ssh", "host", "true"), 2)
    assert playing.ok("ssh", "--name", "two", "host", "hostname; id -u").split()[-1] == "0"
    assert "no VM g1: lab two has host" in refused(playing.lab("ssh", "--name", "two", "g1"), 2)
    every = playing.lab("status", "--json").json()
    assert [(each["name"], each["state"]) for each in every] == [("one", "up"), ("two", "up")]
    tokens = playing.tokens()
    assert "lab one has ended" in playing.ok("down", "--name", "one")
    assert "lab two: up" in playing.ok("status")
    playing.ok("down")
    for token in tokens:
        playing.nothing_left(token, 0.1)
    assert not playing.base.exists()
    report = json.loads((playing.folder / "mine/report.json").read_text())
    assert report["exit_code"] == 0 and report["scenario"] == "lab"
    assert (playing.folder / "mine/host.console.log").exists()


def _keeper(playing: Player) -> tuple[int, str]:
    pid = playing.status()["pid"]
    return pid, playing.tokens()[0]


def test_a_keeper_that_is_killed_leaves_nothing(playing: Player) -> None:
    playing.ok("up", playing.bare())
    playing.ok("snapshot", "one")
    pid, token = _keeper(playing)
    assert len(reaper.marked(token)) == 1
    following = playing.start("console", "host", stderr=subprocess.PIPE)
    assert following.stdout is not None
    playing.ok("ssh", "host", "echo '<3>hello' >/dev/kmsg")
    while "hello" not in following.stdout.readline():
        pass
    os.kill(pid, signal.SIGKILL)
    playing.nothing_left(token)
    assert "its keeper is gone" in following.communicate(timeout=10)[1]
    assert following.returncode == 4
    assert playing.ok("status") == "no lab is up\n"


def test_keeper_and_reaper_killed(playing: Player) -> None:
    """A VM that cannot end by itself is then there until somebody looks."""
    playing.ok("up", playing.bare())
    pid, token = _keeper(playing)
    playing.ok("qmp", "host", "stop")
    assert "host is stopped" in refused(playing.lab("ssh", "host", "true"), 2)
    assert playing.status()["vms"][0]["state"] == "stopped"
    os.kill(_reaper(token), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    assert len(reaper.marked(token)) == 1
    gone = refused(playing.lab("ssh", "host", "true"), 4)
    assert "lab lab: its keeper is gone" in gone and "lab gc" in gone
    assert f"removed lab lab: its keeper (pid {pid}) is gone" in playing.ok("gc")
    playing.nothing_left(token, 0.1)
    assert "nothing is left" in playing.ok("gc")


def _reaper(token: str) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if any(word.endswith("reaper.py") for word in words) and token in " ".join(words):
                return int(path.parent.name)
    raise AssertionError(f"no reaper of {token}")


def test_a_lab_goes_with_its_run_folder(playing: Player) -> None:
    playing.ok("up", playing.bare())
    pid, token = _keeper(playing)
    # The lab ends as soon as a part is gone, and removes the rest beside us.
    shutil.rmtree(playing.base, ignore_errors=True)
    playing.nothing_left(token)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def test_scratch_of_a_machine_that_went_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Folders in the cache whose maker left no run folder: only those, and only old ones."""
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path))
    old, new, other = (
        tmp_path / "lab" / name
        for name in (".0123456789ab-abcdefgh", ".0123456789ac-x_x_x_x_", "x")
    )
    for folder in (old, new, other):
        folder.mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    assert cache.sweep() == [old]
    assert sorted(path.name for path in (tmp_path / "lab").iterdir()) == sorted(
        [new.name, other.name]
    )


def test_scratch_in_use_is_not_swept() -> None:
    with cache.scratch("lab") as folder:
        os.utime(folder, (0, 0))
        assert folder not in cache.sweep()
        assert folder.exists()


def test_interrupted_while_it_comes_up(playing: Player) -> None:
    starting = playing.start("up", playing.bare(), "--cold", stderr=subprocess.PIPE)
    token = ""
    end = time.monotonic() + 60
    while not (token and reaper.marked(token)):
        assert time.monotonic() < end
        token = (playing.tokens() or [""])[0]
        time.sleep(0.02)
    assert "is still coming up" in refused(playing.lab("ssh", "host", "true"), 4)
    assert playing.status()["state"] == "coming up"
    starting.send_signal(signal.SIGINT)
    assert starting.wait(30) == 130
    starting.communicate()
    playing.nothing_left(token, 0.1)
    (report,) = (playing.folder / "reports").iterdir()
    assert json.loads((report / "report.json").read_text())["verdict"] == "interrupted"


def test_what_keeps_it_from_coming_up_is_told(playing: Player) -> None:
    ended = playing.lab("up", playing.bare(), "--qemu", "nonesuch")
    assert ended.code == 3
    assert "--qemu nonesuch: no such program" in ended.err
    assert not playing.base.exists()
    (report,) = (playing.folder / "reports").iterdir()
    assert json.loads((report / "report.json").read_text())["exit_code"] == 3


def test_another_user_reaches_nothing(playing: Player) -> None:
    playing.ok("up", playing.bare())
    (token,) = playing.tokens()
    (states,) = Path(playing.environment["QEMU_IOASID_CACHE"]).glob(f"lab/.{token}*")
    folder = playing.base / token
    for path in (playing.base, folder, states):
        assert path.stat().st_mode & 0o077 == 0, path
    if os.getuid() != 0:
        return
    # From above its folder, a way to which a user has.
    attempt = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for act in (os.listdir, socket.socket(socket.AF_UNIX).connect):\n"
        "    try:\n"
        "        act(sys.argv[1] if act is os.listdir else sys.argv[1] + '/lab')\n"
        "    except PermissionError:\n"
        "        continue\n"
        "    sys.exit('got in')\n"
    )
    playing.folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-I", "-c", attempt, str(folder)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_panic_is_noticed_told_and_undone(playing: Player) -> None:
    playing.ok("up", playing.bare())
    playing.ok("snapshot", "well")
    assert "has a snapshot well already" in refused(playing.lab("snapshot", "well"), 2)
    assert "has no snapshot ill: there is well" in refused(playing.lab("restore", "ill"), 2)
    assert "snapshot '../x': a name is of" in refused(playing.lab("snapshot", "../x"), 2)
    playing.ok("ssh", "host", "echo 1 >/proc/sys/kernel/unknown_nmi_panic")
    playing.ok("qmp", "host", "inject-nmi")
    first = playing.lab("console", "host")
    assert first.code == 0 and "Kernel panic - not syncing: NMI" in first.out
    ended = playing.lab("ssh", "host", "true")
    assert ended.code == 5
    assert "lab lab is down: host: panic" in ended.err
    assert "lab restore brings a snapshot back" in ended.err
    # By whichever of the two came after it.
    assert (first.err + ended.err).count("qemu-ioasid: lab lab: host: panic: Kernel") == 1
    assert "lab lab is down: host: panic" in refused(playing.lab("ssh", "host", "true"), 5)
    status = playing.ok("status")
    assert "lab lab: down" in status and "nmi_panic" in status
    playing.ok("restore", "well")
    assert playing.ok("ssh", "host", "cat /proc/sys/kernel/unknown_nmi_panic") == "0\n"
    assert playing.status()["state"] == "up"


def test_a_kept_failure_is_resumed_or_refused(playing: Player, tmp_path: Path) -> None:
    pool = Pool(Output(lambda line: None, lambda line: None))
    report = tmp_path / "kept"
    configuration = config.load(Path(playing.bare()))
    with pool.fresh(configuration, Options()) as used:
        used.rig.host.ssh.put({"/tmp/mark": b"as it was"}, Deadline(60, "file in the VM"))
        used.keep(report, "test", snapshot=True)
    playing.ok("open", str(report))
    assert playing.ok("ssh", "host", "cat /tmp/mark") == "as it was"
    playing.ok("ssh", "host", "rm /tmp/mark")
    playing.ok("restore", "opened")
    assert playing.ok("ssh", "host", "cat /tmp/mark") == "as it was"
    playing.ok("down")
    told = json.loads((report / "snapshot/snapshot.json").read_text())["told"]
    identity = told["known"]["identity"]
    for change, said in (
        ({"kernel": "/nonesuch/vmlinux"}, "/nonesuch/vmlinux is gone"),
        ({"QEMU": ["9.9", *identity["QEMU"][1:]]}, "QEMU is not what it was"),
        ({"mdevs": None}, "was not saved by this version"),
    ):
        changed = {**told["known"], "identity": {**identity, **change}}
        snapshot._write_told(report / "snapshot", {**told, "known": changed})
        with reopen.found(report) as saved, pytest.raises(ConfigurationError, match=said):
            reopen.parts(saved)
    (report / "snapshot/snapshot.json").write_text("{}")
    assert "cannot be restored" in refused(playing.lab("open", str(report)), 2)


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        (["ls ~.\r"], "ls ~.\r"),
        (["~", "x"], "~x"),
        (["a\r", "~", "."], None),
        (["a\r~."], None),
        (["~~."], "~~."),
        (["\r~", "\r~."], None),
    ],
)
def test_the_escape_from_a_session(typed: list[str], passed: str | None) -> None:
    keys = attach._Keys(True)
    got = [keys.passed(each.encode()) for each in typed]
    assert (None if None in got else b"".join(filter(None, got)).decode()) == passed
    assert attach._Keys(False).passed(b"~.") == b"~."
