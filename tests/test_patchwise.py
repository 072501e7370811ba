# SPDX-License-Identifier: GPL-2.0-or-later
"""check-series and compare: what is told of a patch and of two kernels."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from qemu_ioasid import cli, compare, kernel, patchwise, runs
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import (
    DeadlineExceeded,
    KernelLacks,
    ProcessFailed,
    RequirementError,
    RigError,
)
from qemu_ioasid.kernel import Kernel, tree
from qemu_ioasid.kernel.tree import PatchRefused
from qemu_ioasid.patchwise import Row, Step
from qemu_ioasid.runs import Found
from qemu_ioasid.terminal import Terminal
from tests.conftest import Command

#: What a run without the driver ends with, and one on a full disk.
LACKS = "kernel 7.2.12 lacks CONFIG_VFIO_PDMA (kernel-patches/) for the host VM"
FULL = "images: No space left on device; make room"


def test_a_row_and_its_suite() -> None:
    good = Row("0001-a.patch", [Step("applies", "pass"), Step("isolation", "none", "lacks x")])
    bad = Row(
        "0002-b.patch", [Step("applies", "pass"), Step("builds", "fail", "x.c: \x1b[2J", "y")]
    )
    bad.steps.append(Step("isolation", "skip"))
    assert good.held and not bad.held
    assert "ok" in patchwise.told(good, 1, 2) and "isolation: lacks x" in patchwise.told(good, 1, 2)
    text = patchwise.told(bad, 2, 2)
    assert "FAIL  0002-b.patch" in text and "\\x1b" in text and "\x1b" not in text
    suites = ElementTree.fromstring(patchwise.junit([good, bad]))
    assert [suite.get("name") for suite in suites] == ["0001-a.patch", "0002-b.patch"]
    counts = ("tests", "failures", "errors", "skipped")
    assert [suites[1].get(name) for name in counts] == ["3", "1", "0", "1"]
    assert suites[1].find("testcase/failure") is not None


def test_checkpatch_of_the_tree(built_kernel: Kernel, tmp_path: Path) -> None:
    """Ours has nothing to say against; a line that ends in a blank has."""
    _, patches, kept = kernel.resolved(
        kernel.Spec(), deadline=Deadline(60, "source"), progress=print
    )
    assert patches[0].name.startswith("0001-")
    step = patchwise.checkpatch(kept, patches[0])
    assert step.verdict == "pass", step.evidence
    wrong = tmp_path / "wrong.patch"
    text = patches[0].read_text()
    at = text.index("\n+", text.index("\n@@"))
    end = text.index("\n", at + 1)
    wrong.write_text(text[:end] + " " + text[end:])
    step = patchwise.checkpatch(kept, wrong)
    assert step.verdict == "fail" and "trailing whitespace" in step.why
    assert patchwise.checkpatch(tree.Tree(tmp_path), wrong).verdict == "none"


def test_whose_fault_a_build_is() -> None:
    """A full disk, a deadline and what is missing here are no patch's."""
    refused = PatchRefused("x does not apply", evidence="hunk 1 FAILED")
    compiled = ProcessFailed(["make"], 2, "a.c: error: x")
    assert [step.verdict for step in patchwise.unbuilt(refused)] == ["fail"]
    assert [step.verdict for step in patchwise.unbuilt(compiled)] == ["pass", "fail"]
    full = "a.s: No space left on device"
    rigs: list[tuple[RigError, int]] = [
        (ProcessFailed(["make"], 2, f"{full}\nmake: Error 1"), 4),
        (PatchRefused("x does not apply", evidence=full), 2),
        (DeadlineExceeded("kernel"), 4),
        (RequirementError(FULL), 3),
    ]
    for failed, code in rigs:
        (step,) = patchwise.unbuilt(failed)
        assert (step.name, step.verdict, step.code) == ("builds", "error", code)
        assert step.why in (full, failed.message)
        assert "ERROR x" in patchwise.told(Row("x", [step]), 1, 1)


