# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``qemu-ioasid``."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from qemu_ioasid import (
    bench,
    builds,
    config,
    kernel,
    process,
    report,
    scenarios,
    session,
    subcommand,
)
from qemu_ioasid.bisect import command as bisect
from qemu_ioasid.cache import explained
from qemu_ioasid.compare import command as compare
from qemu_ioasid.coverage import command as coverage
from qemu_ioasid.errors import ConfigurationError, RigError
from qemu_ioasid.kernel import mutant
from qemu_ioasid.lab import arguments as lab
from qemu_ioasid.model import program
from qemu_ioasid.mutants import command as mutants
from qemu_ioasid.patchwise import command as patchwise
from qemu_ioasid.qemu import ACCELERATORS
from qemu_ioasid.report import VERDICTS, Report, counts
from qemu_ioasid.scenarios import SCENARIOS
from qemu_ioasid.scenarios.table import Row, choose
from qemu_ioasid.selftest import command as selftest
from qemu_ioasid.session import Options, Terminated
from qemu_ioasid.standby import Start
from qemu_ioasid.terminal import Terminal, indented, line

EXIT_CODES = "\n".join(f"  {code:3}  {text}" for code, text in VERDICTS.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qemu-ioasid",
        description="Boots a patched kernel with virtual IOMMUs and emulated mdevs, and proves "
        "that no PASID gets through which was not registered.",
        epilog=f"exit codes:\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {importlib.metadata.version('qemu_ioasid')}",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = _common()
    _add_run(commands, common)
    mutants.add(commands)
    bisect.add(commands)
    compare.add(commands)
    coverage.add(commands)
    patchwise.add(commands, common, _spec)
    _add_bench(commands, common)
    lab.add(commands, common, _add_start, _options)
    selftest.add(commands, _common("selftest"), _add_machine, _spec, _ended)
    builds.add(commands, common, _spec)

    page = commands.add_parser("report", help="make a report's page anew from its report.json")
    page.add_argument("folder", type=Path, metavar="FOLDER", help="a run's report folder")
    page.set_defaults(handler=_report, json=False)
    return parser


def add_kernel(command: argparse.ArgumentParser) -> None:
    """Which kernel, and what is laid over it."""
    command.add_argument(
        "--kernel",
        action=subcommand.Named,
        default="",
        metavar="NAME",
        help=f"{kernel.FORMS} (default: Debian's, of the series' version)",
    )
    command.add_argument(
        "--series",
        action=subcommand.Named,
        default="",
        metavar="SERIES",
        help=f"{kernel.SERIES_FORMS} (default: ours, if missing)",
    )
    command.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a config fragment of yours, which counts more than ours; may be given again",
    )


