# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel under test: Debian's source, our series and config fragments, kept by content.

A kernel is kept by the hash of its source package, the series, the config and
the compiler. One unpacked tree and one build folder per profile are kept too,
so that a change of the driver compiles the driver only.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import cache, erofs
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import edited, make, options, source, tree

PATCHES = Path(__file__).resolve().parents[2] / "kernel-patches"
#: Changes with the way a kernel is made of the same inputs.
_VERSION = "2"
_DEBUG = "debug"
_MUTANT = "mutant"
#: The kernels with a mutant, 40 MB each, are kept as long as so many were not used later.
MUTANTS_KEPT = 80

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Spec:
    """Which kernel. *series* is a folder named after its base version, ``7.2`` for example.

    Or one that ``ci/series edit`` made: then what stands in it counts, committed or not.
    """

    #: ``default``, or ``debug`` (lockdep, KASAN; slow).
    profile: str = "default"
    series: Path = PATCHES / "7.2"
    #: Patches of the series that are left out, by shell globs of their names.
    without: tuple[str, ...] = ()
    #: One more patch on top of the series, for the host VM's kernel (`mutant`).
    mutant: Path | None = None
    fragments: Path = PATCHES / "config"
    #: Ask the archive for a newer source package, although one is here.
    update: bool = False
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True)
class Kernel:
    """A built kernel; its files live in the cache and are never changed."""

    folder: Path
    hash: str
    release: str
    #: Package and version, ``linux-source-7.2 7.2.12-1~bpo13+1`` for example.
    source: str
    series_hash: str
    profile: str
    #: Whether it was there before the call that returned it.
    cached: bool

    @property
    def image(self) -> Path:
        """What QEMU's ``-kernel`` takes: an ELF with a PVH entry, so nothing is unpacked."""
        return self.vmlinux

    @property
    def vmlinux(self) -> Path:
        """The ELF with its symbols."""
        return self.folder / "vmlinux"

    @property
    def disk(self) -> Path:
        """An erofs that holds `image` as ``/vmlinuz``: the host VM's way to its guests' kernel."""
        return self.folder / "kernel.erofs"

    @property
    def modules(self) -> Path:
        """An erofs of this kernel's modules and ``order``, a list of them as they are loaded."""
        return self.folder / "modules.erofs"

    @property
    def config(self) -> Path:
        """The .config."""
        return self.folder / "config"

    @property
    def system_map(self) -> Path:
        """Symbols and addresses."""
        return self.folder / "System.map"

    @property
    def headers(self) -> Path:
        """The folder whose ``include`` holds the user-space headers."""
        return self.folder / "headers"

    @property
    def provenance(self) -> Path:
        """JSON: what it was made of, by what, when, in how many seconds."""
        return self.folder / "provenance.json"


def build(spec: Spec, *, deadline: Deadline, progress: Progress) -> Kernel:
    """The kernel of *spec*, built when the cache has none of the same inputs.

    *progress* gets short lines. Interrupted, it leaves no half kernel, and the
    next call goes on where this one ended; of two at once the second waits.
    Raises ConfigurationError (a fragment, a patch), RequirementError (no
    source, no compiler), ProcessFailed (it does not compile), DeadlineExceeded.
    """
    if spec.profile not in ("default", _DEBUG):
        raise ConfigurationError(f"kernel profile {spec.profile}: there are default and {_DEBUG}")
    recipe = _Recipe(spec, make.compiler(deadline), deadline)
    base = recipe.base
    known = None if spec.update else source.remembered(base)
    if known is not None:
        return recipe.get(known, deadline, progress)
    refused: ConfigurationError | None = None
    for candidate in source.offered(base, deadline):
        try:
            kernel = recipe.get(candidate, deadline, progress)
        except tree.PatchRefused as error:
            refused = refused or error
            progress(f"the series does not apply to {candidate}")
            continue
        if candidate.package != f"linux-source-{base}":
            progress(f"the archive has no linux-source-{base}: built {candidate} instead")
        return kernel
    assert refused is not None
    raise refused


