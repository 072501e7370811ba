# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that build what a rig is made of, show what is built, and make room."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from qemu_ioasid import cache, image, kernel, parts, session
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.terminal import Terminal

MakeSpec = Callable[[argparse.Namespace], kernel.Spec]


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    make_spec: MakeSpec,
) -> None:
    """Add ``kernel``, ``image`` and ``parts``; *make_spec* reads what *common* has of a kernel."""
    build = commands.add_parser("kernel", help="build kernels, list them, remove them")
    actions = build.add_subparsers(dest="action", required=True, metavar="ACTION")
    making = actions.add_parser("build", parents=[common], help="build, or say what is built")
    making.add_argument(
        "--update", action="store_true", help="ask the archive for a newer source package"
    )
    making.set_defaults(handler=_with(make_spec, _kernel_build))
    plain = argparse.ArgumentParser(add_help=False)
    plain.add_argument("--json", action="store_true", help="print JSON on standard output, alone")
    listing = actions.add_parser("list", parents=[plain], help="what is built, and its size")
    listing.set_defaults(handler=_kernel_list)
    gc = actions.add_parser(
        "gc", parents=[plain], help="remove kernels, mutants, and trees that no kernel left is of"
    )
    gc.add_argument(
        "--keep", type=int, default=4, metavar="N", help="but the N kernels used last (4)"
    )
    gc.set_defaults(handler=_kernel_gc)

    images = commands.add_parser("image", help="build the VM images")
    actions = images.add_subparsers(dest="action", required=True, metavar="ACTION")
    making = actions.add_parser("build", parents=[plain], help="build, or say what is built")
    making.set_defaults(handler=_image_build)

    carry = commands.add_parser(
        "parts",
        parents=[common],
        help="copy what a run with --host local needs to a folder, for machines without build "
        "tools; DIR/qemu-ioasid is the command there",
    )
    carry.add_argument("folder", type=Path, metavar="DIR", help="is made")
    carry.set_defaults(handler=_with(make_spec, _parts))


def _with(
    make_spec: MakeSpec, handler: Callable[[kernel.Spec, argparse.Namespace, Terminal], int]
) -> Callable[[argparse.Namespace, Terminal], int]:
    return lambda arguments, terminal: handler(make_spec(arguments), arguments, terminal)


def _kernel_build(spec: kernel.Spec, arguments: argparse.Namespace, terminal: Terminal) -> int:
    started = time.monotonic()
    terminal.begins("kernel")
    built = kernel.build(
        spec,
        deadline=Deadline(session.BUILD_SECONDS, "kernel"),
        progress=terminal.progress,
    )
    terminal.begins("")
    if arguments.json:
        print(json.dumps(_kernel_row(built), indent=2))
    else:
        how = "built already" if built.cached else f"built in {time.monotonic() - started:.0f} s"
        terminal.say(f"{built.release} {built.hash}  {how}: {built.image}")
    return 0


def _kernel_row(built: kernel.Kernel) -> dict[str, object]:
    return {
        "release": built.release,
        "source": built.source,
        "hash": built.hash,
        "series": built.series_hash,
        "image": str(built.image),
        "vmlinux": str(built.vmlinux),
        "cached": built.cached,
    }


def _kernel_list(arguments: argparse.Namespace, terminal: Terminal) -> int:
    found = kernel.cached()
    if arguments.json:
        rows = [{**_kernel_row(each), "bytes": cache.size(each.folder)} for each in found]
        print(json.dumps(rows, indent=2))
    else:
        for each in found:
            profile = each.profile or "as it was"
            size = cache.size(each.folder) >> 20
            terminal.say(f"{each.hash}  {size:4} MiB  {each.release}  {profile}  {each.source}")
    return 0


def _kernel_gc(arguments: argparse.Namespace, terminal: Terminal) -> int:
    removed = kernel.collect(max(0, arguments.keep))
    freed = sum(removed.values())
    if arguments.json:
        told = {str(path): size for path, size in removed.items()}
        print(json.dumps({"bytes": freed, "removed": told}, indent=2))
    else:
        for path, size in removed.items():
            terminal.say(f"{size >> 20:6} MiB  {path}")
        terminal.say(f"{freed >> 20:6} MiB freed")
    return 0


def _image_build(arguments: argparse.Namespace, terminal: Terminal) -> int:
    rows = {}
    for name in ("host", "guest"):
        terminal.begins(f"{name} image")
        built = image.build(
            name, deadline=Deadline(session.BUILD_SECONDS, "images"), progress=terminal.progress
        )
        terminal.begins("")
        rows[name] = {"hash": built.hash, "path": str(built.path), "cached": built.cached}
        if not arguments.json:
            terminal.say(
                f"{name} {built.hash}  {'built already' if built.cached else 'built'}: {built.path}"
            )
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return 0


def _parts(spec: kernel.Spec, arguments: argparse.Namespace, terminal: Terminal) -> int:
    terminal.begins("guests' kernel and image")
    built = parts.build(
        spec,
        deadline=Deadline(session.BUILD_SECONDS, "guests' kernel and image"),
        progress=terminal.progress,
    )
    terminal.begins("")
    parts.export(built, arguments.folder)
    if arguments.json:
        print(json.dumps({"folder": str(arguments.folder), **built.versions}, indent=2))
    else:
        command = arguments.folder / "qemu-ioasid"
        terminal.say(f"on a machine to be the host: {command} run --host local --parts DIR")
    return 0
