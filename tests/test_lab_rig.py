# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab with guests: sessions on terminals, consoles, monitors, PASIDs, files, gdb."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Player, Screen, player


@pytest.fixture(scope="module")
def playing() -> Iterator[Player]:
    with player() as someone:
        someone.ok("up")
        yield someone


def test_two_terminals_and_a_pipe(playing: Player) -> None:
    with (
        Screen(playing, "lab", "ssh", "g1", size=(101, 31)) as one,
        Screen(playing, "lab", "ssh", "g2", size=(72, 20)) as two,
    ):
        assert "31 101" in one.run("stty size")
        assert "20 72" in two.run("stty size")
        assert one.raw and "/dev/pts/" in one.run("tty")
        one.resize(90, 40)
        one.popen.send_signal(signal.SIGWINCH)
        assert "40 90" in one.run("stty size")
        # Ctrl-C is the VM's, and ends what runs there only.
        two.prompt()
        # From the program itself: what ends a shell that is about to start one is another matter.
        two.type("sh -c 'echo is\"\"there; exec sleep 1000'\r")
        two.wait_for("isthere")
        two.type("\x03")
        assert "xterm" in two.run("echo $TERM")
        one.prompt()
        one.type("touch /tmp/one; exit 5\r")
        assert one.ends() == 5
        assert "No such file" in two.run("ls /tmp/one")
        # What the VM does not let go of, the user does.
        two.prompt()
        two.type("sleep 1000\r")
        two.wait_for("sleep 1000")
        two.type("\r~.")
        assert two.ends() == 255
    assert playing.ok("ssh", "g1", "ls /tmp/one") == "/tmp/one\n"
    ended = playing.lab("ssh", "g2", "cat; echo err >&2; exit 3", text="a\nb\n")
    assert (ended.code, ended.out, ended.err) == (3, "a\nb\n", "err\n")
    assert playing.lab("ssh", "g2", "kill -9 $$").code == 255


def test_a_console_does_nothing_to_the_terminal(playing: Player) -> None:
    following = playing.start("console", "g1", stderr=subprocess.PIPE)
    assert following.stdout is not None
    evil = r"printf '<3>\033[2Jred\007\033]0;title\007 \xff end\n' >/dev/kmsg"
    playing.ok("ssh", "g1", evil)
    text = ""
    while "end" not in text:
        text = following.stdout.readline()
        assert text.isprintable() or text[:-1].isprintable()
    assert "red" in text and "\\x1b[2J" in text.replace("\\\\", "\\")
    following.send_signal(signal.SIGINT)
    assert following.wait(10) == 0
    assert following.communicate()[1] == ""


def test_monitors(playing: Player) -> None:
    assert json.loads(playing.ok("qmp", "g1", "query-name")) == {"name": "g1"}
    asked = '{"execute": "qom-get", "arguments": {"path": "/machine", "property": "type"}}'
    assert json.loads(playing.ok("qmp", "host", asked)).startswith("pc-q35")
    assert json.loads(
        playing.ok("qmp", "host", "qom-get", "path=/machine", "property=type")
    ).startswith("pc-q35")
    assert playing.ok("qmp", "--hmp", "g2", "info", "name") == "g2\n"
    for words, said in (
        (["nonesuch"], "host: nonesuch: The command nonesuch has not been found"),
        (["{"], 'must be JSON with "execute"'),
    ):
        ended = playing.lab("qmp", "host", *words)
        assert ended.code == 2 and said in ended.err, ended
    # The shell is qmp-shell, and hears of what happens meanwhile.
    said = playing.ok("qmp", "host", text="query-name\nstop\n\ncont\nnonesuch\n")
    assert '{"return": {"name": "host"}}' in said
    assert "'event': 'STOP'" in said
    assert "The command nonesuch has not been found" in said
    assert "VM status: running" in playing.ok("qmp", "--hmp", "g1", text="info status\n")


