"""A guest's process: a Python child stands where QEMU would, all files and signals are real.

The "devices" are pipes: that a PASID list dies with the last close is the kernel's business, that
the last close happens is this module's.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_ioasid.agent import guestvm
from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.guestvm import GuestVm, substituted
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.monitor import Refused
from qemu_ioasid.agent.spawn import Spawner
from qemu_ioasid.agent.vfio import VfioDevice
from tests.agent.conftest import ROOT, SECONDS

PYTHON = sys.executable

# what QEMU does with what it is given: maps the RAM, accepts on the socket, holds the device
CHILD = """
import json, mmap, os, socket, sys
memory, iommufd, device, listener = map(int, sys.argv[1:5])
inherited = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
ram = mmap.mmap(memory, os.fstat(memory).st_size)
ram[0:5] = b"hello"
print("on stdout", flush=True)
connection, _ = socket.socket(fileno=listener).accept()
connection.sendall(json.dumps({"inherited": inherited, "pid": os.getpid()}).encode())
connection.recv(1)
sys.stderr.write("a last word")
sys.exit(7)
"""
ARGV = [PYTHON, "-c", CHILD, "{memory}", "{iommufd}", "{device:a}", "{socket:qmp}"]


class Parts:
    """A GuestVm with pipes for its iommufd and its device, and their other ends."""

    def __init__(self) -> None:
        self.device_end, device = os.pipe()
        self.iommufd_end, iommufd = os.pipe()
        space = Iommufd(Descriptor(iommufd, "g1"))
        self.guest = GuestVm(
            "g1", 1 << 20, False, space, {"a": VfioDevice(Descriptor(device, "a"), "vfio0", space)}
        )
        self.exits: list[tuple[int | None, bool, bool]] = []
        #: What was unplugged, and whether it was closed here by then.
        self.unplugged: list[tuple[str, bool]] = []

    def on_exit(self, guest: GuestVm) -> None:
        """Notes the return code, and whether device and iommufd are closed everywhere."""
        self.exits.append((guest.returncode, hung_up(self.device_end), hung_up(self.iommufd_end)))

    def start(self, argv: list[str]) -> int:
        """Starts the guest with one socket."""
        return self.guest.start(Spawner(), argv, ["qmp"], self.on_exit, self.on_unplugged)

    def on_unplugged(self, device: VfioDevice) -> None:
        """Notes the device."""
        self.unplugged.append((device.name, device.descriptor.closed))


def hung_up(fd: int) -> bool:
    """Nobody has the other end of this pipe any more."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    monkeypatch.setattr(guestvm, "RUNTIME", str(tmp_path / "run"))
    made = Parts()
    yield made
    made.guest.stop(SECONDS)
    made.guest.forget()
    os.close(made.device_end)
    os.close(made.iommufd_end)


def connected(parts: Parts) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(SECONDS)
    client.connect(parts.guest.socket_paths["qmp"])
    return client