def _common(profile: str = "default") -> argparse.ArgumentParser:
    """What every command that wants a kernel takes; *profile* is the one where none is named."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--profile",
        default=profile,
        choices=kernel.PROFILES,
        help=f"the kernel's config profile ({profile})",
    )
    add_kernel(common)
    common.add_argument(
        "--mutant",
        metavar="NAME",
        help="sabotage the kernel with this patch of kernel-patches/mutants, or a file of yours",
    )
    common.add_argument("--json", action="store_true", help="print JSON on standard output, alone")

    return common


def _add_run(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    run = commands.add_parser("run", parents=[common], help="boot a rig and run a scenario on it")
    run.add_argument(
        "scenario",
        nargs="?",
        help=f"one of: {', '.join(SCENARIOS)} (isolation; with --replay model)",
    )
    run.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="NAME",
        help="make this check only; may be given again",
    )
    run.add_argument(
        "--list", action="store_true", help="tell the scenario's checks on the rig; boot nothing"
    )
    run.add_argument(
        "--coverage",
        action="store_true",
        help="have the kernel count which of the series' lines run, for qemu-ioasid coverage",
    )
    run.add_argument("--first", action="store_true", help="end at the first check that fails")
    run.add_argument(
        "--rig", type=Path, metavar="FILE", help="what to boot (TOML; default: the scenario's own)"
    )
    _add_order(run)
    run.add_argument(
        "--host",
        default="vm",
        choices=("vm", "local"),
        help="what the guests run on: a host VM, or this machine itself, its kernel and its "
        "/dev/iommu (root; docs/local.md)",
    )
    run.add_argument(
        "--parts",
        type=Path,
        metavar="DIR",
        help="with --host local: what qemu-ioasid parts made elsewhere, instead of building it",
    )
    _add_start(run)
    run.set_defaults(handler=_run)


def _add_order(run: argparse.ArgumentParser) -> None:
    """What single scenarios take."""
    run.add_argument("--seconds", type=_count, metavar="N", help="stress: how long it lasts (60)")
    run.add_argument(
        "--operations",
        type=_count,
        metavar="N",
        help="hostile: how many descriptors and accesses (200000)",
    )
    run.add_argument(
        "--steps", type=_count, metavar="N", help="model: how many random steps (10000)"
    )
    run.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="stress, hostile, model: what is drawn from it (a fresh one, told)",
    )
    run.add_argument(
        "--replay", type=Path, metavar="FILE", help="model: this program, and no other"
    )


def _add_start(command: argparse.ArgumentParser) -> None:
    """What is told to a *command* that starts a rig."""
    _add_machine(command)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=_change,
        metavar="KEY=VALUE",
        help="change a key of the rig file, host.viommu.fsts=true for example; may be given again",
    )
    command.add_argument(
        "--cold", action="store_true", help="boot the rig, whether it was saved before or not"
    )
    command.add_argument(
        "--verify", action="store_true", help="compare every byte of a saved rig before trusting it"
    )


def _add_machine(command: argparse.ArgumentParser) -> None:
    """What is told to a *command* that boots a host VM and reports."""
    command.add_argument(
        "--accel", default="auto", choices=ACCELERATORS, help="kvm refuses to fall back"
    )
    command.add_argument(
        "--qemu",
        default="auto",
        metavar="PROGRAM",
        help="the host VM's QEMU: auto, private (the rig's own copy, 11.1), 10.0 (likewise) "
        "or a program",
    )
    command.add_argument("--report", type=Path, metavar="DIR", help="where the report goes")
    command.add_argument(
        "--append", default="", metavar="ARGS", help="more for the host VM's kernel command line"
    )


def _add_bench(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    command = commands.add_parser("bench", parents=[common], help="measure what things cost here")
    command.add_argument(
        "--rounds", type=_count, default=5, metavar="N", help="how often each is measured (5)"
    )
    command.add_argument(
        "--restores",
        type=_count,
        metavar="N",
        help="only restore the default rig, N times in a row",
    )
    command.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="FILE",
        help="only build, boot and judge the kernel anew with a line more in this C file of it",
    )
    _add_machine(command)
    command.set_defaults(handler=_bench)


def _change(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text}: must be KEY=VALUE")
    return key.strip(), value.strip()


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 on")
    return int(text)


def _spec(arguments: argparse.Namespace) -> kernel.Spec:
    profile = arguments.profile
    if getattr(arguments, "coverage", False):
        if profile not in ("default", kernel.COVERAGE):
            raise ConfigurationError(f"--coverage: is a profile of its own, not {profile}")
        profile = kernel.COVERAGE
    spec = kernel.Spec(
        profile=profile,
        mutant=mutant.find(arguments.mutant).patch if arguments.mutant else None,
        config=tuple(path.absolute() for path in arguments.config),
        update=getattr(arguments, "update", False),
    )
    return spec.naming(arguments.kernel, arguments.series)


def _options(arguments: argparse.Namespace) -> Options:
    """What `_add_start` and the common options say."""
    return Options(
        rig=arguments.rig or config.DEFAULT,
        accelerator=arguments.accel,
        qemu=arguments.qemu,
        changes=dict(arguments.set),
        kernel=_spec(arguments),
        report=arguments.report,
        append=arguments.append,
        start=Start(cold=arguments.cold, verify=arguments.verify),
    )


def _run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    name = arguments.scenario
    if name is None:
        name = "isolation" if arguments.replay is None else "model"
    scenario = scenarios.find(name)
    options = _options(arguments)
    if not arguments.series:
        options = replace(options, kernel=replace(options.kernel, without=scenario.left_out))
    options = replace(
        options,
        rig=arguments.rig or scenario.rig,
        append=f"{scenario.append} {arguments.append}".strip(),
        scenario=name,
        order=_order(arguments, name, scenario.takes),
        checks=tuple(arguments.check),
        first=arguments.first,
        host=arguments.host,
        parts=arguments.parts,
    )
    if arguments.list:
        return _list(scenario.rows(config.load(options.rig, options.changes)), arguments, terminal)
    return _ended(session.run(options, subcommand.output(terminal)), arguments, terminal)


def _list(rows: Sequence[Row], arguments: argparse.Namespace, terminal: Terminal) -> int:
    found = choose(rows, arguments.check)
    if arguments.json:
        told = [{"phase": row.phase, "name": row.name, "tried": row.tried} for row in found]
        print(json.dumps(told, indent=2))
        return 0
    for row in found:
        terminal.say(f"{row.name:24} {row.tried}")
    return 0


def _ended(ended: Report, arguments: argparse.Namespace, terminal: Terminal) -> int:
    if arguments.json:
        print(json.dumps(ended.document(), indent=2))
    else:
        _tell(ended, terminal)
    return ended.exit_code


def _order(arguments: argparse.Namespace, name: str, takes: tuple[str, ...]) -> dict[str, Any]:
    """What the user said to a scenario; raises ConfigurationError where it does not take it."""
    said = {
        each: getattr(arguments, each)
        for each in ("seconds", "operations", "steps", "seed", "replay")
    }
    order = {each: value for each, value in said.items() if value is not None}
    for each in order.keys() - set(takes):
        raise ConfigurationError(f"--{each}: scenario {name} takes none")
    if "series" in takes:
        order["series"] = bool(arguments.series)
    if "replay" in order:
        for each in ("steps", "seed"):
            if each in order:
                raise ConfigurationError(f"--{each}: a program that is replayed has its own")
        order["replay"] = program.load(order["replay"])
    elif name == "model":
        program.require_hypothesis()
    return order


def _bench(arguments: argparse.Namespace, terminal: Terminal) -> int:
    options = Options(
        accelerator=arguments.accel,
        qemu=arguments.qemu,
        kernel=_spec(arguments),
        report=arguments.report,
        append=arguments.append,
    )
    if arguments.edit and arguments.restores:
        raise ConfigurationError("--edit and --restores: one of the two")
    if arguments.edit:
        document = bench.edits(
            options, arguments.edit, arguments.rounds, subcommand.output(terminal)
        )
    elif arguments.restores:
        document = bench.restores(options, arguments.restores, subcommand.output(terminal))
    else:
        document = bench.run(options, arguments.rounds, subcommand.output(terminal))
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        print(f"\n{bench.text(document['results'])}\n")
        print(f"report: {_short(Path(document['report']))}")
    wrong = document["results"][0].get("wrong", [])
    for told in wrong:
        print(told, file=sys.stderr)
    return 1 if wrong else 0


def _tell(ended: Report, terminal: Terminal) -> None:
    if ended.checks:
        terminal.say("")
        terminal.checks(ended.checks)
        terminal.say("")
    if ended.error is not None:
        evidence = ended.error["evidence"] if ended.exit_code in (4, 5) else ""
        _complain(ended.error["message"], evidence)
    made = counts(ended.checks)
    terminal.say(f"{VERDICTS[ended.exit_code]}{f' ({made})' if made else ''}")
    terminal.say(f"report: {_short(ended.folder / 'report.html')}")


def _complain(message: str, evidence: str = "") -> None:
    print(f"qemu-ioasid: {line(message)}", file=sys.stderr)
    if evidence:
        print(indented(evidence), file=sys.stderr)


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def _report(arguments: argparse.Namespace, terminal: Terminal) -> int:
    document = report.load(arguments.folder)
    try:
        with explained(arguments.folder, "the page goes beside its report.json"):
            path = report.write_page(arguments.folder, document)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}") from None
    terminal.say(_short(path))
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _where() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigurationError("the current folder is gone: change to another one") from None


def _mute() -> None:
    """Nobody takes our output any more: Python's own flush at exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # A closed stream is None, to which nobody can write.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    parsed = _parser().parse_args(arguments)
    handler: Callable[[argparse.Namespace, Terminal], int] = parsed.handler
    signal.signal(signal.SIGTERM, _terminate)
    # nohup's wish is the user's.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _where()
        with Terminal(sys.stderr if parsed.json else sys.stdout) as terminal:
            return handler(parsed, terminal)
    except RigError as error:
        _complain(error.message, error.evidence if error.exit_code == 4 else "")
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Terminated:
        _complain("terminated")
        return 143
    except BrokenPipeError:
        _mute()
        return 141
    except Exception as error:
        # Of our own files' room somebody has told by name.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            _mute()
            _complain("standard output: No space left on device")
            return 3
        _complain(f"bug in the rig: {error!r}", traceback.format_exc())
        return 4
    finally:
        process.close_run()


if __name__ == "__main__":
    sys.exit(main())
