# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/agent.md lists the operations there are, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from qemu_ioasid.agent.guest import Guest
from qemu_ioasid.agent.holder import Holder
from qemu_ioasid.agent.host import Host

TEXT = (Path(__file__).parents[2] / "docs/agent.md").read_text()


def listed(heading: str) -> set[str]:
    """The operations in the table under *heading*."""
    part = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    names = re.findall(r"^\| ([a-z_ /]+?) \|", part, re.MULTILINE)
    return {name for names_ in names for name in names_.split(" / ")} - {"op"}


def test_operations_are_documented() -> None:
    both = listed("Both roles")
    assert set(Holder(0, 0).operations) == listed("Holder role")
    assert set(Host(lambda line: None).operations) == listed("Host role") | both
    assert set(Guest().operations) == listed("Guest role") | both
