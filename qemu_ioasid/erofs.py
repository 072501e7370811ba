# SPDX-License-Identifier: GPL-2.0-or-later
"""A folder as a read-only disk, and back: the same files give the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from qemu_ioasid import process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import RequirementError

_UUID = "6f1b7c56-0000-4000-8000-696f61736964"


def pack(folder: Path, disk: Path, *, deadline: Deadline) -> None:
    """Make the erofs *disk* of *folder*: uncompressed, all files root's, all times 0.

    Raises RequirementError without mkfs.erofs, ProcessFailed, DeadlineExceeded.
    """
    if shutil.which("mkfs.erofs") is None:
        raise RequirementError("mkfs.erofs is missing: install erofs-utils")
    options = ["-T0", "-U", _UUID, "--all-root", "--quiet"]
    process.run(["mkfs.erofs", *options, str(disk), str(folder)], deadline=deadline)


def unpack(disk: Path, folder: Path, *, deadline: Deadline) -> None:
    """Put what is in the erofs *disk* into the new *folder*, as our own files.

    Raises RequirementError without fsck.erofs, ProcessFailed for a damaged disk.
    """
    if shutil.which("fsck.erofs") is None:
        raise RequirementError("fsck.erofs is missing: install erofs-utils")
    argv = ["fsck.erofs", f"--extract={folder}", "--no-preserve", str(disk)]
    process.run(argv, deadline=deadline)