def found(
    folder: Path, code: int | None, verdicts: dict[str, str], console: str = "", message: str = ""
) -> Found:
    folder.mkdir(parents=True)
    (folder / "host.console.log").write_text(console)
    kinds = {2: "ConfigurationError", 3: "RequirementError", 4: "AgentError", 5: "KernelBroke"}
    report: dict[str, Any] = {
        "phases": [{"name": "boot the host VM", "seconds": 2.5}],
        "checks": [{"name": name, "verdict": verdict} for name, verdict in verdicts.items()],
        "error": None,
    }
    if message == LACKS:
        kinds[3] = KernelLacks.__name__
    if code in kinds:
        told = {"message": message or kinds[code], "kind": kinds[code], "evidence": "", "phase": ""}
        report["error"] = told
    return Found(code, report, folder, folder)


def test_what_a_run_says_of_a_patch(tmp_path: Path) -> None:
    """Only a kernel that has not what is tried is `none`; the host VM alone wants no driver."""
    expected = [
        ("isolation", 0, "", "pass", 0),
        ("isolation", 5, "", "fail", 0),
        ("isolation", 3, LACKS, "none", 0),
        ("isolation", 3, FULL, "error", 3),
        ("isolation", 2, "", "error", 2),
        ("isolation", 4, "", "error", 4),
        ("boots", 3, "QEMU is missing", "error", 3),
        ("boots", 3, LACKS, "error", 3),
    ]
    for at, (name, code, message, verdict, ends) in enumerate(expected):
        step = patchwise.tried_by(name, found(tmp_path / f"{at}", code, {}, message=message))
        assert (step.verdict, step.code) == (verdict, ends), (name, code, message)


def rows(*verdicts: tuple[str, int]) -> list[Row]:
    return [
        Row("x", [Step("boots", "pass"), Step("isolation", verdict, LACKS, code=code)])  # type: ignore[arg-type]
        for verdict, code in verdicts
    ]


def test_a_series_that_no_scenario_was_tried_on() -> None:
    never = (3, [f"isolation was never made: {LACKS}"])
    assert patchwise.judged(rows(("none", 0), ("none", 0)), ["isolation"]) == never
    assert patchwise.judged(rows(("none", 0), ("pass", 0)), ["isolation"]) == (0, [])
    assert patchwise.judged(rows(("none", 0), ("fail", 0)), ["isolation"]) == (1, [])
    assert patchwise.judged(rows(("none", 0), ("error", 3)), ["isolation"]) == (3, [])
    assert patchwise.judged(rows(("fail", 0), ("error", 4)), ["isolation"]) == (4, [])


def test_what_differs(tmp_path: Path) -> None:
    first = found(
        tmp_path / "a",
        0,
        {"same": "pass", "worse": "pass", "gone": "pass"},
        "[ 1.0] up at 0x1f\n~1\n",
    )
    second = found(
        tmp_path / "b",
        1,
        {"same": "pass", "worse": "fail", "new": "pass"},
        "[ 2.5] up at 0x2e\n~08d34a\n[ 3.0] pdma: \x1b[2Jhello\n",
    )
    pair = compare.pair("x", first, second)
    assert pair.same == 1 and not pair.code and not pair.broke
    assert [(each.check, each.regression) for each in pair.changes] == [
        ("worse", True),
        ("gone", True),
        ("new", False),
    ]
    assert pair.lines == ["[ 3.0] pdma: \x1b[2Jhello"]
    assert pair.seconds == {"boot the host VM": (2.5, 2.5)}
    text = compare.told(pair)
    assert "REGRESSION  worse: pass, then fail" in text and "\x1b" not in text
    assert compare.judged([pair]) == (1, ["2 regressions"])


def test_a_base_without_the_driver_is_no_regression(tmp_path: Path) -> None:
    first = found(tmp_path / "a", 3, {}, message=LACKS)
    pair = compare.pair("x", first, found(tmp_path / "b", 0, {"new": "pass"}))
    assert pair.why == (LACKS, "")
    assert [change.check for change in pair.changes] == ["new"] and not pair.regressions
    assert compare.judged([pair]) == (0, ["no regression"])


