# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's source: a Debian ``linux-source`` package, fetched once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qemu_ioasid import archive, cache
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import RequirementError
from qemu_ioasid.process import current_run

#: Where to look, the first that has the package wins.
SUITES = ("trixie-backports", "sid", "forky")
_KIND = "kernel-source"


@dataclass(frozen=True)
class Source:
    """A version of a source package; *sha256* is its .deb's, empty until it is `fetch`ed."""

    package: str
    version: str
    suite: str
    sha256: str = ""

    @property
    def key(self) -> str:
        """Names it in the cache."""
        return f"{self.package}_{self.version.replace(':', '.')}"

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def _record(base: str) -> Path:
    return cache.root() / _KIND / f"{base}.json"


def remembered(base: str, newer: bool) -> Source | None:
    """The source that was last used for series of *base* (``7.2``), if it is still here.

    Without *newer*, no other version's.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        source = Source(**json.loads(_record(base).read_text()))
        if cache.entry(_KIND, source.key).is_dir() and (newer or source.package == _package(base)):
            return source
    return None


def _package(base: str) -> str:
    return f"linux-source-{base}"


def remember(base: str, source: Source) -> None:
    """Use *source* for *base* from now on, without asking the archive."""
    record = _record(base)
    # Two builds of one kernel end together: each has a file of its own to rename.
    temporary = record.with_suffix(f".{current_run().token}")
    temporary.write_text(json.dumps(asdict(source)) + "\n")
    temporary.replace(record)


def offered(base: str, deadline: Deadline, newer: bool) -> Iterator[Source]:
    """What the archive has for *base*: its own package, or with *newer* the next ones, in order.

    Raises RequirementError when there is nothing, naming each suite's reason.
    """
    major, minor = (int(part) for part in base.split("."))
    later: dict[int, Source] = {}
    reasons = []
    for suite in SUITES:
        try:
            found = archive.newest(rf"^linux-source-{major}\.[0-9]+$", suite, deadline=deadline)
        except RequirementError as error:
            reasons.append(error.message)
            continue
        reasons.append(f"{suite} has {', '.join(sorted(found)) or 'none'}")
        for package, version in found.items():
            number = int(re.sub(r".*\.", "", package))
            if package == _package(base):
                yield Source(package, version, suite)
                return
            if newer and number > minor:
                later.setdefault(number, Source(package, version, suite))
    for number in sorted(later):
        yield later[number]
    if not later:
        wanted = f"{base} or newer" if newer else base
        raise RequirementError(f"no source of Linux {wanted} to be had: " + "; ".join(reasons))


def fetch(
    source: Source, deadline: Deadline, progress: Callable[[str], None]
) -> tuple[Source, Path]:
    """*source* with its checksum, and its .deb; downloaded when it is not here yet.

    Raises RequirementError when it cannot be had.
    """

    def download(folder: Path) -> None:
        progress(f"downloading {source} from {source.suite}")
        deb = archive.download(source.package, source.suite, folder, deadline=deadline)
        deb = deb.rename(folder / "source.deb")
        with open(deb, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        (folder / "sha256").write_text(sha256)

    folder, _ = cache.get_or_build(
        _KIND,
        source.key,
        download,
        deadline=deadline,
        on_wait=lambda: progress(f"waiting for another download of {source}"),
    )
    sha256 = (folder / "sha256").read_text()
    return Source(source.package, source.version, source.suite, sha256), folder / "source.deb"
