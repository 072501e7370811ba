# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``abi``: a device does what kernel-patches/ABI.md says of it.

The host side drives the mdevs itself, in a host VM without guests.
"""

from __future__ import annotations

from qemu_ioasid.config import RigConfig
from qemu_ioasid.scenarios import flight
from qemu_ioasid.scenarios.abi import calls, published, records, regions, work
from qemu_ioasid.scenarios.table import Row

RIG = flight.RIG
run = flight.run


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises ConfigurationError for a rig without two mdevs that no guest has."""
    flight.require_spare(config, "abi")
    parts = (work, records, published, regions, calls)
    return [row for part in parts for row in part.TABLE.rows(config, {})]
