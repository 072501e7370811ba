# SPDX-License-Identifier: GPL-2.0-or-later
"""A terminal as far as `qemu_ioasid.terminal` uses one: what a person would see on it."""

from __future__ import annotations

import re

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def screen(written: str) -> list[str]:
    """The lines that *written* leaves; anything but text, colours, \\r and \\n is an error."""
    rows: list[list[str]] = [[]]
    column = 0
    for char in COLOUR.sub("", written):
        if char == "\n":
            rows.append([])
            column = 0
        elif char == "\r":
            column = 0
        else:
            assert char.isprintable(), repr(char)
            rows[-1][column : column + 1] = [char]
            column += 1
    return ["".join(row).rstrip() for row in rows]
