# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario attacks, on the driver as it is and without VFIO's mended detach; and its page."""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path

import pytest

from qemu_ioasid import config, kernel
from qemu_ioasid.scenarios import abi, attacks, flight, hotplug
from qemu_ioasid.scenarios.acts import parts
from qemu_ioasid.scenarios.attacks import registration
from tests.conftest import Command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/security-model.md").read_text()
RIG = config.load(config.DEFAULT, {})
ATTACKS = [row.name for row in attacks.rows(RIG)]
ROWS = [*ATTACKS, *(row.name for row in hotplug.rows(RIG))]
OTHERS = [row.name for each in (flight, abi) for row in each.rows(config.load(each.RIG, {}))]
#: A row's name, or a pattern of them, as the page's table has it in its last column.
NAMED = [
    pattern
    for line in PAGE.splitlines()
    if line.startswith("| ") and line.count("|") == 4
    for pattern in re.findall(r"`([^`]+)`", line.split("|")[3])
]
COPY_OUTS = {f"copy-out-{name}" for name in registration.COPY_OUTS}


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len(ROWS) == len(set(ROWS)) >= 50


@pytest.mark.parametrize("pattern", NAMED)
def test_the_page_names_attacks_there_are(pattern: str) -> None:
    assert fnmatch.filter([*ROWS, *OTHERS], pattern)


def test_every_attack_is_on_the_page() -> None:
    assert not [row for row in ROWS if not any(fnmatch.fnmatch(row, each) for each in NAMED)]


def test_the_page_names_functions_of_the_driver_there_are() -> None:
    series = kernel.SERIES
    text = "".join(patch.read_text() for patch in series.glob("*.patch"))
    named = set(re.findall(r"`(pdma_\w+)\(\)`", PAGE))
    assert len(named) > 5
    assert not [name for name in named if not re.search(rf"^\+.*\b{name}\(", text, re.MULTILINE)]


def test_the_page_has_every_rule_and_is_one_page() -> None:
    assert re.findall(r"^(\d)\. ", PAGE, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    assert len(PAGE.split()) < 1500


def test_every_attack_is_stopped(command: Command) -> None:
    ended = command("run", "attacks", "--json")
    assert ended.code == 0, ended.err
    checks = ended.json()["checks"]
    assert [check["name"] for check in checks] == ATTACKS
    assert {check["verdict"] for check in checks} == {"pass"}
    assert all(check["witnesses"] != "not asked" for check in checks)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Our series without its first patch: VFIO as it was released."""
    series = tmp_path / kernel.SERIES.name
    shutil.copytree(kernel.SERIES, series)
    first, *others = (series / "series").read_text().splitlines()
    assert "vfio-undo-the-attach" in first
    (series / "series").write_text("\n".join([*others, ""]))
    return series


def test_without_vfios_fix_the_copy_outs_fail_and_nothing_else(
    command: Command, released: Path
) -> None:
    chosen = [name for name in ATTACKS if name.startswith(("copy-out-", "register-", "shared-"))]
    words = [word for name in chosen for word in ("--check", name)]
    ended = command("run", "attacks", "--json", "--series", str(released), *words)
    assert ended.code == 1, ended.err
    verdicts = {check["name"]: check["verdict"] for check in ended.json()["checks"]}
    assert {name for name in verdicts if verdicts[name] != "pass"} == COPY_OUTS
    assert len(verdicts) == len(chosen)


def test_alone_an_attack_brings_about_what_it_needs(command: Command) -> None:
    play = parts(config.load(config.DEFAULT, {}), "attacks")
    chosen = [f"pasid-sibling-{play['b']}", "toctou-pasid", "file-closed", f"dead-{play['g1']}"]
    words = [word for name in chosen for word in ("--check", name)]
    ended = command("run", "attacks", "--json", *words)
    assert ended.code == 0, ended.err
    assert [check["name"] for check in ended.json()["checks"]] == chosen