def cached() -> list[Kernel]:
    """The kernels in the cache, newest first."""
    folders = [path.parent for path in (cache.root() / "kernel").glob("*/provenance.json")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [_load(folder, True) for folder in folders]


def _load(folder: Path, was_there: bool) -> Kernel:
    told: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    names = ("release", "source", "series_hash", "profile")
    return Kernel(folder, folder.name, cached=was_there, **{name: told[name] for name in names})


class _Recipe:
    """All inputs but the source, read once: what is hashed is what is built."""

    def __init__(self, spec: Spec, compiler: str, deadline: Deadline) -> None:
        self.spec = spec
        self.compiler = compiler
        if edited.is_one(spec.series):
            self.base, patch = edited.read(spec.series, deadline)
            self.patches = [patch]
        else:
            self.base = spec.series.name
            if re.fullmatch(r"\d+\.\d+", self.base) is None:
                raise ConfigurationError(
                    f"{spec.series}: a series folder is named after its kernel, 7.2 for example"
                )
            self.patches = [
                patch
                for patch in tree.read_series(spec.series)
                if not any(fnmatch.fnmatchcase(patch.name, glob) for glob in spec.without)
            ]
        if spec.mutant is not None:
            self.patches.append(spec.mutant)
        self.series_hash = cache.digest(*[patch.read_bytes() for patch in self.patches])
        found = sorted(spec.fragments.glob("*.config"))
        self.fragments = [path for path in found if path.stem != _DEBUG or spec.profile == _DEBUG]
        self.options = options.read(self.fragments)
        self.kind = "kernel" if spec.mutant is None else _MUTANT

    def get(self, wanted: source.Source, deadline: Deadline, progress: Progress) -> Kernel:
        """The kernel of this recipe and the source *wanted*."""
        fetched, deb = source.fetch(wanted, deadline, progress)
        asked = "\n".join(f"{option.name}={option.value}" for option in self.options)
        key = cache.digest(_VERSION, fetched.sha256, self.series_hash, asked, self.compiler)
        path, was_there = cache.get_or_build(
            self.kind,
            key,
            lambda folder: self._build(fetched, deb, folder, deadline, progress),
            deadline=deadline,
            on_wait=lambda: progress("waiting for another build of the same kernel"),
        )
        source.remember(self.base, fetched)
        if self.kind == _MUTANT:
            os.utime(path)
            cache.prune(_MUTANT, MUTANTS_KEPT)
        return _load(path, was_there)

    def _build(
        self,
        fetched: source.Source,
        deb: Path,
        folder: Path,
        deadline: Deadline,
        progress: Progress,
    ) -> None:
        started = time.monotonic()
        place = cache.entry("kernel-tree", fetched.key)

        def unpack(new: Path) -> None:
            progress(f"unpacking {fetched}")
            tree.unpack(deb, new / "src", deadline)

        waiting = functools.partial(progress, f"waiting for another build in the tree of {fetched}")
        cache.get_or_build("kernel-tree", fetched.key, unpack, deadline=deadline, on_wait=waiting)
        lock = cache.locked(place.parent / f".{fetched.key}.work", deadline, waiting)
        with cache.explained(place), lock:
            progress(f"applying {len(self.patches)} patches")
            kept = tree.Tree(place)
            kept.apply(self.patches, deadline)
            built = make.Build(kept.src, place / f"build-{self.spec.profile}", self.spec.jobs)
            progress(f"configuring: {len(self.options)} options asked for")
            built.configure(self.options, deadline)
            progress("compiling the kernel")
            built.compile(deadline, progress)
            _collect(built, folder, deadline)
        told = {
            "release": built.release(),
            "source": str(fetched),
            "source_sha256": fetched.sha256,
            "suite": fetched.suite,
            "series": [path.name for path in self.patches],
            "series_hash": self.series_hash,
            "profile": self.spec.profile,
            "fragments": [path.name for path in self.fragments],
            "compiler": self.compiler,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - started, 1),
        }
        (folder / "provenance.json").write_text(json.dumps(told, indent=1) + "\n")


def _collect(built: make.Build, folder: Path, deadline: Deadline) -> None:
    """Copy what is kept of a finished build into *folder*."""
    for name, kept in (("vmlinux", "vmlinux"), (".config", "config"), ("System.map", "System.map")):
        shutil.copy(built.out / name, folder / kept)
    shutil.copytree(built.out / "usr/include", folder / "headers/include", ignore=_not_headers)
    with cache.scratch("kernel") as scratch:
        shutil.copy(folder / "vmlinux", scratch / "vmlinuz")
        erofs.pack(scratch, folder / "kernel.erofs", deadline=deadline)
    with cache.scratch("kernel") as scratch:
        modules = built.modules()
        for module in modules:
            shutil.copy(module, scratch)
        (scratch / "order").write_text("".join(f"{module.name}\n" for module in modules))
        erofs.pack(scratch, folder / "modules.erofs", deadline=deadline)


def _not_headers(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if "." in name and not name.endswith(".h")]
