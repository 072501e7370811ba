# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a kernel's source comes from: Debian's archive, a tarball, a git tree."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from qemu_ioasid import cache, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed
from qemu_ioasid.kernel import source, tree
from qemu_ioasid.kernel.gittree import GitTree

Progress = Callable[[str], None]

#: How a kernel is named on a command line.
FORMS = "debian:7.2, tree:PATH, tree:PATH@COMMIT, tarball:PATH, image:PATH[,modules=DIR]"


class Origin(Protocol):
    """A source. As a string: what people know it by."""

    @property
    def key(self) -> str:
        """Names its tree in the cache; sources that differ little share one."""

    @property
    def content(self) -> str:
        """A hash of all of it."""

    @property
    def base(self) -> str:
        """The kernel version it is of, ``7.2``."""

    @property
    def repository(self) -> Path | None:
        """The git repository that it is from."""

    def has(self, name: str) -> bool:
        """Whether it has a file *name* by itself."""

    def unpack(self, src: Path, deadline: Deadline) -> None:
        """Make the new folder *src* of it. Raises ProcessFailed or RequirementError."""

    def renew(self, kept: tree.Tree, deadline: Deadline) -> None:
        """Make a tree of its key hold it; the caller has the tree's lock."""


class Debian:
    """A ``linux-source`` package that was fetched."""

    repository = None

    def __init__(self, fetched: source.Source, deb: Path) -> None:
        self._deb = deb
        self.fetched = fetched
        self.key = fetched.key
        self.content = fetched.sha256
        self.base = fetched.package.removeprefix("linux-source-")

    def __str__(self) -> str:
        return str(self.fetched)

    def has(self, name: str) -> bool:
        """Debian has nothing of ours."""
        return False

    def unpack(self, src: Path, deadline: Deadline) -> None:
        """As `tree.unpack`."""
        tree.unpack(self._deb, src, deadline)

    def renew(self, kept: tree.Tree, deadline: Deadline) -> None:
        """A package never changes."""


class Tarball:
    """A tar of one folder, a kernel's source, compressed in any way that tar knows.

    Raises ConfigurationError when it is none.
    """

    repository = None

    def __init__(self, path: Path, deadline: Deadline, progress: Progress) -> None:
        self._path = path
        try:
            with open(path, "rb") as stream:
                self.content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ConfigurationError(f"tarball:{path}: {error.strerror}") from None
        self.key = f"tarball-{self.content[:16]}"
        self._tree = laid_out(self, deadline, progress)
        self.base = tree.version_of(self._tree.pristine("Makefile"), f"tarball:{path}")

    def __str__(self) -> str:
        return self._path.name

    def has(self, name: str) -> bool:
        """Whether it has a file *name*."""
        return bool(self._tree.pristine(name))

    def unpack(self, src: Path, deadline: Deadline) -> None:
        """All of it as the new folder *src*."""
        src.mkdir(parents=True)
        argv = ["tar", "-x", "-f", str(self._path), "-C", str(src), "--strip-components=1"]
        try:
            process.run(argv, deadline=deadline)
        except ProcessFailed as failed:
            said = (failed.evidence.strip().splitlines() or ["tar failed"])[0]
            raise ConfigurationError(f"tarball:{self._path}: {said}") from None
        if not (src / "Makefile").is_file():
            raise ConfigurationError(f"tarball:{self._path}: holds no kernel source")

    def renew(self, kept: tree.Tree, deadline: Deadline) -> None:
        """A tarball with other content has another tree."""


def laid_out(origin: Origin, deadline: Deadline, progress: Progress) -> tree.Tree:
    """The tree of *origin*'s key, which may hold another content of it: see `Origin.renew`."""

    def unpack(new: Path) -> None:
        progress(f"unpacking {origin}")
        origin.unpack(new / "src", deadline)

    place, _ = cache.get_or_build(
        "kernel-tree",
        origin.key,
        unpack,
        deadline=deadline,
        on_wait=lambda: progress(f"waiting for another build in the tree of {origin}"),
    )
    return tree.Tree(place)


_KINDS = ("debian", "tree", "tarball", "image")


def anchored(word: str, folder: Path) -> str:
    """*word* with its paths, which count from *folder* or begin with ``~``, made absolute.

    Raises ConfigurationError for a word of no form there is, before anything is done for it.
    """
    kind, _, rest = word.partition(":")
    if word and not (rest and kind in _KINDS):
        raise ConfigurationError(f"kernel {word}: must be one of {FORMS}")
    if kind in ("", "debian"):
        return word
    path, modules, place = rest.partition(",modules=") if kind == "image" else (rest, "", "")
    paths = [str(folder.absolute() / os.path.expanduser(each)) for each in (path, place) if each]
    return f"{kind}:{modules.join(paths)}"


def find(
    word: str, update: bool, deadline: Deadline, progress: Progress, newer: bool = False
) -> Iterator[Origin]:
    """What *word* names; *newer*: of Debian's packages the next best ones too.

    Raises ConfigurationError for a word that names nothing; RequirementError when it cannot be had.
    """
    kind, _, rest = word.partition(":")
    if kind == "debian" and re.fullmatch(r"\d+\.\d+", rest):
        known = None if update else source.remembered(rest, newer)
        for wanted in [known] if known else source.offered(rest, deadline, newer):
            yield Debian(*source.fetch(wanted, deadline, progress))
    elif kind == "tree" and rest:
        path, _, revision = rest.rpartition("@") if "@" in rest else (rest, "", "")
        if Path(rest).is_dir():
            path, revision = rest, ""
        yield GitTree(Path(path), revision, deadline)
    elif kind == "tarball" and rest:
        yield Tarball(Path(rest).absolute(), deadline, progress)
    else:
        raise ConfigurationError(f"kernel {word}: must be one of {FORMS}")
