# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run tells: phases, checks and versions, as report.json, junit.xml and report.html."""

from __future__ import annotations

import contextlib
import json
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qemu_ioasid import documents, page
from qemu_ioasid.text import cut, lines, visible

Verdict = Literal["pass", "fail", "error", "skip"]
#: What became of an attempt. *leaked*: the witnesses saw what must not be; *wrong*: they did
#: not, and yet it ended otherwise than it must; *unanswered*: nobody knows.
Outcome = Literal["allowed", "refused", "faulted", "leaked", "wrong", "unanswered"]

#: Raised by one when a key of report.json changes its meaning.
SCHEMA = 1

VERDICTS = {
    0: "all checks held",
    1: "a check failed",
    2: "usage or configuration",
    3: "a requirement is missing",
    4: "the rig failed",
    5: "the kernel under test failed to boot or broke",
    130: "interrupted",
    143: "interrupted",
}


#: The longest text of a check, and the longest evidence, in characters: VMs have their say in both.
TEXT, EVIDENCE = 20_000, 200_000
#: The longest status that a device is said to have answered.
STATUS = 200


class Enough(Exception):
    """A check failed, and no other is wanted (`Report.first`)."""


@dataclass
class Attempt:
    """One piece of work that *by* (a guest, or ``host``) gave *device*.

    *pasid* None: without one. *owner*: who held the PASID at the time, "" for nobody. *expected*
    and *answered* are statuses of completion records, *answered* "" when there was none.
    """

    device: str
    by: str
    pasid: int | None
    owner: str
    expected: str
    answered: str = ""
    outcome: Outcome = "unanswered"


@dataclass
class Check:
    """One check: what was tried, what the kernel answered, what the witnesses saw."""

    name: str
    verdict: Verdict
    tried: str
    answered: str
    witnesses: str
    seconds: float = 0.0
    evidence: str = ""
    phase: str = ""
    attempts: list[Attempt] = field(default_factory=list)


@dataclass
class Phase:
    """One step of the run, its wall time, and how long after the run's start it began."""

    name: str
    seconds: float
    start: float = 0.0
    finished: bool = True


