# SPDX-License-Identifier: GPL-2.0-or-later
"""What the same tests are run over: kernels x QEMUs x modes of the virtual IOMMUs, from a file.

::

    [kernel.default]
    [kernel.debug]
    profile = "debug"           # or name = "debian:7.3", series = "DIR"
    [qemu.private]
    program = "private"         # as --qemu
    [viommu.second-stage]
    [viommu.first-stage]
    "host.viommu.fsts" = true   # laid over the rig, as --set does

A part that is not there has one value: what the rig and the options say.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.session import Options

_KEYS: dict[str, dict[str, type]] = {
    "kernel": {"profile": str, "name": str, "series": str},
    "qemu": {"program": str},
    # Any key of the rig file.
    "viommu": {},
}


@dataclass(frozen=True)
class Variant:
    """One combination; *name* is made of the names in the file."""

    name: str
    kernel: dict[str, Any] = field(default_factory=dict)
    qemu: dict[str, Any] = field(default_factory=dict)
    viommu: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    def options(self, given: Options) -> Options:
        """*given*, with this kernel, this QEMU and these changes of the rig."""
        spec = given.kernel
        if "profile" in self.kernel:
            spec = replace(spec, profile=self.kernel["profile"])
        name, series = (self.kernel.get(key, "") for key in ("name", "series"))
        spec = spec.naming(name, series, Path(self.where).parent)
        changes = {key: json.dumps(value) for key, value in self.viommu.items()}
        return replace(
            given,
            kernel=spec,
            qemu=self.qemu.get("program", given.qemu),
            changes={**given.changes, **changes},
        )


def load(path: Path) -> list[Variant]:
    """All combinations; raises ConfigurationError naming file, key and reason."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    for part, values in table.items():
        if part not in _KEYS:
            raise ConfigurationError(f"{path}: {part}: unknown; known are {', '.join(_KEYS)}")
        _check(values, _KEYS[part], f"{path}: {part}")
    parts = [list(table.get(part, {"": {}}).items()) for part in _KEYS]
    return [
        Variant(
            "-".join(name for name, _ in chosen if name) or "default",
            **dict(zip(_KEYS, (values for _, values in chosen), strict=True)),
            where=str(path),
        )
        for chosen in itertools.product(*parts)
    ]


def _check(values: Any, known: dict[str, type], where: str) -> None:
    if not isinstance(values, dict) or not values:
        raise ConfigurationError(f"{where}: must hold a table for each value")
    for name, value in values.items():
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where}.{name}: must be a table")
        for key, given in value.items():
            if not known:
                continue
            if key not in known:
                raise ConfigurationError(
                    f"{where}.{name}.{key}: unknown key; known are {', '.join(known)}"
                )
            if not isinstance(given, known[key]):
                raise ConfigurationError(f"{where}.{name}.{key}: must be a string")
