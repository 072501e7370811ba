# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept of the runs against the mutants: a table in docs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qemu_ioasid.kernel.mutant import Mutant
from qemu_ioasid.mutants import Result

TABLE = Path(__file__).resolve().parents[2] / "docs/mutants.md"

_HEAD = "| mutant | what it breaks | killed by | seconds |\n|---|---|---|---:|\n"
_ROW = re.compile(r"^\| `([^`]+)` \| (.*) \| (.*) \| ([0-9.]+) \|$", re.MULTILINE)


def rows(text: str) -> dict[str, tuple[str, str, float]]:
    """The table in *text*, by name: what each breaks, what killed it, after how many seconds."""
    return {name: (breaks, by, float(seconds)) for name, breaks, by, seconds in _ROW.findall(text)}


def killers() -> dict[str, str]:
    """What killed each mutant, by name; none where there is no table."""
    with contextlib.suppress(OSError):
        return {name: by for name, (_, by, _) in rows(TABLE.read_text()).items()}
    return {}


def write(results: Sequence[Result], known: Iterable[Mutant]) -> None:
    """Enter *results* in `TABLE`; rows of other mutants that are *known* stay."""
    text = TABLE.read_text()
    kept = rows(text)
    for each in results:
        kept[each.name] = (each.breaks, each.by or each.verdict, round(each.seconds))
    table = [
        f"| `{name}` | {kept[name][0]} | {kept[name][1]} | {kept[name][2]:.0f} |\n"
        for name in (mutant.name for mutant in known)
        if name in kept
    ]
    TABLE.write_text(f"{text.partition(_HEAD)[0]}{_HEAD}{''.join(table)}")
