# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands of ``qemu-ioasid lab`` do, each a handler of its arguments."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from qemu_ioasid import config, process, subcommand
from qemu_ioasid.errors import ConfigurationError, InfrastructureError, RequirementError
from qemu_ioasid.kernel import Spec
from qemu_ioasid.lab import attach, client, place
from qemu_ioasid.lab.order import Order
from qemu_ioasid.lab.place import Entry
from qemu_ioasid.lab.wire import OUT, Refused, Wire
from qemu_ioasid.session import Options
from qemu_ioasid.terminal import Terminal, indented
from qemu_ioasid.text import visible

#: How many lines of a console `lab status` shows where a kernel has reported something.
EXCERPT = 16

Json = dict[str, Any]


class _Lab:
    """The lab that *arguments* name, and the terminal that hears of it."""

    def __init__(self, arguments: argparse.Namespace, terminal: Terminal) -> None:
        self.entry: Entry = place.find(arguments.name)
        self.output = subcommand.output(terminal)

    def note(self, line: str) -> None:
        """Tell of what a kernel has reported since the last command."""
        print(f"qemu-ioasid: lab {self.entry.name}: {visible(line)}", file=sys.stderr)

    def ask(self, op: str, **arguments: Any) -> Any:
        """See `client.ask`."""
        return client.ask(self.entry, self.output, self.note, op, **arguments)

    def wire(self, op: str, **arguments: Any) -> Wire:
        """A connection on which *op* has been asked for."""
        wire = Wire(self.entry.connect())
        wire.tell(op=op, **arguments)
        return wire


def _print(document: Any) -> None:
    print(json.dumps(document, indent=2))


# Lives


