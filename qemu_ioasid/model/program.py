# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of steps: as text, what the rules say of them, and whether a kernel agrees."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.model.iommufd import EXTENT
from qemu_ioasid.model.rules import Answer, Model

#: The mdevs that programs open, all of one parent.
DEVICES = ("a", "b", "c")
#: What a list holds, in the kernels that the scenario boots.
MAX_PASIDS = 3
#: Of the memory's content, which is the same for every program.
SEED = 1

#: An operation, which is a method of `Model` and of the agent's ``Steps``, and its arguments.
Step = tuple[str, dict[str, Any]]

_CONTENT = random.Random(SEED).randbytes(EXTENT)
_OPERATIONS = {
    name: inspect.signature(method)
    for name, method in inspect.getmembers(Model, inspect.isfunction)
    if inspect.signature(method).return_annotation == "Answer" and name[0] != "_" and name != "step"
}


def fresh(max_pasids: int) -> Model:
    """The model as it is before a program's first step."""
    return Model(_CONTENT, DEVICES, max_pasids)


class Expected(NamedTuple):
    """What a kernel must show after a step."""

    answer: Answer
    pages: dict[int, str]
    lists: dict[str, Any]


class Difference(NamedTuple):
    """Where a kernel first did otherwise: the step's number, and what was expected and seen."""

    step: int
    expected: str
    seen: str


def predict(steps: Sequence[Step], max_pasids: int) -> list[Expected]:
    """What the rules say: one for each step, and one for the end, when all is closed."""
    model = fresh(max_pasids)
    found = []
    for operation, arguments in steps:
        answer = model.step(operation, arguments)
        found.append(Expected(answer, _digests(model.memory.changed()), model.kernel()))
    model.slots.clear()
    return [*found, Expected(Answer("0"), {}, fresh(max_pasids).kernel())]


def _digests(pages: dict[int, bytes]) -> dict[int, str]:
    return {page: hashlib.blake2b(data, digest_size=8).hexdigest() for page, data in pages.items()}


def compare(expected: Sequence[Expected], observed: Sequence[dict[str, Any]]) -> Difference | None:
    """The first step after which a kernel shows something else than must be."""
    lists: dict[str, Any] = {}
    for index, (must, seen) in enumerate(zip(expected, observed, strict=False)):
        pages = {int(page): digest for page, digest in seen.get("pages", {}).items()}
        if "lists" in seen:
            lists = _lists(seen["lists"])
        values = list(must.answer.values)
        if (seen["errno"], seen["values"]) != (_errno(must.answer), values):
            return Difference(index, f"{must.answer.outcome} {values}", _told(seen))
        if pages != must.pages:
            return Difference(index, *_pages(must.pages, pages))
        if lists != must.lists:
            return Difference(index, *_both(must.lists, lists))
    return None


def _errno(answer: Answer) -> str:
    # What a completion says is an answer to a call that returned 0
    name = answer.outcome.split(":")[0]
    return name if name.startswith("E") else "0"


def _told(seen: dict[str, Any]) -> str:
    return f"{seen['errno']} {seen['values']}"


def _pages(must: dict[int, str], seen: dict[int, str]) -> tuple[str, str]:
    differing = [page for page in sorted(must | seen) if must.get(page) != seen.get(page)]
    expected = ", ".join(f"page {page}: {must.get(page, 'unchanged')}" for page in differing)
    return expected, ", ".join(f"page {page}: {seen.get(page, 'unchanged')}" for page in differing)


def _lists(rows: dict[str, Any]) -> dict[str, Any]:
    """The kernel's table and lists as `Model.kernel` has them; a row that is not at rest is odd."""
    found: dict[str, Any] = {}
    for name, each in rows.items():
        found[name] = {row["pasid"]: _row(row) for row in each}
    return found


def _row(row: dict[str, Any]) -> Any:
    if "users" in row:
        return (row["ioas"], row["users"]) if row["state"] == "ready" else row
    return row["ioas"] if (row["state"], row["inflight"]) == ("open", 0) else row


def _both(must: dict[str, Any], seen: dict[str, Any]) -> tuple[str, str]:
    names = [name for name in must if must[name] != seen.get(name)]
    expected = "; ".join(f"{name}: {must[name]}" for name in names)
    return expected, "; ".join(f"{name}: {seen.get(name)}" for name in names)


def load(path: Path) -> list[Step]:
    """The steps in a file; raises as `parse`."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text") from None


def require_hypothesis() -> None:
    """Raise RequirementError where there is no Hypothesis to draw programs with."""
    if importlib.util.find_spec("hypothesis") is None:
        raise RequirementError(
            "scenario model draws its programs with hypothesis: pip install 'qemu_ioasid[model]', "
            "or play one again with --replay FILE, which needs none"
        )


def parse(text: str, path: str) -> list[Step]:
    """The steps of a text, one a line: ``attach_pasid fd=d0 pasid=5 pt_id=2``, ``#`` a comment.

    Raises ConfigurationError, which names *path* and the line.
    """
    steps: list[Step] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        operation, *rest = words
        try:
            if operation not in _OPERATIONS:
                raise ValueError(f"no step {operation}; there are {', '.join(sorted(_OPERATIONS))}")
            arguments = dict(_argument(word) for word in rest)
            _OPERATIONS[operation].bind(None, **arguments)
            _check(arguments)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{path}:{number}: {operation}: {error}") from None
        steps.append((operation, arguments))
    return steps


def _argument(word: str) -> tuple[str, int | str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word}: must be name=value")
    if name in ("fd", "of", "iommufd", "device"):
        return name, value
    return name, int(value, 0)


def _check(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name == "device" and value not in DEVICES:
            raise ValueError(f"device={value}: must be one of {', '.join(DEVICES)}")
        if isinstance(value, int) and not (-(1 << 31) if name == "by" else 0) <= value < 1 << 64:
            raise ValueError(f"{name}={value}: out of range")
    if "at" in arguments and arguments["at"] > EXTENT:
        raise ValueError(f"at={arguments['at']:#x}: the memory ends at {EXTENT:#x}")


def line(step: Step) -> str:
    """A step as text."""
    operation, arguments = step
    words = [f"{name}={_value(name, value)}" for name, value in arguments.items()]
    return " ".join([operation, *words])


def _value(name: str, value: int | str) -> str:
    return hex(value) if isinstance(value, int) and value > 9 else str(value)


def text(steps: Sequence[Step], max_pasids: int, difference: Difference) -> str:
    """Steps as `parse` reads them, each with what must come of it, and where it did not."""
    found = []
    for index, (step, expected) in enumerate(zip(steps, predict(steps, max_pasids), strict=False)):
        found.append(f"{line(step):<72}  # {expected.answer.outcome}")
        if index == difference.step:
            found += [f"#   expected: {difference.expected}", f"#   seen:     {difference.seen}"]
    if difference.step == len(steps):
        found += [f"# closed: {difference.expected}", f"# seen:   {difference.seen}"]
    return "\n".join(found) + "\n"
