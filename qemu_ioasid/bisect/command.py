# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid bisect``."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_ioasid import bisect, kernel, session, subcommand, tried
from qemu_ioasid.bisect import State
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import Spec
from qemu_ioasid.session import Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    from qemu_ioasid.subcommand import Commands


def add(commands: Commands) -> None:
    """Add ``bisect``, and the step that it has git run."""
    command = commands.add_parser("bisect", help="find the commit that broke a kernel")
    command.add_argument("good", metavar="GOOD", help="a commit that holds")
    command.add_argument("bad", metavar="BAD", help="one that does not")
    command.add_argument(
        "scenario", nargs="?", default="isolation", help=f"what is tried: {tried.FORMS} (isolation)"
    )
    command.add_argument(
        "--tree", type=Path, default=Path(), metavar="PATH", help="the git tree (here)"
    )
    command.add_argument(
        "--check", action="append", default=[], metavar="NAME", help="this check only"
    )
    command.add_argument("--series", default="", metavar="SERIES", help=kernel.SERIES_FORMS)
    command.add_argument("--profile", default="default", choices=("default", "debug"))
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for qemu-ioasid run"
    )
    command.add_argument(
        "--anew", action="store_true", help="forget what commits have answered before"
    )
    subcommand.add_report(command)
    subcommand.handle(command, _run)
    hidden = commands.add_parser("bisect-step")
    hidden.add_argument("folder", type=Path)
    hidden.set_defaults(handler=_step, json=True)


def _spec(arguments: argparse.Namespace) -> Spec:
    tried.find(arguments.scenario)
    if tried.target(arguments.scenario) is not None and (arguments.check or arguments.set):
        raise ConfigurationError(f"{arguments.scenario}: --check and --set are for scenarios")
    # What is booted alone is the very kernel that is tried then.
    spec = Spec(profile=arguments.profile).naming("", arguments.series)
    return tried.kernel(arguments.scenario, spec)


def _words(arguments: argparse.Namespace, spec: Spec) -> list[str]:
    words = tried.words(arguments.scenario, spec)
    for name, values in (("--check", arguments.check), ("--set", arguments.set)):
        for value in values:
            words += [name, value]
    return words


def _run(arguments: argparse.Namespace, terminal: Terminal, output: Output) -> int:
    spec = _spec(arguments)
    words = _words(arguments, spec)
    ends = (arguments.good, arguments.bad)
    begun = bisect.begin(arguments.tree, ends, spec, words, terminal.say, anew=arguments.anew)
    with begun as state:
        folder = session.report_folder(arguments.report, "bisect")
        terminal.begins("bisect")
        first, maybe = bisect.drive(state, output)
        terminal.begins("")
        if bisect.inputs(spec, state.repository) != state.inputs:
            raise ConfigurationError(
                "the series or the config changed meanwhile: the same command begins anew"
            )
        document = _document(state, first, maybe)
        (folder / "bisect.json").write_text(json.dumps(document, indent=2) + "\n")
        shutil.copytree(state.folder / "runs", folder / "runs")
        bisect.reset(state)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _tell(document, terminal)
        terminal.say(f"reports: {folder}")
    return 0 if first else 1


def _document(state: State, first: str, maybe: list[str]) -> dict[str, object]:
    return {
        "schema": 1,
        "repository": str(state.repository),
        "good": state.good,
        "bad": state.bad,
        "first_bad": first,
        "maybe": maybe,
        "boots": sum(answer.boots for answer in state.answers),
        "seconds": round(sum(answer.seconds for answer in state.answers), 1),
        "commits": [asdict(answer) for answer in state.answers],
    }


def _tell(document: dict[str, object], terminal: Terminal) -> None:
    boots, seconds = document["boots"], document["seconds"]
    first = str(document["first_bad"])
    commits = document["commits"]
    assert isinstance(commits, list)
    found = next((each for each in commits if each["commit"] == first), None)
    if found is not None:
        terminal.say(f"first bad commit: {first[:12]} {found['subject']} ({found['why']})")
    elif first:
        # The bad end itself: nobody asked for it again.
        terminal.say(f"first bad commit: {first[:12]}, the bad end itself")
    else:
        terminal.say(f"it is one of these, which could not be tried: {document['maybe']}")
    terminal.say(f"{len(commits)} commits, {boots} boots, {seconds} s")


def _step(arguments: argparse.Namespace, terminal: Terminal) -> int:
    return bisect.step(arguments.folder, lambda text: print(text, flush=True))
