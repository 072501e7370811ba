# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``stress``: everything at once in the host VM, and the rules hold meanwhile.

A C program (``qemu_ioasid/stress``) does it, on mdevs of its own; `stress.h` there says what it
does and what it finds. Afterwards nothing is left, and on a kernel that can tell (``--profile
debug``) nothing was lost.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu_ioasid import config, cprogram
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios.checks import Checks, Skipped, Trial
from qemu_ioasid.scenarios.table import Row

RIG = config.DEFAULT.with_name("stress.toml")
SOURCES = Path(__file__).parents[1] / "stress"
SECONDS = 60
#: Where the program is put in the VM, and the driver that it unloads and loads there.
PROGRAM = "/run/stress/stress"
MODULE = "/run/modules/vfio_pdma.ko"
#: What it may take beside the time it is given: it waits 90 s for what hangs, thrice at most.
END_SECONDS = 300.0
SCAN_SECONDS = 120.0
#: From so many seconds on, everything there is must have happened.
ENOUGH = 60


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises ConfigurationError for a rig that cannot race, or has guests."""
    if config.guests or config.host.cpus < 2:
        raise ConfigurationError(
            f"{config.path}: scenario stress takes a host VM of 2 vCPUs and no guests"
        )
    return [
        Row("races", "races", "everything at once, from threads and processes", Races.hold),
        Row("races", "leaks", "whether the kernel has lost memory by it", Races.leak),
    ]


def run(
    rig: Rig, report: Report, rows: Sequence[Row], seconds: int = SECONDS, seed: int | None = None
) -> None:
    """Race for *seconds*; *seed* is what the program draws its choices from, not their order."""
    races = Races(rig, seconds, secrets.randbelow(1 << 32) if seed is None else seed)
    checks = Checks(rig, report)
    with report.phase("races"):
        checks.make(rows, races)


class Races:
    """The program in the host VM of *rig*, run once."""

    def __init__(self, rig: Rig, seconds: int, seed: int) -> None:
        self._rig = rig
        self._seconds = seconds
        self._seed = seed

    @functools.cached_property
    def _told(self) -> dict[str, Any]:
        host = self._rig.host
        assert host.parts is not None
        deadline = Deadline(60, "the stress program, compiled")
        sources = sorted(SOURCES.glob("*.[ch]"))
        headers = host.parts.kernel.parent / "headers"
        cprogram.put(host, PROGRAM, cprogram.build(sources, headers, deadline))
        deadline = Deadline(self._seconds + END_SECONDS, "end of the stress program")
        command = f"{PROGRAM} {self._seconds} {self._seed} {MODULE}; [ $? -le 1 ]"
        # What hangs in a kernel that has said so may never end.
        said = host.ssh.output(command, deadline, unless=host.console.broken)
        (self._rig.logs / "stress.json").write_bytes(said)
        told: dict[str, Any] = json.loads(said)
        self._rig.settle()
        return told

    @property
    def _can_tell(self) -> bool:
        return bool(self._rig.host.hello["kernel"].get("kmemleak"))

    @staticmethod
    def _scan() -> Deadline:
        return Deadline(SCAN_SECONDS, "the kernel's search for what it has lost")

    def hold(self, trial: Trial) -> None:
        """The program has nothing to complain of, and something of every kind was done."""
        trial.tried = f"{trial.tried}; {self._seconds} s, seed {self._seed}"
        told = self._told
        counts = told["counts"]
        trial.answer(", ".join(f"{count} {name}" for name, count in counts.items()))
        # One that a killed process was about to make has no words.
        complaints = list(filter(None, told["complaints"])) or ["a holder's, killed meanwhile"]
        trial.require(not told["many"], "; ".join(complaints[:4]))
        wanted = counts if self._seconds >= ENOUGH else ("done", "refused", "judged")
        missing = [name for name in wanted if not counts[name]]
        if missing:
            # A machine too busy for it says nothing about the kernel.
            raise InfrastructureError(f"stress proves nothing: no {', '.join(missing)}")
        trial.saw(
            f"{counts['judged']} pieces of work were as their PASID's registration at the time; "
            "no byte elsewhere; all lists and the table are empty"
        )

    def leak(self, trial: Trial) -> None:
        """The kernel's own search finds nothing that was lost meanwhile."""
        if not self._can_tell:
            raise Skipped("this kernel cannot tell: --profile debug has kmemleak")
        self._told  # noqa: B018
        lost = self._rig.host.agent.call("leaks", deadline=self._scan())["lost"]
        trial.answer(f"{len(lost)} objects that nothing points to")
        trial.require(not lost, "\n".join(lost[:3]))
        trial.saw("two scans found nothing")
