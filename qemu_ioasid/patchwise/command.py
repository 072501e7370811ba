# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid check-series``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_ioasid import patchwise, session, subcommand, tried
from qemu_ioasid.kernel import Spec
from qemu_ioasid.patchwise import Row
from qemu_ioasid.session import Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    from qemu_ioasid.subcommand import Commands


def add(
    commands: Commands,
    common: argparse.ArgumentParser,
    make_spec: Callable[[argparse.Namespace], Spec],
) -> None:
    """Add ``check-series``; *make_spec* reads what *common* has of a kernel."""
    command = commands.add_parser(
        "check-series",
        parents=[common],
        help="a series, patch by patch: does each apply, build, come up and hold?",
    )
    command.add_argument(
        "--scenario",
        action="append",
        default=[],
        metavar="NAME",
        help=f"what each is tried with once the kernel has the driver: {tried.FORMS} (isolation); "
        "may be given again",
    )
    command.add_argument(
        "--keep-going", action="store_true", help="past a patch that something is wrong with"
    )
    command.add_argument("--report", type=Path, metavar="DIR", help="where the reports go")

    def run(arguments: argparse.Namespace, terminal: Terminal, output: Output) -> int:
        return _run(arguments, make_spec(arguments), terminal, output)

    subcommand.handle(command, run)


def _run(arguments: argparse.Namespace, spec: Spec, terminal: Terminal, output: Output) -> int:
    names = tried.chosen(arguments.scenario or ["isolation"])
    folder = session.report_folder(arguments.report, "check-series")
    series = patchwise.Series(spec, names, folder, output)
    rows: list[Row] = []
    with session.written(folder):
        try:
            for row in series.run(arguments.keep_going):
                rows.append(row)
        finally:
            document = _document(rows, series.patches)
            (folder / "series.json").write_text(json.dumps(document, indent=2) + "\n")
            (folder / "junit.xml").write_bytes(patchwise.junit(rows))
    code, never = patchwise.judged(rows, names)
    for line in never:
        terminal.say(line)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        held = sum(row.held for row in rows)
        left = f", {len(series.patches) - len(rows)} not reached" if document["not_reached"] else ""
        terminal.say(f"{held} of {len(rows)} patches hold{left}")
        terminal.say(f"reports: {os.path.relpath(folder)}")
    return code


def _document(rows: list[Row], patches: list[Path]) -> dict[str, Any]:
    return {
        "schema": 1,
        "patches": [{**asdict(row), "held": row.held} for row in rows],
        "not_reached": [patch.name for patch in patches[len(rows) :]],
    }
