# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of ``qemu-ioasid lab``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_ioasid import config, kernel
from qemu_ioasid.session import Options
from qemu_ioasid.terminal import Terminal

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


MakeOptions = Callable[[argparse.Namespace], Options]


def _later(name: str) -> Callable[[argparse.Namespace, Terminal], int]:
    """The handler *name* of `command`, which is imported when it is called.

    What it takes is not on every machine that can be a host itself (docs/local.md).
    """

    def handler(arguments: argparse.Namespace, terminal: Terminal) -> int:
        from qemu_ioasid.lab import command

        return int(getattr(command, name)(arguments, terminal))

    return handler


def add(
    commands: Commands,
    common: argparse.ArgumentParser,
    add_start: Callable[[argparse.ArgumentParser], None],
    make_options: MakeOptions,
) -> None:
    """Add ``lab`` to *commands*.

    *common* has what every command takes, *add_start* adds what tells how a rig
    is started, and *make_options* reads both.
    """
    parser = commands.add_parser("lab", help="leave a rig running, and play with it")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", metavar="LAB", help="which lab; where one is up: that one")
    plain = argparse.ArgumentParser(add_help=False, parents=[named])
    plain.set_defaults(json=False)
    told = argparse.ArgumentParser(add_help=False, parents=[named])
    told.add_argument("--json", action="store_true", help="print JSON on standard output, alone")
    _add_lives(actions, common, plain, told, add_start, make_options)
    _add_sessions(actions, plain)
    _add_pasids(actions, plain, told)


def _add_lives(
    actions: Commands,
    common: argparse.ArgumentParser,
    plain: argparse.ArgumentParser,
    told: argparse.ArgumentParser,
    add_start: Callable[[argparse.ArgumentParser], None],
    make_options: MakeOptions,
) -> None:
    up = actions.add_parser("up", parents=[common], help="start a rig that runs until lab down")
    up.add_argument(
        "rig", nargs="?", type=Path, default=config.DEFAULT, metavar="RIG", help="rig file (TOML)"
    )
    up.add_argument("--name", metavar="LAB", help="its name (lab)")
    add_start(up)
    up.set_defaults(handler=_later("up"), make_options=make_options)

    status = actions.add_parser("status", parents=[told], help="the labs and their VMs")
    status.set_defaults(handler=_later("status"))

    reload = actions.add_parser(
        "reload", parents=[plain], help="build the driver anew, swap it, boot the guests again"
    )
    reload.add_argument(
        "--series", default="", metavar="SERIES", help=f"{kernel.SERIES_FORMS}, from now on"
    )
    reload.set_defaults(handler=_later("reload"))

    saving = actions.add_parser("snapshot", parents=[plain], help="save the lab as it stands")
    saving.add_argument("snapshot", metavar="NAME")
    saving.set_defaults(handler=_later("snapshot"))
    restore = actions.add_parser("restore", parents=[plain], help="have it as it was saved")
    restore.add_argument("snapshot", metavar="NAME")
    restore.set_defaults(handler=_later("restore"))

    reopen = actions.add_parser("open", parents=[common], help="resume the rig of a kept failure")
    reopen.add_argument("folder", type=Path, metavar="REPORT", help="a report with a snapshot")
    reopen.add_argument("--name", metavar="LAB", help="the lab's name (lab)")
    reopen.add_argument("--report", type=Path, metavar="DIR", help="where the lab's report goes")
    reopen.set_defaults(handler=_later("reopen"))

    down = actions.add_parser("down", parents=[plain], help="end a lab")
    down.add_argument("--all", action="store_true", help="end every lab")
    down.set_defaults(handler=_later("down"))
    garbage = actions.add_parser("gc", help="remove what is left of rigs whose owners are gone")
    garbage.set_defaults(handler=_later("gc"), json=False)


def _add_sessions(actions: Commands, plain: argparse.ArgumentParser) -> None:
    def add(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, parents=[plain], help=help)
        added.set_defaults(handler=_later(name))
        return added

    ssh = add("ssh", "a shell or a command in a VM")
    ssh.add_argument("-t", dest="terminal", action="store_true", help="a terminal for CMD, too")
    ssh.add_argument("vm", metavar="VM", help="host, or a guest's name")
    ssh.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    console = add("console", "a VM's console, until Ctrl-C")
    console.add_argument("vm", metavar="VM")
    qmp = add("qmp", "a shell on a VM's QMP, or one command")
    qmp.add_argument("--hmp", action="store_true", help="QEMU's monitor for people")
    qmp.add_argument("vm", metavar="VM")
    qmp.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="NAME [KEY=VALUE...] or JSON"
    )
    push = add("push", "copy a file into a VM")
    push.add_argument("vm", metavar="VM")
    push.add_argument("source", type=Path, metavar="FILE")
    push.add_argument(
        "target", nargs="?", default="/tmp/", metavar="PATH", help="in the VM (/tmp/)"
    )
    pull = add("pull", "copy a file out of a VM")
    pull.add_argument("vm", metavar="VM")
    pull.add_argument("source", metavar="PATH", help="in the VM")
    pull.add_argument("target", nargs="?", type=Path, default=Path(), metavar="FILE")
    gdb = add("gdb", "gdb on a VM's kernel")
    gdb.add_argument("--print", action="store_true", help="print the line, and do not run it")
    gdb.add_argument("vm", nargs="?", default="host", metavar="VM")
    gdb.add_argument("more", nargs=argparse.REMAINDER, metavar="ARGS", help="for gdb")


def _add_pasids(
    actions: Commands, plain: argparse.ArgumentParser, told: argparse.ArgumentParser
) -> None:
    parser = actions.add_parser("pasid", help="what is registered, and by whom; change it")
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    listing = what.add_parser("list", parents=[told], help="the ledger and the kernel's lists")
    listing.set_defaults(handler=_later("pasid_list"))

    register = what.add_parser(
        "register", parents=[told], help="bind some of a guest's arena to a PASID on its device"
    )
    register.add_argument("guest", metavar="GUEST")
    register.add_argument("device", metavar="DEVICE")
    for name, default, help in (
        ("--offset", None, "where in the arena (the first free 64 KiB)"),
        ("--length", 0x10000, "how many bytes (64 KiB)"),
        ("--pasid", None, "which PASID (a fresh one)"),
    ):
        register.add_argument(name, type=_number, default=default, metavar="N", help=help)
    register.set_defaults(handler=_later("pasid_register"))

    unregister = what.add_parser("unregister", parents=[plain], help="take a PASID off a device")
    unregister.add_argument("device", metavar="DEVICE")
    unregister.add_argument("pasid", type=_number, metavar="PASID")
    unregister.set_defaults(handler=_later("pasid_unregister"))


def _number(text: str) -> int:
    return int(text, 0)
