# SPDX-License-Identifier: GPL-2.0-or-later
"""Bisecting: git's own machinery on a real repository; only the runs of a rig are stood in for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from qemu_ioasid import bisect, cli, kernel, tried
from qemu_ioasid.errors import ConfigurationError, InfrastructureError
from qemu_ioasid.kernel import Spec
from qemu_ioasid.session import Output
from tests.conftest import Command
from tests.test_origin import git

#: Answers a run by what the file ``answers`` in the repository says of the commit's subject: one
#: word a run, as `runs.Found.verdict` has them; the last one counts from there on.
STEP = """
import json, os, sys
from pathlib import Path
from qemu_ioasid import bisect, cache, process, runs
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
    with open(os.environ["ANSWERS"] + ".told", "a") as log:
        log.write(json.dumps([stage, words, str(cache.root())]) + "\\n")
    folder.mkdir(parents=True)
    kinds = {"unbuildable": "ProcessFailed", "broke": "KernelBroke", "lacking": "KernelLacks"}
    kind = kinds.get(word, "QemuError")
    error = {"message": word, "kind": kind, "phase": "kernel", "evidence": ""}
    codes = {"held": 0, "failed": 1, "broke": 5, "unbuildable": 4, "lacking": 3, "unknown": 4}
    report = {"phases": [], "checks": [], "error": error}
    if word == "unknown":
        error["phase"] = "boot"
    if word == "failed":
        report["checks"] = [{"name": "unregistered-a", "verdict": "fail"}]
    return runs.Found(codes[word], report, folder, folder)
runs.run = run
sys.exit(main(["bisect-step", *sys.argv[1:]]))
"""

STEPPING = (sys.executable, "-c", STEP)


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

    @property
    def ends(self) -> tuple[str, str]:
        """The oldest commit, which holds, and the newest, which does not."""
        return self.commits[0], self.commits[-1]

    def run(
        self, spec: Spec | None = None, step: Sequence[str] = STEPPING, anew: bool = False
    ) -> tuple[bisect.State, bool, str, list[str]]:
        """Begin, or go on; the state, whether it went on, and what was found."""
        self.said.clear()
        output = Output(self.said.append, lambda line: None, lambda line: None)
        begun = bisect.begin(
            self.tree, self.ends, spec or Spec(), ["isolation"], self.said.append, anew=anew
        )
        with begun as state:
            resumed = any("going on" in line for line in self.said)
            first, maybe = bisect.drive(state, output, step)
        return state, resumed, first, maybe

    @property
    def told(self) -> list[tuple[str, list[str], str]]:
        """Of every run that was made its stage, what it was told, and its cache."""
        lines = self._answers.with_name("answers.told").read_text().splitlines()
        return [tuple(json.loads(line)) for line in lines]

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


def test_a_commit_that_does_not_build_or_lacks_the_driver_is_skipped(bisected: Bisected) -> None:
    bisected.answer({5: ["unbuildable"], 8: ["lacking"]})
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
        (["--tree", tree, *reversed(ends), "--series", "nonesuch"], "series nonesuch"),
    ):
        ended = command("bisect", *words)
        assert ended.code == 2, ended.err
        assert any(part in ended.err for part in said.split("|")), ended.err
    with (
        pytest.raises(ConfigurationError),
        bisect.begin(bisected.tree, ends, Spec(), [], print),
    ):
        pass


def test_killed_it_goes_on(bisected: Bisected) -> None:
    """SIGKILL in the middle: the next begin finds what was known."""
    with bisect.begin(bisected.tree, bisected.ends, Spec(), ["isolation"], print) as state:
        pass
    subprocess.run([*STEPPING, str(state.folder)], check=False, capture_output=True)
    git(state.git, "bisect", "good", "BISECT_HEAD")
    _, resumed, first, _ = bisected.run()
    assert resumed and first == bisected.commits[7]
    runs = [line[0] for line in bisected.log if line[1] == "whole"]
    assert (
        len(runs)
        == len(set(runs)) + sum(1 for line in bisected.log if line[1:] == ["whole", "failed"]) // 2
    )


def test_a_step_that_dies_blames_no_commit(bisected: Bisected) -> None:
    """Nor has git noted anything: the bisect goes on as if it had not been asked."""
    for code in (1, 2, 3, 4, 120, 126, 127, 137):
        with pytest.raises(InfrastructureError, match="git bisect run failed"):
            bisected.run(step=("sh", "-c", f"exit {code}"))
    _, resumed, first, _ = bisected.run()
    assert resumed and first == bisected.commits[7]


def test_a_step_without_its_modules_says_so(bisected: Bisected) -> None:
    with pytest.raises(InfrastructureError) as raised:
        bisected.run(step=(sys.executable, "-c", "import nonesuch"))
    assert "No module named 'nonesuch'" in raised.value.evidence


def test_whom_nobody_found_bad_is_not_blamed(bisected: Bisected) -> None:
    """Whatever git has heard; only the bad end need not be asked."""
    bad = ("sh", "-c", f"exit {bisect.BAD}")
    with pytest.raises(InfrastructureError, match=r"has answered nothing; --anew"):
        bisected.run(step=bad)
    bisected.commits = bisected.commits[-2:]
    assert bisected.run(step=bad)[2] == bisected.commits[-1]


def test_more_skipped_commits_than_an_error_has_lines(bisected: Bisected) -> None:
    for number in range(11, 60):
        git(bisected.tree, "commit", "-q", "--allow-empty", "-m", f"Change {number}")
    bisected.commits = git(bisected.tree, "log", "--reverse", "--format=%H").split()
    _, _, first, maybe = bisected.run(step=("sh", "-c", f"exit {bisect.SKIP}"))
    assert first == ""
    assert set(maybe) == set(bisected.commits[1:])


@pytest.mark.parametrize(
    ("scenario", "profile"), [("isolation", "debug"), ("selftest:iommu", "selftest")]
)
def test_both_stages_try_the_kernel_that_was_asked_for(
    bisected: Bisected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str, profile: str
) -> None:
    monkeypatch.setattr(bisect, "drive", partial(bisect.drive, step=STEPPING))
    words = ["--tree", str(bisected.tree), "--series", "none", "--report", str(tmp_path / "report")]
    words += ["--profile", "debug"] if profile == "debug" else []
    assert cli.main(["bisect", *bisected.ends, scenario, *words]) == 0
    assert {stage for stage, _, _ in bisected.told} == {"bare", "whole"}
    for _, told, _ in bisected.told:
        pairs = list(pairwise(told))
        assert pairs.count(("--series", "none")) == pairs.count(("--profile", profile)) == 1
        assert told.count("--kernel") == told.count("--series") == told.count("--profile") == 1


def laid_over(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Spec, Path]:
    """A kernel with something laid over it, and the file that this is in."""
    series = folder / "kernel-patches/7.2"
    series.mkdir(parents=True)
    patch = series / "0001.patch"
    (series / "series").write_text("0001.patch\n")
    patch.write_text(MAIL)
    fragments = folder / "kernel-patches/config"
    fragments.mkdir()
    config = fragments / "default.config"
    config.write_text("CONFIG_A=y\n")
    monkeypatch.setattr(kernel, "PATCHES", folder / "kernel-patches")
    named = {"folder": str(series), "mbox": str(patch), "default": "", "config": "none"}
    spec = Spec(series=named[name], fragments=fragments)
    return spec, config if name == "config" else patch


MAIL = """From 0123456789012345678901234567890123456789 Mon Sep 17 00:00:00 2001
From: x <x@localhost>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] a