def up(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Start a lab."""
    options: Options = arguments.make_options(arguments)
    # A mistake in the rig file is told of before anything is started, by the name it was given.
    config.load(options.rig, options.changes)
    qemu = options.qemu
    options = replace(
        options,
        rig=options.rig.absolute(),
        qemu=os.path.abspath(qemu) if os.sep in qemu else qemu,
        report=options.report.absolute() if options.report else None,
    )
    return _up(Order(arguments.name or place.DEFAULT, options), arguments.json, terminal)


def reopen(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Start a lab from the rig that was kept in a report."""
    spec = Spec(profile=arguments.profile).naming(arguments.kernel, arguments.series)
    report = arguments.report.absolute() if arguments.report else None
    order = Order(
        arguments.name or place.DEFAULT,
        Options(kernel=spec, report=report),
        arguments.folder.absolute(),
    )
    return _up(order, arguments.json, terminal)


def _up(order: Order, as_json: bool, terminal: Terminal) -> int:
    place.check_name(order.name)
    place.sweep()
    place.refuse_taken(order.name)
    told = client.start(order, subcommand.output(terminal))
    if as_json:
        _print(told)
    else:
        _tell(told, terminal)
    return 0


def status(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Tell of all labs, or of one."""
    # A lab whose keeper has died is told of once: this removes it.
    every = [place.find(arguments.name)] if arguments.name else place.entries()
    told = [client.status(entry) for entry in every]
    if any(each["state"] == "gone" for each in told):
        place.sweep()
    if arguments.json:
        _print(told)
        return 0
    for each in told:
        _tell(each, terminal)
    if not told:
        terminal.say("no lab is up")
    return 0


def _tell(told: Json, terminal: Terminal) -> None:
    since = time.strftime("%H:%M:%S", time.localtime(told["started"]))
    doing = f" ({told['doing']})" if told["doing"] else ""
    terminal.say(f"lab {told['name']}: {told['state']}{doing}, pid {told['pid']}, since {since}")
    if told["why"]:
        terminal.say(f"  {told['why']}")
    for vm in told["vms"]:
        mdevs = f"  mdevs {' '.join(vm['mdevs'])}" if vm["mdevs"] else ""
        terminal.say(f"  {vm['name']:6}  {vm['state']:7}{mdevs}".rstrip())
        for report in vm["reports"]:
            terminal.say(f"          {report['kind']}: {report['text']}")
        if vm["reports"]:
            excerpt = vm["reports"][0]["excerpt"].splitlines()
            for line in indented("\n".join(excerpt[:EXCERPT])).splitlines():
                terminal.say(f"          {line}")
    for kept in told["snapshots"]:
        terminal.say(f"  snapshot {kept['name']}, {kept['bytes'] >> 20} MiB")
    terminal.say(f"  rig {told['rig']}, report {told['report']}")


def reload(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Swap the driver."""
    told = Spec().naming("", arguments.series).series
    swapped = _Lab(arguments, terminal).ask("reload", series=told)["swapped"]
    what = f"swapped {', '.join(swapped)}" if swapped else "the driver is the one that runs"
    terminal.say(what)
    return 0


def snapshot(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Save the lab."""
    told = _Lab(arguments, terminal).ask("snapshot", name=arguments.snapshot)
    terminal.say(f"snapshot {told['name']}, {told['bytes'] >> 20} MiB")
    return 0


def restore(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Have the lab as it was saved."""
    _Lab(arguments, terminal).ask("restore", name=arguments.snapshot)
    return 0


def down(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """End a lab, or all of them."""
    if arguments.all and arguments.name:
        raise ConfigurationError("--all and --name: one of them")
    every = place.entries() if arguments.all else [place.find(arguments.name)]
    for entry in every:
        client.down(entry, terminal.say)
        terminal.say(f"lab {entry.name} has ended; report: {entry.report}")
    if not every:
        terminal.say("no lab is up")
    return 0


def gc(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Remove what is left of rigs whose owners are gone, and say what."""
    removed = place.collect_garbage()
    for line in removed:
        terminal.say(f"removed {line}")
    if not removed:
        terminal.say("nothing is left of anybody who is gone")
    return 0


# Sessions


def ssh(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """A shell or a command in a VM; its exit status is ours."""
    lab = _Lab(arguments, terminal)
    command = " ".join(arguments.command)
    wants = arguments.terminal or not command
    shown = (
        [os.environ.get("TERM", "dumb"), *attach.terminal_size()]
        if (wants and sys.stdin.isatty())
        else None
    )
    with lab.wire("ssh", vm=arguments.vm, command=command or "", terminal=shown) as wire:
        return attach.session(wire, lab.note, terminal=shown is not None)


def console(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """A VM's console, in characters that do nothing."""
    lab = _Lab(arguments, terminal)
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    with contextlib.suppress(KeyboardInterrupt), lab.wire("console", vm=arguments.vm) as wire:
        while (frame := wire.receive()) is not None:
            kind, data = frame
            if kind != OUT:
                told = json.loads(data)
                if "error" in told:
                    raise Refused(told["error"])
                if "note" in told:
                    lab.note(told["note"])
                if "ok" in told:
                    return 0
                continue
            text = decode(data).replace("\r\n", "\n")
            sys.stdout.write("\n".join(visible(line.expandtabs()) for line in text.split("\n")))
            sys.stdout.flush()
        raise InfrastructureError(f"lab {lab.entry.name}: its keeper is gone")
    return 0


def qmp(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """One QMP command, or a shell on the monitor."""
    lab = _Lab(arguments, terminal)
    if not arguments.command:
        return _qmp_shell(lab, arguments.vm, hmp=arguments.hmp)
    text = " ".join(arguments.command)
    if arguments.hmp:
        command, given = "human-monitor-command", {"command-line": text}
    else:
        command, given = _qmp_command(text)
    answered = lab.ask("qmp", vm=arguments.vm, command=command, arguments=given)
    if arguments.hmp:
        print("\n".join(visible(line) for line in str(answered).splitlines()))
    else:
        _print(answered)
    return 0


def _qmp_command(text: str) -> tuple[str, Json]:
    if text.startswith("{"):
        try:
            request = json.loads(text)
            return str(request["execute"]), dict(request.get("arguments", {}))
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f'{text}: must be JSON with "execute"') from None
    command, *pairs = shlex.split(text)
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigurationError(f"{command}: {pair}: must be KEY=VALUE")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    return command, given


def _qmp_shell(lab: _Lab, vm: str, *, hmp: bool) -> int:
    # These take as long to import as all else does.
    from qemu.qmp import QMPError
    from qemu.qmp.qmp_shell import HMPShell, QMPShell

    with lab.wire("qmp_shell", vm=vm) as wire:
        client.answer(wire, lab.output, lab.note, "the monitor's connection ended")
        shell = (HMPShell if hmp else QMPShell)(cast(Any, wire.sock))
        try:
            with shell:
                shell.connect()
                for _ in shell.repl():
                    pass
        except QMPError as error:
            raise InfrastructureError(f"{vm}: QMP: {error}") from None
    return 0


def push(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Copy a file into a VM, its mode with it."""
    source: Path = arguments.source
    target = arguments.target
    if target.endswith("/"):
        target += source.name
    try:
        with open(source, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            where = shlex.quote(target)
            script = f"cat >{where} && chmod {mode:o} {where}"
            return _transfer(arguments, terminal, script, file, None)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigurationError(f"{source}: {error.strerror}") from None


def pull(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Copy a file out of a VM; there is none where that failed."""
    target: Path = arguments.target
    if target.is_dir():
        target /= Path(arguments.source).name
    try:
        fd, part = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(fd, "wb") as file:
                script = f"exec cat {shlex.quote(arguments.source)}"
                status = _transfer(arguments, terminal, script, None, file)
            if status == 0:
                os.chmod(part, 0o644)
                os.replace(part, target)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigurationError(f"{target}: {error.strerror}") from None
    return status


def _transfer(
    arguments: argparse.Namespace,
    terminal: Terminal,
    script: str,
    source: BinaryIO | None,
    sink: BinaryIO | None,
) -> int:
    lab = _Lab(arguments, terminal)
    with lab.wire("ssh", vm=arguments.vm, command=script, terminal=None) as wire:
        return attach.transfer(wire, lab.note, source, sink)


def gdb(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print the line that debugs a VM's kernel, and become it."""
    told = _Lab(arguments, terminal).ask("gdb", vm=arguments.vm)
    words = ["gdb", "-q", "-iex", "set confirm off", told["vmlinux"]]
    for module in told["modules"]:
        sections = dict(module["sections"])
        placed = [f"add-symbol-file {module['path']} {sections.pop('.text')}"]
        placed += [f"-s {name} {address}" for name, address in sections.items()]
        words += ["-ex", " ".join(placed)]
    for line in (*told["commands"], f"target remote {told['socket']}"):
        words += ["-ex", line]
    words += arguments.more
    terminal.say(shlex.join(words))
    if arguments.print:
        return 0
    if shutil.which("gdb") is None:
        raise RequirementError("gdb is missing: install gdb, or run the line elsewhere")
    sys.stdout.flush()
    process.close_run()
    return os.execvp(words[0], words)


# PASIDs


def pasid_list(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """All registrations, and whether the kernel agrees; exit code 1 when it does not."""
    told = _Lab(arguments, terminal).ask("pasid_list")
    if arguments.json:
        _print(told)
        return 0 if told["audit"]["agrees"] else 1
    form = "{:8} {:>7}  {:>5}  {:9}  {:14}  {}"
    if told["registrations"]:
        terminal.say(form.format("device", "PASID", "IOAS", "of", "kernel", "bound to"))
    for row in told["registrations"]:
        kernel, bound = row["kernel"], row.get("bound")
        listed = f"{kernel['state']}, {kernel['inflight']} busy" if kernel else "not listed"
        where = ""
        if bound:
            where = f"IOVA {bound['iova']:#x}: {bound['length']:#x} bytes at {bound['offset']:#x}"
        of = row["iommufd"] or "nobody"
        ioas = row["ioas"] if row["ioas"] is not None else kernel["ioas"]
        terminal.say(form.format(row["device"], row["pasid"], ioas, of, listed, where).rstrip())
    agrees = told["audit"]["agrees"]
    terminal.say(
        f"{len(told['registrations'])} registered, {len(told['allocated'])} allocated; "
        + ("the ledger, the kernel's lists and its table agree" if agrees else "AUDIT FAILED")
    )
    if not agrees:
        for kind in ("missing", "unexpected", "different"):
            for row in told["audit"][kind]:
                terminal.say(f"  {kind}: {json.dumps(row)}")
    return 0 if agrees else 1


def pasid_register(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Bind some of a guest's arena to a PASID."""
    told = _Lab(arguments, terminal).ask(
        "pasid_register",
        guest=arguments.guest,
        device=arguments.device,
        offset=arguments.offset,
        length=arguments.length,
        pasid=arguments.pasid,
    )
    if arguments.json:
        _print(told)
    else:
        terminal.say(
            f"PASID {told['pasid']} on {told['device']}: IOAS {told['ioas']} of {told['guest']}, "
            f"IOVA {told['iova']:#x} is {told['length']:#x} bytes at {told['offset']:#x} of its "
            f"arena (guest-physical {told['gpa']:#x})"
        )
    return 0


def pasid_unregister(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Take a PASID off a device."""
    lab = _Lab(arguments, terminal)
    lab.ask("pasid_unregister", device=arguments.device, pasid=arguments.pasid)
    return 0
