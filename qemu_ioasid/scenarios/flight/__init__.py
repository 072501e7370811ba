# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``flight``: what becomes of work that is under way when everything else changes.

The host side drives the mdevs itself, in a host VM without guests. The first piece of work writes
to memory that puts it to sleep (userfaultfd), so that each moment is as long as is wanted. What
is queued behind it, and where that lands, tells what the driver did.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from qemu_ioasid import config
from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios.checks import Checks
from qemu_ioasid.scenarios.flight import anew, ending, leaving, meanwhile
from qemu_ioasid.scenarios.flight.ground import Flight
from qemu_ioasid.scenarios.table import Row

RIG = config.DEFAULT.with_name("host-only.toml")


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises ConfigurationError for a rig without two mdevs that no guest has."""
    require_spare(config, "flight")
    parts = (leaving, ending, meanwhile, anew)
    return [row for part in parts for row in part.TABLE.rows(config, {})]


def require_spare(config: RigConfig, scenario: str) -> None:
    """Raises ConfigurationError for a rig without the two mdevs that *scenario* needs."""
    if len(config.spare) < 2:
        raise ConfigurationError(
            f"{config.path}: scenario {scenario} needs two mdevs that no guest has"
        )


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Make the checks of *rows*; failures are in the report, a rig that broke is raised."""
    checks = Checks(rig, report)
    flight = Flight(rig, *rig.config.spare[:2])
    for phase, group in itertools.groupby(rows, lambda row: row.phase):
        with report.phase(phase):
            for row in group:
                with checks.check(row.name, row.tried) as trial, flight.opened():
                    row.act(flight, trial)