def test_the_child_gets_exactly_its_files(parts: Parts) -> None:
    pid = parts.start(ARGV)
    folder = Path(parts.guest.socket_paths["qmp"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with connected(parts) as client:
        said = json.loads(client.recv(4096))
        # 0, 1, 2, the four of its own, the monitor, and the folder that listdir itself has open
        assert len(said["inherited"]) == 3 + 4 + 1 + 1
        assert said["pid"] == pid
        assert parts.guest.memory[0:5] == b"hello"
        assert parts.guest.running
        with pytest.raises(OSError, match="is running") as caught:
            parts.guest.forget()
        assert caught.value.errno == errno.EBUSY


def test_a_guest_that_ends_by_itself_is_torn_down(parts: Parts) -> None:
    parts.start(ARGV)
    folder = Path(parts.guest.socket_paths["qmp"]).parent
    with connected(parts) as client:
        client.recv(4096)
        assert not hung_up(parts.device_end)
        client.sendall(b"x")
        parts.guest._gone.wait(SECONDS)
    assert parts.exits == [(7, True, True)]
    assert parts.guest.returncode == 7
    assert parts.guest.output() == "on stdout\na last word"
    assert not folder.exists()
    # what it wrote can still be read: the other witness outlives the guest
    assert parts.guest.memory[0:5] == b"hello"


def test_stop_kills_and_closes_before_it_returns(parts: Parts) -> None:
    pid = parts.start([PYTHON, "-c", "import time; time.sleep(600)"])
    parts.guest.stop(SECONDS)
    assert parts.exits == [(-signal.SIGKILL, True, True)]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    parts.guest.stop(SECONDS)
    assert len(parts.exits) == 1


def test_a_call_in_progress_delays_the_close_and_stop_says_so(parts: Parts) -> None:
    parts.start([PYTHON, "-c", "import time; time.sleep(600)"])
    with parts.guest.devices["a"].descriptor.borrowed():
        parts.guest.stop(SECONDS)
        assert parts.exits == [(-signal.SIGKILL, False, True)]
    assert hung_up(parts.device_end)


def test_output_has_an_end(parts: Parts) -> None:
    """A guest that has QEMU complain for ever fills no memory."""
    complaints = """
import contextlib, os
for _ in range(100):
    with contextlib.suppress(PermissionError):
        os.write(2, b"complaint " * 10000)
"""
    parts.start([PYTHON, "-c", complaints])
    parts.guest._gone.wait(SECONDS)
    assert parts.guest.returncode == 0
    assert parts.guest.output().count("complaint") > 700
    assert len(parts.guest.output()) == guestvm.OUTPUT_TAIL
    assert os.fstat(parts.guest._output).st_blocks * 512 <= guestvm.OUTPUT_LIMIT


def test_a_command_that_cannot_run_leaves_nothing(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        parts.start(["/nowhere/qemu"])
    assert hung_up(parts.device_end) and hung_up(parts.iommufd_end)
    assert list((tmp_path / "run").iterdir()) == []
    assert not parts.guest.running
    assert parts.exits == []


def test_a_folder_left_by_a_killed_agent_is_no_obstacle(parts: Parts, tmp_path: Path) -> None:
    left = tmp_path / "run" / "g1"
    left.mkdir(parents=True)
    (left / "qmp").write_text("stale")
    parts.start(ARGV)
    with connected(parts) as client:
        assert client.recv(4096)


# what QEMU's monitor does with devices; any other device than "a" cannot be plugged in
MONITOR = """
import json, os, socket, sys
monitor = socket.socket(fileno=int(sys.argv[1]))
os.close(int(sys.argv[2]))
monitor.sendall(b'{"QMP": {}}\\r\\n')
data, passed = b"", []
while True:
    said, fds, _, _ = socket.recv_fds(monitor, 4096, 4)
    if not said:
        sys.exit(3)
    data += said
    passed += fds
    *lines, data = data.split(b"\\n")
    for line in map(json.loads, lines):
        arguments, answer = line.get("arguments", {}), {"return": {}, "id": line["id"]}
        if line["execute"] == "device_add" and arguments["id"] != "a":
            os.close(passed.pop())
            answer = {"error": {"class": "GenericError", "desc": "no such thing"}, "id": line["id"]}
        if line["execute"] == "device_del":
            gone = {"device": arguments["id"], "path": "/machine"}
            for event in ({"event": "DEVICE_UNPLUGGED"}, {"event": "DEVICE_DELETED", "data": gone}):
                monitor.sendall(json.dumps(event).encode() + b"\\r\\n")
            if passed:
                os.close(passed.pop())
        if line["execute"] == "device_del" and arguments["id"] == "garbage":
            monitor.sendall(b"what?\\n")
            # Nobody reads an answer any more.
            continue
        monitor.sendall(json.dumps(answer).encode() + b"\\r\\n")
"""
MONITORED = [PYTHON, "-c", MONITOR, "{monitor}", "{device:a}"]


def device(name: str) -> tuple[int, VfioDevice]:
    """A pipe for a device, and its other end."""
    end, fd = os.pipe()
    return end, VfioDevice(Descriptor(fd, name), "vfio1")


def test_a_device_that_qemu_lets_go_of_is_closed_here(parts: Parts) -> None:
    parts.start(MONITORED)
    parts.guest.unplug("a", SECONDS)
    parts.guest.wait_unplugged("a", SECONDS)
    assert parts.unplugged == [("a", True)] and hung_up(parts.device_end)
    assert parts.guest.running and not parts.guest.devices
    with pytest.raises(KeyError, match="no device 'a'"):
        parts.guest.unplug("a", SECONDS)
    # Plugged in again: QEMU has a copy of its file, and closes it.
    end, again = device("a")
    parts.guest.plug(again, {"driver": "vfio-pci"}, SECONDS)
    assert not hung_up(end) and parts.guest.devices == {"a": again}
    parts.guest.unplug("a", SECONDS)
    parts.guest.wait_unplugged("a", SECONDS)
    assert hung_up(end)
    os.close(end)


def test_a_device_that_qemu_refuses_is_closed(parts: Parts) -> None:
    parts.start(MONITORED)
    end, refused = device("b")
    with pytest.raises(Refused, match="no such thing"):
        parts.guest.plug(refused, {"driver": "vfio-pci"}, SECONDS)
    assert hung_up(end) and list(parts.guest.devices) == ["a"]
    os.close(end)
    with pytest.raises(TimeoutError, match="g1 let go of a"):
        parts.guest.wait_unplugged("a", 0.01)


def test_a_monitor_that_ends_does_not_end_the_guest(parts: Parts) -> None:
    parts.start(MONITORED)
    assert parts.guest._monitor
    with pytest.raises(ConnectionError):
        parts.guest._monitor.execute("device_del", {"id": "garbage"}, SECONDS)
    parts.guest._gone.wait(SECONDS)
    assert parts.exits == [(3, True, True)]
    end, late = device("b")
    with pytest.raises(ConnectionError):
        parts.guest.plug(late, {}, SECONDS)
    assert hung_up(end)
    os.close(end)


def test_substitution_leaves_other_braces_alone() -> None:
    argv = ['{"driver":"x"}', "fd={memory},size={size}", "{memory}{memory}"]
    assert substituted(argv, {"memory": 5}) == ['{"driver":"x"}', "fd=5,size={size}", "55"]


AGENT = """
import os, sys, threading, time
from qemu_ioasid.agent.spawn import Spawner
spawner = Spawner()
def request():
    process = spawner.spawn([sys.executable, "-c", "import time; time.sleep(600)"], [], 2)
    print(process.pid, flush=True)
thread = threading.Thread(target=request)
thread.start()
thread.join()
time.sleep(600)
"""


def test_the_child_outlives_the_thread_that_asked_and_dies_with_the_agent() -> None:
    with subprocess.Popen([PYTHON, "-c", AGENT], stdout=subprocess.PIPE, cwd=ROOT) as agent:
        assert agent.stdout
        child = os.pidfd_open(int(agent.stdout.readline()))
        poll = select.poll()
        poll.register(child, select.POLLIN)
        # the requesting thread has ended before the agent sleeps; a tie to it would show here
        assert not poll.poll(500)
        agent.kill()
        assert poll.poll(SECONDS * 1000)
        os.close(child)


def test_many_threads_may_spawn_at_once() -> None:
    spawner = Spawner()
    codes: list[int] = []

    def spawn(code: int) -> None:
        codes.append(spawner.spawn(["sh", "-c", f"exit {code}"], [], 2).wait())

    threads = [threading.Thread(target=spawn, args=(code,)) for code in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert sorted(codes) == list(range(10))
