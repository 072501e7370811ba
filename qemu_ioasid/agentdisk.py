# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk that brings the agent into the VMs, compiled by the images' own Python."""

from __future__ import annotations

import functools
from pathlib import Path

from qemu_ioasid import cache, erofs, image
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.image import Image

_PACKAGE = Path(__file__).parent


@functools.cache
def _sources() -> dict[str, bytes]:
    """The agent's files by their path below the disk's root."""
    agent = _PACKAGE / "agent"
    files = sorted([_PACKAGE / "__init__.py", *agent.rglob("*.py")])
    found = {str(file.relative_to(_PACKAGE.parent)): file.read_bytes() for file in files}
    # Python runs a folder by the __main__ at its root.
    return {**found, "__main__.py": (agent / "__main__.py").read_bytes()}


def sources_hash() -> str:
    """Names the agent's code in reports and in what is kept of a VM that runs it."""
    return cache.digest(*(part for item in _sources().items() for part in item))


def build(guest: Image, *, deadline: Deadline) -> Path:
    """The erofs, made when the cache has none of this code for the Python of image *guest*.

    Under TCG compiling the agent takes a VM longer than anything the agent
    then does. Both images have the one Python of guest-images/common.toml.
    """

    def make(folder: Path) -> None:
        with cache.scratch("agent") as scratch:
            for name, content in _sources().items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(content)
            python = str(image.recipe("guest")["python"])
            image.compile_tree(guest.root, python, scratch, "", "-b", deadline=deadline)
            for source in scratch.rglob("*.py"):
                source.unlink()
            erofs.pack(scratch, folder / "agent.erofs", deadline=deadline)

    key = cache.digest(sources_hash(), guest.hash)
    return cache.get_or_build("agent", key, make, deadline=deadline)[0] / "agent.erofs"
