# SPDX-License-Identifier: GPL-2.0-or-later
"""The rig file: what a rig is made of, checked whole before anything starts."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from qemu_ioasid import viommu
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.viommu import Viommu

DEFAULT = Path(__file__).with_name("default.toml")

MIB = 1 << 20
#: A guest's RAM stays below q35's hole under 4 GiB: an address is an offset in its RAM file.
MAX_GUEST_MEMORY = 2048 * MIB
#: More than any machine has for a rig; beyond some size no file can be made so large.
MAX_HOST_MEMORY = 1024 * 1024 * MIB
#: What the host VM needs beside its guests' memory.
HOST_OVERHEAD = 256 * MIB
MIN_GUEST_MEMORY = 96 * MIB
#: PCI slots 0x10 to 0x1e: q35 has its own devices below and above.
MAX_MDEVS = 15

_NAME = re.compile(r"[a-z][a-z0-9-]{0,14}\Z")
_SIZE = re.compile(r"([1-9][0-9]*)([MG])\Z")

_NONE: Mapping[str, str] = MappingProxyType({})

T = TypeVar("T")


class Size(int):
    """Bytes, written ``"256M"`` or ``"2G"`` in the rig file."""


_HOST_MEMORY = Size(1024 * MIB)
_GUEST_MEMORY = Size(160 * MIB)


@dataclass(frozen=True)
class HostConfig:
    """The host VM. *cpus* 0: as many as help and hold, see `hostvm.cpus`."""

    cpus: int = 0
    memory: Size = _HOST_MEMORY
    viommu: Viommu = field(default_factory=Viommu)


@dataclass(frozen=True)
class MdevConfig:
    """One mediated device on the parent ``pdma``; it has no options yet."""


@dataclass(frozen=True)
class GuestConfig:
    """One guest VM inside the host VM, and the mdevs that are its."""

    cpus: int = 1
    memory: Size = _GUEST_MEMORY
    mdevs: tuple[str, ...] = ()
    viommu: Viommu = field(default_factory=Viommu)


@dataclass(frozen=True)
class RigConfig:
    """A whole rig. *text* is the file it was read from, *path* its name in messages."""

    host: HostConfig
    mdevs: dict[str, MdevConfig]
    guests: dict[str, GuestConfig]
    path: str
    text: str

    @property
    def spare(self) -> list[str]:
        """The mdevs that no guest has."""
        owned = {mdev for guest in self.guests.values() for mdev in guest.mdevs}
        return [mdev for mdev in self.mdevs if mdev not in owned]


def load(path: Path, changes: Mapping[str, str] = _NONE) -> RigConfig:
    """Read and check a rig file; raises ConfigurationError naming file, key and reason.

    *changes* are laid over the file first: ``host.viommu.fsts`` to ``true``, as TOML writes it
    (a bare word is a string); ``*`` in place of a name means every one: ``guest.*.memory``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text") from None
    return parse(text, str(path), changes)


