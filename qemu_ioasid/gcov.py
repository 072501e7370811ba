# SPDX-License-Identifier: GPL-2.0-or-later
"""How often the lines that a series changed ran in a host VM: coverage.json of its run.

The kernel's counts (gcda) and what gcc noted of its objects (gcno) make sense together only, to the
gcov of that gcc: its JSON (``man gcov``, --json-format) is what is read here.
"""

from __future__ import annotations

import binascii
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

from qemu_ioasid import documents, process
from qemu_ioasid.client import Agent
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError, ProcessFailed
from qemu_ioasid.kernel import Kernel
from qemu_ioasid.kernel import gcov as notes

FILE = "coverage.json"
SCHEMA = 1
#: For the counts to come and gcov to read them, in seconds of the reference machine.
SECONDS = 60.0
#: The longest data of one object, in bytes: what a VM says has an end.
LONGEST = 16 << 20
#: What gcov says of data that is of another build, another gcc's, or none (gcc/gcov.cc).
_UNFIT = re.compile(r"mismatch|, prefer|corrupted|overflowed|not a gcov|cannot open (?!data)")
_SHAPE = {
    "schema": int,
    "kernel": {"hash": str, "release": str, "source": str},
    "patches": [str],
    "missing": [str],
    "lines": [
        {
            **dict.fromkeys(["patch", "file", "text", "function"], str),
            "number": int,
            "count": int,
            "branches": [int],
        }
    ],
}


@dataclass
class Line:
    """A line that *patch* was the last to change and that has code.

    *function*: empty where gcc does not tell. *count*: how often it ran; *branches*: how often each
    of the ways on from it was taken.
    """

    patch: str
    file: str
    number: int
    text: str
    function: str
    count: int
    branches: list[int]


@dataclass
class Coverage:
    """Of one kernel and its series, after one run or several."""

    #: Its hash, release and source.
    kernel: dict[str, str]
    #: The names of the patches, in order.
    patches: list[str]
    #: Files that the series changes, and that no object of this kernel was compiled from.
    missing: list[str]
    lines: list[Line]
    schema: int = field(default=SCHEMA)

    def in_series(self) -> list[Line]:
        """The lines by patch, in the series' order, by file and number."""
        order = {patch: number for number, patch in enumerate(self.patches)}
        return sorted(self.lines, key=lambda line: (order[line.patch], line.file, line.number))

    def write(self, folder: Path) -> None:
        """Write coverage.json into *folder*, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def add(self, other: Coverage) -> None:
        """Add the counts of another run; raises ConfigurationError when its kernel is another."""
        if other.kernel != self.kernel or other._lines() != self._lines():
            both = " and ".join(
                f"{each['source']} {each['hash']}" for each in (self.kernel, other.kernel)
            )
            raise ConfigurationError(f"coverage of {both}: counts of one kernel are added")
        for mine, its in zip(self.lines, other.lines, strict=True):
            mine.count += its.count
            mine.branches = [sum(both) for both in zip(mine.branches, its.branches, strict=True)]

    def _lines(self) -> list[tuple[str, int, int]]:
        return [(line.file, line.number, len(line.branches)) for line in self.lines]


def load(path: Path) -> Coverage:
    """The file *path*; ConfigurationError when it is none of this schema."""
    document = documents.told(path, f"of {FILE}", _SHAPE, SCHEMA)
    names = [each.name for each in fields(Line)]
    lines = [Line(*map(line.get, names)) for line in document["lines"]]
    return Coverage(document["kernel"], document["patches"], document["missing"], lines)


def collect(agent: Agent, counting: Kernel) -> Coverage:
    """What the kernel of *agent*'s host VM, *counting*, has counted since it was booted.

    Raises RigError, also where what the VM says is no such data.
    """
    deadline = Deadline(SECONDS, f"counts of the kernel of {agent.name}")
    told: dict[str, Any] = agent.call("gcov", deadline=deadline)["files"]
    changed = {(line.file, line.number): line for line in notes.load(counting.gcov)}
    files = {file for file, _ in changed}
    compiled: set[str] = set()
    found: dict[tuple[str, int], Line] = {}
    for note in sorted(counting.gcov.rglob("*.gcno")):
        object_path = note.relative_to(counting.gcov).with_suffix(".gcda")
        for each in _read(note, _data(object_path, told), deadline):
            # As gcc was told it: behind the folder of the source.
            name = next((file for file in files if f"/{each['file']}".endswith(f"/{file}")), "")
            compiled.add(name)
            for line in each["lines"]:
                if at := changed.get((name, line["line_number"])):
                    _add(found, at, line)
    return Coverage(
        {"hash": counting.hash, "release": counting.release, "source": counting.source},
        counting.series,
        sorted(file for file in files - compiled if file.endswith(".c")),
        [found[at] for at in sorted(found)],
    )


def _data(object_path: PurePath, told: Mapping[str, object]) -> bytes | None:
    """The counts of an object, whose path stands behind that of the build folder.

    None: there are none, as of a module that was never loaded.
    """
    end = f"/{object_path}"
    for packed in (data for path, data in told.items() if f"/{path}".endswith(end)):
        try:
            return zlib.decompressobj().decompress(binascii.a2b_base64(str(packed)), LONGEST)
        except (ValueError, zlib.error) as error:
            raise InfrastructureError(f"counts of {object_path}: {error}") from None
    return None


def _read(note: Path, data: bytes | None, deadline: Deadline) -> list[dict[str, Any]]:
    """What gcov says of the files that one object was compiled from."""
    with tempfile.TemporaryDirectory(dir=process.current_run().folder) as scratch:
        folder = Path(scratch)
        shutil.copy(note, folder)
        subject = folder / note.name
        if data is not None:
            subject = subject.with_suffix(".gcda")
            subject.write_bytes(data)
        argv = ["gcov", "--json-format", "--branch-probabilities", subject.name]
        said, wrong = "", ""
        try:
            said = process.run(argv, deadline=deadline, cwd=folder, env={"LC_ALL": "C"})
            (made,) = folder.glob("*.gcov.json.gz")
            files: list[dict[str, Any]] = json.loads(gzip.decompress(made.read_bytes()))["files"]
        except ProcessFailed as failed:
            said, wrong = failed.evidence, failed.said
        except (ValueError, OSError, KeyError, EOFError) as error:
            wrong = f"gcov has made no JSON: {error}"
        # There are versions that then take all counts for 0, and end well.
        wrong = next(filter(_UNFIT.search, said.splitlines()), wrong)
        if wrong:
            raise InfrastructureError(f"counts of {note.stem}: {wrong}", evidence=said)
        return files


def _add(found: dict[tuple[str, int], Line], at: notes.Line, told: dict[str, Any]) -> None:
    """Add to *found* what is *told* of the line *at*, by one object of several, or one function."""
    new = Line(**asdict(at), function="", count=0, branches=[])
    line = found.setdefault((at.file, at.number), new)
    line.function = line.function or told.get("function_name", "")
    line.count += told["count"]
    line.branches += [branch["count"] for branch in told["branches"]]
