# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a user or an earlier run wrote: of the form wanted, or told with what is wrong."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.shape import Shape, misfit


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None


def told(path: Path, what: str, shape: Shape, schema: int) -> dict[str, Any]:
    """The JSON document *what* in *path*; ConfigurationError when it is none of this schema."""
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not JSON: {error}") from None
    wrong = misfit(document, shape)
    if wrong:
        raise ConfigurationError(f"{path}: not {what}: {wrong}")
    if document["schema"] != schema:
        raise ConfigurationError(f"{path}: schema {document['schema']}; this is for {schema}")
    return dict(document)


def tables(path: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Where each table ``[[name]]`` of the TOML file *path* stands, in words, and the table.

    No file has none. Raises ConfigurationError for a file of anything else.
    """
    if not path.exists():
        return []
    try:
        table = tomllib.loads(_read(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    entries = table.pop(name, [])
    whole = isinstance(entries, list) and all(isinstance(each, dict) for each in entries)
    if table or not whole:
        raise ConfigurationError(f"{path}: holds [[{name}]] tables and nothing else")
    return [(f"{path}: {name} {number}", entry) for number, entry in enumerate(entries, 1)]
