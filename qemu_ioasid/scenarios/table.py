# SPDX-License-Identifier: GPL-2.0-or-later
"""A scenario's checks as a table, known from the rig file before anything boots."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from qemu_ioasid import text
from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import ConfigurationError

Act = TypeVar("Act", bound=Callable[..., None])


class Row(NamedTuple):
    """A check: its phase, its name, what is tried, and the method that tries it.

    *act* is called with the scenario, the trial and *arguments*.
    """

    phase: str
    name: str
    tried: str
    act: Callable[..., None]
    arguments: tuple[str, ...] = ()

    @property
    def each(self) -> str:
        """What the name counts over: ``vm``, ``guest``, ``device`` or nothing."""
        found = re.search(r"{(vm|guest|device)}", self.name)
        return found[1] if found else ""


class Table:
    """A scenario's rows, in the order of the methods that are decorated."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def phase(self, phase: str) -> Callable[[str, str], Callable[[Act], Act]]:
        """The decorator that enters a method as ``(name, tried)`` of *phase*.

        The method brings about all it needs: it may be the only one made on a rig. *name* and
        *tried* are format strings over the parts that `rows` is given. One whose name has
        ``{vm}``, ``{guest}`` or ``{device}`` (with its ``{guest}``) is made for each of them and
        called with the name of it; neighbours of a kind take turns.
        """

        def check(name: str, tried: str) -> Callable[[Act], Act]:
            def enter(act: Act) -> Act:
                self._rows.append(Row(phase, name, tried, act))
                return act

            return enter

        return check

    def rows(self, config: RigConfig, parts: Mapping[str, str]) -> list[Row]:
        """The checks on the rig *config*; *parts* are the guests and mdevs that have a part."""
        owners = {device: name for name, guest in config.guests.items() for device in guest.mdevs}
        turns: dict[str, list[dict[str, str]]] = {
            "": [{}],
            "vm": [{"vm": name} for name in ("host", *config.guests)],
            "guest": [{"guest": name} for name in config.guests],
            "device": [{"device": device, "guest": guest} for device, guest in owners.items()],
        }
        return [
            row._replace(
                name=row.name.format(**parts, **turn),
                tried=row.tried.format(**parts, **turn),
                arguments=(turn[each],) if each else (),
            )
            for (_, each), group in itertools.groupby(self._rows, lambda row: (row.phase, row.each))
            for neighbours in [list(group)]
            for turn in turns[each]
            for row in neighbours
        ]


def crossed(
    phase: str,
    name: str,
    tried: str,
    act: Callable[..., None],
    cases: Mapping[str, str],
    devices: Sequence[str],
) -> list[Row]:
    """A row for each case and device, whose *act* is called with the names of both.

    *name* and *tried* are format strings over ``device`` and ``case``, which is the case's name
    in one and what *cases* says of it in the other.
    """
    return [
        Row(
            phase,
            name.format(device=device, case=case),
            tried.format(device=device, case=said),
            act,
            (device, case),
        )
        for case, said in cases.items()
        for device in devices
    ]


def choose(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these *names*, in the table's order; without a name, all.

    Raises ConfigurationError for a name that no row has.
    """
    there = [row.name for row in rows]
    for name in names:
        if name not in there:
            said = text.known(name, there)
            raise ConfigurationError(
                f"check {name}: unknown; {said} (qemu-ioasid run SCENARIO --list)"
            )
    return [row for row in rows if row.name in names or not names]
