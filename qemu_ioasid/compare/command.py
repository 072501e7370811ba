# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid compare``."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qemu_ioasid import compare, kernel, session, subcommand, tried
from qemu_ioasid.compare import Pair
from qemu_ioasid.kernel import Spec
from qemu_ioasid.session import Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    from qemu_ioasid.subcommand import Commands

#: What is tried unless told otherwise: any kernel comes up; one with the driver holds.
SCENARIOS = ("boot", "isolation")


def add(commands: Commands) -> None:
    """Add ``compare``."""
    command = commands.add_parser("compare", help="the same on two kernels, and what differs")
    for letter, which in (("a", "first"), ("b", "second")):
        command.add_argument(letter, metavar=letter.upper(), help=f"the {which}: {kernel.FORMS}")
        command.add_argument(
            f"--series-{letter}",
            default="",
            metavar="SERIES",
            help=f"on top of the {which}: {kernel.SERIES_FORMS} (default: ours, if missing)",
        )
    command.add_argument("--profile", default="default", choices=("default", "debug"))
    command.add_argument(
        "--scenario",
        action="append",
        default=[],
        metavar="NAME",
        help=f"what is tried: {tried.FORMS} ({', '.join(SCENARIOS)}); may be given again",
    )
    subcommand.add_report(command)
    subcommand.handle(command, _run)


def _run(arguments: argparse.Namespace, terminal: Terminal, output: Output) -> int:
    names = tried.chosen(arguments.scenario or SCENARIOS)
    spec = Spec(profile=arguments.profile)
    first = spec.naming(arguments.a, arguments.series_a)
    second = spec.naming(arguments.b, arguments.series_b)
    folder = session.report_folder(arguments.report, "compare")
    pairs: list[Pair] = []
    with session.written(folder):
        try:
            for pair in compare.run((first, second), names, folder, output):
                pairs.append(pair)
        finally:
            text = json.dumps(_document(first, second, pairs), indent=2)
            (folder / "compare.json").write_text(f"{text}\n")
    code, said = compare.judged(pairs)
    for line in said:
        terminal.say(line)
    if arguments.json:
        print(text)
    else:
        terminal.say(f"reports: {os.path.relpath(folder)}")
    return code


def _document(first: Spec, second: Spec, pairs: list[Pair]) -> dict[str, Any]:
    return {
        "schema": 1,
        "a": {"kernel": first.source, "series": first.series},
        "b": {"kernel": second.source, "series": second.series},
        "regressions": [asdict(change) for pair in pairs for change in pair.regressions],
        "scenarios": [asdict(pair) for pair in pairs],
    }
