# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutants: small sabotages of the series, each a patch on top of it, that the suite must catch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from qemu_ioasid import text
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import PATCHES

FOLDER = PATCHES / "mutants"
#: The patch that changes nothing: a suite that kills it proves nothing about the others.
CONTROL = "harmless"

_SUBJECT = re.compile(r"^Subject: (?:\[[^]]*\] *)?(.+)$", re.MULTILINE)
_DIFF = ("diff ", "--- ", "Index: ", "From ")


class Mutant(NamedTuple):
    """*breaks* says in one line what is wrong with it."""

    name: str
    breaks: str
    patch: Path

    @property
    def control(self) -> bool:
        """Whether it must survive."""
        return self.patch == FOLDER / f"{CONTROL}.patch"


def read(patch: Path) -> Mutant:
    """The mutant in the file *patch*: its first line, or a mail's subject, is what it breaks.

    Raises ConfigurationError when it cannot be read.
    """
    try:
        text = patch.read_text(errors="replace")
    except OSError as error:
        raise ConfigurationError(f"mutant {patch}: {error.strerror}") from None
    subject = _SUBJECT.search(text)
    first = subject[1] if subject else text.partition("\n")[0].strip()
    return Mutant(patch.stem, patch.name if first.startswith(_DIFF) else first, patch.absolute())


def every() -> list[Mutant]:
    """Those of `FOLDER`, by name, the control first."""
    found = [read(path) for path in sorted(FOLDER.glob("*.patch"))]
    return sorted(found, key=lambda mutant: not mutant.control)


def find(word: str) -> Mutant:
    """The mutant of that name, or in the file of that name; raises ConfigurationError."""
    path = FOLDER / f"{word}.patch"
    if path.is_file():
        return read(path)
    if not Path(word).is_file():
        said = text.known(word, [mutant.name for mutant in every()])
        raise ConfigurationError(f"mutant {word}: no patch file, and none of {FOLDER}: {said}")
    return read(Path(word))
