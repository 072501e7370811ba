# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run of ours says of its kernel: that it is broken, that it is none, or nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_ioasid import rig, runs
from qemu_ioasid.config import HostConfig, RigConfig
from qemu_ioasid.errors import KernelLacks
from qemu_ioasid.runs import Found
from qemu_ioasid.scenarios import faults

FAILED = {"checks": [{"name": "x", "verdict": "fail"}], "error": None}
NONE: dict[str, Any] = {"checks": [], "error": None}


def error(kind: str, phase: str = "boot the host VM", evidence: str = "") -> dict[str, Any]:
    """A report of a run that ended early."""
    told = {"message": f"{kind} it was", "kind": kind, "phase": phase, "evidence": evidence}
    return {"checks": [], "error": told}


@pytest.mark.parametrize(
    ("code", "report", "verdict", "reported"),
    [
        (0, NONE, "held", False),
        (1, FAILED, "failed", False),
        # A Python that broke ends with 1, too.
        (1, NONE, "unknown", False),
        (4, FAILED, "unknown", False),
        (5, error("KernelBroke"), "broke", True),
        # It did not come up: that may be a slow machine.
        (5, error("BootError"), "broke", False),
        (4, error("ProcessFailed", "kernel"), "unbuildable", False),
        (2, error("PatchRefused", "kernel"), "unbuildable", False),
        (2, error("NotGranted", "kernel"), "unbuildable", False),
        # The word for it, or the user's own fragment, is wrong.
        (2, error("ConfigurationError", "kernel"), "unknown", False),
        (4, error("ProcessFailed", "kernel", "x: No space left on device"), "unknown", False),
        (4, error("DeadlineExceeded", "kernel"), "unknown", False),
        (4, error("ProcessFailed", "the kernel's tests"), "unbuildable", False),
        (4, error("ProcessFailed", "images"), "unknown", False),
        (None, NONE, "unknown", False),
        (130, NONE, "unknown", False),
    ],
)
def test_what_it_says(
    code: int | None, report: dict[str, Any], verdict: str, reported: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("first\n\x1b[2Jlast\n")
    found = Found(code, report, tmp_path, log)
    assert (found.verdict, found.reported) == (verdict, reported)
    expected = {"failed": "x", "held": r"\x1b[2Jlast"}
    if verdict in expected:
        assert found.why == expected[verdict]


def test_a_kernel_that_has_not_what_is_tried(tmp_path: Path) -> None:
    """What this machine lacks is something else."""
    for kind, verdict in (("KernelLacks", "lacking"), ("RequirementError", "unknown")):
        found = Found(3, error(kind, ""), tmp_path, tmp_path)
        assert (found.verdict, found.exit_code) == (verdict, 3)
    host: Any = SimpleNamespace(hello={"release": "7.2.12", "kernel": {}})
    with pytest.raises(KernelLacks, match=r"kernel 7\.2\.12 lacks CONFIG"):
        rig._check_features(host, RigConfig(HostConfig(), {}, {}, "x", ""))
    with pytest.raises(KernelLacks, match="CONFIG_FAILSLAB"):
        faults.run(SimpleNamespace(host=host), None, [])  # type: ignore[arg-type]


def test_what_a_command_ends_with_that_knows_no_more(tmp_path: Path) -> None:
    codes = {None: 4, -9: 4, 1: 4, 2: 2, 3: 3, 4: 4, 130: 4}
    for code, expected in codes.items():
        assert Found(code, NONE, tmp_path, tmp_path).exit_code == expected


def test_a_run_that_is_refused(tmp_path: Path) -> None:
    """It is one, in a process of its own; what it said is beside its folder."""
    said: list[str] = []
    found = runs.run(["run", "nonesuch"], tmp_path / "deep/run", said.append)
    assert (found.code, found.verdict) == (2, "unknown")
    assert "nonesuch" in found.why
    assert found.log == tmp_path / "deep/run.log" and said
