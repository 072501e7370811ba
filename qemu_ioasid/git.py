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
    return ["git", *words]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """For `process.run` of a `command`: of repositories it says only what *env* does."""
    return {**dict.fromkeys(_LOCAL), **(env or {})}


def run(where: Path, *words: str, deadline: Deadline, env: Mapping[str, str] | None = None) -> str:
    """What git says at *where*; *env* is meant. Raises ProcessFailed, RequirementError."""
    argv = command(["-C", str(where), *words])
    return process.run(argv, deadline=deadline, env=environment(env))