@pytest.mark.parametrize(
    ("code", "message", "ends"),
    [
        (2, "tree:nonesuch: no such folder", 2),
        (3, "no source of Linux 7.1 to be had", 3),
        (3, LACKS, 3),
        (4, "late", 4),
        (None, "", 4),
        (130, "", 4),
    ],
)
def test_what_says_nothing_of_a_kernel_is_no_regression(
    code: int | None, message: str, ends: int, tmp_path: Path
) -> None:
    """What was reached before is compared, whichever of both it was."""
    whole = found(tmp_path / "a", 0, {"same": "pass", "not reached": "pass"})
    (tmp_path / "b.log").write_text("")
    part = Found(
        code,
        found(tmp_path / "b", code, {"same": "pass"}, message=message).report,
        tmp_path / "b",
        tmp_path / "b.log",
    )
    pair = compare.pair("x", whole, part)
    assert (pair.same, pair.changes) == (1, [])
    ended, (said,) = compare.judged([pair])
    assert ended == ends
    assert said.startswith("x: not compared to its end") and message in said
    if message != LACKS:
        pair = compare.pair("x", part, whole)
        assert (pair.same, pair.changes, compare.judged([pair])[0]) == (1, [], ends)
    failed = found(tmp_path / "c", 1, {"same": "fail", "not reached": "pass"})
    worse = compare.pair("y", whole, failed)
    assert compare.judged([pair, worse])[0] == 1


def test_a_second_kernel_that_breaks(tmp_path: Path) -> None:
    """It is told what happened, not how many regressions there were not."""
    good, bad = found(tmp_path / "a", 0, {}), found(tmp_path / "b", 5, {}, message="BUG: x")
    assert compare.judged([compare.pair("boot", good, bad)]) == (
        1,
        ["the second kernel broke (boot): BUG: x"],
    )
    late = found(tmp_path / "c", 4, {})
    assert compare.judged([compare.pair("boot", late, bad)])[0] == 4
    assert compare.judged([compare.pair("boot", bad, bad)]) == (0, ["no regression"])


def test_the_consoles_of_all_host_vms(tmp_path: Path) -> None:
    """The kernel's own tests have a folder for each."""
    founds = [found(tmp_path / letter, 0, {}) for letter in "ab"]
    for number in (1, 2):
        deep = tmp_path / f"b/vfio-legacy-{number}/host.console.log"
        deep.parent.mkdir()
        deep.write_text(f"{'x' * number}\n")
    assert compare.pair("selftest:vfio", *founds).lines == ["x", "xx"]


def test_two_words_for_one_kernel(tmp_path: Path) -> None:
    founds = [found(tmp_path / letter, 0, {}) for letter in "ab"]
    assert compare.judged([compare.pair("x", *founds)]) == (0, ["no regression"])
    one = {"release": "7.2.12", "source": "linux-source-7.2 7.2.12-1", "hash": "abc"}
    for each in founds:
        each.report["versions"] = {"kernel": dict(one)}
    said = "both are the same kernel: 7.2.12 (linux-source-7.2 7.2.12-1), abc"
    assert compare.judged([compare.pair("x", *founds)]) == (0, ["no regression", said])
    founds[1].report["versions"]["kernel"]["hash"] = "def"
    assert compare.judged([compare.pair("x", *founds)]) == (0, ["no regression"])


# --- the commands, whose builds and runs are none ------------------------------------------------

