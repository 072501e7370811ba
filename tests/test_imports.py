# SPDX-License-Identifier: GPL-2.0-or-later
"""Imports point down only: the floors of docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import qemu_ioasid

PACKAGE = Path(qemu_ioasid.__file__).parent

#: From the top; modules on one floor do not import each other.
FLOORS = (
    ("cli", "pytest_plugin", "avocado"),
    (
        "bench",
        "bisect",
        "builds",
        "compare",
        "coverage",
        "lab",
        "mutants",
        "patchwise",
        "rigpool",
        "matrix",
    ),
    ("tried",),
    ("selftest",),
    ("subcommand",),
    ("session", "terminal", "runs"),
    ("scenarios",),
    ("report",),
    ("standby", "localhost", "hostdevice", "requirement"),
    ("rig", "page"),
    ("guest",),
    ("hostvm", "guestvm", "parts", "picture", "cprogram"),
    ("machine", "registrar", "vtd", "gdbstub", "agentdisk", "gcov"),
    ("client", "qemu", "snapshot"),
    ("qmp", "ssh", "console", "kernel", "image"),
    ("archive", "erofs", "preflight", "markup", "attempts", "model"),
    ("config", "cache", "git", "documents"),
    ("process", "viommu"),
    ("reaper", "deadline", "text", "logfile", "shape"),
    ("errors",),
)
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """The module or package directly below qemu_ioasid that *path* belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the modules *path* imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(str(node.module))
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms among imported *names*."""
    return {name.split(".")[1] for name in names if name.startswith("qemu_ioasid.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_down_only(path: Path) -> None:
    own = room(path)
    others = rooms_of(imported(path)) - {own}
    if own == "agent":
        assert not others
        return
    assert own in LEVEL, f"{own} is on no floor"
    for other in others:
        assert other in LEVEL, f"{own} imports {other}, which is on no floor"
        assert LEVEL[own] < LEVEL[other], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room(path) in ("agent", "reaper")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_what_runs_without_us_is_stdlib_only(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - {"qemu_ioasid"}
    assert outside <= set(sys.stdlib_module_names)


def test_only_process_starts_processes() -> None:
    starters = {
        room(path)
        for path in FILES
        if room(path) != "agent"
        and any(
            isinstance(node, ast.Attribute)
            and node.attr in ("Popen", "run", "check_output", "check_call", "system", "fork")
            and isinstance(node.value, ast.Name)
            and node.value.id in ("subprocess", "os")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert starters <= {"process"}


def test_the_house_rules_on_size() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path}: over 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                size = node.end_lineno - node.lineno + 1
                assert size <= 60, f"{path}: {node.name} has {size} lines"
