# SPDX-License-Identifier: GPL-2.0-or-later
"""What is tried on a rig, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios import isolation


class Scenario(NamedTuple):
    """*check_shape* refuses a rig that lacks what *run* needs, before anything starts."""

    check_shape: Callable[[RigConfig], None]
    run: Callable[[Rig, Report], None]


SCENARIOS = {"isolation": Scenario(isolation.check_shape, isolation.run)}
