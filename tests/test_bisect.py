# SPDX-License-Identifier: GPL-2.0-or-later
"""Bisecting: git's own machinery on a real repository; only the runs of a rig are stood in for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_ioasid import bisect
from qemu_ioasid.errors import ConfigurationError, InfrastructureError
from qemu_ioasid.session import Output
from tests.conftest import Command
from tests.test_origin import git

#: Answers a run by what the file ``answers`` in the repository says of the commit's subject: one
#: word a run, as `runs.Found.verdict` has them; the last one counts from there on.
STEP = """
import json, os, sys
from pathlib import Path
from qemu_ioasid import bisect, process, runs
from qemu_ioasid.cli import main
asked = {}
def run(words, folder, progress):
    subject = folder.name.split("-")[0]
    answers = json.loads(Path(os.environ["ANSWERS"]).read_text())
    verdicts = answers.get(subject, ["held"])
    stage = folder.name.split("-")[1]
    if stage == "bare" and "boot" not in answers:
        verdicts = ["held"]
    at = asked[subject] = asked.get(subject, 0) + (stage == "whole")
    word = verdicts[min(max(at, 1), len(verdicts)) - 1]
    with open(os.environ["ANSWERS"] + ".log", "a") as log:
        log.write(f"{subject} {stage} {word}\\n")
    folder.mkdir(parents=True)
    kind = {"unbuildable": "ProcessFailed", "broke": "KernelBroke"}.get(word, "QemuError")
    error = {"message": word, "kind": kind, "phase": "kernel", "evidence": ""}
    codes = {"held": 0, "failed": 1, "broke": 5, "unbuildable": 4, "unknown": 4}
    report = {"phases": [], "checks": [], "error": error}
    if word == "unknown":
        error["phase"] = "boot"
    if word == "failed":
        report["checks"] = [{"name": "unregistered-a", "verdict": "fail"}]
    return runs.Found(codes[word], report, folder, folder)
runs.run = run
sys.exit(main(["bisect-step", *sys.argv[1:]]))
"""


class Bisected:
    """A repository of ten commits, and what each of them answers."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tree = folder / "linux"
        self.tree.mkdir()
        git(self.tree, "init", "-q")
        (self.tree / "Makefile").write_text("VERSION = 7\nPATCHLEVEL = 2\nSUBLEVEL = 0\n")
        git(self.tree, "add", "Makefile")
        for number in range(11):
            git(self.tree, "commit", "-q", "--allow-empty", "-m", f"Change {number}")
        self.commits = git(self.tree, "log", "--reverse", "--format=%H").split()
        self._answers = folder / "answers"
        monkeypatch.setenv("ANSWERS", str(self._answers))
        monkeypatch.setenv("QEMU_IOASID_CACHE", str(folder / "cache"))
        self.said: list[str] = []
        self.answer({})

    def answer(self, by_number: dict[int, list[str]], **more: bool) -> None:
        """Have commits answer so; those from the seventh on fail, those before hold."""
        found: dict[str, object] = dict(more)
        for number, commit in enumerate(self.commits):
            usual = ["failed"] if number >= 7 else ["held"]
            found[commit[:12]] = by_number.get(number, usual)
        self._answers.write_text(json.dumps(found))

    def run(self) -> tuple[bisect.State, bool, str, list[str]]:
        """Begin, or go on; the state, whether it went on, and what was found."""
        words = ["isolation"]
        state, resumed = bisect.begin(self.tree, self.commits[0], self.commits[10], words)
        output = Output(self.said.append, lambda line: None, lambda line: None)
        first, maybe = bisect.drive(state, output, (sys.executable, "-c", STEP))
        return state, resumed, first, maybe

    @property
    def log(self) -> list[list[str]]:
        """Every run that was made."""
        path = self._answers.with_name("answers.log")
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def bisected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bisected]:
    yield Bisected(tmp_path, monkeypatch)


