# SPDX-License-Identifier: GPL-2.0-or-later
"""What an edit of the kernel costs: a file with a line more, from the build to a verdict."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from qemu_ioasid import cache, kernel, runs, tried
from qemu_ioasid.bench.table import Measurement, Values
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError
from qemu_ioasid.kernel import tree
from qemu_ioasid.session import BUILD_SECONDS, Output

SCENARIO = "isolation"


class Edits:
    """Files of a kernel's source, one line of which is another one for each run.

    *words* are added to the runs, whose reports go to *folder*.
    """

    def __init__(
        self,
        spec: kernel.Spec,
        words: Sequence[str],
        names: Sequence[str],
        folder: Path,
        output: Output,
    ) -> None:
        """Build it once; raises what that does, and ConfigurationError where a file is none."""
        if spec.mutant is not None:
            raise ConfigurationError("--edit: is a mutant itself: not together with --mutant")
        self._patch = folder / "edit.patch"
        self._spec = dataclasses.replace(spec, mutant=self._patch)
        self._words = words
        self._folder = folder
        self._output = output
        self._firsts = _first_lines(spec, names, output)
        # No kernel in the cache has it.
        self._lines = dict.fromkeys(names, time.time_ns())
        self._runs = 0
        self._write()
        deadline = Deadline(BUILD_SECONDS, "kernel")
        kernel.build(self._spec, deadline=deadline, progress=output.progress)

    def measurements(self) -> list[Measurement]:
        """One for each file."""
        return [
            Measurement(f"an edit of {name}", "s", functools.partial(self._take, name))
            for name in self._lines
        ]

    def _take(self, name: str) -> Values:
        """Raises InfrastructureError for a run that did not hold: it may have ended early."""
        self._lines[name] += 1
        self._write()
        self._runs += 1
        words = [*tried.words(SCENARIO, self._spec), *self._words]
        started = time.monotonic()
        found = runs.run(words, self._folder / f"edit-{self._runs}", self._output.progress)
        seconds = time.monotonic() - started
        if found.verdict != "held":
            raise InfrastructureError(f"{name} edited: {found.why}; its report: {found.folder}")
        return {
            f"{name}: kernel built": found.seconds("kernel"),
            f"{name}: built, booted cold, {SCENARIO} held": seconds,
        }

    def _write(self) -> None:
        self._patch.write_text(
            "Another line\n"
            + "".join(
                f"--- a/{name}\n+++ b/{name}\n@@ -1,1 +1,2 @@\n"
                f'+static const char edit[] __used = "{line}";\n {self._firsts[name]}\n'
                for name, line in self._lines.items()
            )
        )


def _first_lines(spec: kernel.Spec, names: Sequence[str], output: Output) -> dict[str, str]:
    """What the files *names* begin with, under the series."""
    deadline = Deadline(BUILD_SECONDS, "kernel's source")
    _, patches, kept = kernel.resolved(spec, deadline=deadline, progress=output.progress)
    touched = {name for patch in patches for name in tree.names(patch)}
    for name in names:
        if tree.leads_out(name) or os.path.normpath(name) != name:
            raise ConfigurationError(f"--edit {name}: must be a path in the kernel's tree")
    with cache.scratch("edit") as scratch:
        kept.patched({*names, *touched}, patches, scratch, deadline)
        for name in names:
            if not name.endswith(".c") or not (scratch / name).is_file():
                raise ConfigurationError(f"--edit {name}: no C file of the kernel under test")
        return {name: (scratch / name).read_text().partition("\n")[0] for name in names}
