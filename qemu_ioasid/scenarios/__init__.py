# SPDX-License-Identifier: GPL-2.0-or-later
"""What is tried on a rig, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios import attacks, isolation, stage
from qemu_ioasid.scenarios.table import Row


class Scenario(NamedTuple):
    """*rows* tells the checks on a rig, and refuses one that lacks what they need."""

    rows: Callable[[RigConfig], list[Row]]
    run: Callable[[Rig, Report, Sequence[Row]], None]


SCENARIOS = {
    "isolation": Scenario(isolation.rows, isolation.run),
    "attacks": Scenario(attacks.rows, attacks.run),
    "boot": Scenario(stage.rows, stage.run),
}


def find(name: str) -> Scenario:
    """The scenario *name*; raises ConfigurationError when there is none."""
    if name not in SCENARIOS:
        raise ConfigurationError(f"scenario {name}: unknown; known are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
