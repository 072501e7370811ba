# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports as machines and people read them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from qemu_ioasid import page
from qemu_ioasid.report import Attempt, Check, Report, load


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """A report with one check of each verdict."""
    said: list[str] = []
    report = Report(tmp_path, "isolation", said.append, accelerator="tcg")
    report.versions = {"kernel": {"release": "7.2"}, "series": "abc"}
    with report.phase("boot"):
        pass
    report.checks += [
        Check("one", "pass", "tried it", "DONE", "seen", 0.5),
        Check("two", "fail", "tried it", "DONE", "LEAK: <g1> & \x1b[0m", 0.1, "console\x00 line"),
        Check("three", "error", "tried it", "nothing", "not asked"),
        Check("four", "skip", "tried it", "nothing", "not asked"),
    ]
    return report


def test_document_has_the_promised_keys(report: Report, tmp_path: Path) -> None:
    report.exit_code = 1
    report.write()
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["schema"] == 1
    assert document["verdict"] == "a check failed"
    assert document["exit_code"] == 1
    assert document["accelerator"] == "tcg"
    assert document["versions"]["series"] == "abc"
    assert [set(phase) for phase in document["phases"]] == [
        {"name", "seconds", "start", "finished"}
    ]
    for check in document["checks"]:
        assert {"name", "verdict", "tried", "answered", "witnesses", "attempts"} <= set(check)
    assert load(tmp_path) == document
    assert (tmp_path / "report.html").read_text() == page.render(document)


def test_junit_counts_and_survives_control_characters(report: Report, tmp_path: Path) -> None:
    report.fail(5, "host: panic: Kernel panic\ud800", "last\x1b words")
    report.write()
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("tests") == "5"
    assert suite.get("failures") == "1"
    assert suite.get("errors") == "2"
    assert suite.get("skipped") == "1"
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    failure = cases["two"].find("failure")
    assert failure is not None and "LEAK" in str(failure.get("message"))
    broke = cases["rig"].find("error")
    assert broke is not None and broke.text == r"last\x1b words"


def test_unfinished_phase_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    report = Report(tmp_path, "isolation", said.append)
    with pytest.raises(KeyError), report.phase("boot"):
        raise KeyError
    assert said[0].endswith("boot  (not finished)")
    assert report.phases[0].name == "boot" and not report.phases[0].finished
    report.fail(4, "it broke", "")
    assert report.error is not None and report.error["phase"] == "boot"


def test_steps_and_checks_are_told_as_they_come(tmp_path: Path) -> None:
    told: list[str] = []
    report = Report(tmp_path, "isolation", told.append)
    report.begins = report.progress = told.append
    with report.phase("attacks"):
        report.enter(Check("one", "pass", "it", "DONE", "seen"))
        report.enter(Check("two", "fail", "it", "DONE", "LEAK"))
    assert told[:-1] == ["attacks", "1 pass, last one", "1 pass, 1 fail, last two", ""]
    assert told[-1].endswith("attacks: 1 pass, 1 fail")
    assert [check.phase for check in report.checks] == ["attacks", "attacks"]
    with report.phase("no attack"):
        pass
    assert told[-1].endswith("no attack")
    first, second = report.phases
    assert second.start >= first.start + first.seconds - 0.002


def test_what_vms_say_has_an_end(report: Report, tmp_path: Path) -> None:
    """Names of no check, status or file that a VM gives make more than their share of a report."""
    evil = "../../etc/\x1b[2J<b>\u202e" * 100_000
    attempts = [Attempt("a", "g1", 1, "g1", "DONE", evil, "wrong") for _ in range(3)]
    with report.phase("attacks"):
        report.enter(Check("evil", "fail", evil, evil, evil, 0.1, evil, attempts=attempts))
    report.fail(4, evil, evil)
    report.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("junit.xml", "report.html", "report.json")
    ]
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 2 << 20, path
        assert "\x1b" not in path.read_text() and "\u202e" not in path.read_text()
    assert load(tmp_path)["checks"][-1]["name"] == "evil"
