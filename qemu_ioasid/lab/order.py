# SPDX-License-Identifier: GPL-2.0-or-later
"""What `lab up` tells a new keeper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid.session import Options


@dataclass(frozen=True)
class Order:
    """What `lab up` wants of a new keeper: a rig by *options*, or the one kept in *opened*."""

    name: str
    options: Options
    opened: Path | None = None