@dataclass
class Report:
    """Everything a run found out; `write` it once, at the end, whatever the end was."""

    folder: Path
    scenario: str
    say: Callable[[str], None]
    accelerator: str = ""
    accelerator_reason: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rig: str = ""
    #: What each VM was given, when that is known: `session.vms`.
    vms: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, str] | None = None
    #: Until the run has come to its end, it has failed.
    exit_code: int = 4
    #: Whether the first check that fails is the last one made.
    first: bool = False
    #: Told of each step as it begins, and with "" that the last one is over.
    begins: Callable[[str], None] = lambda name: None
    #: Told how far the step is.
    progress: Callable[[str], None] = lambda line: None
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    _origin: float = field(default_factory=time.monotonic)
    _phase: str = ""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a step; it is said when it is over, also when it failed."""
        started = time.monotonic()
        first = len(self.checks)
        finished = False
        self._phase = name
        self.begins(name)
        try:
            yield
            finished = True
            self._phase = ""
        finally:
            seconds = time.monotonic() - started
            start = started - self._origin
            self.phases.append(Phase(name, round(seconds, 3), round(start, 3), finished))
            made = counts(self.checks[first:])
            self.begins("")
            self.say(
                f"{seconds:7.1f} s  {name}"
                + (f": {made}" if made else "")
                + ("" if finished else "  (not finished)")
            )

    def enter(self, check: Check) -> None:
        """A check of the phase under way has been made; raises Enough when it was the last."""
        check.phase = self._phase
        for name in ("tried", "answered", "witnesses"):
            setattr(check, name, cut(getattr(check, name), TEXT))
        check.evidence = cut(check.evidence, EVIDENCE)
        for attempt in check.attempts:
            attempt.answered = cut(attempt.answered, STATUS)
        self.checks.append(check)
        mine = [each for each in self.checks if each.phase == self._phase]
        self.progress(f"{counts(mine)}, last {check.name}")
        if self.first and check.verdict == "fail":
            raise Enough

    def fail(self, exit_code: int, message: str, evidence: str, kind: str = "") -> None:
        """The run ended early: with which exit code, for what reason, on what evidence.

        *kind* is the error's class, where it is one of ours (`errors`).
        """
        self.exit_code = exit_code
        self.error = {
            "message": cut(message, TEXT),
            "evidence": cut(evidence, EVIDENCE),
            "phase": self._phase,
            "kind": kind,
        }

    @property
    def failed(self) -> bool:
        """Whether a check did not hold."""
        return any(check.verdict in ("fail", "error") for check in self.checks)

    def document(self) -> dict[str, Any]:
        """report.json as an object."""
        return {
            "schema": SCHEMA,
            "verdict": VERDICTS[self.exit_code],
            "exit_code": self.exit_code,
            "scenario": self.scenario,
            "started": self.started,
            "accelerator": self.accelerator,
            "accelerator_reason": self.accelerator_reason,
            "versions": self.versions,
            "phases": [asdict(phase) for phase in self.phases],
            "checks": [asdict(check) for check in self.checks],
            "error": self.error,
            "rig": self.rig,
            "vms": self.vms,
        }

    def write(self) -> None:
        """Write report.json, junit.xml and report.html into the folder."""
        (self.folder / "report.json").write_text(json.dumps(self.document(), indent=2) + "\n")
        tree = ElementTree.ElementTree(self._junit())
        ElementTree.indent(tree)
        tree.write(self.folder / "junit.xml", encoding="utf-8", xml_declaration=True)
        write_page(self.folder, self.document())

    def _junit(self) -> ElementTree.Element:
        suite = ElementTree.Element("testsuite", name=f"qemu-ioasid.{self.scenario}")
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in {"accelerator": self.accelerator, **self.versions}.items():
            text = value if isinstance(value, str) else json.dumps(value)
            ElementTree.SubElement(properties, "property", name=name, value=text)
        for check in self.checks:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"qemu-ioasid.{self.scenario}",
                name=check.name,
                time=f"{check.seconds:.3f}",
            )
            if check.verdict != "pass":
                tag = {"fail": "failure", "error": "error", "skip": "skipped"}[check.verdict]
                told = ElementTree.SubElement(
                    case, tag, message=visible(f"{check.answered}; {check.witnesses}")
                )
                told.text = "\n".join(lines(f"tried: {check.tried}\n{check.evidence}"))
        if self.error is not None:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"qemu-ioasid.{self.scenario}", name="rig", time="0"
            )
            told = ElementTree.SubElement(case, "error", message=visible(self.error["message"]))
            told.text = "\n".join(lines(self.error["evidence"]))
        verdicts = [check.verdict for check in self.checks]
        suite.set("tests", str(len(list(suite.iter("testcase")))))
        suite.set("failures", str(verdicts.count("fail")))
        suite.set("errors", str(verdicts.count("error") + (self.error is not None)))
        suite.set("skipped", str(verdicts.count("skip")))
        suite.set("time", f"{sum(phase.seconds for phase in self.phases):.3f}")
        return suite


def counts(checks: list[Check]) -> str:
    """How many of each verdict, in words; "" for no check."""
    verdicts = [check.verdict for check in checks]
    return ", ".join(
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("pass", "fail", "error", "skip")
        if verdict in verdicts
    )


def write_page(folder: Path, document: dict[str, Any]) -> Path:
    """Write report.html of a report.json's *document* into *folder*."""
    path = folder / "report.html"
    path.write_text(page.render(document), encoding="utf-8")
    return path


#: What report.json must hold for a page to be made of it: the keys that came later may be missing.
_SHAPE: dict[str, Any] = {
    "schema": int,
    "verdict": str,
    "exit_code": int,
    "scenario": str,
    "started?": str,
    "accelerator": str,
    "accelerator_reason": str,
    "versions": dict,
    "phases": [{"name": str, "seconds": float, "start?": float, "finished?": bool}],
    "checks": [
        {
            **dict.fromkeys(["name", "verdict", "tried", "answered", "witnesses"], str),
            "seconds": float,
            "evidence": str,
            "phase?": str,
            "attempts?": [
                {
                    **dict.fromkeys(["device", "by", "owner", "expected", "answered"], str),
                    "pasid": int | None,
                    "outcome": str,
                }
            ],
        }
    ],
    "error": {"message": str, "evidence": str, "phase?": str, "kind?": str},
    "rig": str,
    "vms?": [{"name": str, "viommu": str, "mdevs": [str]}],
}


def load(folder: Path) -> dict[str, Any]:
    """The document in *folder*'s report.json; ConfigurationError when it is none of this schema."""
    return documents.told(folder / "report.json", "a report", _SHAPE, SCHEMA)
