# SPDX-License-Identifier: GPL-2.0-or-later
"""What is tried on a rig, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qemu_ioasid import config
from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.scenarios import (
    abi,
    attacks,
    faults,
    findings,
    flight,
    hostile,
    hotplug,
    isolation,
    model,
    modelguests,
    stage,
    stress,
)
from qemu_ioasid.scenarios.table import Row


class Scenario(NamedTuple):
    """*rows* tells the checks on a rig, and refuses one that lacks what they need.

    *run* takes a rig, a report and the rows to make; and by name what *takes* lists, which are
    options of the command. *rig* is what it runs on where nobody says, *append* what it adds to
    the host VM's kernel command line.
    """

    rows: Callable[[RigConfig], list[Row]]
    run: Callable[..., None]
    rig: Path = config.DEFAULT
    append: str = ""
    takes: tuple[str, ...] = ()
    #: Patches of our series that its kernel does without (shell globs), where nobody says which.
    left_out: tuple[str, ...] = ()


SCENARIOS = {
    "isolation": Scenario(isolation.rows, isolation.run),
    "attacks": Scenario(attacks.rows, attacks.run),
    "hotplug": Scenario(hotplug.rows, hotplug.run),
    "boot": Scenario(stage.rows, stage.run),
    "abi": Scenario(abi.rows, abi.run, abi.RIG),
    "flight": Scenario(flight.rows, flight.run, flight.RIG),
    "stress": Scenario(stress.rows, stress.run, stress.RIG, takes=("seconds", "seed")),
    "faults": Scenario(faults.rows, faults.run, stress.RIG),
    "hostile": Scenario(hostile.rows, hostile.run, takes=("seed", "operations")),
    "model": Scenario(model.rows, model.run, model.RIG, model.APPEND, ("steps", "seed", "replay")),
    "model-guests": Scenario(modelguests.rows, modelguests.run, takes=("steps", "seed")),
    **{
        findings.PREFIX + found.name: Scenario(
            found.rows, found.run, found.rig, takes=("series",), left_out=found.left_out
        )
        for found in findings.FINDINGS
    },
}


def find(name: str) -> Scenario:
    """The scenario *name*; raises ConfigurationError when there is none."""
    if name not in SCENARIOS:
        raise ConfigurationError(f"scenario {name}: unknown; known are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
