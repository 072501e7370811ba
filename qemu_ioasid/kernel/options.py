# SPDX-License-Identifier: GPL-2.0-or-later
"""Config fragments: what is asked of Kconfig, and whether it was granted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid.errors import ConfigurationError

_SET = re.compile(r"(CONFIG_\w+)=(.+)")
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")


@dataclass(frozen=True)
class Option:
    """One request: *value* as .config spells it, ``n`` for "is not set"."""

    name: str
    value: str
    fragment: Path


def parse(text: str) -> dict[str, str]:
    """Option to value of a .config or a fragment; raises ValueError naming a line of neither."""
    found = {}
    for line in text.splitlines():
        match = _SET.fullmatch(line.strip())
        if match:
            found[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line.strip()):
            found[match[1]] = "n"
        elif line.strip() and not line.startswith("#"):
            raise ValueError(line.strip())
    return found


def read(fragments: Iterable[Path]) -> list[Option]:
    """All requests in *fragments*.

    Raises ConfigurationError for a line that is no request, or when two
    fragments contradict each other.
    """
    options: dict[str, Option] = {}
    for fragment in fragments:
        try:
            found = parse(fragment.read_text())
        except OSError as error:
            raise ConfigurationError(f"{fragment}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigurationError(f"{fragment}: not a config line: {error}") from None
        for name, value in found.items():
            other = options.setdefault(name, Option(name, value, fragment))
            if other.value != value:
                raise ConfigurationError(
                    f"{fragment}: {name}={value}, but {other.fragment.name} wants {other.value}"
                )
    return list(options.values())


class NotGranted(ConfigurationError):
    """This kernel's Kconfig does not grant what is asked for."""


def check(asked: Iterable[Option], config: str) -> None:
    """Raises NotGranted when *config* (the text of .config) grants less than *asked*.

    The message names each option with its fragment: a misspelt name and a
    missing dependency look alike here.
    """
    granted = parse(config)
    refused = [
        f"{option.fragment.name}: {option.name}={option.value} became "
        + granted.get(option.name, "n (unknown here, or what it depends on is not set)")
        for option in asked
        if granted.get(option.name, "n") != option.value
    ]
    if refused:
        raise NotGranted("kernel config: " + "; ".join(refused))
