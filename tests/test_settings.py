# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/settings.md has the keys that there are, with the defaults that they have."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import config
from qemu_ioasid.config import GuestConfig, HostConfig, Size
from qemu_ioasid.viommu import Viommu

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/settings.md").read_text()
KEYS = dict(re.findall(r"^\| `([\w.-]+)` \| (?:`(.+?)`)? *\| ", PAGE, re.MULTILINE))
TABLES = {"host.": HostConfig, "guest.NAME.": GuestConfig, "": Viommu}


@pytest.mark.parametrize("prefix", TABLES)
def test_every_key_is_told_with_its_default(prefix: str) -> None:
    for field in fields(TABLES[prefix]):
        key = prefix + field.name.replace("_", "-")
        default: Any = field.default
        if default is MISSING:
            assert KEYS[key] == "", key
            continue
        told = tomllib.loads(f"value = {KEYS[key]}")["value"]
        if isinstance(default, Size):
            assert told == f"{default // config.MIB}M" or told == f"{default // config.MIB >> 10}G"
        else:
            assert told == (list(default) if isinstance(default, tuple) else default), key


def test_no_other_key_is_told() -> None:
    there = {
        prefix + field.name.replace("_", "-")
        for prefix, table in TABLES.items()
        for field in fields(table)
    }
    assert set(KEYS) - there == {"mdev.NAME"}


def test_variables_are_those_that_are_read() -> None:
    told = set(re.findall(r"`([A-Z_]{2,})`", PAGE.partition("## The environment")[2]))
    source = "".join(path.read_text() for path in (ROOT / "qemu_ioasid").rglob("*.py"))
    assert set(re.findall(r'environ\.get\("([A-Z_]+)"', source)) - told == {
        "PATH",
        "XDG_CACHE_HOME",
    }
    assert all(f'"{name}"' in source for name in told)
