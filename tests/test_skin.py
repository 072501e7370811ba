# SPDX-License-Identifier: GPL-2.0-or-later
"""The rig's own skin: what other users reach of it, what VMs reach, and what a VM can do to it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import cache, config, logfile, process, reaper, scenarios, session
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.machine import Machine
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Guest, Rig
from qemu_ioasid.rigpool import Pool, Used
from qemu_ioasid.scenarios import Scenario
from qemu_ioasid.scenarios.checks import Checks
from qemu_ioasid.scenarios.table import Row
from qemu_ioasid.session import Options, Output
from qemu_ioasid.ssh import bounded

QUIET = Output(lambda line: None, lambda line: None, lambda line: None)
SECONDS = 60.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(QUIET)
    yield made
    made.close()


@pytest.fixture
def used(pool: Pool) -> Used:
    """The default rig, shared by the tests that leave it as it is."""
    return pool.shared(config.load(config.DEFAULT, {}), Options())


def told(machine: Machine, script: str, data: bytes = b"") -> str:
    """What a shell script says in a VM, as root."""
    return machine.ssh.output(script, Deadline(SECONDS, script), data).decode()


# Another user of the machine

#: What somebody tries with each path, pid and port of ours, as a user with a number; says what
#: succeeded.
ATTEMPTS = """
import json, os, socket, sys
given = json.load(sys.stdin)
if given["user"]:
    os.setgroups([]); os.setgid(given["user"]); os.setuid(given["user"])
for path in given["sockets"]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        print("connected to", path)
    except OSError:
        pass
files = [f"/proc/{pid}/{name}" for pid in given["pids"] for name in ("environ", "mem", "maps")]
files += [f"/proc/{pid}/fd/{fd}" for pid in given["pids"] for fd in range(40)]
for path in [*given["files"], *files]:
    for how in (os.O_RDONLY, os.O_WRONLY):
        try:
            os.close(os.open(path, how))
            print("opened", path)
        except OSError:
            pass
for pid in given["pids"]:
    try:
        os.kill(pid, 0)
        print("signalled", pid)
    except OSError:
        pass
for path in given["folders"]:
    try:
        os.listdir(path)
        print("listed", path)
    except OSError:
        pass
"""


def reached(user: int, **given: Sequence[Any]) -> list[str]:
    """What *user* gets at; 0 is ourselves."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ATTEMPTS],
        input=json.dumps({"user": user, **given}),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def of_ours(kind: str, pids: Sequence[int]) -> set[str]:
    """The inodes of the sockets that *pids* have, which /proc/net/KIND shows, with their lines."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(fd.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    lines = Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    return {line for line in lines if inodes & set(line.split())}


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_another_user_reaches_nothing_of_a_rig(used: Used, tmp_path: Path) -> None:
    for machine in (used.rig.host, *(guest.machine for guest in used.rig.guests.values())):
        # Connected, all of it: there is the most to reach now.
        assert machine.qmp.execute("query-status", Deadline(SECONDS, "status"))["running"]
    run = process.current_run()
    pids = [pid for pid in reaper.marked(run.token) if pid != os.getpid()]
    assert pids, "the rig has no process"
    # Nothing listens: not on the network, and every unix socket is a nameless pair.
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw"):
        assert not of_ours(kind, pids), kind
    named = [line.split()[7] for line in of_ours("unix", pids) if len(line.split()) > 7]
    assert named == []
    snapshots = list((cache.root() / "snapshot").glob("[!.]*"))
    folders = [run.folder, run.folder.parent, used.logs, *snapshots]
    files = [path for folder in folders for path in folder.glob("*") if path.is_file()]
    assert {path.name for path in files} >= {"ram", "state", "host.console.log", "g1.agent.log"}
    given: dict[str, Sequence[Any]] = {
        "pids": pids,
        "files": [str(path) for path in files],
        "folders": [str(path) for path in folders],
        "sockets": [],
    }
    # We reach all of that ourselves, or the attempts prove nothing.
    assert len(reached(0, **given)) > len(files) + len(pids)
    assert reached(65534, **given) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_logs_in_an_open_folder_are_their_users_alone(tmp_path: Path) -> None:
    """A report's folder is where its user wants it: any umask, any place."""
    tmp_path.chmod(0o777)
    with logfile.LogFile(tmp_path / "g1.console.log") as log:
        log.write(b"secret\n")
    (tmp_path / "open").write_text("not secret\n")
    (tmp_path / "open").chmod(0o644)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent.name:
            parent.chmod(parent.stat().st_mode | 0o055)
    files = [str(path) for path in tmp_path.iterdir()]
    got = reached(65534, files=files, folders=[str(tmp_path)], sockets=[], pids=[])
    assert got == [f"opened {tmp_path}/open", f"listed {tmp_path}"]


