# SPDX-License-Identifier: GPL-2.0-or-later
"""Text that came from a VM, or from a user, as it can be shown: harmless, and not too long."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence


def visible(text: str) -> str:
    """*text* as one line: what would act on a terminal or a page is spelled out (``\\x1b``).

    That is every control and format character, line ends, lone surrogates, and marks that would
    stack on the character before them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() and not unicodedata.category(char).startswith("M")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def lines(text: str) -> list[str]:
    """The lines of *text*, each as `visible` has it; a carriage return does not end one."""
    return [visible(line.expandtabs()) for line in text.rstrip("\n").split("\n")]


def cut(text: str, limit: int) -> str:
    """*text*, or its first *limit* characters and how many follow."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit} characters more)"


def known(name: str, names: Sequence[str]) -> str:
    """What to say to whoever meant one of *names* by *name*: all, or of many those like it."""
    if len(names) <= 12:
        return f"known are {', '.join(names)}"
    like = ", ".join(difflib.get_close_matches(name, names, 3, 0.4))
    return f"there are {len(names)}" + (f", {like} among them" if like else "")
