# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that are known to fail, by the kernel's version: kernel-patches/selftests/expected.toml."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qemu_ioasid import documents, kernel
from qemu_ioasid.errors import ConfigurationError

FILE = kernel.PATCHES / "selftests" / "expected.toml"

Version = tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """A failure that is no news.

    *test* is a shell glob of whole names, *mode* one of `targets.MODES`, "" for all. It holds from
    the version *since* to before *until*, "" for ever; *link* is a commit, or where it is told.
    *sometimes*: it may pass as well.
    """

    test: str
    reason: str
    link: str
    mode: str = ""
    since: str = ""
    until: str = ""
    sometimes: bool = False

    def holds(self, release: Version) -> bool:
        """Whether it is of a kernel of that version."""
        if self.since and release < version(self.since):
            return False
        return not self.until or release < version(self.until)


def version(text: str) -> Version:
    """``7.2.12-rc1`` as numbers to be compared: those before the first that is none."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def load(path: Path = FILE) -> list[Expected]:
    """The file's entries; ConfigurationError names the one that is none."""
    return [_read(entry, where) for where, entry in documents.tables(path, "failure")]


def _read(entry: dict[str, Any], where: str) -> Expected:
    kinds = {each.name: bool if each.name == "sometimes" else str for each in fields(Expected)}
    for name, value in entry.items():
        if name not in kinds:
            raise ConfigurationError(f"{where}: {name}: unknown; known are {', '.join(kinds)}")
        if type(value) is not kinds[name]:
            raise ConfigurationError(f"{where}: {name}: must be a {kinds[name].__name__}")
    for name in ("test", "reason", "link"):
        if not entry.get(name):
            raise ConfigurationError(f"{where}: {name}: missing")
    for name in ("since", "until"):
        if entry.get(name) and not version(entry[name]):
            raise ConfigurationError(f"{where}: {name}: {entry[name]} is no version")
    return Expected(**entry)


def find(entries: Sequence[Expected], test: str, mode: str, release: str) -> Expected | None:
    """The entry that a failure of *test* is expected by."""
    for entry in entries:
        named = entry.mode in ("", mode) and fnmatch.fnmatchcase(test, entry.test)
        if named and entry.holds(version(release)):
            return entry
    return None
