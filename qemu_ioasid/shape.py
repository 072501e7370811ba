# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a JSON document is of a shape: what comes from elsewhere is looked at before use."""

from __future__ import annotations

from typing import Any

#: A type; a list of one shape; or an object: a shape by key, "?" ends the keys that may be missing.
#: ``float`` is a number of seconds.
Shape = Any


def misfit(value: Any, shape: Shape, where: str = "") -> str | None:
    """What keeps *value* from having the *shape*; *where* it stands in the document."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where or 'it'} must be a list"
        found = (misfit(each, shape[0], f"{where}[{n}]") for n, each in enumerate(value))
        return next(filter(None, found), None)
    if isinstance(shape, dict):
        if where == "error" and value is None:
            return None
        if not isinstance(value, dict):
            return f"{where or 'it'} must be an object"
        for key, inner in shape.items():
            name = key.removesuffix("?")
            place = f"{where}.{name}".removeprefix(".")
            if name not in value and not key.endswith("?"):
                return f"{place} is missing"
            if name in value and (wrong := misfit(value[name], inner, place)):
                return wrong
        return None
    if shape is float:
        fits = isinstance(value, int | float) and 0 <= value < 1e9
        return None if fits else f"{where} must be seconds"
    return None if isinstance(value, shape) else f"{where or 'it'} must be {shape}"
