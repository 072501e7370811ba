# SPDX-License-Identifier: GPL-2.0-or-later
"""An unpacked source with a series laid over it, kept so that a driver change rebuilds little.

``src`` is the package's tree; of every file a series ever touched, the
untouched original is kept in ``originals`` (``touched.json`` says which files
had none). Another series is worked out beside the tree from those originals,
and only files whose bytes differ are written: the rest keep their times, and
make leaves alone what did not change.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from qemu_ioasid import cache, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed, RequirementError

# A third of the unpacked bytes, and no file of them is opened by a build of ours.
_LEFT_OUT = "*/drivers/gpu/drm/*/*.[ch]"
_VERSION = re.compile(r"^(VERSION|PATCHLEVEL) *= *(\d+)$", re.MULTILINE)
_NAMED = re.compile(r"^(?:--- a/|\+\+\+ b/|rename (?:from|to) )([^\t\n]+)", re.MULTILINE)


class PatchRefused(ConfigurationError):
    """A patch does not apply to this source."""


def unpack(deb: Path, src: Path, deadline: Deadline) -> None:
    """The source tree inside *deb* as the new folder *src*.

    Raises ProcessFailed for a damaged package, RequirementError without the tools.
    """
    for tool, package in (("dpkg-deb", "dpkg"), ("xz", "xz-utils"), ("tar", "tar")):
        if shutil.which(tool) is None:
            raise RequirementError(f"{tool} is missing: install {package}")
    src.mkdir(parents=True)
    # Three programs at once; -T0 lets xz use every core, which halves the time on two.
    pipe = (
        'set -e; dpkg-deb --fsys-tarfile "$1" | tar -xO --wildcards "*/linux-source-*.tar.xz" '
        '| xz -dc -T0 | tar -x -C "$2" --strip-components=1 --exclude="$3"'
    )
    argv = ["sh", "-c", pipe, "sh", str(deb), str(src), _LEFT_OUT]
    process.run(argv, deadline=deadline)
    if not (src / "Makefile").is_file():
        raise ProcessFailed(argv, 1, f"{deb}: holds no kernel source")


def version_of(makefile: str, where: str) -> str:
    """``7.2`` of a kernel's top Makefile; raises ConfigurationError for another's, of *where*."""
    found = dict(_VERSION.findall(makefile))
    if set(found) != {"VERSION", "PATCHLEVEL"}:
        raise ConfigurationError(f"{where}: holds no kernel source: its Makefile says no VERSION")
    return f"{found['VERSION']}.{found['PATCHLEVEL']}"


class Tree:
    """The folder of one source; the caller holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.src = folder / "src"
        self._originals = folder / "originals"
        self._record = folder / "touched.json"

    def apply(self, patches: Sequence[Path], deadline: Deadline) -> None:
        """Make ``src`` the package's source with *patches* and no others.

        Raises PatchRefused naming the patch; ``src``
        is then as it was. Interrupted, it is put right by the next call.
        """
        touched = self._touched()
        named = sorted({name for patch in patches for name in names(patch)})
        with cache.scratch("kernel-tree") as scratch:
            self.patched(named, patches, scratch, deadline)
            self._keep_originals(named, touched)
            for name in touched:
                _put(self._wanted(name, named, touched, scratch), self.src / name)

    def forget(self, deadline: Deadline) -> None:
        """Make ``src`` the source as it came, and know of no series: it may come anew."""
        self.apply([], deadline)
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self._originals, ignore_errors=True)

    def pristine(self, name: str) -> str:
        """The text of a file as the source has it; empty without one."""
        touched = self._touched()
        path = self._pristine(name, touched)
        return path.read_text(errors="replace") if touched.get(name, path.is_file()) else ""

    def lay_out(self, named: Iterable[str], folder: Path) -> None:
        """Copy the files *named* to *folder* as the package has them, if it has them."""
        touched = self._touched()
        for name in named:
            if touched.get(name, True):
                _copy(self._pristine(name, touched), folder / name)

    def patched(
        self, named: Iterable[str], patches: Sequence[Path], folder: Path, deadline: Deadline
    ) -> None:
        """As `lay_out`, with *patches* over them, all of whose files are *named*.

        Raises PatchRefused.
        """
        self.lay_out(named, folder)
        for patch in patches:
            lay_over(patch, folder, deadline)

    def _touched(self) -> dict[str, bool]:
        """Each file any series touched so far, and whether the package has it."""
        with contextlib.suppress(OSError):
            found: dict[str, bool] = json.loads(self._record.read_text())
            return found
        return {}

    def _pristine(self, name: str, touched: dict[str, bool]) -> Path:
        return (self._originals if name in touched else self.src) / name

    def _keep_originals(self, named: Sequence[str], touched: dict[str, bool]) -> None:
        for name in named:
            if name not in touched:
                touched[name] = _copy(self.src / name, self._originals / name)
        # From here on the files in src may differ from the package's.
        temporary = self._record.with_suffix(".new")
        temporary.write_text(json.dumps(touched, indent=1) + "\n")
        temporary.replace(self._record)

    def _wanted(
        self, name: str, named: Sequence[str], touched: dict[str, bool], scratch: Path
    ) -> Path | None:
        path = scratch / name if name in named else self._originals / name
        if name not in named and not touched[name]:
            return None
        return path if path.is_file() else None


def leads_out(name: str) -> bool:
    """Whether *name*, of a file below a tree, is one outside of it."""
    return name.startswith("/") or ".." in name.split("/")


def names(patch: Path) -> set[str]:
    """The files that *patch* touches; raises ConfigurationError for one outside of the tree."""
    found = set(_NAMED.findall(patch.read_text(errors="surrogateescape")))
    for name in found:
        if leads_out(name):
            raise ConfigurationError(f"{patch}: {name}: leads out of the tree")
        # Under two names a file would be two, and the one's original the other patched.
        if posixpath.normpath(name) != name:
            raise ConfigurationError(f"{patch}: {name}: must be {posixpath.normpath(name)}")
    return found


def _copy(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        return False
    shutil.copy(source, target)
    return True


def _put(source: Path | None, path: Path) -> None:
    if source is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != source.read_bytes():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        shutil.copy(source, temporary)
        temporary.replace(path)


def lay_over(patch: Path, folder: Path, deadline: Deadline) -> None:
    """Apply *patch* to the files in *folder*; raises PatchRefused where it does not fit exactly."""
    options = ["-p1", "--force", "--fuzz=0", "--no-backup-if-mismatch", "-r-"]
    try:
        process.run(["patch", *options, "-d", str(folder), "-i", str(patch)], deadline=deadline)
    except ProcessFailed as failed:
        said = failed.evidence.splitlines()
        # "patching file X", then each of its hunks that does not fit.
        at = next((at for at, line in enumerate(said) if "FAILED" in line), 0)
        files = [line.removeprefix("patching file ") for line in said[:at] if "file" in line]
        where = ": ".join([*files[-1:], *said[at : at + 1]])
        raise PatchRefused(f"{patch}: does not apply: {where}", evidence=failed.evidence) from None
    except RequirementError:
        raise RequirementError("patch is missing: install patch") from None
