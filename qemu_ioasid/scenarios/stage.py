# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``boot``: everything came up, both levels translate, an address means one byte."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_ioasid import vtd
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.machine import Machine
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios.acts import Acts, parts
from qemu_ioasid.scenarios.checks import Skipped, Trial
from qemu_ioasid.scenarios.table import Row, Table

TABLE = Table()
_STAGE = TABLE.phase("the stage")


def rows(config: RigConfig) -> list[Row]:
    """The checks on a rig of any shape."""
    return TABLE.rows(config, {})


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Make the checks of *rows*; failures are in the report, a rig that broke is raised."""
    Stage(rig, report).run(rows)


class Stage(Acts):
    """What every scenario stands on."""

    @_STAGE("stage-{vm}", "read the VT-d registers through QMP")
    def _stage(self, trial: Trial, vm: str) -> None:
        reason = self.rig.host.cannot_tell_stage() if vm == "host" else ""
        if reason:
            raise Skipped(reason)
        machine: Machine = self.rig.host if vm == "host" else self.rig.guests[vm].machine
        found = vtd.stage(machine.qmp)
        mode = "scalable" if found.scalable else "legacy"
        trial.answer(f"translation {'on' if found.enabled else 'off'}, {mode} mode")
        trial.saw(f"root table at {found.root:#x}")
        trial.require(found.enabled, "translation is off")
        trial.require(found.scalable, "the root table is not in scalable mode")

    @_STAGE("same-bytes-{guest}", "pmemsave the arena's first bytes through QMP")
    def _same_bytes(self, trial: Trial, name: str) -> None:
        guest = self.rig.guests[name]
        deadline = Deadline(20, f"pmemsave in {guest.name}")
        self.witnesses.stale()
        nonce = guest.agent.call("nonce")["hex"]
        length = len(nonce) // 2
        path = f"{self.rig.host.folder}/{guest.name}.pmem"
        guest.machine.qmp.execute("pmemsave", deadline, val=guest.gpa, size=length, filename=path)
        saved = self.rig.host.fetch(path, deadline).hex()
        in_file = self.rig.host.agent.call("read", guest=guest.name, gpa=guest.gpa, length=length)[
            "hex"
        ]
        trial.answer(f"guest-physical {guest.gpa:#x}")
        trial.require(saved == nonce, "the guest's nonce is not at the address it names")
        trial.require(in_file == nonce, "the guest's nonce is not at that offset of its RAM file")
        trial.saw("the guest, QEMU and the RAM file show the same nonce")


class TwoGuests(Stage):
    """On the stage: *g1* with the mdevs *a* and *b*, *g2* with *c*."""

    def __init__(self, rig: Rig, report: Report, scenario: str) -> None:
        """Raises as `acts.parts`."""
        super().__init__(rig, report)
        play = parts(rig.config, scenario)
        self.g1, self.g2 = rig.guests[play["g1"]], rig.guests[play["g2"]]
        self.a, self.b, self.c = play["a"], play["b"], play["c"]
