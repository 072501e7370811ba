# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel of the profile ``coverage`` counts: the objects of what its series touches.

The kernel's own gcov (Documentation/dev-tools/gcov.rst) counts; what is told of the counts are the
lines that the series changed, each of them the last patch's that changed it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from qemu_ioasid import cache, git
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.kernel import make, tree
from qemu_ioasid.kernel.tree import Tree

PROFILE = "coverage"
#: In a kernel's folder: the notes that gcc left of each object (gcno), and the changed lines.
FOLDER = "gcov"
_LINES = "changed.json"
#: Programs of the machine that builds, or of user space: no kernel's object has them.
_NOT_KERNEL = ("tools/", "scripts/", "usr/", "Documentation/")
_HEADER = Path(__file__).with_suffix(".h")
#: gcc counts what is left after it has inlined early, when lines of small functions are gone.
_FLAGS = "-fno-early-inlining -include"
_BLAMED = re.compile(r"([0-9a-f]{40,}) \d+ (\d+)")
_IDENTITY = {
    # Nothing in the user's configuration steers this repository of ours.
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{role}_NAME": "qemu-ioasid" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_EMAIL": "qemu-ioasid" for role in ("AUTHOR", "COMMITTER")},
}


@dataclass(frozen=True)
class Line:
    """A line of a file in the tree that all patches made, *number* from 1, its ends stripped."""

    patch: str
    file: str
    number: int
    text: str


def recipe() -> tuple[str, ...]:
    """What a kernel depends on that is made to count, besides its inputs."""
    return _FLAGS, _HEADER.read_text()


def require() -> None:
    """Raises RequirementError where what a kernel has counted could not be read."""
    if shutil.which("gcov") is None:
        raise RequirementError("gcov is missing, of the gcc that builds the kernel: install gcc")


def changed(kept: Tree, patches: Sequence[Path], deadline: Deadline) -> list[Line]:
    """The lines of C that *patches* add to the source of *kept* or alter, by file and number.

    Raises ConfigurationError when no object has any, PatchRefused, RequirementError without git.
    """
    with cache.scratch("kernel-tree") as scratch:
        kept.lay_out({name for patch in patches for name in tree.names(patch)}, scratch)
        _git(scratch, deadline, "init", "-q")
        commits = {_commit(scratch, None, deadline): ""}
        for patch in patches:
            tree.lay_over(patch, scratch, deadline)
            commits[_commit(scratch, [*commits][-1], deadline)] = patch.name
        names = _git(scratch, deadline, "ls-files", "-z", "--", "*.c", "*.h").split("\0")
        found = [
            line
            for name in sorted(filter(None, names))
            if not name.startswith(_NOT_KERNEL)
            for line in _blamed(scratch, name, commits, deadline)
        ]
    if not any(_is_c(line.file) for line in found):
        raise ConfigurationError(
            f"profile {PROFILE}: the series changes no object of the kernel, and nothing would "
            "be counted: --series names another"
        )
    return found


def _git(where: Path, deadline: Deadline, *words: str) -> str:
    return git.run(where, *words, deadline=deadline, env=_IDENTITY)


def _commit(where: Path, parent: str | None, deadline: Deadline) -> str:
    _git(where, deadline, "add", "--all", "--force")
    content = _git(where, deadline, "write-tree").strip()
    words = ["-m", "patch", *(["-p", parent] if parent else [])]
    return _git(where, deadline, "commit-tree", content, *words).strip()


def _blamed(where: Path, name: str, commits: dict[str, str], deadline: Deadline) -> list[Line]:
    head = [*commits][-1]
    found = []
    at = ("", 0)
    for line in _git(where, deadline, "blame", "--porcelain", head, "--", name).split("\n"):
        if line.startswith("\t"):
            commit, number = at
            if commits[commit]:
                found.append(Line(commits[commit], name, number, line.strip()))
        elif told := _BLAMED.match(line):
            at = (told[1], int(told[2]))
    return found


def prepare(built: make.Build, lines: Sequence[Line]) -> None:
    """Have kbuild count in the objects of *lines*, and in no others.

    scripts/Makefile.lib asks GCOV_PROFILE, and CFLAGS_KERNEL or CFLAGS_MODULE, anew for each
    object: so they may speak of ``$@``, and equal names in other folders are left alone.
    """
    header = built.out / _HEADER.name
    # Written anew it would have make compile anew.
    if not header.is_file() or header.read_bytes() != _HEADER.read_bytes():
        shutil.copyfile(_HEADER, header)
    objects = {str(PurePath(line.file).with_suffix(".o")) for line in lines if _is_c(line.file)}
    only = f"$(if $(filter {' '.join(sorted(objects))},$@)"
    flags = [f"{name}={only},{_FLAGS} {header})" for name in ("CFLAGS_KERNEL", "CFLAGS_MODULE")]
    built.words = [f"GCOV_PROFILE={only},y)", *flags]


def _is_c(file: str) -> bool:
    return file.endswith(".c")


def keep(out: Path, folder: Path, lines: Sequence[Line]) -> None:
    """Copy to the new *folder* what tells the counts of the kernel that was built in *out*."""
    folder.mkdir()
    for file in {line.file for line in lines if _is_c(line.file)}:
        notes = PurePath(file).with_suffix(".gcno")
        # No note: this config does not want the object.
        if (out / notes).is_file():
            (folder / notes).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / notes, folder / notes)
    (folder / _LINES).write_text(json.dumps([asdict(line) for line in lines]) + "\n")


def load(folder: Path) -> list[Line]:
    """The changed lines of a kernel, from the *folder* that `keep` made."""
    return [Line(**line) for line in json.loads((folder / _LINES).read_text())]
