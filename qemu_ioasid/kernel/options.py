# SPDX-License-Identifier: GPL-2.0-or-later
"""Config fragments: what is asked of Kconfig, and whether it was granted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid.errors import ConfigurationError

_SET = re.compile(r"(CONFIG_\w+)=(.+)")
_DEPENDS = re.compile(r"^[ \t]+depends on (.+)$", re.MULTILINE)
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")
#: What an option was called before, which is asked for and granted with it (7.3: fs/proc/Kconfig).
_BEFORE = {"CONFIG_SYSCTL": "CONFIG_PROC_SYSCTL"}


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
    for name, before in _BEFORE.items():
        if name in found:
            found.setdefault(before, found[name])
    return found


def read(fragments: Iterable[Path], last_word: Path | None = None) -> list[Option]:
    """All requests in *fragments*; where *last_word*, one of them, contradicts another, its own.

    Raises ConfigurationError for a line that is no request, or when two
    others contradict each other.
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
            if other.value != value and fragment == last_word:
                options[name] = Option(name, value, fragment)
            elif other.value != value and other.fragment != last_word:
                raise ConfigurationError(
                    f"{fragment}: {name}={value}, but {other.fragment.name} wants {other.value}"
                )
    return list(options.values())


class NotGranted(ConfigurationError):
    """This kernel's Kconfig does not grant what is asked for."""


def laid_over(ours: Iterable[Option], own: Iterable[Option]) -> list[Option]:
    """*ours*, but what the user's *own* fragments ask for as they have it."""
    return list({option.name: option for option in (*ours, *own)}.values())


def check(asked: Iterable[Option], config: str, kconfigs: Iterable[Path] = ()) -> None:
    """Raises NotGranted when *config* (the text of .config) grants less than *asked*.

    The message names each option with its fragment and, by *kconfigs*, what it depends on that is
    not met: a misspelt name and a missing dependency look alike in a .config.
    """
    granted = parse(config)
    refused = [option for option in asked if granted.get(option.name, "n") != option.value]
    if refused:
        texts = [path.read_text(errors="replace") for path in kconfigs if path.is_file()]
        raise NotGranted(
            "kernel config: "
            + "; ".join(
                f"{option.fragment.name}: {option.name}={option.value} became "
                f"{granted.get(option.name, 'n')} ({_why(option.name, granted, texts)})"
                for option in refused
            )
        )


def _why(name: str, granted: Mapping[str, str], texts: Iterable[str]) -> str:
    """What Kconfig has against an option."""
    symbol = name.removeprefix("CONFIG_")
    entry = re.compile(rf"^(?:menu)?config {symbol}\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
    bodies = [match[1] for text in texts for match in entry.finditer(text)]
    if not bodies:
        return "this kernel has no such option"
    wanted = [each for body in bodies for each in _DEPENDS.findall(body.replace("\\\n", " "))]
    for expression in wanted:
        missing = [
            each
            for each in dict.fromkeys(re.findall(r"!?\b[A-Z][A-Z0-9_]+\b", expression))
            if (granted.get(f"CONFIG_{each.lstrip('!')}", "n") == "n") != each.startswith("!")
        ]
        if missing:
            what = ", ".join(
                f"{each[1:]} is set" if each.startswith("!") else f"{each} is not set"
                for each in missing
            )
            return f"depends on {' '.join(expression.split())}: {what}"
    return "what it depends on is met: another option selects or limits it"
