# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid selftest``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from qemu_ioasid import kernel, selftest, subcommand
from qemu_ioasid.report import Report
from qemu_ioasid.selftest import targets
from qemu_ioasid.session import Options, Output
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    from qemu_ioasid.subcommand import Commands

MakeSpec = Callable[[argparse.Namespace], kernel.Spec]
Tell = Callable[[Report, argparse.Namespace, Terminal], int]


def add(
    commands: Commands,
    common: argparse.ArgumentParser,
    add_machine: Callable[[argparse.ArgumentParser], None],
    make_spec: MakeSpec,
    tell: Tell,
) -> None:
    """Add ``selftest`` to *commands*; *tell* says what came of it, and is the exit code."""
    command = commands.add_parser(
        "selftest",
        parents=[common],
        help="build the kernel's own tests and run them in the host VM",
    )
    command.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help=f"a folder of tools/testing/selftests (default: {' '.join(targets.NAMES)})",
    )
    command.add_argument(
        "--mode",
        action="append",
        default=[],
        choices=tuple(targets.MODES),
        help="how the virtual IOMMU translates (default: vfio in all, others in second-stage); "
        "may be given again",
    )
    command.add_argument(
        "--program",
        action="append",
        default=[],
        metavar="NAME",
        help="run this program only; may be given again",
    )
    command.add_argument("--first", action="store_true", help="end at the first test that fails")
    add_machine(command)

    def run(arguments: argparse.Namespace, terminal: Terminal, output: Output) -> int:
        options = Options(
            accelerator=arguments.accel,
            qemu=arguments.qemu,
            kernel=make_spec(arguments),
            report=arguments.report,
            append=arguments.append,
            first=arguments.first,
        )
        order = selftest.Order(arguments.targets, arguments.mode, arguments.program)
        return tell(selftest.run(options, order, output), arguments, terminal)

    subcommand.handle(command, run)
