# SPDX-License-Identifier: GPL-2.0-or-later
"""Two kernels side by side: the same scenarios on each, and what differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qemu_ioasid import runs, tried
from qemu_ioasid.kernel import Spec
from qemu_ioasid.runs import Found
from qemu_ioasid.session import Output
from qemu_ioasid.text import visible

#: What one kernel's console says anew each time: times, addresses, sizes, rates, our own marks.
_NUMBERS = re.compile(r"~[0-9a-f]+|0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")
#: New lines of a log that are shown, at most; all are in compare.json.
SHOWN = 10
#: What is said of a kernel that is worse than any check could tell, by a run's verdict.
_BROKE = {"broke": "broke", "unbuildable": "cannot be built"}


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
    #: The exit code of a run that told nothing of its kernel: the rig failed, or a word was wrong.
    code: int = 0
    #: What the second kernel did, or cannot, where the first did better; one of `_BROKE`.
    broke: str = ""
    #: What both kernels were, where that was one.
    kernel: str = ""

    @property
    def regressions(self) -> list[Change]:
        """What held on the first and does not on the second."""
        return [change for change in self.changes if change.regression]


def run(
    kernels: tuple[Spec, Spec], scenarios: Sequence[str], folder: Path, output: Output
) -> Iterator[Pair]:
    """Each scenario on both kernels, booted anew; the reports go to *folder*."""
    for name in scenarios:
        found = []
        for letter, spec in zip("ab", kernels, strict=True):
            output.begins(f"{name} on {letter.upper()}")
            # Boot, on a rig that any kernel can have.
            words = tried.bare(spec) if name == "boot" else tried.words(name, spec)
            found.append(runs.run(words, folder / letter / name, output.progress))
            output.begins("")
        made = pair(name, found[0], found[1])
        for line in told(made).splitlines():
            output.say(line)
        yield made


def pair(name: str, first: Found, second: Found) -> Pair:
    """What differs between two runs of a scenario."""
    verdicts = [
        {check["name"]: str(check["verdict"]) for check in found.report["checks"]}
        for found in (first, second)
    ]
    # The first may lack what the second has; of one that lacks it now, nothing was tried.
    silent = (first.verdict == "unknown", second.verdict in ("unknown", "lacking"))
    changes = [
        Change(name, check, verdicts[0].get(check, ""), verdicts[1].get(check, ""))
        for check in dict.fromkeys([*verdicts[0], *verdicts[1]])
        if all(check in made or not mute for made, mute in zip(verdicts, silent, strict=True))
    ]
    different = [change for change in changes if change.before != change.after]
    said = [_said(found) for found in (first, second)]
    codes = [each.exit_code for each, mute in zip((first, second), silent, strict=True) if mute]
    broke = "" if first.verdict in ("unknown", second.verdict) else _BROKE.get(second.verdict, "")
    return Pair(
        name,
        (_early(first), _early(second)),
        len(changes) - len(different),
        different,
        [line for key, line in said[1].items() if key not in said[0]],
        _seconds(first, second),
        code=max(codes, default=0),
        broke=broke,
        kernel=_same(first, second),
    )


def _early(found: Found) -> str:
    return "" if found.verdict in ("held", "failed") else found.why


def _said(found: Found) -> dict[str, str]:
    """The lines of the host VMs' consoles, by what of them is the same each time."""
    # Each VM of the kernel's own tests has a folder.
    paths = sorted(found.folder.rglob("host.console.log"))
    lines = [line for path in paths for line in path.read_text(errors="replace").splitlines()]
    return {_NUMBERS.sub("#", line.strip()): line.strip() for line in lines}


def _same(first: Found, second: Found) -> str:
    one, other = (found.report.get("versions", {}).get("kernel", {}) for found in (first, second))
    if not one.get("hash") or one["hash"] != other.get("hash"):
        return ""
    return f"{one['release']} ({one['source']}), {one['hash']}"


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


def judged(pairs: Sequence[Pair]) -> tuple[int, list[str]]:
    """The exit code, and what it is for, in lines."""
    count = sum(len(pair.regressions) for pair in pairs)
    said = [f"{count} regressions"] if count else []
    said += [
        f"the second kernel {pair.broke} ({pair.scenario}): {pair.why[1]}"
        for pair in pairs
        if pair.broke
    ]
    code = 1 if said else max((pair.code for pair in pairs), default=0)
    for pair in pairs:
        if pair.code:
            why = [f"{letter}: {text}" for letter, text in zip("AB", pair.why, strict=True) if text]
            said.append(f"{pair.scenario}: not compared to its end; {'; '.join(why)}")
    kernel = next((pair.kernel for pair in pairs if pair.kernel), "")
    return code, [
        *(said or ["no regression"]),
        *([f"both are the same kernel: {kernel}"] if kernel else []),
    ]
