# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs to have a rig: cold, restored, kept; how much memory, and how many at once."""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qemu_ioasid import config, standby
from qemu_ioasid.bench.table import Measurement, Ratio, Values, row
from qemu_ioasid.client import Agent
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import InfrastructureError, RigError
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.process import current_run
from qemu_ioasid.rig import Rig, copy
from qemu_ioasid.standby import Start

#: The host VM by itself.
BARE = '[host]\nmemory = "256M"\n'
MIB = 1 << 20
ROUND_TRIPS = 200
#: Rigs are added until one of these says stop: seconds to the first replies of one more,
#: memory left on the machine.
LATE_SECONDS = 5.0
LEFT = 2048 * MIB


class Rigs:
    """Starts the default rig and the bare one, and knows how long each step of it took."""

    def __init__(self, parts: HostParts) -> None:
        self.parts = parts
        self.full = config.load(config.DEFAULT)
        self.bare = config.parse(BARE, "the benchmark's host VM")
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name.partition(" the ")[0]] = time.monotonic() - started

    @contextlib.contextmanager
    def up(self, which: RigConfig, *, cold: bool = False) -> Iterator[Rig]:
        """A rig of that configuration."""
        self.seconds = {}
        with (
            tempfile.TemporaryDirectory(dir=current_run().folder) as logs,
            standby.start(
                which, self.parts, Start(cold=cold), self._phase, lambda line: None, Path(logs)
            ) as running,
        ):
            yield running


def measurements(rigs: Rigs) -> list[Measurement]:
    """Everything about the start of rigs, in an order in which snapshots are there when used."""
    return [
        Measurement("cold boots", "s", functools.partial(_cold, rigs)),
        Measurement("restores", "s", functools.partial(_restored, rigs)),
        Measurement("what a test pays", "ms", functools.partial(_fixtures, rigs)),
        Measurement("round trips", "ms", functools.partial(_round_trips, rigs)),
        Measurement("memory", "MiB", functools.partial(_memory, rigs)),
    ]


RATIOS = (
    Ratio(
        "cold boot to restore, full stack",
        ("cold boot, full stack, last agent's first reply",),
        ("restore, full stack, last agent's first reply",),
    ),
    Ratio(
        "cold boot to restore, host VM alone",
        ("cold boot, host VM alone, first reply",),
        ("restore, host VM alone, first reply",),
    ),
)


def _cold(rigs: Rigs) -> Values:
    with rigs.up(rigs.bare, cold=True):
        host = rigs.seconds["boot"]
    started = time.monotonic()
    with rigs.up(rigs.full, cold=True):
        full = time.monotonic() - started
    return {
        "cold boot, host VM alone, first reply": host,
        "cold boot, full stack, last agent's first reply": full,
    }


def _restored(rigs: Rigs) -> Values:
    found = {}
    for name, which in (("host VM alone, first", rigs.bare), ("full stack, last", rigs.full)):
        # The first one may have had to be saved.
        for _ in range(2):
            with rigs.up(which):
                seconds = rigs.seconds["restore"]
        agent = " agent's first" if which is rigs.full else ""
        found[f"restore, {name}{agent} reply"] = seconds
    return found


def _fixtures(rigs: Rigs) -> Values:
    started = time.monotonic()
    with rigs.up(rigs.full) as running:
        running.settle()
    own = time.monotonic() - started
    with rigs.up(rigs.full) as running:
        _between(running)
        started = time.monotonic()
        for _ in range(10):
            _between(running)
        shared = (time.monotonic() - started) / 10
    return {"a test with rig": 1000 * own, "a test with shared_rig": 1000 * shared}


def _between(running: Rig) -> None:
    """What shared_rig does for one test that did nothing."""
    running.settle()
    running.check_consoles()
    running.reset()


def _round_trips(rigs: Rigs) -> Values:
    with rigs.up(rigs.full) as running:
        agents = {"host VM": (running.host.agent, "ledger")}
        guest = next(iter(running.guests.values()))
        agents["guest"] = (guest.agent, "bindings")
        return {
            f"agent's round trip, {name}": 1000 * _trip(agent, op)
            for name, (agent, op) in agents.items()
        }


def _trip(agent: Agent, op: str) -> float:
    taken = []
    for _ in range(ROUND_TRIPS):
        started = time.monotonic()
        agent.call(op)
        taken.append(time.monotonic() - started)
    return statistics.median(taken)


def _private(pid: int) -> int:
    """The bytes of a process that no other shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _memory(rigs: Rigs) -> Values:
    with rigs.up(rigs.full), rigs.up(rigs.full) as second:
        up = _private(second.host.child.pid)
        held = second.bind("g1", "a", 0x4000, 0x4000)
        second.unbind(held)
        return {
            "memory a second rig adds, up": up / MIB,
            "memory a second rig adds, at work": _private(second.host.child.pid) / MIB,
        }


class Restores:
    """The default rig, restored again and again: how many times, and what was wrong with some.

    Right: every agent answered, each device moved bytes with a PASID of its own,
    and the ledger agrees with the kernel's lists.
    """

    def __init__(self, rigs: Rigs) -> None:
        self._rigs = rigs
        self._seconds: list[float] = []
        self._wrong: list[str] = []
        self.count = 0

    def once_more(self) -> None:
        """Restore it, have it work, and end it."""
        try:
            with self._rigs.up(self._rigs.full) as running:
                self._seconds.append(self._rigs.seconds["restore"])
                _work(running)
        except RigError as error:
            self._wrong.append(f"restore {self.count + 1}: {error.message}")
        self.count += 1

    def __str__(self) -> str:
        return f"{self.count} restores, {len(self._wrong)} of them wrong"

    def row(self) -> dict[str, object]:
        """The figures so far."""
        times = row("restores", "s", self._seconds or [0.0])
        return {**times, "count": self.count, "wrong": self._wrong}


def _work(running: Rig) -> None:
    for name, guest in running.guests.items():
        for device in guest.mdevs:
            held = running.bind(name, device, 0x4000, 0x4000)
            (done,) = guest.submit(device, copy(held.pasid, held.iova, held.iova + 64, 64))
            if done["status"] != "DONE":
                raise InfrastructureError(f"{device} answered {done}")
    if not running.registrar.audit()["agrees"]:
        raise InfrastructureError("the ledger and the kernel's lists differ")
    running.settle()
    running.check_consoles()


def side_by_side(rigs: Rigs) -> int:
    """How many full stacks are up at once before one more comes late or memory runs out."""
    count = 0
    with contextlib.ExitStack() as stack:
        while _available() > LEFT:
            started = time.monotonic()
            try:
                running = stack.enter_context(rigs.up(rigs.full))
                for guest in running.guests.values():
                    guest.agent.call("bindings", deadline=Deadline(LATE_SECONDS, "answer"))
            except RigError:
                break
            if time.monotonic() - started > LATE_SECONDS:
                break
            count += 1
    return count


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0
