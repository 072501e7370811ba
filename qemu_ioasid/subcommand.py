# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands that make runs have in common: how they are called, and where they talk to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_ioasid.session import Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


class Named(argparse.Action):
    """Stores a word that must not be empty: an unset variable is no wish for the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Refuse what is empty."""
        if values == "":
            raise argparse.ArgumentError(self, "is empty; leave it out for the default")
        setattr(namespace, self.dest, values)


def output(terminal: Terminal) -> Output:
    """A run's lines, on *terminal*."""
    return Output(terminal.say, terminal.progress, terminal.begins)


def add_report(command: argparse.ArgumentParser) -> None:
    """What is told in the end, and where it is kept."""
    command.add_argument("--json", action="store_true", help="print JSON on standard output, alone")
    command.add_argument("--report", type=Path, metavar="DIR", help="where the reports go")


def handle(
    command: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Terminal, Output], int],
) -> None:
    """Have *command* call *run*, whose answer is the exit code."""
    command.set_defaults(
        handler=lambda arguments, terminal: run(arguments, terminal, output(terminal))
    )
