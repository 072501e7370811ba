# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole stack as a user runs it: what holds, what breaks it, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import reaper
from qemu_ioasid.kernel import Kernel, mutant
from tests.conftest import Command

CHECKS = [
    *("stage-host", "stage-g1", "stage-g2", "same-bytes-g1", "same-bytes-g2"),
    *(f"no-pasid-{how}-{device}" for device in "abc" for how in ("mapped", "unmapped")),
    *(f"registered-{device}" for device in "abc"),
    "audit",
    *(f"unregistered-{device}" for device in "abc"),
    *("intra-vm", "intra-vm-shared"),
    *("inter-vm-use", "inter-vm-register", "inter-vm-ioas-id", "inter-vm-equal-id"),
    *(f"after-{what}-{device}" for device in "abc" for what in ("unregister", "free", "replace")),
    *("audit-afterwards", "in-flight"),
    *(f"past-the-end-{device}" for device in "abc"),
    *("after-death-c", "after-reset-c"),
]


def ours(token: str) -> list[int]:
    """The live processes of the run with that token."""
    return reaper.marked(token)


def _arguments(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


class Running:
    """``qemu-ioasid``, or another *command* with its arguments, under way without a terminal."""

    def __init__(
        self,
        cwd: Path,
        environment: dict[str, str],
        *arguments: str,
        command: Sequence[str] = (sys.executable, "-m", "qemu_ioasid.cli"),
    ) -> None:
        self.environment = environment
        self.popen = subprocess.Popen(
            [*command, *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def wait_for(self, text: str, seconds: float) -> None:
        """Read its output until *text* is in it."""
        assert self.popen.stdout is not None
        end = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self.popen.stdout], [], [], end - time.monotonic())
            assert ready, f"no {text!r} in {self.output!r}"
            line = self.popen.stdout.readline()
            assert line, f"ended without {text!r}: {self.output!r}"
            self.output += line

    def wait_for_child(self, words: bytes, seconds: float) -> str:
        """Wait until it has a child with *words* in its arguments; returns the run's token."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            base = Path(self.environment["XDG_RUNTIME_DIR"]) / "qemu_ioasid"
            # It goes with the last run in it: Avocado's other processes have runs of their own.
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(base):
                    if any(words in _arguments(pid) for pid in ours(name)):
                        return name
            time.sleep(0.02)
        raise AssertionError(f"no child with {words!r}")

    def nothing_left(self, token: str, seconds: float = 5.0) -> None:
        """Within *seconds* of its death no process and no folder of it is left."""
        base = Path(self.environment["XDG_RUNTIME_DIR"]) / "qemu_ioasid"
        end = time.monotonic() + seconds
        while ours(token) or (base / token).exists():
            assert time.monotonic() < end, (ours(token), list(base.iterdir()))
            time.sleep(0.05)
        cache = Path(os.environ.get("QEMU_IOASID_CACHE", "~/.cache/qemu_ioasid")).expanduser()
        assert not list(cache.glob(f"*/.{token}*"))


@pytest.fixture
def running(tmp_path: Path, environment: dict[str, str]) -> Iterator[Any]:
    """Starts runs that are killed at the end if they still live."""
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        started.append(Running(tmp_path, environment, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.popen.kill()
        each.popen.communicate()


def attempted(check: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The attempts of a check: who, device, whose PASID, outcome."""
    keys = ("by", "device", "owner", "outcome")
    return [tuple(attempt[key] for key in keys) for attempt in check["attempts"]]


def test_isolation_holds(command: Command, tmp_path: Path, built_kernel: Kernel) -> None:
    ended = command("run", "--json", "--report", "report")
    assert ended.code == 0, ended.err
    report = ended.json()
    assert report == json.loads((tmp_path / "report/report.json").read_text())
    assert [check["name"] for check in report["checks"]] == CHECKS
    assert {check["verdict"] for check in report["checks"]} == {"pass"}
    for check in report["checks"]:
        assert check["tried"] and check["answered"] != "nothing"
        assert check["witnesses"] != "not asked"
    assert report["accelerator"] in ("kvm", "tcg")
    assert report["verdict"] == "all checks held"
    assert report["versions"]["kernel"]["hash"] == built_kernel.hash
    assert {"series", "qemu", "images", "project"} <= set(report["versions"])
    names = [phase["name"] for phase in report["phases"]]
    assert names.index("restore the rig") < names.index("the stage") < names.index("take it apart")
    suite = ElementTree.parse(tmp_path / "report/junit.xml").getroot()
    assert suite.get("tests") == str(len(CHECKS))
    checks = {check["name"]: check for check in report["checks"]}
    assert attempted(checks["registered-c"]) == [("g2", "c", "g2", "allowed")]
    assert attempted(checks["inter-vm-use"]) == [("g2", "c", "g1", "refused")]
    assert attempted(checks["after-free-a"]) == [("g1", "a", "", "refused")]
    assert attempted(checks["past-the-end-b"]) == [("g1", "b", "g1", "faulted")] * 2
    assert attempted(checks["after-death-c"]) == [("host", "c", "", "refused")]
    assert [outcome for *_, outcome in attempted(checks["in-flight"])] == ["allowed", "refused"]
    assert "All checks held" in (tmp_path / "report/report.html").read_text()
    for vm in ("host", "g1", "g2"):
        for log in ("console", "qmp", "agent", "qemu"):
            assert (tmp_path / f"report/{vm}.{log}.log").exists(), f"{vm}.{log}"


def test_checks_made_alone_bring_about_what_they_need(command: Command) -> None:
    """In the table's order, whatever the order they were asked for in."""
    ended = command("run", "--json", "--check", "after-reset-c", "--check", "audit")
    assert ended.code == 0, ended.err
    checks = ended.json()["checks"]
    assert [check["name"] for check in checks] == ["audit", "after-reset-c"]
    assert {check["verdict"] for check in checks} == {"pass"}
    phases = [phase["name"] for phase in ended.json()["phases"]]
    assert phases[-3:-1] == ["registered PASIDs", "after the guest's death"]


LEAKING = ("registered-a", "intra-vm", "inter-vm-use")


def test_a_driver_without_its_list_leaks_and_is_caught(command: Command) -> None:
    chosen = [word for name in LEAKING for word in ("--check", name)]
    ended = command("run", "--json", "--mutant", "no-list-check", *chosen)
    assert ended.code == 1, ended.err
    checks = {check["name"]: check for check in ended.json()["checks"]}
    assert checks["intra-vm"]["verdict"] == "fail"
    assert checks["inter-vm-use"]["verdict"] == "fail"
    assert checks["registered-a"]["verdict"] == "pass"
    for name in ("intra-vm", "inter-vm-use"):
        assert "DONE" in checks[name]["answered"]
        assert "LEAK: g1 from the host: 4099 bytes" in checks[name]["witnesses"]
        assert "LEAK: g1 from inside: 4099 bytes" in checks[name]["witnesses"]
        assert "the kernel made a write" in checks[name]["witnesses"]
        assert checks[name]["phase"] == "between devices and VMs"
        assert "no console said anything meanwhile" in checks[name]["evidence"]
    assert attempted(checks["intra-vm"]) == [("g1", "b", "g1", "leaked")]
    assert attempted(checks["inter-vm-use"]) == [("g2", "c", "g1", "leaked")]
    assert attempted(checks["registered-a"]) == [("g1", "a", "g1", "allowed")]


def test_a_kernel_without_its_root_is_blamed(command: Command) -> None:
    started = time.monotonic()
    ended = command("run", "--json", "--append", "root=/dev/nonesuch")
    assert ended.code == 5, ended.err
    error = ended.json()["error"]
    assert "host did not boot: panic" in error["message"]
    assert "nonesuch" in error["evidence"] or "mount root" in error["evidence"]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_ended_in_mid_boot(running: Any, number: signal.Signals, code: int, tmp_path: Path) -> None:
    run = running("run", "--cold", "--report", "report")
    token = run.wait_for_child(b"virtserialport", 60)
    run.popen.send_signal(number)
    assert run.popen.wait(20) == code
    run.nothing_left(token)
    if number != signal.SIGKILL:
        report = json.loads((tmp_path / "report/report.json").read_text())
        assert report["verdict"] == "interrupted"
        assert "boot the host VM" in (tmp_path / "report/report.html").read_text()


def test_killed_in_mid_scenario(running: Any) -> None:
    run = running("run")
    token = run.wait_for_child(b"virtserialport", 60)
    run.wait_for("the stage", 120)
    run.popen.kill()
    run.popen.wait(20)
    run.nothing_left(token)


def test_killed_in_mid_build(
    running: Any, command: Command, tmp_path: Path, built_kernel: Kernel
) -> None:
    """The next build goes on; the kernel it makes is another than the one without the patch."""
    # Never the same text twice: the cache must not have it.
    patch = tmp_path / "unique.patch"
    control = mutant.find(mutant.CONTROL).patch
    patch.write_text(control.read_text().replace("HARMLESS", f"harmless {time.time_ns()}"))
    run = running("kernel", "build", "--mutant", str(patch))
    token = run.wait_for_child(b"Makefile.build", 120)
    run.popen.kill()
    run.popen.wait(20)
    run.nothing_left(token)
    ended = command("kernel", "build", "--json", "--mutant", str(patch))
    assert ended.code == 0, ended.err
    assert ended.json()["cached"] is False
    again = command("kernel", "build", "--json", "--mutant", str(patch))
    assert again.json()["cached"] is True
    assert again.json()["hash"] == ended.json()["hash"] != built_kernel.hash
