# SPDX-License-Identifier: GPL-2.0-or-later
"""Two kernels side by side: the same scenarios on each, and what differs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qemu_ioasid import runs, tried
from qemu_ioasid.errors import RequirementError
from qemu_ioasid.kernel import Spec
from qemu_ioasid.runs import Found
from qemu_ioasid.session import Output
from qemu_ioasid.text import visible

#: What one kernel's console says anew each time: times, addresses, sizes, rates.
_NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")
#: New lines of a log that are shown, at most; all are in compare.json.
SHOWN = 10


@dataclass(frozen=True)
class Change:
    """A check that answers differently; "" where it was not made."""

    scenario: str
    check: str
    before: str
    after: str

    @property
    def regression(self) -> bool:
        """Whether it held and does not any more."""
        return self.before == "pass" and self.after != "pass"


@dataclass
class Pair:
    """A scenario on both kernels. *why*: what ended it early, on the first and on the second."""

    scenario: str
    why: tuple[str, str]
    same: int
    changes: list[Change] = field(default_factory=list)
    #: What the second host VM's console says, and the first's does not.
    lines: list[str] = field(default_factory=list)
    #: Of each phase of both, its seconds.
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: Whether the rig failed, or the second kernel broke where the first did not.
    unknown: bool = False
    broke: bool = False

    @property
    def regressions(self) -> list[Change]:
        """What held on the first and does not on the second."""
        return [change for change in self.changes if change.regression]


def run(
    kernels: tuple[Spec, Spec], scenarios: Sequence[str], folder: Path, output: Output
) -> list[Pair]:
    """Each scenario on both kernels, booted anew; the reports go to *folder*."""
    pairs = []
    for name in scenarios:
        found = []
        for letter, spec in zip("ab", kernels, strict=True):
            output.begins(f"{name} on {letter.upper()}")
            # Boot, on a rig that any kernel can have.
            words = [*runs.BARE, *spec.words] if name == "boot" else tried.words(name, spec)
            found.append(runs.run(words, folder / letter / name, output.progress))
            output.begins("")
        pairs.append(pair(name, found[0], found[1]))
        for line in told(pairs[-1]).splitlines():
            output.say(line)
    return pairs


def pair(name: str, first: Found, second: Found) -> Pair:
    """What differs between two runs of a scenario."""
    verdicts = [
        {check["name"]: str(check["verdict"]) for check in found.report["checks"]}
        for found in (first, second)
    ]
    changes = [
        Change(name, check, verdicts[0].get(check, ""), verdicts[1].get(check, ""))
        for check in dict.fromkeys([*verdicts[0], *verdicts[1]])
    ]
    different = [change for change in changes if change.before != change.after]
    said = [_said(found) for found in (first, second)]
    lacking = RequirementError.exit_code
    return Pair(
        name,
        (_early(first), _early(second)),
        len(changes) - len(different),
        different,
        [line for key, line in said[1].items() if key not in said[0]],
        _seconds(first, second),
        unknown=any(
            found.verdict == "unknown" and found.code != lacking for found in (first, second)
        ),
        broke=second.verdict in ("broke", "unbuildable") and first.verdict != second.verdict,
    )


def _early(found: Found) -> str:
    return "" if found.verdict in ("held", "failed") else found.why


def _said(found: Found) -> dict[str, str]:
    """The lines of the host VM's console, by what of them is the same each time."""
    path = found.folder / "host.console.log"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return {_NUMBERS.sub("#", line.strip()): line.strip() for line in text.splitlines()}


def _seconds(first: Found, second: Found) -> dict[str, tuple[float, float]]:
    names = [each["name"] for each in first.report["phases"]]
    both = [name for name in names if name in {e["name"] for e in second.report["phases"]}]
    return {name: (first.seconds(name), second.seconds(name)) for name in dict.fromkeys(both)}


def told(pair: Pair) -> str:
    """A pair in words."""
    text = [f"{pair.scenario}: {pair.same} checks the same, {len(pair.changes)} not"]
    text += [
        f"  {letter}: {visible(why)}" for letter, why in zip("AB", pair.why, strict=True) if why
    ]
    for change in pair.changes:
        mark = "REGRESSION" if change.regression else "new"
        text.append(
            f"  {mark:10}  {change.check}: {change.before or 'not made'}, "
            f"then {change.after or 'not made'}"
        )
    if pair.lines:
        text.append(f"  {len(pair.lines)} new lines on the host VM's console:")
        text += [f"    {visible(line)}" for line in pair.lines[:SHOWN]]
    text += [
        f"  {a:8.1f} s {b:8.1f} s  {name}"
        for name, (a, b) in pair.seconds.items()
        if "boot" in name or name == "kernel"
    ]
    return "\n".join(text)
