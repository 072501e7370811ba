# SPDX-License-Identifier: GPL-2.0-or-later
"""A folder of ``ci/series edit`` as it stands, committed or not, in the place of a series."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from qemu_ioasid import cache, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed, RequirementError

#: What ``ci/series edit`` leaves there: the kernel's version, and the untouched files' commit.
_KERNEL = "qemu-ioasid.kernel"
_BASE = "base"


def is_one(folder: Path) -> bool:
    """Whether *folder* is a git repository rather than a series of patches."""
    return (folder / ".git").exists() and not (folder / "series").exists()


def read(folder: Path, deadline: Deadline) -> tuple[str, Path]:
    """The kernel version that *folder* is for, and all its changes as one patch.

    The patch lies in the run folder. Raises ConfigurationError when ``ci/series
    edit`` has not made *folder*, RequirementError without git.
    """
    if shutil.which("git") is None:
        raise RequirementError(f"{folder}: git is missing: install git")

    def git(*words: str, index: str = "") -> str:
        env = {"GIT_INDEX_FILE": index} if index else None
        return process.run(["git", "-C", str(folder), *words], deadline=deadline, env=env)

    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=process.current_run().folder))
        index = f"{scratch}/index"
        try:
            version = git("config", _KERNEL).strip()
            # An index of its own: what somebody has staged stays as it is.
            git("add", "-A", index=index)
            shown = ["--no-color", "--no-ext-diff", "--no-renames", "--src-prefix=a/"]
            text = git("diff", "--cached", *shown, "--dst-prefix=b/", _BASE, index=index)
        except ProcessFailed as failed:
            said = failed.evidence.strip().splitlines()
            reason = f": {said[-1]}" if said else ""
            raise ConfigurationError(
                f"{folder}: neither a series of patches nor a folder of ci/series edit{reason}"
            ) from None
    patch = process.current_run().folder / f"edited-{cache.digest(text)}.patch"
    patch.write_text(text)
    return version, patch
