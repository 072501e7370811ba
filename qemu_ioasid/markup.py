# SPDX-License-Identifier: GPL-2.0-or-later
"""HTML that nothing put into it can break: every string is escaped, spelled out and bounded."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from xml.etree.ElementTree import Element

from qemu_ioasid.text import cut, visible

#: The longest string, in characters.
STRING = 2000
#: The most lines of a block of text, and the longest of them.
BLOCK_LINES, BLOCK_LINE = 120, 300

Child = Element | str | None


class Markup:
    """Makes the elements of one page, whose text is *budget* characters at most."""

    def __init__(self, budget: int) -> None:
        self._left = budget

    def _take(self, text: str) -> str:
        text = visible(text)
        if len(text) > self._left:
            return "…"
        self._left -= len(text)
        return text

    def __call__(self, tag: str, *children: Child, **attributes: str) -> Element:
        """An element; ``class_`` is its class, an underscore in another name is a dash.

        *title* is text like the children are; other attributes are the page's own and cost
        nothing.
        """
        element = Element(tag)
        for name, value in attributes.items():
            said = self._take(cut(value, STRING)) if name == "title" else visible(value)
            element.set(name.rstrip("_").replace("_", "-"), said)
        for child in children:
            if isinstance(child, str):
                self._text(element, self._take(cut(child, STRING)))
            elif child is not None:
                element.append(child)
        return element

    @staticmethod
    def _text(element: Element, text: str) -> None:
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text

    def block(self, text: str) -> Element:
        """Text as it was laid out; of one that is too long, its beginning and its end."""
        found = text.rstrip("\n").split("\n")
        if len(found) > BLOCK_LINES:
            head, tail = BLOCK_LINES * 2 // 3, BLOCK_LINES // 3
            between = f"… ({len(found) - head - tail} lines left out here)"
            found = [*found[:head], between, *found[-tail:]]
        element = Element("pre")
        element.text = "\n".join(self._take(cut(line, BLOCK_LINE).expandtabs()) for line in found)
        return element


def serialized(root: Element) -> str:
    """The document as text."""
    return (
        "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
    )
