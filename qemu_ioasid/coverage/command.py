# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid coverage``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_ioasid import coverage, session, subcommand
from qemu_ioasid.coverage import page, reasons
from qemu_ioasid.session import Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    from qemu_ioasid.subcommand import Commands


def add(commands: Commands) -> None:
    """Add ``coverage``."""
    command = commands.add_parser(
        "coverage",
        help="which lines of the series no run has executed (docs/coverage.md)",
    )
    command.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="REPORT",
        help="a report folder of run --coverage, or a folder of such; their counts are added",
    )
    subcommand.add_report(command)
    subcommand.handle(command, _run)


def _run(arguments: argparse.Namespace, terminal: Terminal, output: Output) -> int:
    known = reasons.load(reasons.FILE)
    found, runs = coverage.read(arguments.folders)
    judgement = coverage.judge(found, runs, known)
    folder = session.report_folder(arguments.report, "coverage")
    path = folder / "coverage.html"
    with session.written(folder):
        path.write_text(page.render(judgement), encoding="utf-8")
    if arguments.json:
        print(json.dumps({**judgement.document(), "report": str(path)}, indent=2))
    else:
        for line in coverage.text(judgement):
            terminal.say(line)
        terminal.say(f"report: {os.path.relpath(path)}")
    return 0 if judgement.held else 1
