# SPDX-License-Identifier: GPL-2.0-or-later
"""A series, one patch after another: does each apply, build, come up and hold by itself?"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from qemu_ioasid import kernel, process, runs, tried
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed, RequirementError, RigError
from qemu_ioasid.kernel import Spec
from qemu_ioasid.kernel.series import NONE
from qemu_ioasid.kernel.tree import PatchRefused, Tree
from qemu_ioasid.runs import Found
from qemu_ioasid.session import BUILD_SECONDS, Output
from qemu_ioasid.text import lines, visible

#: Without mainline's history a commit that a Fixes: names is one it does not know.
_CHECKPATCH = ("--strict", "--no-signoff", "--ignore", "FILE_PATH_CHANGES,UNKNOWN_COMMIT_ID", "-q")

#: What a host VM alone is tried by.
_BOOTS = "boots"

#: *none*: what it would be tried on is not there (yet). *skip*: an earlier step did not pass.
#: *error*: the rig failed, and nothing is said about the patch.
Verdict = Literal["pass", "fail", "none", "skip", "error"]


@dataclass
class Step:
    """What came of a step: *why* in a line, *evidence* as it was said."""

    name: str
    verdict: Verdict
    why: str = ""
    evidence: str = ""
    seconds: float = 0.0
    #: The exit code that an *error* is.
    code: int = 0


@dataclass
class Row:
    """A patch and its steps, in order."""

    patch: str
    steps: list[Step] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether nothing was wrong with it."""
        return all(step.verdict in ("pass", "none") for step in self.steps)


class Series:
    """The patches of *spec*, each tried on top of those before it; reports go to *folder*."""

    def __init__(self, spec: Spec, scenarios: Sequence[str], folder: Path, output: Output) -> None:
        deadline = Deadline(BUILD_SECONDS, "source")
        self._word, self.patches, self._tree = kernel.resolved(
            spec, deadline=deadline, progress=output.progress
        )
        if not self.patches:
            raise ConfigurationError("there is no patch in the series")
        self._spec = spec
        self._scenarios = scenarios
        self._folder = folder
        self._output = output
        self._warned = set(self._build(spec.naming(self._word, NONE)).warnings)

    def run(self, keep_going: bool) -> Iterator[Row]:
        """Try each; without *keep_going* the first one that something is wrong with is the last."""
        for number, patch in enumerate(self.patches, 1):
            row = Row(patch.name)
            self._try(number, row)
            for line in told(row, number, len(self.patches)).splitlines():
                self._output.say(line)
            yield row
            gone = row.steps[0].verdict != "pass"
            if gone or not (row.held or keep_going):
                break

    def _prefix(self, number: int) -> Spec:
        """The kernel with the first *number* patches."""
        folder = self._folder / f"series/{number:04}"
        folder.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{patch.absolute()}\n" for patch in self.patches[:number])
        (folder / "series").write_text(names)
        return self._spec.naming(self._word, str(folder))

    def _build(self, spec: Spec) -> kernel.Kernel:
        deadline = Deadline(BUILD_SECONDS, "kernel")
        return kernel.build(spec, deadline=deadline, progress=self._output.progress)

    def _try(self, number: int, row: Row) -> None:
        patch, spec = self.patches[number - 1], self._prefix(number)
        self._output.begins(f"patch {number} of {len(self.patches)}: {patch.name}")
        started = time.monotonic()
        built = None
        try:
            built = self._build(spec)
        except RigError as failed:
            row.steps += unbuilt(failed)
        seconds = time.monotonic() - started
        if built is not None:
            new = [each for each in built.warnings if each not in self._warned]
            self._warned.update(new)
            row.steps += [Step("applies", "pass"), Step("builds", "pass", seconds=seconds)]
            row.steps.append(
                Step("warnings", "fail" if new else "pass", new[0] if new else "", "\n".join(new))
            )
        if row.steps[0].verdict == "pass":
            row.steps.append(checkpatch(self._tree, patch))
        if built is not None:
            self._boot(number, spec, row)
        self._output.begins("")

    def _boot(self, number: int, spec: Spec, row: Row) -> None:
        up = self._scenario(number, _BOOTS, tried.bare(spec))
        row.steps.append(up)
        for name in self._scenarios:
            if up.verdict == "pass":
                row.steps.append(self._scenario(number, name, tried.words(name, spec)))
            else:
                row.steps.append(Step(name, "skip"))

    def _scenario(self, number: int, name: str, words: list[str]) -> Step:
        place = self._folder / f"{number:04}/{name}"
        return tried_by(name, runs.run(words, place, self._output.progress))


