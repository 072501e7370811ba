# SPDX-License-Identifier: GPL-2.0-or-later
"""What is laid over a kernel's source, in each form that people have patches in."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qemu_ioasid import git, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed

#: How a series is named on a command line.
FORMS = "none, a folder (series, ci/series edit), an mbox, a patch, [REPOSITORY:]A..B"
#: Nothing is laid over it.
NONE = "none"
#: What ``ci/series edit`` leaves there: the kernel's version, and the untouched files' commit.
_KERNEL = "qemu-ioasid.kernel"
_BASE = "base"
_RANGE = re.compile(r"(?:(?P<where>.+):)?(?P<range>[^:]*\.\.[^:]*)")


def anchored(word: str, folder: Path) -> str:
    """*word* with its path, which counts from *folder*, made absolute."""
    path = folder.absolute() / os.path.expanduser(word)
    if word and word != NONE and path.exists():
        return str(path)
    found = _RANGE.fullmatch(word)
    if found is None or not found["where"]:
        return word
    return f"{folder.absolute() / os.path.expanduser(found['where'])}:{found['range']}"


def base(word: str, deadline: Deadline) -> str | None:
    """The kernel version that the series *word* is for, where its folder says so."""
    folder = Path(word)
    if _edited(folder):
        try:
            return _git(folder, deadline, "config", _KERNEL).strip()
        except ConfigurationError:
            raise ConfigurationError(
                f"{folder}: neither a series of patches nor a folder of ci/series edit"
            ) from None
    return folder.name if re.fullmatch(r"\d+\.\d+", folder.name) and folder.is_dir() else None


def patches(word: str, deadline: Deadline, repository: Path | None = None) -> list[Path]:
    """The patches of the series *word*, in order; what is made for this lies in the run's folder.

    *repository* is where a range without one is looked up. Raises ConfigurationError for what is
    no series, RequirementError without git where it takes git.
    """
    path = Path(word)
    if word == NONE:
        return []
    if _edited(path):
        return [_as_it_stands(path, deadline)]
    if path.is_dir():
        return listed(path)
    if path.is_file():
        return _mails(path, deadline)
    found = _RANGE.fullmatch(word)
    if found is None:
        raise ConfigurationError(f"series {word}: must be one of {FORMS}")
    where = Path(found["where"]) if found["where"] else repository
    if where is None or not where.is_dir():
        raise ConfigurationError(
            f"series {word}: no such file, and {where or 'a range'} needs a git repository"
        )
    return _range(where, found["range"], deadline)


def listed(folder: Path) -> list[Path]:
    """The patches that ``folder/series`` names, in order.

    Raises ConfigurationError when it or a patch is missing.
    """
    try:
        lines = (folder / "series").read_text().splitlines()
    except OSError as error:
        raise ConfigurationError(f"{folder / 'series'}: {error.strerror}") from None
    names = [line.partition("#")[0].strip() for line in lines]
    found = [folder / name for name in names if name]
    for patch in found:
        if not patch.is_file():
            raise ConfigurationError(f"{folder / 'series'}: {patch.name}: no such patch")
    return found


def _edited(folder: Path) -> bool:
    return (folder / ".git").exists() and not (folder / "series").exists()


def _git(where: Path, deadline: Deadline, *words: str, index: str = "") -> str:
    env = {"GIT_INDEX_FILE": index} if index else None
    try:
        return git.run(where, *words, deadline=deadline, env=env)
    except ProcessFailed as failed:
        raise ConfigurationError(f"series {where}: git {words[0]}: {failed.said}") from None


def _as_it_stands(folder: Path, deadline: Deadline) -> Path:
    """All changes in a folder of ``ci/series edit`` as one patch, committed or not."""
    with tempfile.TemporaryDirectory(dir=process.current_run().folder) as scratch:
        # An index of its own: what somebody has staged stays as it is.
        index = f"{scratch}/index"
        _git(folder, deadline, "add", "-A", index=index)
        shown = ["--no-color", "--no-ext-diff", "--no-renames", "--src-prefix=a/"]
        text = _git(
            folder, deadline, "diff", "--cached", *shown, "--dst-prefix=b/", _BASE, index=index
        )
    patch = _made() / "edited.patch"
    patch.write_text(text)
    return patch


def _made() -> Path:
    return Path(tempfile.mkdtemp(prefix="series-", dir=process.current_run().folder))


def _range(repository: Path, commits: str, deadline: Deadline) -> list[Path]:
    folder = _made()
    words = ["format-patch", "--quiet", "--no-renames", "--full-index", "-o", str(folder)]
    # Whatever the user has set for patches of their own.
    words += ["--no-cover-letter", "--no-attach", "--no-base", "--no-color", "--no-ext-diff"]
    words += ["--suffix=.patch", "--src-prefix=a/", "--dst-prefix=b/"]
    _git(repository, deadline, *words, commits)
    found = sorted(folder.glob("*.patch"))
    if not found:
        raise ConfigurationError(f"series {commits}: {repository} has no commit in it")
    return found


def _mails(path: Path, deadline: Deadline) -> list[Path]:
    """A patch alone as it is; each mail of a box decoded, those without a patch left out."""
    with open(path, "rb") as stream:
        if not re.match(rb"From |[A-Za-z-]+: ", stream.readline()):
            return [path]
    folder = _made()
    _git(folder, deadline, "mailsplit", "-b", f"-o{folder}", "--", str(path.absolute()))
    found = list(_decoded(folder, path, deadline))
    if not found:
        raise ConfigurationError(f"series {path}: no mail in it has a patch")
    return found


def _decoded(folder: Path, box: Path, deadline: Deadline) -> Iterator[Path]:
    for mail in sorted(folder.glob("[0-9]*")):
        message, patch = folder / "message", folder / "patch"
        argv = git.command(["mailinfo", str(message), str(patch)])
        try:
            told = process.run(
                argv,
                deadline=deadline,
                env=git.environment(),
                cwd=folder,
                input=mail.read_bytes(),
            )
        except ProcessFailed as failed:
            raise ConfigurationError(f"series {box}: mail {mail.name}: {failed.said}") from None
        # A cover letter has none.
        if patch.stat().st_size:
            subject = re.search(r"^Subject: (.*)$", told, re.MULTILINE)
            name = re.sub(r"[^\w.]+", "-", subject[1] if subject else box.stem).strip("-.")
            whole = folder / f"{mail.name}-{name[:60]}.patch"
            head = f"{told.strip()}\n\n".encode()
            whole.write_bytes(head + message.read_bytes() + b"---\n" + patch.read_bytes())
            yield whole
