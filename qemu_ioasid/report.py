# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run tells: phases, checks and versions, as report.json and junit.xml."""

from __future__ import annotations

import contextlib
import json
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["pass", "fail", "error", "skip"]

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


@dataclass
class Phase:
    """One step of the run and its wall time."""

    name: str
    seconds: float


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
    error: dict[str, str] | None = None
    #: Until the run has come to its end, it has failed.
    exit_code: int = 4

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a step; it is said when it is over, also when it failed."""
        started = time.monotonic()
        ending = ""
        try:
            yield
        except BaseException:
            ending = "  (not finished)"
            raise
        finally:
            seconds = time.monotonic() - started
            self.phases.append(Phase(name, round(seconds, 3)))
            self.say(f"{seconds:7.1f} s  {name}{ending}")

    def fail(self, exit_code: int, message: str, evidence: str) -> None:
        """The run ended early: with which exit code, for what reason, on what evidence."""
        self.exit_code = exit_code
        self.error = {"message": message, "evidence": evidence}

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
            "accelerator": self.accelerator,
            "accelerator_reason": self.accelerator_reason,
            "versions": self.versions,
            "phases": [asdict(phase) for phase in self.phases],
            "checks": [asdict(check) for check in self.checks],
            "error": self.error,
            "rig": self.rig,
        }

    def write(self) -> None:
        """Write report.json and junit.xml into the folder."""
        (self.folder / "report.json").write_text(json.dumps(self.document(), indent=2) + "\n")
        tree = ElementTree.ElementTree(self._junit())
        ElementTree.indent(tree)
        tree.write(self.folder / "junit.xml", encoding="utf-8", xml_declaration=True)

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
                    case, tag, message=_printable(f"{check.answered}; {check.witnesses}")
                )
                told.text = _printable(f"tried: {check.tried}\n{check.evidence}")
        if self.error is not None:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"qemu-ioasid.{self.scenario}", name="rig", time="0"
            )
            told = ElementTree.SubElement(case, "error", message=_printable(self.error["message"]))
            told.text = _printable(self.error["evidence"])
        verdicts = [check.verdict for check in self.checks]
        suite.set("tests", str(len(list(suite.iter("testcase")))))
        suite.set("failures", str(verdicts.count("fail")))
        suite.set("errors", str(verdicts.count("error") + (self.error is not None)))
        suite.set("skipped", str(verdicts.count("skip")))
        suite.set("time", f"{sum(phase.seconds for phase in self.phases):.3f}")
        return suite


def _printable(text: str) -> str:
    """Without the control characters that XML 1.0 has no way to write."""
    return "".join(char for char in text if char >= " " or char in "\n\t")


def table(checks: list[Check], width: int) -> str:
    """The checks for a terminal of *width* columns: one line each, details where one failed."""
    lines = []
    longest = max((len(check.name) for check in checks), default=0)
    for check in checks:
        room = max(20, width - longest - 11)
        told = f"{check.answered}; {check.witnesses}"
        if check.verdict == "pass" and len(told) > room:
            told = told[: room - 1] + "…"
        lines.append(f"  {check.verdict:5}  {check.name:{longest}}  {told}")
        if check.verdict != "pass":
            lines.append(f"         {'':{longest}}  tried: {check.tried}")
    return "\n".join(lines)
