# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid mutants``."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from qemu_ioasid import kernel, mutants, session, subcommand
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import mutant
from qemu_ioasid.mutants import table
from qemu_ioasid.session import Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    from qemu_ioasid.subcommand import Commands


def add(commands: Commands) -> None:
    """Add ``mutants`` to *commands*."""
    command = commands.add_parser(
        "mutants", help="run the suite against broken kernels: which check kills each?"
    )
    command.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a patch of kernel-patches/mutants, or a file of yours (default: all of them)",
    )
    command.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME",
        help="of the suite, this one only; may be given again: "
        + ", ".join(stage.name for stage in mutants.SUITE),
    )
    command.add_argument(
        "--jobs",
        type=int,
        # A trial waits for deadlines as often as for a processor.
        default=(os.cpu_count() or 1) + 1,
        metavar="N",
        help="how many at a time (default: one more than there are processors)",
    )
    command.add_argument(
        "--write", action="store_true", help="enter what came of them in docs/mutants.md"
    )
    command.add_argument(
        "--series",
        default="",
        metavar="SERIES",
        help=f"under them: {kernel.SERIES_FORMS}",
    )
    subcommand.add_report(command)
    subcommand.handle(command, _run)


def _run(arguments: argparse.Namespace, terminal: Terminal, output: Output) -> int:
    chosen = [mutant.find(name) for name in arguments.names] or mutant.every()
    if not chosen or (arguments.write and not table.TABLE.is_file()):
        raise ConfigurationError("the mutants and their table are in a checkout only")
    stages = mutants.suite(arguments.stage)
    folder = session.report_folder(arguments.report, "mutants")
    words = ["--series", arguments.series] if arguments.series else []
    terminal.begins("mutants")
    results = mutants.run(
        chosen, stages, words, max(1, arguments.jobs), folder, output, table.killers()
    )
    terminal.begins("")
    if arguments.write:
        table.write(results, mutant.every())
    if arguments.json:
        print(json.dumps(mutants.document(results), indent=2))
    else:
        terminal.say(f"reports: {os.path.relpath(folder)}")
    return mutants.exit_code(results)
