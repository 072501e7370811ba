# SPDX-License-Identifier: GPL-2.0-or-later
"""git, in whichever repository is meant."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qemu_ioasid import process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import RequirementError

#: What a hook, an alias or ``git bisect run`` leaves in the environment (``git rev-parse
#: --local-env-vars``): it names a repository, and would be obeyed in every other one.
_LOCAL = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"),
    *("GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_PREFIX", "GIT_CONFIG", "GIT_CONFIG_PARAMETERS"),
    *("GIT_CONFIG_COUNT", "GIT_GRAFT_FILE", "GIT_SHALLOW_FILE", "GIT_NAMESPACE"),
)


def command(words: Sequence[str]) -> list[str]:
    """The program and its arguments; raises RequirementError without git."""
    if shutil.which("git") is None:
        raise RequirementError("git is missing: install git")
    return ["env", *(f"--unset={name}" for name in _LOCAL), "git", *words]


def run(where: Path, *words: str, deadline: Deadline, env: Mapping[str, str] | None = None) -> str:
    """What git says at *where*; *env* is meant. Raises ProcessFailed, RequirementError."""
    told = [f"{name}={value}" for name, value in (env or {}).items()]
    argv = command(["-C", str(where), *words])
    # Behind what is unset.
    argv[1 + len(_LOCAL) : 1 + len(_LOCAL)] = told
    return process.run(argv, deadline=deadline)
