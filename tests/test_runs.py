# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run of ours says of its kernel: that it is broken, that it is none, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import runs
from qemu_ioasid.runs import Found

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


def test_a_run_that_is_refused(tmp_path: Path) -> None:
    """It is one, in a process of its own; what it said is beside its folder."""
    said: list[str] = []
    found = runs.run(["run", "nonesuch"], tmp_path / "deep/run", said.append)
    assert (found.code, found.verdict) == (2, "unknown")
    assert "nonesuch" in found.why
    assert found.log == tmp_path / "deep/run.log" and said
