# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own tests, compiled: kept as a disk that brings them into a VM."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_ioasid import cache, erofs
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import RequirementError

KIND = "selftest"
#: Changes with the way they are made of the same inputs.
VERSION = "1"
#: They are 8 MB each.
KEPT = 16
#: What targets are compiled against: a header, and the Debian package that has it.
_LIBRARIES = {
    "iommu": {"sys/capability.h": "libcap-dev"},
    "vfio": {"uuid/uuid.h": "uuid-dev"},
}
#: What a target calls in some kernels without having it, and the compiler's flag that mends that.
#: 7.2.12 took a patch of vfio's library (of a later kernel) without the one before it.
_MENDS = {"vfio": {"calloc_assert": "-Dcalloc_assert=calloc"}}
_PLACES = ("/usr/include", "/usr/local/include")
_TOLD = "tests.json"


@dataclass(frozen=True)
class Programs:
    """*disk* is an erofs of ``TARGET/PROGRAM``; *tests* are the programs' names by target.

    *scripts* are those, as ``TARGET/NAME``, that no processor runs; *mended* are names that they
    call and this kernel has not.
    """

    disk: Path
    tests: Mapping[str, Sequence[str]]
    scripts: Sequence[str] = ()
    mended: Sequence[str] = ()


def require(targets: Sequence[str]) -> None:
    """Raises RequirementError naming the packages that are missing here."""
    missing = [
        package
        for target in targets
        for header, package in _LIBRARIES.get(target, {}).items()
        if not any(Path(place, header).exists() for place in _PLACES)
    ]
    if missing:
        raise RequirementError(f"building the kernel's tests needs: install {' '.join(missing)}")


def mended(folder: Path, targets: Sequence[str]) -> dict[str, str]:
    """What the targets in *folder* call and have not, with the flag for it: else none compiles."""
    found = {}
    for target in targets:
        for name, flag in _MENDS.get(target, {}).items():
            texts = [path.read_text(errors="replace") for path in (folder / target).rglob("*.[ch]")]
            has = re.compile(rf"#\s*define {name}\b|^[\w* ]+\b{name}\(.*[^;]$", re.MULTILINE)
            if any(f"{name}(" in text for text in texts) and not any(map(has.search, texts)):
                found[name] = flag
    return found


def keep(
    programs: Mapping[str, Sequence[Path]],
    mended: Iterable[str],
    folder: Path,
    deadline: Deadline,
) -> None:
    """Put what was compiled into the new entry *folder*."""
    scripts = []
    with cache.scratch(KIND) as scratch:
        for target, files in programs.items():
            (scratch / target).mkdir(parents=True)
            for file in files:
                shutil.copy(file, scratch / target / file.name)
                if file.read_bytes()[:4] != b"\x7fELF":
                    scripts.append(f"{target}/{file.name}")
        erofs.pack(scratch, folder / "selftests.erofs", deadline=deadline)
    tests = {target: [file.name for file in files] for target, files in programs.items()}
    told = {"tests": tests, "scripts": scripts, "mended": list(mended)}
    (folder / _TOLD).write_text(json.dumps(told, indent=1) + "\n")


def load(folder: Path) -> Programs:
    """What `keep` put there."""
    told = json.loads((folder / _TOLD).read_text())
    return Programs(folder / "selftests.erofs", told["tests"], told["scripts"], told["mended"])
