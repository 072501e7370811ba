# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/lab.md, run exactly as written."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_ioasid import cli
from tests.lab import Player, Screen, player

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/lab.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
SESSIONS = [line for line in COMMANDS if re.fullmatch(r"qemu-ioasid lab ssh \w+", line)]


@pytest.fixture
def playing() -> Iterator[Player]:
    with player() as someone:
        # As a reader of the page: in the project's folder, where its reports go.
        someone.folder = ROOT
        reports = ROOT / "reports"
        before = set(reports.iterdir()) if reports.exists() else set()
        yield someone
        for path in set(reports.glob("*-lab-lab")) - before:
            shutil.rmtree(path)


def test_every_command_is_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["lab", "--help"])
    names = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"up", "gc", "pasid"} <= set(names)
    table = "".join(line for line in PAGE.splitlines(keepends=True) if line.startswith("| `"))
    for name in names:
        assert re.search(rf"`{name}\b", table), name


def test_as_written(playing: Player) -> None:
    said: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        screens = []
        for command in COMMANDS:
            if command in SESSIONS:
                screens.append(stack.enter_context(Screen(playing, *shlex.split(command)[1:])))
                continue
            if screens:
                _both_are_used(screens)
                screens = []
            said[command] = _run(playing, command)
    assert len(SESSIONS) == 2
    assert said["qemu-ioasid lab pasid list"].startswith("device")
    assert "swapped vfio_pdma.ko" in said["qemu-ioasid lab reload --series ~/pdma"]
    assert "lab lab: down" in said["qemu-ioasid lab status"]
    assert "has ended" in said["qemu-ioasid lab down"]
    assert not playing.base.exists()


def _run(playing: Player, command: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=playing.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (command, done)
    return done.stdout


def _both_are_used(screens: list[Screen]) -> None:
    """Two people at two terminals at once, who then leave."""
    for number, screen in enumerate(screens):
        screen.prompt()
        screen.type(f"echo {number} >/tmp/who; uptime; cat /tmp/who; echo over''there\r")
    for number, screen in enumerate(screens):
        seen = screen.wait_for("overthere")
        assert "load average" in seen and f"\r\n{number}\r\n" in seen
        screen.prompt()
        screen.type("exit\r")
    for screen in screens:
        assert screen.ends() == 0