def unbuilt(failed: RigError) -> list[Step]:
    """What is told of a patch whose kernel was not built."""
    full = next((line for line in failed.evidence.splitlines() if runs.FULL in line), "")
    if full or not isinstance(failed, (ProcessFailed, ConfigurationError)):
        # Whether it applies is not known either.
        why = full or failed.message
        return [Step("builds", "error", why, failed.evidence, code=failed.exit_code)]
    if isinstance(failed, PatchRefused):
        return [Step("applies", "fail", failed.message, failed.evidence)]
    why = failed.evidence.strip().rpartition("\n")[2] or failed.message
    return [Step("applies", "pass"), Step("builds", "fail", why, failed.evidence)]


def tried_by(name: str, found: Found) -> Step:
    """What a run of the scenario *name* says of the patch."""
    seconds = found.seconds()
    if found.verdict == "held":
        return Step(name, "pass", seconds=seconds)
    if found.verdict == "lacking" and name != _BOOTS:
        # A later patch brings it, or none does: `judged` says.
        return Step(name, "none", found.why, seconds=seconds)
    evidence = (found.report["error"] or {}).get("evidence", "")
    if found.verdict in ("failed", "broke"):
        return Step(name, "fail", found.why, evidence, seconds)
    return Step(name, "error", found.why, evidence, seconds, found.exit_code)


def checkpatch(tree: Tree, patch: Path) -> Step:
    """What the kernel's own checkpatch.pl has to say of *patch*."""
    script = tree.src / "scripts/checkpatch.pl"
    if shutil.which("perl") is None or not script.is_file():
        return Step("checkpatch", "none", "no perl" if script.is_file() else "the tree has none")
    try:
        argv = ["perl", str(script), *_CHECKPATCH, str(patch.absolute())]
        process.run(argv, deadline=Deadline(120, "checkpatch"), cwd=tree.src)
    except ProcessFailed as failed:
        first = re.search(r"^(?:ERROR|WARNING|CHECK):.*$", failed.evidence, re.MULTILINE)
        why = first[0] if first else "checkpatch.pl failed"
        return Step("checkpatch", "fail", why, failed.evidence)
    return Step("checkpatch", "pass")


def told(row: Row, number: int, of: int) -> str:
    """A row in one line, and one more for each step that something is wrong with."""
    steps = "  ".join(f"{step.name} {step.verdict}" for step in row.steps)
    wrong = [
        f"\n           {step.name}: {visible(step.why)}"
        for step in row.steps
        if step.verdict not in ("pass", "skip")
    ]
    failed = any(step.verdict == "fail" for step in row.steps)
    mark = "ok" if row.held else "FAIL" if failed else "ERROR"
    return f"  {number:>2}/{of} {mark:5} {row.patch}\n           {steps}{''.join(wrong)}"


def judged(rows: Sequence[Row], scenarios: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code, and which of *scenarios* no kernel of the series could be tried with."""
    steps = [step for row in rows for step in row.steps]
    never = []
    for name in scenarios:
        tries = [step for step in steps if step.name == name and step.verdict != "skip"]
        if tries and all(step.verdict == "none" for step in tries):
            never.append(f"{name} was never made: {tries[-1].why}")
    code = max((step.code for step in steps), default=0)
    failed = int(not all(row.held for row in rows))
    return code or failed or (RequirementError.exit_code if never else 0), never


def junit(rows: Sequence[Row]) -> bytes:
    """A suite a patch, a case a step."""
    suites = ElementTree.Element("testsuites", name="qemu-ioasid.check-series")
    tags = {"fail": "failure", "error": "error", "none": "skipped", "skip": "skipped"}
    for row in rows:
        suite = ElementTree.SubElement(suites, "testsuite", name=row.patch)
        verdicts = [step.verdict for step in row.steps]
        suite.set("tests", str(len(verdicts)))
        suite.set("failures", str(verdicts.count("fail")))
        suite.set("errors", str(verdicts.count("error")))
        suite.set("skipped", str(verdicts.count("none") + verdicts.count("skip")))
        for step in row.steps:
            case = ElementTree.SubElement(suite, "testcase", name=step.name, classname=row.patch)
            case.set("time", f"{step.seconds:.3f}")
            if step.verdict != "pass":
                text = visible(step.why) or "an earlier step did not pass"
                ElementTree.SubElement(case, tags[step.verdict], message=text).text = "\n".join(
                    lines(step.evidence)
                )
    ElementTree.indent(suites)
    return bytes(ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True))
