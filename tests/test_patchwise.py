# SPDX-License-Identifier: GPL-2.0-or-later
"""check-series and compare: what is told of a patch and of two kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qemu_ioasid import compare, kernel, patchwise, runs
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.kernel import Kernel, tree
from qemu_ioasid.patchwise import Row, Step
from qemu_ioasid.runs import Found
from tests.conftest import Command


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


def found(folder: Path, code: int, verdicts: dict[str, str], console: str) -> Found:
    folder.mkdir()
    (folder / "host.console.log").write_text(console)
    report: dict[str, Any] = {
        "phases": [{"name": "boot the host VM", "seconds": 2.5}],
        "checks": [{"name": name, "verdict": verdict} for name, verdict in verdicts.items()],
        "error": {"message": "it lacks x", "kind": "RequirementError"} if code == 3 else None,
    }
    return Found(code, report, folder, folder)


def test_what_differs(tmp_path: Path) -> None:
    first = found(
        tmp_path / "a", 0, {"same": "pass", "worse": "pass", "gone": "pass"}, "[ 1.0] up at 0x1f\n"
    )
    second = found(
        tmp_path / "b",
        1,
        {"same": "pass", "worse": "fail", "new": "pass"},
        "[ 2.5] up at 0x2e\n[ 3.0] pdma: \x1b[2Jhello\n",
    )
    pair = compare.pair("x", first, second)
    assert pair.same == 1 and not pair.unknown and not pair.broke
    assert [(each.check, each.regression) for each in pair.changes] == [
        ("worse", True),
        ("gone", True),
        ("new", False),
    ]
    assert pair.lines == ["[ 3.0] pdma: \x1b[2Jhello"]
    assert pair.seconds == {"boot the host VM": (2.5, 2.5)}
    text = compare.told(pair)
    assert "REGRESSION  worse: pass, then fail" in text and "\x1b" not in text


def test_a_base_without_the_driver_is_no_regression(tmp_path: Path) -> None:
    pair = compare.pair(
        "x", found(tmp_path / "a", 3, {}, ""), found(tmp_path / "b", 0, {"new": "pass"}, "")
    )
    assert pair.why == ("it lacks x", "")
    assert not pair.unknown and not pair.regressions


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
