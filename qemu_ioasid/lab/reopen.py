# SPDX-License-Identifier: GPL-2.0-or-later
"""A rig that was kept in a report, and what it was made of: found again, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from qemu_ioasid import image, kernel, qemu, snapshot, standby
from qemu_ioasid.config import GuestConfig, HostConfig, MdevConfig, RigConfig, Size
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.qemu import Qemu
from qemu_ioasid.snapshot import Snapshot, Unusable
from qemu_ioasid.viommu import Viommu

#: Where a report has the rig: `Rig.save` made it.
FOLDER = "snapshot"
PROBE_SECONDS = 60.0

Json = dict[str, Any]


@contextlib.contextmanager
def found(report: Path) -> Iterator[Snapshot]:
    """The rig kept in the folder *report*; ConfigurationError when there is none to be trusted."""
    if not report.is_dir():
        raise ConfigurationError(f"{report}: no such folder")
    folder = report / FOLDER
    if not folder.is_dir():
        raise ConfigurationError(
            f"{report}: no rig was kept there (pytest --ioasid-keep-rig keeps those of failures)"
        )
    with contextlib.ExitStack() as stack:
        try:
            saved = stack.enter_context(snapshot.opened(folder, verify=False))
        except Unusable as why:
            raise ConfigurationError(f"{folder}: cannot be restored: {why}") from None
        yield saved


def parts(saved: Snapshot) -> tuple[RigConfig, HostParts]:
    """What *saved* was made of. Raises ConfigurationError naming what is gone or another now."""
    identity = saved.known.get("identity", {})
    try:
        config = _config(identity, str(saved.folder))
        missing = [path for path in _files(identity) if not path.exists()]
        if missing:
            raise ConfigurationError(
                f"{saved.folder.parent}: the rig cannot be resumed: {missing[0]} is gone "
                f"({len(missing)} of its files are)"
            )
        made = HostParts(
            qemu=_qemu(identity),
            accelerator=identity["accelerator"][0],
            kernel=Path(identity["kernel"]),
            disks=_disks(identity),
            guest_viommu=_private(_disks(identity)["root"].with_name("root")).viommu,
            append=_append(identity),
            slowness=kernel.slowness(Path(identity["kernel"]).with_name("config")),
        )
    except (KeyError, TypeError, ValueError, IndexError, StopIteration):
        raise ConfigurationError(f"{saved.folder}: was not saved by this version") from None
    now = standby.identity(config, made)
    differing = sorted(
        name for name in now.keys() | identity.keys() if now.get(name) != identity.get(name)
    )
    if differing:
        raise ConfigurationError(
            f"{saved.folder.parent}: the rig cannot be resumed: {', '.join(differing)} "
            "is not what it was when it was saved"
        )
    return config, made


def _config(identity: Json, path: str) -> RigConfig:
    # JSON keeps no order of the guests; their command lines are a list.
    order = [words[words.index("-name") + 1] for words in identity["guests' command lines"]]
    guests = {name: _made(GuestConfig, identity["guests"][name]) for name in order}
    host = _made(HostConfig, identity["host"])
    return RigConfig(host, {name: MdevConfig() for name in identity["mdevs"]}, guests, path, "")


def _made(cls: type[Any], told: Json) -> Any:
    values = {field.name: told[field.name] for field in fields(cls)}
    values["viommu"] = Viommu(**values["viommu"])
    values["memory"] = Size(values["memory"])
    if "mdevs" in values:
        values["mdevs"] = tuple(values["mdevs"])
    return cls(**values)


def _disks(identity: Json) -> dict[str, Path]:
    # In the order of the command line, which has them so: the first is the root.
    line = " ".join(identity["command line"])
    paths = {
        name.removeprefix("disk "): Path(path)
        for name, path in identity.items()
        if name.startswith("disk ")
    }
    return dict(sorted(paths.items(), key=lambda item: line.index(f"serial={item[0]}")))


def _files(identity: Json) -> list[Path]:
    programs = [Path(told[0]) for told in identity["QEMU"][1:]]
    return [Path(identity["kernel"]), *_disks(identity).values(), *programs]


def _append(identity: Json) -> str:
    line = identity["command line"]
    return str(line[line.index("-append") + 1]).partition("ROLE=host")[2].strip()


def _qemu(identity: Json) -> Qemu:
    line = identity["command line"]
    argv = tuple(line[: line.index("-accel")])
    program = next(Path(word) for word in argv if word.endswith(f"/{qemu.PROGRAM}"))
    if len(argv) > 1:
        return _private(program.parents[2])
    return qemu.probe(argv, {}, Deadline(PROBE_SECONDS, "answers of QEMU"))


def _private(root: Path) -> Qemu:
    """The QEMU in *root*, the folder that an image was made from."""
    deadline = Deadline(PROBE_SECONDS, "answers of QEMU")
    found = image.qemu_in(root, deadline)
    return qemu.probe(found.argv, found.env, deadline)