def test_logs_have_no_secret(used: Used) -> None:
    """SSH's host key, and what a VM's randomness comes from, pass through the agents."""
    assert told(used.rig.host, "echo yes") == "yes\n"
    text = (used.logs / "host.agent.log").read_text()
    for name in ("host_key", "entropy"):
        assert f'"{name}": "(not kept)"' in text
        assert text.count(f'"{name}"') == text.count(f'"{name}": "(not kept)"')


# What a VM reaches

#: What there is around a VM, as JSON.
AROUND = """
import errno, json, os, socket
def refused(*kind):
    try:
        socket.socket(*kind).close()
    except OSError as error:
        return errno.errorcode[error.errno]
def first(path):
    with open(path) as file:
        return file.read().strip()
def write(path):
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(bytes(512))
    except OSError as error:
        return errno.errorcode[error.errno]
pci = "/sys/bus/pci/devices"
print(json.dumps({
    "interfaces": sorted(os.listdir("/sys/class/net")) if os.path.exists("/sys/class/net") else [],
    "families": {name: refused(getattr(socket, name), socket.SOCK_STREAM)
                 for name in ("AF_INET", "AF_INET6", "AF_VSOCK")},
    "packet": refused(socket.AF_PACKET, socket.SOCK_RAW),
    "ports": sorted(os.listdir("/dev/virtio-ports")),
    "classes": sorted({first(f"{pci}/{name}/class") for name in os.listdir(pci)}),
    "disks": {name: write(f"/dev/{name}") for name in os.listdir("/sys/block")},
    "filesystems": [line.split()[-1] for line in open("/proc/filesystems")],
    "listening": [line.split()[7] for line in list(open("/proc/net/unix"))[1:]
                  if len(line.split()) > 7],
}))
"""

#: Classes of PCI devices (include/linux/pci_ids.h) that lead nowhere but to the VM itself:
#: host, ISA and PCI bridges, SMBus, SATA, what virtio calls its disks and ports, pdma.
HARMLESS = {
    *("0x060000", "0x060100", "0x060400", "0x0c0500", "0x010601", "0x010000", "0x078000"),
    "0x088000",
}


def test_a_vm_reaches_no_network_and_no_other_vm(used: Used) -> None:
    rig = used.rig
    to_us = [f"{port}.{name}" for port in ("agent", "console") for name in rig.guests]
    ports = {"host": ["agent", *to_us, "ssh"], **{name: ["agent", "ssh"] for name in rig.guests}}
    # One guest is as the other.
    for machine in (rig.host, rig.guests["g1"].machine):
        around = json.loads(told(machine, "python3 -", AROUND.encode()))
        assert around["interfaces"] in ([], ["lo"]), machine.name
        assert set(around["families"].values()) == {"EAFNOSUPPORT"}, machine.name
        assert around["packet"] == "EAFNOSUPPORT", machine.name
        # Each VM has ports of its own: the guests' lead to us, past the host VM's agent.
        assert around["ports"] == ports[machine.name]
        assert set(around["classes"]) <= HARMLESS, around["classes"]
        # What others boot from cannot be changed, and no folder of the machine is shared.
        assert around["disks"] and None not in around["disks"].values(), around["disks"]
        assert not {"9p", "virtiofs", "nfs", "cifs"} & set(around["filesystems"])
        named = [path for path in around["listening"] if not path.startswith("@/dev/")]
        inside = "/run/qemu-ioasid/" if machine is rig.host else "nowhere"
        assert all(path.startswith(inside) for path in named), named
    assert told(rig.host, "stat -c %a /run/qemu-ioasid /run/qemu-ioasid/*").split() == ["700"] * 3


# What a VM does to the rig

