# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests are booted from on a machine that is the host itself: built there, or brought."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qemu.qmp

from qemu_ioasid import agentdisk, image, kernel
from qemu_ioasid.cache import explained
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, RequirementError

_TOLD = "parts.json"
#: Changes with the layout of the folder.
_VERSION = 1
#: The folder's copy of this program, for machines that have Python and nothing else of it.
_PYTHON, _COMMAND = "python", "qemu-ioasid"
_SCRIPT = """#!/bin/sh
# qemu-ioasid as it was where these parts were made.
PYTHONPATH="$(dirname "$0")/python" exec python3 -P -m qemu_ioasid.cli "$@"
"""
_METADATA = "Metadata-Version: 2.1\nName: qemu_ioasid\nVersion: {}\n"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class GuestParts:
    """*disks* are files by serial, the first the root; *versions* name all that in a report."""

    kernel: Path
    disks: dict[str, Path]
    versions: dict[str, Any]


def build(spec: kernel.Spec, *, deadline: Deadline, progress: Progress) -> GuestParts:
    """The guests' parts from the cache, built if need be; raises as `kernel.build` and others."""
    built = kernel.build(spec, deadline=deadline, progress=progress)
    guest = image.build("guest", deadline=deadline, progress=progress)
    return GuestParts(
        kernel=built.image,
        disks={"root": guest.path, "agent": agentdisk.build(guest, deadline=deadline)},
        versions={
            "agent": agentdisk.sources_hash(),
            "guests_kernel": {"release": built.release, "hash": built.hash},
            "images": {"guest": guest.hash},
        },
    )


def _files(folder: Path) -> dict[str, Path]:
    """The parts in *folder*, by what they are."""
    return {
        "kernel": folder / "vmlinux",
        "root": folder / "guest.erofs",
        "agent": folder / "agent.erofs",
    }


def export(parts: GuestParts, folder: Path) -> None:
    """Copy *parts* into *folder*, which is made, with this program beside them.

    Raises ConfigurationError when there is something in *folder*, RequirementError (no room).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigurationError(f"{folder}: is not empty")
        with explained(folder, "make room, or take another folder"):
            sources = {"kernel": parts.kernel, **parts.disks}
            hashes = {}
            for name, path in _files(folder).items():
                shutil.copyfile(sources[name], path)
                hashes[name] = _hash(path)
            _export_program(folder)
            told = {"version": _VERSION, "sha256": hashes, "versions": parts.versions}
            (folder / _TOLD).write_text(json.dumps(told, indent=1) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{error.filename or folder}: {error.strerror}") from None


def _export_program(folder: Path) -> None:
    target = folder / _PYTHON
    for package in (Path(__file__).parent, Path(qemu.qmp.__file__).parent):
        below = target / ("qemu/qmp" if package.name == "qmp" else package.name)
        shutil.copytree(package, below, ignore=shutil.ignore_patterns("__pycache__"))
    version = importlib.metadata.version("qemu_ioasid")
    named = target / f"qemu_ioasid-{version}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(_METADATA.format(version))
    command = folder / _COMMAND
    command.write_text(_SCRIPT)
    command.chmod(0o755)


def load(folder: Path) -> GuestParts:
    """The parts that `export` left in *folder*, every byte compared.

    Raises ConfigurationError for a folder that is not one, RequirementError for
    parts that are damaged or another version's.
    """
    again = "make them anew with qemu-ioasid parts"
    try:
        told = json.loads((folder / _TOLD).read_text())
        if told["version"] != _VERSION or told["versions"]["agent"] != agentdisk.sources_hash():
            raise RequirementError(f"--parts {folder}: another version's; {again}")
        found = {name: path.absolute() for name, path in _files(folder).items()}
        for name, path in found.items():
            if _hash(path) != told["sha256"][name]:
                raise RequirementError(f"{path}: damaged; {again}")
    except OSError as error:
        raise ConfigurationError(f"--parts: {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(f"--parts: {folder / _TOLD}: damaged; {again}") from None
    return GuestParts(found.pop("kernel"), found, told["versions"])


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
