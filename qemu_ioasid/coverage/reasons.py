# SPDX-License-Identifier: GPL-2.0-or-later
"""Why no test runs a line that the series changed for sure: kernel-patches/unreached.toml."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qemu_ioasid import documents, kernel
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.gcov import Line

FILE = kernel.PATCHES / "unreached.toml"


@dataclass(frozen=True)
class Reason:
    """Why one line of *function* in *file*, whose text is *line*, does not run.

    Of equal lines in a function, each has an entry of its own.
    """

    file: str
    function: str
    line: str
    reason: str

    def of(self, line: Line) -> bool:
        """Whether *line* may be the one."""
        return (self.file, self.function, self.line) == (line.file, line.function, line.text)


def load(path: Path) -> list[Reason]:
    """The file's entries; ConfigurationError names the one that is none."""
    return [_read(entry, where) for where, entry in documents.tables(path, "unreached")]


def _read(entry: dict[str, Any], where: str) -> Reason:
    names = [each.name for each in fields(Reason)]
    if not all(isinstance(each, str) for each in entry.values()):
        raise ConfigurationError(f"{where}: must be a table of strings")
    for name in entry.keys() ^ set(names):
        raise ConfigurationError(f"{where}: {name}: must be given, with {', '.join(names)} alone")
    if not entry["reason"].strip():
        raise ConfigurationError(f"{where}: reason: says nothing")
    return Reason(**entry)