#: Stops the agent, says so, and says at its port what it is then given; the agent goes on after it.
AS_THE_AGENT = """
import ctypes, os, signal, sys
agents = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"/run/agent" in file.read().split(b"\\0")[1:5]:
                agents.append(int(pid))
    except OSError:
        pass
(agent,) = agents
os.kill(agent, signal.SIGSTOP)
device = os.stat("/dev/virtio-ports/agent").st_rdev
number = next(int(fd) for fd in os.listdir(f"/proc/{agent}/fd")
              if os.stat(f"/proc/{agent}/fd/{fd}").st_rdev == device)
port = ctypes.CDLL(None).syscall(438, os.pidfd_open(agent), number, 0)
print("stopped", flush=True)
data = sys.stdin.buffer.read()
while data:
    data = data[os.write(port, data):]
os.kill(agent, signal.SIGCONT)
"""
#: On the console: an escape sequence, a title, a bell, and a line that does not end.
EVIL = r"\033[2J\033]0;owned\007\r\010" + "A" * 3000


def answered(guest: Guest, line: Callable[[int], bytes]) -> Any:
    """What comes of a question to *guest* that *line* of its number answers, in the agent's place.

    The agent is stopped by then: it cannot be the one who answers.
    """
    deadline = Deadline(SECONDS, f"{guest.name} in its agent's place")
    script = f"exec python3 -c {shlex.quote(AS_THE_AGENT)}"
    with (
        contextlib.closing(guest.machine.ssh.run(script, deadline)) as channel,
        bounded(channel, deadline),
    ):
        assert channel.recv(100) == b"stopped\n"
        asked = guest.agent.start("nonce")
        channel.sendall(line(guest.agent.requests))
        channel.shutdown_write()
        assert channel.recv_exit_status() == 0
        return asked.result(deadline)


def _garbage(rig: Rig, guest: Guest) -> None:
    answered(guest, lambda number: b"\x1b[2J\xff{{{ nonsense\n")


def _escapes(rig: Rig, guest: Guest) -> None:
    error = {"type": "OSError", "errno": 5, "message": "\x1b[2J<script>\u202e" * 2000}
    answered(guest, lambda number: json.dumps({"id": number, "error": error}).encode() + b"\n")


def _flood(rig: Rig, guest: Guest) -> None:
    console = rig.host.guest_consoles[guest.name]
    script = f"while printf '{EVIL}'; do :; done >/dev/ttyS0"
    with contextlib.closing(guest.machine.ssh.run(script, Deadline(SECONDS, "flood"))):
        assert console.broken.wait(SECONDS)


Act = Callable[[Rig, Guest], None]
HOSTILE: dict[str, tuple[Act, int, str]] = {
    "garbage": (_garbage, 4, "g1: what the agent says is no answer: "),
    "escapes": (_escapes, 1, "g1: nonce: \\x1b[2J<script>\\u202e"),
    "flood": (_flood, 5, "g1: flood: more than 4 KiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_guest_ends_as_a_verdict(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real run, in which the first guest does its worst in the one check there is."""
    act, code, message = HOSTILE[name]

    def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
        with Checks(rig, report).check(name, "be hostile"):
            act(rig, rig.guests["g1"])

    row = Row("hostile", name, "be hostile", lambda *_: None)
    monkeypatch.setitem(scenarios.SCENARIOS, "hostile", Scenario(lambda _: [row], run))
    # Gigabytes take a guest under TCG hours: a limit that it can reach.
    monkeypatch.setattr(logfile, "LIMIT", 4 << 10)
    folder = tmp_path / "report"
    report = session.run(Options(scenario="hostile", report=folder), QUIET)
    said = report.error["message"] if report.error else report.checks[0].answered
    assert (report.exit_code, said[: len(message)]) == (code, message), report.document()
    # Disk: nothing outside the folder, every file bounded.
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    for path in folder.iterdir():
        most = 1 << 20 if path.name.startswith("report.") else 100 << 10
        assert path.stat().st_size < most, path
    # Reports and terminal: nothing acts.
    for kind in ("report.json", "report.html", "junit.xml"):
        text = (folder / kind).read_text()
        assert "\x1b" not in text and "\u202e" not in text, kind
        assert kind == "report.json" or "<script>" not in text, kind
    assert json.loads((folder / "report.json").read_text())["exit_code"] == code
    ElementTree.parse(folder / "junit.xml")
    out = "".join(capfd.readouterr())
    assert "\x1b" not in out and "Traceback" not in out
