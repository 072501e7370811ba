# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``attacks``: every attack we can name, each breaking one thing.

The tables are in `work`, `registration`, `underway` and `moments`; docs/security-model.md
says of each group what stops it. Whatever an attack answers, no byte may have
changed that it was not allowed to change, by the witnesses of every row.
"""

from __future__ import annotations

from collections.abc import Sequence

from qemu_ioasid.config import RigConfig
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios.acts import parts
from qemu_ioasid.scenarios.attacks import moments, registration, underway, work
from qemu_ioasid.scenarios.attacks.ground import Ground
from qemu_ioasid.scenarios.table import Row


def rows(config: RigConfig) -> list[Row]:
    """The attacks on a rig; raises ConfigurationError where it has not the guests and mdevs."""
    play = parts(config, "attacks")
    return [
        row for table in (work, registration, underway, moments) for row in table.rows(config, play)
    ]


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Make the attacks of *rows*; failures are in the report, a rig that broke is raised."""
    Ground(rig, report).run(rows)