def test_the_first_bad_commit(bisected: Bisected) -> None:
    before = git(bisected.tree, "for-each-ref") + git(bisected.tree, "status", "--short")
    state, _, first, maybe = bisected.run()
    assert (first, maybe) == (bisected.commits[7], [])
    seventh = next(each for each in state.answers if each.commit == first)
    assert (seventh.verdict, seventh.subject) == ("bad", "Change 7")
    assert seventh.why == "unregistered-a"
    # Alone, as a whole, and once more.
    assert seventh.boots == 3
    assert any("Change 7" in line and "bad" in line for line in bisected.said)
    assert git(bisected.tree, "for-each-ref") + git(bisected.tree, "status", "--short") == before


def test_a_commit_that_does_not_build_is_skipped(bisected: Bisected) -> None:
    bisected.answer({5: ["unbuildable"], 8: ["unbuildable"]})
    state, _, first, _ = bisected.run()
    assert first == bisected.commits[7]
    skipped = [each for each in state.answers if each.verdict == "skip"]
    assert skipped and {each.commit for each in skipped} <= {bisected.commits[n] for n in (5, 8)}


def test_what_cannot_be_told_apart_is_said(bisected: Bisected) -> None:
    bisected.answer({6: ["unbuildable"], 7: ["unbuildable"]})
    _, _, first, maybe = bisected.run()
    assert first == ""
    assert set(maybe) == {bisected.commits[number] for number in (6, 7, 8)}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["failed", "held"], "FLAKY: first unregistered-a, then it held"),
        (["unknown"], "rig failed"),
    ],
)
def test_it_stops_rather_than_blame_and_goes_on(
    bisected: Bisected, answers: list[str], message: str
) -> None:
    """What is flaky, or a rig that fails, is no answer; what is known is not asked again."""
    bisected.answer({8: answers, 7: answers, 6: answers, 5: answers})
    with pytest.raises(InfrastructureError, match=message):
        bisected.run()
    made = [line[0] for line in bisected.log]
    bisected.answer({})
    _, resumed, first, _ = bisected.run()
    assert resumed and first == bisected.commits[7]
    again = {line[0] for line in bisected.log[len(made) :]}
    assert made[-1] in again and not (set(made) - {made[-1]}) & again


def test_what_does_not_boot_is_found_without_guests(bisected: Bisected) -> None:
    bisected.answer({number: ["broke"] for number in range(7, 11)}, boot=True)
    _, _, first, _ = bisected.run()
    assert first == bisected.commits[7]
    broke = [line[1] for line in bisected.log if line[2] == "broke"]
    assert broke and set(broke) == {"bare"}


def test_bad_input(bisected: Bisected, command: Command, tmp_path: Path) -> None:
    tree, ends = str(bisected.tree), (bisected.commits[10], bisected.commits[0])
    for words, said in (
        ([*ends, "selftest:iommu", "--check", "x"], "--check and --set are for scenarios"),
        (["--tree", "nonesuch", *ends], "no such folder"),
        (["--tree", str(tmp_path), *ends], "no git repository"),
        (["--tree", tree, "nonesuch", ends[1]], "no commit nonesuch"),
        (["--tree", tree, *ends], "bisect|ancestor|good"),
        (["--tree", tree, *ends, "nonesuch"], "nonesuch"),
    ):
        ended = command("bisect", *words)
        assert ended.code == 2, ended.err
        assert any(part in ended.err for part in said.split("|")), ended.err
    with pytest.raises(ConfigurationError):
        bisect.begin(bisected.tree, *ends, [])


def test_killed_it_goes_on(bisected: Bisected) -> None:
    """SIGKILL in the middle: the next begin finds what was known."""
    state, resumed = bisect.begin(
        bisected.tree, bisected.commits[0], bisected.commits[10], ["isolation"]
    )
    assert not resumed
    step = [sys.executable, "-c", STEP, str(state.folder)]
    subprocess.run(step, check=False, capture_output=True)
    git(state.git, "bisect", "good", "BISECT_HEAD")
    _, resumed, first, _ = bisected.run()
    assert resumed and first == bisected.commits[7]
    runs = [line[0] for line in bisected.log if line[1] == "whole"]
    assert (
        len(runs)
        == len(set(runs)) + sum(1 for line in bisected.log if line[1:] == ["whole", "failed"]) // 2
    )
