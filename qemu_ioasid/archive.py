# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's archive: packages fetched by mmdebstrap, with apt's signature checks, without root."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from qemu_ioasid import cache, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import DeadlineExceeded, ProcessFailed, RequirementError, RigError

#: Names what was fetched, one `sha256  name_version_arch.deb` a line; kept in the tree's root.
FETCHED = "fetched"

# mmdebstrap knows the default mirror; the lines it wrote are copied for the further suites.
_ADD_SUITES = """sed -n 's/^\\(deb .*\\) {suite} main$/\\1 {extra} main/p' \
"$1/etc/apt/sources.list" >"$1/etc/apt/sources.list.d/{extra}.list" """
_LIST_FETCHED = 'cd "$1/var/cache/apt/archives" && sha256sum *.deb >"$1/' + FETCHED + '"'


def _own_mirrors(deadline: Deadline) -> list[str]:
    """Where this machine's apt gets Debian's main archive from; empty off Debian."""
    line = "$(ORIGIN) $(CODENAME) $(REPO_URI)"
    with contextlib.suppress(RigError):
        out = process.run(
            ["apt-get", "indextargets", "--format", line, "Created-By: Packages"],
            deadline=deadline,
        )
        rows = [row.split() for row in out.splitlines()]
        found = [row[2] for row in rows if len(row) == 3 and row[0] == "Debian"]
        return [uri for uri in dict.fromkeys(found) if "security" not in uri]
    return []


def _mirrors(deadline: Deadline) -> Iterator[list[str]]:
    """mmdebstrap's mirror arguments to try in turn: this machine's own, then its default."""
    for uri in _own_mirrors(deadline):
        yield [uri]
    yield []


def _mmdebstrap(options: list[str], suite: str, folder: Path, what: str, deadline: Deadline) -> str:
    """Run it into *folder* (made anew per mirror); returns its output."""
    if shutil.which("mmdebstrap") is None:
        raise RequirementError(f"mmdebstrap is missing: it fetches {what}; install mmdebstrap")
    problem = ""
    for mirror in _mirrors(deadline):
        shutil.rmtree(folder, ignore_errors=True)
        argv = ["mmdebstrap", "--mode=chrootless", *options, suite, str(folder), *mirror]
        try:
            return process.run(argv, deadline=deadline)
        except ProcessFailed as failed:
            lines = [line for line in failed.evidence.splitlines() if line.startswith("E: ")]
            problem, evidence = (lines or [failed.message])[0], failed.evidence
        except DeadlineExceeded:
            raise
    raise RequirementError(f"cannot fetch {what} from {suite}: {problem}", evidence=evidence)


def extract(suite: str, packages: Iterable[str], tree: Path, *, deadline: Deadline) -> None:
    """Unpack *packages* (``name`` or ``name/further-suite``) and what they need into *tree*.

    No maintainer script runs. ``tree/fetched`` lists the packages. Raises
    RequirementError when the archive cannot be reached or lacks one, and
    DeadlineExceeded; *tree* is then of no use.
    """
    names = list(packages)
    extras = sorted({name.partition("/")[2] for name in names} - {"", suite})
    hooks = [f"--setup-hook={_ADD_SUITES.format(suite=suite, extra=extra)}" for extra in extras]
    options = ["--variant=extract", f"--include={','.join(names)}", *hooks]
    options.append(f"--extract-hook={_LIST_FETCHED}")
    _mmdebstrap(options, suite, tree, "the VM images' packages", deadline)


def newest(pattern: str, suite: str, *, deadline: Deadline) -> dict[str, str]:
    """The packages of *suite* whose name matches the regular expression, with their version.

    Raises RequirementError when the archive cannot be asked.
    """
    hook = f'APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache show "?name({pattern})"'
    with cache.scratch("archive") as folder:
        options = ["--variant=custom", f"--customize-hook={hook} || :"]
        out = _mmdebstrap(options, suite, folder / "tree", f"the list of {suite}", deadline)
    found: dict[str, str] = {}
    name = ""
    for line in out.splitlines():
        key, _, value = line.partition(": ")
        if key == "Package":
            name = value.strip()
        elif key == "Version" and name:
            # apt-cache lists the newest version first.
            found.setdefault(name, value.strip())
            name = ""
    return found


def download(package: str, suite: str, folder: Path, *, deadline: Deadline) -> Path:
    """Fetch *package*'s .deb from *suite* into *folder*; returns its path.

    Raises RequirementError when it cannot be had.
    """
    hook = (
        'cd "$1" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get download ' + package + " && ls *.deb"
    )
    with cache.scratch("archive") as scratch:
        options = ["--variant=custom", f"--customize-hook={hook}"]
        _mmdebstrap(options, suite, scratch / "tree", package, deadline)
        deb = next((scratch / "tree").glob(f"{package}_*.deb"), None)
        if deb is None:
            raise RequirementError(f"{suite} has no {package}")
        return deb.rename(folder / deb.name)