def test_pasids(playing: Player) -> None:
    first = json.loads(playing.ok("pasid", "register", "g1", "a", "--json"))
    second = json.loads(playing.ok("pasid", "register", "g1", "b", "--json"))
    assert first["offset"] == 0x10000 and second["offset"] == 0x20000
    chosen = playing.ok("pasid", "register", "g2", "c", "--pasid", "0x4d", "--length", "8192")
    assert "PASID 77 on c" in chosen and "0x2000 bytes" in chosen
    told = json.loads(playing.ok("pasid", "list", "--json"))
    rows = {(row["device"], row["pasid"]): row for row in told["registrations"]}
    assert set(rows) == {("a", first["pasid"]), ("b", second["pasid"]), ("c", 77)}
    assert all(row["kernel"]["state"] == "open" for row in rows.values())
    assert rows["c", 77]["bound"]["length"] == 8192
    assert told["audit"]["agrees"]
    text = playing.ok("pasid", "list")
    assert "3 registered, 2 allocated" in text and "agree" in text
    for words, code, said in (
        (["register", "g1", "c"], 2, "g1 has no mdev c: it has a, b"),
        (["register", "g1", "a", "--offset", "0x1ff000"], 2, "is not in g1's arena"),
        (["register", "g2", "c", "--pasid", "77"], 1, "(EEXIST)"),
        (["register", "g2", "c", "--pasid", str(first["pasid"])], 1, "(EBUSY)"),
        (["unregister", "a", "99"], 2, f"a has no PASID 99: it has {first['pasid']}"),
    ):
        ended = playing.lab("pasid", *words)
        assert ended.code == code and said in ended.err, ended
        assert len(ended.err.splitlines()) == 1, ended
    for device, pasid in rows:
        playing.ok("pasid", "unregister", device, str(pasid))
    assert playing.ok("pasid", "list").startswith("0 registered, 0 allocated")


def test_files(playing: Player) -> None:
    program = playing.folder / "program"
    program.write_bytes(b"#!/bin/sh\necho ran\nexit\n" + bytes(range(256)) * 300)
    program.chmod(0o755)
    playing.ok("push", "host", "program")
    assert playing.ok("ssh", "host", "/tmp/program").startswith("ran\n")
    playing.ok("push", "g1", "program", "/tmp/other name")
    playing.ok("pull", "g1", "/tmp/other name", "back")
    assert (playing.folder / "back").read_bytes() == program.read_bytes()
    before = sorted(path.name for path in playing.folder.iterdir())
    for words, code, said in (
        (["push", "g1", "nonesuch"], 2, "nonesuch: No such file"),
        (["push", "g1", "program", "/nonesuch/x"], 1, "nonexistent directory"),
        (["pull", "g1", "/nonesuch"], 1, "No such file"),
    ):
        ended = playing.lab(*words)
        assert ended.code == code and said in ended.err, ended
    assert sorted(path.name for path in playing.folder.iterdir()) == before


def test_gdb(playing: Player) -> None:
    """A breakpoint in the driver, which a registration runs into; one in a guest's kernel."""
    line = playing.ok("gdb", "--print")
    assert "vfio_pdma.ko 0x" in line and f"target remote {playing.base}" in line
    kernel = line.split("'")[2].split()[0]
    assert Path(kernel).name == "vmlinux"
    script = ["-batch", "-ex", "break pdma_pasid_attach_ioas", "-ex", "c", "-ex", "bt 4"]
    debugging = playing.start("gdb", "host", *script)
    assert debugging.stdout is not None
    _wait_line(debugging, "Breakpoint 1 at")
    _wait_running(playing, "host")
    registering = playing.start("pasid", "register", "g1", "a", "--json")
    said = debugging.communicate(timeout=60)[0]
    assert "in pdma_pasid_attach_ioas" in said and "vfio_df_ioctl_attach_pt" in said
    pasid = json.loads(registering.communicate(timeout=60)[0])["pasid"]
    playing.ok("pasid", "unregister", "a", str(pasid))
    debugging = playing.start("gdb", "g1", "-batch", "-ex", "break __x64_sys_newuname", "-ex", "c")
    _wait_line(debugging, "reakpoint 1 at")
    _wait_running(playing, "g1")
    assert playing.ok("ssh", "g1", "uname -s") == "Linux\n"
    assert "in __x64_sys_newuname" in debugging.communicate(timeout=60)[0]


def _wait_running(playing: Player, vm: str) -> None:
    """Return when gdb, which has it stopped, has let it go on."""
    while json.loads(playing.ok("qmp", vm, "query-status"))["status"] != "running":
        pass


def _wait_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line


def test_a_guest_that_ends_is_told_of(playing: Player) -> None:
    """The rest goes on; and is saved, and restored, without it."""
    playing.ok("qmp", "g2", "quit")
    ended = playing.lab("ssh", "g2", "true")
    assert ended.code == 4 and "g2 is down: its QEMU has ended" in ended.err
    assert "lab reload boots the guests again" in ended.err
    playing.ok("snapshot", "without-g2")
    states = {vm["name"]: vm["state"] for vm in playing.status()["vms"]}
    assert states == {"host": "up", "g1": "up", "g2": "down"}
    assert playing.ok("ssh", "g1", "echo here") == "here\n"
    assert playing.ok("pasid", "list").startswith("0 registered")