---
diff --git a/a b/a
--- a/a
+++ b/a
@@ -1 +1 @@
-a
+b
"""


def edit(file: Path) -> None:
    """Another patch, or fragment."""
    file.write_text(file.read_text().replace("+b", "+c").replace("=y", "=m"))


@pytest.mark.parametrize("name", ["folder", "mbox", "default", "config"])
def test_what_is_laid_over_counts_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec, file = laid_over(name, tmp_path, monkeypatch)
    before = bisect.inputs(spec, tmp_path)
    assert bisect.inputs(spec, tmp_path) == before
    edit(file)
    assert bisect.inputs(spec, tmp_path) != before


def test_other_patches_begin_anew(
    bisected: Bisected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered with other patches is no answer."""
    spec, file = laid_over("folder", tmp_path, monkeypatch)
    bisected.answer({6: ["unknown"], 7: ["unknown"]})
    with pytest.raises(InfrastructureError):
        bisected.run(spec)
    made = {line[0] for line in bisected.log}
    with pytest.raises(InfrastructureError):
        bisected.run(spec)
    assert "going on with the bisect that was interrupted" in bisected.said[0]
    edit(file)
    bisected.answer({})
    before = len(bisected.log)
    _, resumed, first, _ = bisected.run(spec)
    assert not resumed and first == bisected.commits[7]
    assert "has changed" in bisected.said[0] and "begins anew" in bisected.said[0]
    assert made <= {line[0] for line in bisected.log[before:]}


def test_patches_that_change_meanwhile_are_told(
    bisected: Bisected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, file = laid_over("folder", tmp_path, monkeypatch)
    drive = bisect.drive

    def edited(state: bisect.State, output: Output) -> tuple[str, list[str]]:
        edit(file)
        return drive(state, output, STEPPING)

    monkeypatch.setattr(bisect, "drive", edited)
    words = ["--tree", str(bisected.tree), "--series", spec.series]
    words += ["--report", str(tmp_path / "report")]
    assert cli.main(["bisect", *bisected.ends, *words]) == ConfigurationError.exit_code
    assert not (tmp_path / "report/bisect.json").exists()


def test_anew(bisected: Bisected) -> None:
    bisected.answer({6: ["unknown"], 7: ["unknown"]})
    with pytest.raises(InfrastructureError):
        bisected.run()
    made = {line[0] for line in bisected.log}
    bisected.answer({})
    before = len(bisected.log)
    _, resumed, first, _ = bisected.run(anew=True)
    assert not resumed and first == bisected.commits[7]
    assert made <= {line[0] for line in bisected.log[before:]}


def test_one_process_at_a_time(bisected: Bisected, command: Command) -> None:
    spec = Spec()
    words = tried.words("isolation", spec)
    with bisect.begin(bisected.tree, bisected.ends, spec, words, print):
        ended = command("bisect", "--tree", str(bisected.tree), *bisected.ends, timeout=60)
        assert ended.code == 2 and "under way in another process" in ended.err
        # Another one is not in its way.
        with bisect.begin(bisected.tree, bisected.ends, spec, ["attacks"], print):
            pass


def test_a_relative_cache_is_one_and_the_same(
    bisected: Bisected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEMU_IOASID_CACHE", "mine")
    assert bisected.run()[2] == bisected.commits[7]
    assert {where for _, _, where in bisected.told} == {str(tmp_path / "mine")}