Called = Callable[..., tuple[int, str, Path]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Called:
    """Calls a command whose runs end with these codes, in order; None is a Ctrl-C.

    What it ends with, what it says, and its report folder.
    """

    def call(words: Sequence[str], codes: Sequence[int | OSError | None]) -> tuple[int, str, Path]:
        left = list(codes)

        def run(words: Sequence[str], folder: Path, progress: object) -> Found:
            code = left.pop(0)
            if code is None:
                raise KeyboardInterrupt
            if isinstance(code, OSError):
                raise code
            return found(folder, code, {"x": "pass"} if code == 0 else {}, message=LACKS)

        built: Any = SimpleNamespace(warnings=[])
        patches = [tmp_path / f"{number:04}-x.patch" for number in (1, 2)]
        monkeypatch.setattr(runs, "run", run)
        monkeypatch.setattr(kernel, "build", lambda spec, **others: built)
        monkeypatch.setattr(
            kernel, "resolved", lambda spec, **others: ("debian:7.2", patches, None)
        )
        monkeypatch.setattr(patchwise, "checkpatch", lambda *words: Step("checkpatch", "pass"))
        folder = tmp_path / "report"
        parsed = cli._parser().parse_args([*words, "--report", str(folder)])
        stream = io.StringIO()
        with Terminal(stream) as terminal:
            try:
                code = parsed.handler(parsed, terminal)
            except KeyboardInterrupt:
                code = 130
            except RigError as error:
                code = error.exit_code
        assert not left
        return code, stream.getvalue(), folder

    return call


SERIES = ["check-series", "--series", "x"]
COMPARE = ["compare", "debian:7.2", "debian:7.3"]


def test_a_series_on_a_kernel_without_the_driver(called: Called) -> None:
    code, said, _ = called(SERIES, [0, 3, 0, 3])
    assert code == 3
    assert "2 of 2 patches hold" in said and f"isolation was never made: {LACKS}" in said


def test_a_scenario_that_is_named_twice_is_made_once(called: Called, tmp_path: Path) -> None:
    twice = ["--scenario", "isolation", "--scenario", "attacks", "--scenario", "isolation"]
    code, _, _ = called([*SERIES, *twice], [0] * 6)
    assert code == 0
    (tmp_path / "report").rename(tmp_path / "first")
    code, _, folder = called([*COMPARE, *twice], [0] * 4)
    told = json.loads((folder / "compare.json").read_text())
    assert code == 0 and [each["scenario"] for each in told["scenarios"]] == [
        "isolation",
        "attacks",
    ]


@pytest.mark.parametrize(
    ("end", "code"), [(None, 130), (OSError(errno.ENOSPC, "No space left on device"), 3)]
)
def test_what_is_known_when_it_is_interrupted(
    end: OSError | None, code: int, called: Called, tmp_path: Path
) -> None:
    ended, _, folder = called(SERIES, [0, 0, end])
    told = json.loads((folder / "series.json").read_text())
    assert ended == code
    assert [row["patch"] for row in told["patches"]] == ["0001-x.patch"]
    assert told["not_reached"] == ["0002-x.patch"]
    suites = ElementTree.parse(folder / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["0001-x.patch"]
    folder.rename(tmp_path / "first")
    ended, _, folder = called(COMPARE, [0, 0, end])
    told = json.loads((folder / "compare.json").read_text())
    assert ended == code and [each["scenario"] for each in told["scenarios"]] == ["boot"]


def test_what_compare_says_in_the_end(called: Called) -> None:
    code, said, _ = called(COMPARE, [0, 2, 0, 2])
    assert code == 2
    assert "REGRESSION" not in said and "isolation: not compared to its end; B: " in said


def test_a_base_without_the_driver_boots(command: Command) -> None:
    """What the first patches of a series are tried on; a rig with devices is refused, and why."""
    ended = command(*runs.BARE, "--series", "none")
    assert ended.code == 0, ended.err
    ended = command("run", "boot", "--series", "none")
    assert ended.code == 3 and "CONFIG_VFIO_PDMA" in ended.err, ended.err


def test_bad_words(command: Command) -> None:
    for words, said in (
        (["check-series", "--series", "none"], "no patch in the series"),
        (["check-series", "--kernel", "image:x"], "no source to lay patches over"),
        (["check-series", "--scenario", "nonesuch"], "nonesuch"),
        (["compare", "debian:7.2", "nonesuch", "--scenario", "nonesuch"], "nonesuch"),
        (["check-series", "--scenario", "selftest:../x"], "not a folder of tools/testing"),
    ):
        ended = command(*words)
        assert ended.code == 2 and said in ended.err, ended.err