def parse(text: str, path: str, changes: Mapping[str, str] = _NONE) -> RigConfig:
    """As `load`, of *text*; *path* is used in messages only."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    where = path
    for key, value in changes.items():
        where += f" with {key}={value}"
        kind, _, name = key.partition(".")
        name = name.partition(".")[0]
        # One that only a misspelt name has made would be booted.
        if kind in ("mdev", "guest") and name not in ("*", *table.get(kind, ())):
            raise ConfigurationError(f"{path}: {key}: no {kind} {name} in this file")
        _change(table, key.split("."), _plain(value), f"{path}: {key}")
        text += f"\n# changed: {key} = {value!r}\n"
    _no_other_keys(table, {"host", "mdev", "guest"}, where)
    rig = RigConfig(
        host=_read(HostConfig, table.get("host", {}), f"{where}: host"),
        mdevs=_read_named(MdevConfig, table.get("mdev", {}), f"{where}: mdev"),
        guests=_read_named(GuestConfig, table.get("guest", {}), f"{where}: guest"),
        path=path,
        text=text,
    )
    _check(rig)
    return rig


def shape(
    guests: Mapping[str, Sequence[str]],
    mdevs: Sequence[str] = (),
    changes: Mapping[str, str] = _NONE,
) -> RigConfig:
    """A rig of default options: *guests* by name with their mdevs, and *mdevs* that are nobody's.

    *changes* and what is raised: as `load`.
    """
    lines = []
    for name in dict.fromkeys([*mdevs, *(mdev for owned in guests.values() for mdev in owned)]):
        lines.append(f"[mdev.{name}]")
    for name, owned in guests.items():
        lines += [f"[guest.{name}]", f"mdevs = {json.dumps(list(owned))}"]
        lines += [f"[guest.{name}.viommu]", "pasid-bits = 20", "caching-mode = true"]
    need = HOST_OVERHEAD + len(guests) * _GUEST_MEMORY
    if need > _HOST_MEMORY:
        lines += ["[host]", f'memory = "{need // MIB}M"']
    return parse("\n".join(lines) + "\n", "rig", changes)


def _plain(text: str) -> Any:
    with contextlib.suppress(tomllib.TOMLDecodeError):
        found = tomllib.loads(f"value = {text}")
        if list(found) == ["value"]:
            return found["value"]
    return text


def _change(table: Any, keys: list[str], value: Any, where: str) -> None:
    if not isinstance(table, dict):
        raise ConfigurationError(f"{where}: no such key")
    first, *rest = keys
    for key in list(table) if first == "*" else [first]:
        if rest:
            _change(table.setdefault(key, {}), rest, value, where)
        else:
            table[key] = value


def _no_other_keys(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            separator = ": " if ": " not in where else "."
            raise ConfigurationError(
                f"{where}{separator}{key}: unknown key; known are {', '.join(sorted(known))}"
            )


def _read_named(cls: type[T], table: Any, where: str) -> dict[str, T]:
    if not isinstance(table, dict):
        raise ConfigurationError(f"{where}: must be a table")
    for name in table:
        if not _NAME.match(name):
            raise ConfigurationError(
                f"{where}.{name}: a name is a letter, then letters, digits or dashes, 15 at most"
            )
    return {name: _read(cls, value, f"{where}.{name}") for name, value in table.items()}


def _read(cls: type[T], table: Any, where: str) -> T:
    assert is_dataclass(cls)
    if not isinstance(table, dict):
        raise ConfigurationError(f"{where}: must be a table")
    hints = typing.get_type_hints(cls)
    known = {f.name.replace("_", "-"): f for f in fields(cls)}
    _no_other_keys(table, set(known), where)
    values: dict[str, Any] = {}
    for key, spec in known.items():
        if key in table:
            values[spec.name] = _value(hints[spec.name], table[key], f"{where}.{key}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigurationError(f"{where}.{key}: missing")
    return typing.cast(T, cls(**values))


def _value(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _read(typing.cast(type[Any], kind), value, where)
    if kind is Size:
        match = _SIZE.match(value) if isinstance(value, str) else None
        if match is None:
            raise ConfigurationError(f'{where}: must be a size such as "256M" or "2G"')
        return Size(int(match[1]) * (MIB if match[2] == "M" else 1024 * MIB))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigurationError(f"{where}: must be a list of strings")
        return tuple(value)
    names = {bool: "true or false", int: "a whole number", str: "a string"}
    if type(value) is not kind:
        raise ConfigurationError(f"{where}: must be {names[kind]}")
    return value


def _check(rig: RigConfig) -> None:
    owner: dict[str, str] = {}
    for name, guest in rig.guests.items():
        where = f"{rig.path}: guest.{name}"
        if name == "host":
            raise ConfigurationError(f"{where}: host is the host VM's name")
        if len(guest.mdevs) > MAX_MDEVS:
            raise ConfigurationError(f"{where}.mdevs: at most {MAX_MDEVS} fit on its PCI bus")
        for mdev in guest.mdevs:
            if mdev not in rig.mdevs:
                raise ConfigurationError(f"{where}.mdevs: no mdev {mdev} in this file")
            if mdev in owner:
                raise ConfigurationError(f"{where}.mdevs: {mdev} is guest {owner[mdev]}'s already")
            owner[mdev] = name
        if not MIN_GUEST_MEMORY <= guest.memory <= MAX_GUEST_MEMORY or guest.memory % (2 * MIB):
            raise ConfigurationError(f"{where}.memory: must be from 96M to 2G, and even")
        _check_cpus(guest.cpus, where)
        viommu.check(guest.viommu, f"{where}.viommu", assigned=bool(guest.mdevs))
    if rig.host.cpus:
        _check_cpus(rig.host.cpus, f"{rig.path}: host")
    viommu.check(rig.host.viommu, f"{rig.path}: host.viommu", assigned=False)
    need = HOST_OVERHEAD + sum(guest.memory for guest in rig.guests.values())
    if rig.host.memory > MAX_HOST_MEMORY:
        raise ConfigurationError(f"{rig.path}: host.memory: must be at most 1024G")
    if rig.host.memory < need:
        raise ConfigurationError(
            f"{rig.path}: host.memory: {rig.host.memory // MIB}M is too little for these guests, "
            f'which take {need // MIB}M with the host\'s own; write "{need // MIB}M" or more'
        )


def _check_cpus(cpus: int, where: str) -> None:
    if not 1 <= cpus <= 64:
        raise ConfigurationError(f"{where}.cpus: must be from 1 to 64")
