# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test needs of QEMU, the accelerator and the kernel, in words such as ``pasid-bits=20``."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from qemu_ioasid import viommu
from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.viommu import Viommu

_OPTIONS = {field.name.replace("_", "-"): field for field in fields(Viommu)}
_ACCELERATORS = ("kvm", "tcg")


def unmet(feature: str, parts: HostParts) -> str:
    """Why rigs of *parts* do not have *feature*; empty when they do.

    A *feature* is an option of the virtual IOMMU that the host VM's QEMU must
    offer (``fsts``, ``pasid-bits=20``) or an accelerator. Raises
    ConfigurationError for a word that is neither.
    """
    name, _, text = feature.partition("=")
    if name in _ACCELERATORS and not text:
        return "" if parts.accelerator == name else f"runs under {parts.accelerator}, not {name}"
    if name not in _OPTIONS:
        known = ", ".join([*_ACCELERATORS, *_OPTIONS])
        raise ConfigurationError(f"ioasid_requires: {feature}: unknown; known are {known}")
    try:
        value: Any = _value(name, text)
        wanted = replace(Viommu(), **{_OPTIONS[name].name: value})
        # What an option needs beside it is the rig's affair; a number may be out of range.
        if not isinstance(value, bool):
            viommu.check(wanted, "ioasid_requires", assigned=False)
        wanted.device(parts.qemu.viommu)
    except RequirementError as error:
        return f"QEMU {parts.qemu.version}: {error.message}"
    return ""


def _value(name: str, text: str) -> bool | int:
    default = getattr(Viommu(), _OPTIONS[name].name)
    if isinstance(default, bool):
        if text not in ("", "true", "false"):
            raise ConfigurationError(f"ioasid_requires: {name}={text}: must be true or false")
        return text != "false"
    if not text.isdecimal():
        raise ConfigurationError(f"ioasid_requires: {name}={text}: must be a number")
    return int(text)
