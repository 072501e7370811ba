# SPDX-License-Identifier: GPL-2.0-or-later
"""What README and docs tell people to type exists, and CI runs what the README says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qemu_ioasid import cli
from qemu_ioasid.report import VERDICTS
from tests.test_imports import FLOORS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "CONTRIBUTING.md").read_text()]
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("qemu-ioasid")])
def test_commands_are_understood(line: str) -> None:
    parsed = cli._parser().parse_args(shlex.split(line, comments=True)[1:])
    assert callable(parsed.handler)


def test_scripts_are_there_and_may_be_run() -> None:
    named = {word for line in COMMANDS for word in line.split() if word.startswith("ci/")}
    assert {"ci/quickstart", "ci/test", "ci/series"} <= named
    for name in named:
        assert (ROOT / name).stat().st_mode & 0o111, name


def test_ci_runs_the_readmes_test_command() -> None:
    assert "\nci/test\n" in README
    assert "exec ci/test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/avocado.md", "docs/settings.md"],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_readme_tells_every_exit_code() -> None:
    for code in VERDICTS:
        assert re.search(rf"\b{code}\b", README)


def test_architecture_draws_the_floors_there_are() -> None:
    picture = (ROOT / "docs/architecture.md").read_text().partition("## The floors")[2]
    drawn = re.findall(r"^([a-z_ ·]+?)  +\S", picture, re.MULTILINE)
    floors = [tuple(name.strip() for name in line.split("·")) for line in drawn]
    assert [floor for floor in floors if floor in FLOORS] == list(FLOORS)
