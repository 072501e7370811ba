# SPDX-License-Identifier: GPL-2.0-or-later
"""A git tree of the user's: a commit, or the work tree as it stands. Nothing there is changed.

Objects that are made on the way go to a repository of ours in the cache, which
borrows those of the user's. Of one content and the next only the files that
differ are written: the rest keep their times, and make leaves them alone.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from qemu_ioasid import cache, git, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed
from qemu_ioasid.kernel import tree

_KIND = "kernel-git"


class GitTree:
    """What the repository around *path* holds: its commit *revision*, or ``""``: its work tree.

    Raises ConfigurationError for no kernel's repository, or no commit of it; RequirementError
    without git.
    """

    def __init__(self, path: Path, revision: str, deadline: Deadline) -> None:
        if not path.is_dir():
            raise ConfigurationError(f"tree:{path}: no such folder")
        self._words = f"tree:{path}"
        self._path = path
        self._deadline = deadline
        self.repository = Path(self._ask("no git repository", "rev-parse", "--show-toplevel"))
        self.key = f"git-{cache.digest(str(self.repository))}"
        objects = self._ask("", "rev-parse", "--path-format=absolute", "--git-path", "objects")
        self._own = self._borrowing(Path(objects))
        name = revision or "HEAD"
        self.commit = self._ask(f"no commit {name}", "rev-parse", "-q", "--verify", f"{name}^0")
        committed = self._ask("", "rev-parse", f"{self.commit}^{{tree}}")
        self.content = committed if revision else self._as_it_stands()
        self.dirty = self.content != committed
        self.base = tree.version_of(self._read("Makefile"), self._words)

    def __str__(self) -> str:
        return f"{self.repository} {self.commit[:12]}{', dirty' if self.dirty else ''}"

    def has(self, name: str) -> bool:
        """Whether there is a file *name*."""
        return bool(self._ask("", "ls-tree", self.content, "--", name, ours=True))

    def unpack(self, src: Path, deadline: Deadline) -> None:
        """All of it as the new folder *src*."""
        src.mkdir(parents=True)
        self._deadline = deadline
        self._check_out(src)

    def renew(self, kept: tree.Tree, deadline: Deadline) -> None:
        """Make a tree of the same key hold it; the caller has the tree's lock."""
        self._deadline = deadline
        if _index(kept.src).with_suffix(".content").read_text() != self.content:
            # What a series has changed git would take for unchanged.
            kept.forget(deadline)
            self._check_out(kept.src)

    def _check_out(self, src: Path) -> None:
        index = _index(src)
        told = index.with_suffix(".content")
        told.write_text("")
        # Of a git that was killed; whoever has the tree's lock is alone with the index.
        index.with_name(f"{index.name}.lock").unlink(missing_ok=True)
        words = [f"--work-tree={src}", "read-tree", "--reset", "-u", self.content]
        self._ask("", *words, ours=True, index=index)
        told.write_text(self.content)

    def _borrowing(self, objects: Path) -> Path:
        def create(folder: Path) -> None:
            git.run(folder, "init", "-q", "--bare", deadline=self._deadline)
            (folder / "objects/info/alternates").write_text(f"{objects}\n")

        return cache.get_or_build(_KIND, self.key, create, deadline=self._deadline)[0]

    def _as_it_stands(self) -> str:
        """The work tree as an object of our own repository, what git ignores left out."""
        mine = self._ask("", "rev-parse", "--path-format=absolute", "--git-path", "index")
        with tempfile.TemporaryDirectory(dir=process.current_run().folder) as scratch:
            index = Path(scratch) / "index"
            # It knows what is unchanged; a repository without a commit has none.
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(mine, index)
            env = {"GIT_OBJECT_DIRECTORY": str(self._own / "objects")}
            self._ask("", "-C", str(self.repository), "add", "-A", index=index, env=env)
            return self._ask("", "write-tree", index=index, env=env)

    def _read(self, name: str) -> str:
        return self._ask(f"no kernel: no {name}", "show", f"{self.content}:{name}", ours=True)

    def _ask(
        self,
        otherwise: str,
        *words: str,
        ours: bool = False,
        index: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> str:
        """What git says; *otherwise* is what is wrong where it fails."""
        more = {"GIT_INDEX_FILE": str(index), **(env or {})} if index else None
        where = self._own if ours else self._path
        mine = [f"--git-dir={self._own}"] if ours else []
        try:
            found = git.run(where, *mine, *words, deadline=self._deadline, env=more)
        except ProcessFailed as failed:
            # What is wrong with the user's own repository only git knows.
            said = [otherwise] if otherwise else failed.evidence.split("\n")[-3:]
            if "ownership" in failed.evidence:
                said.append(f"(git: {failed.evidence.splitlines()[0]})")
            raise ConfigurationError(f"{self._words}: {' '.join(said).strip()}") from None
        return found.strip()


def _index(src: Path) -> Path:
    return src.with_name("git.index")
