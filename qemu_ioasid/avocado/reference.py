# SPDX-License-Identifier: GPL-2.0-or-later
"""A test reference: a rig file or a scenario file, and after a colon one of its checks.

A scenario file (``*.ioasid``) is TOML with three keys, all optional:
``scenario``, ``rig`` (a path from the file's own folder) and ``checks``.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from qemu_ioasid import config, scenarios
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.scenarios import table

SUFFIXES = (".toml", ".ioasid")


@dataclass(frozen=True)
class Reference:
    """What a reference names. *checks* are all that it stands for, in the scenario's order."""

    file: Path
    scenario: str
    rig: Path
    checks: tuple[str, ...]


def split(text: str) -> tuple[Path, str]:
    """The file of a reference, and the check or an empty string."""
    if not Path(text).exists():
        path, colon, check = text.rpartition(":")
        if colon:
            return Path(path), check
    return Path(text), ""


def read(text: str, scenario: str) -> Reference | None:
    """What *text* names; None when it is no file of ours.

    *scenario* is that of a file which names none. Raises ConfigurationError for
    one that is wrong, and for a check that there is not.
    """
    file, check = split(text)
    if file.suffix not in SUFFIXES or not file.is_file():
        return None
    try:
        written = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{file}: {error}") from None
    if file.suffix == ".ioasid":
        found = _scenario_file(file, written, scenario)
    elif written.keys() & {"host", "mdev", "guest"}:
        found = Reference(file, scenario, file, ())
    else:
        return None
    rows = scenarios.find(found.scenario).rows(config.load(found.rig))
    wanted = (check,) if check else found.checks
    return replace(found, checks=tuple(row.name for row in table.choose(rows, wanted)))


def _scenario_file(file: Path, written: dict[str, object], scenario: str) -> Reference:
    name = written.pop("scenario", scenario)
    rig = written.pop("rig", None)
    checks = written.pop("checks", [])
    if written:
        raise ConfigurationError(
            f"{file}: {next(iter(written))}: unknown key; known are checks, rig, scenario"
        )
    if not isinstance(name, str) or not isinstance(rig, str | None):
        raise ConfigurationError(f"{file}: scenario and rig must be strings")
    if not isinstance(checks, list) or not all(isinstance(each, str) for each in checks):
        raise ConfigurationError(f"{file}: checks: must be a list of strings")
    path = config.DEFAULT if rig is None else file.parent / rig
    return Reference(file, name, path, tuple(checks))
