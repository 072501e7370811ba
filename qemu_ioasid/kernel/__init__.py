# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel under test: Debian's source, our series and config fragments, kept by content.

A kernel is kept by the hash of its source package, the series, the config and
the compiler. One unpacked tree and one build folder per profile are kept too,
so that a change of the driver compiles the driver only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qemu_ioasid import cache, erofs
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, DeadlineExceeded
from qemu_ioasid.kernel import gcov, make, options, ready, selftest, source, tree
from qemu_ioasid.kernel import origin as origins
from qemu_ioasid.kernel import series as serieses
from qemu_ioasid.kernel.origin import Origin
from qemu_ioasid.kernel.selftest import Programs
from qemu_ioasid.kernel.tree import Tree

PATCHES = Path(__file__).resolve().parents[2] / "kernel-patches"
#: The series that is laid over a kernel that has not what it brings (`_OURS` is a part of that).
SERIES = PATCHES / "7.2"
_OURS = "drivers/vfio/pdma/Makefile"
#: Changes with the way a kernel is made of the same inputs.
_VERSION = "2"
COVERAGE = gcov.PROFILE
#: A fragment that is named after one belongs to it alone, and has the last word in it.
PROFILES = ("default", "debug", "selftest", COVERAGE)
#: The fragment of what the series brings.
_DRIVER = "pdma"
_MUTANT = "mutant"
#: The kernels with a mutant, 40 MB each, are kept as long as so many were not used later.
MUTANTS_KEPT = 80

#: How kernels and series are named on a command line.
FORMS, SERIES_FORMS = origins.FORMS, serieses.FORMS

Progress = Callable[[str], None]

T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """Which kernel, by words as `origin.FORMS` and `series.FORMS` have them."""

    #: "": Debian's, of the version that the series is for.
    source: str = ""
    #: "": ours, on a kernel that has it not.
    series: str = ""

    #: One of `PROFILES`: ``debug`` has lockdep and KASAN, and is slow; ``selftest`` has what the
    #: kernel's own tests want, an iommufd that makes itself devices among it; ``coverage`` counts
    #: what runs of what the series touches.
    profile: str = "default"
    #: Patches of the series that are left out, by shell globs of their names.
    without: tuple[str, ...] = ()
    #: One more patch on top of the series, for the host VM's kernel (`mutant`).
    mutant: Path | None = None
    fragments: Path = PATCHES / "config"
    #: The user's own fragments: what they ask for counts more than what `fragments` do.
    config: tuple[Path, ...] = ()
    #: Ask the archive for a newer source package, although one is here.
    update: bool = False
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)

    def naming(self, source: str, series: str, folder: Path | None = None) -> Spec:
        """This one, but of the kernel and the series that are named; paths count from *folder*.

        An empty word changes nothing.
        """
        place = folder or Path.cwd()
        return dataclasses.replace(
            self,
            source=origins.anchored(source, place) or self.source,
            series=serieses.anchored(series, place) or self.series,
        )

    @property
    def words(self) -> list[str]:
        """What ``qemu-ioasid run`` is told to take it; the rest of it has no word there."""
        said: dict[str, Sequence[object]] = {
            "--profile": [self.profile],
            "--kernel": [self.source],
            "--series": [self.series],
            "--mutant": [self.mutant],
            "--config": self.config,
        }
        return [
            word
            for option, values in said.items()
            for value in values
            if value
            for word in (option, str(value))
        ]


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
    def headers(self) -> Path:
        """The folder whose ``include`` holds the user-space headers."""
        return self.folder / "headers"

    @property
    def warnings(self) -> list[str]:
        """What the compiler warned of in the files that this build compiled."""
        return list(json.loads(self.provenance.read_text()).get("warnings", ()))

    @property
    def gcov(self) -> Path:
        """The folder that tells the counts of the profile ``coverage``, and of no other."""
        return self.folder / gcov.FOLDER

    @property
    def series(self) -> list[str]:
        """The names of the patches on its source, in order."""
        return list(json.loads(self.provenance.read_text()).get("series", ()))

    @property
    def provenance(self) -> Path:
        """JSON: what it was made of, by what, when, in how many seconds."""
        return self.folder / "provenance.json"


def slowness(config: Path) -> float:
    """How many times longer than the default one a kernel of this .config may take to boot a rig.

    That much it may; the host VM of the profile ``debug`` was seen to take six times as long as the
    default one (37 s and 6 s, under TCG), and what waits for it has ten times the 6 s already.
    """
    asked = config.read_text().splitlines()
    return 4.0 if "CONFIG_KASAN=y" in asked or "CONFIG_PROVE_LOCKING=y" in asked else 1.0


def build(spec: Spec, *, deadline: Deadline, progress: Progress) -> Kernel:
    """The kernel of *spec*, built when the cache has none of the same inputs.

    *progress* gets short lines. Interrupted, it leaves no half kernel, and the
    next call goes on where this one ended; of two at once the second waits.
    Raises ConfigurationError (a fragment, a patch), RequirementError (no
    source, no compiler), ProcessFailed (it does not compile), DeadlineExceeded.
    """
    if spec.profile not in PROFILES:
        known = ", ".join(PROFILES)
        raise ConfigurationError(f"kernel profile {spec.profile}: there are {known}")
    if spec.profile == COVERAGE:
        gcov.require()
    kind, _, rest = spec.source.partition(":")
    if kind == "image":
        return _ready(rest, spec, deadline)
    return _of_source(spec, lambda recipe: recipe.get(deadline, progress), deadline, progress)


def selftests(
    spec: Spec, targets: Sequence[str], *, deadline: Deadline, progress: Progress
) -> Programs:
    """The kernel's own tests, tools/testing/selftests/TARGET of each, of what `build` builds.

    Raises as `build`, and RequirementError naming a library that they need.
    """
    selftest.require(targets)
    return _of_source(
        dataclasses.replace(spec, update=False),
        lambda recipe: recipe.selftests(targets, deadline, progress),
        deadline,
        progress,
    )


def _of_source(
    spec: Spec, act: Callable[[_Recipe], T], deadline: Deadline, progress: Progress
) -> T:
    """What *act* makes of the first source of *spec* that the series applies to."""
    compiler = make.compiler(deadline)
    word = _word(spec, deadline)
    refused: ConfigurationError | None = None
    # Who names one means that one.
    newer = not spec.source
    for origin in origins.find(word, spec.update, deadline, progress, newer):
        try:
            made = act(_Recipe(spec, origin, compiler, deadline))
        except tree.PatchRefused as error:
            refused = refused or error
            progress(f"the series does not apply to {origin}")
            continue
        if isinstance(origin, origins.Debian):
            base = word.removeprefix("debian:")
            source.remember(base, origin.fetched)
            if origin.base != base:
                progress(f"the archive has no linux-source-{base}: built {origin} instead")
        return made
    assert refused is not None
    raise refused


def _word(spec: Spec, deadline: Deadline) -> str:
    base = serieses.base(spec.series, deadline) if spec.series and not spec.source else None
    return spec.source or f"debian:{base or SERIES.name}"


def resolved(spec: Spec, *, deadline: Deadline, progress: Progress) -> tuple[str, list[Path], Tree]:
    """The words for *spec*'s source, the patches on top, and the tree that it is built in.

    The tree may hold another series, or another content of its source. Raises as `build`.
    """
    word = _word(spec, deadline)
    if word.startswith("image:"):
        raise ConfigurationError(f"{word}: is built: there is no source to lay patches over")
    origin = next(origins.find(word, spec.update, deadline, progress, not spec.source))
    patches = _patches(spec.series, origin, deadline)
    return word, patches, origins.laid_out(origin, deadline, progress)


def _ready(word: str, spec: Spec, deadline: Deadline) -> Kernel:
    """The image that *word* names, kept as one of ours is; it has no headers and no symbols."""
    if spec.series or spec.mutant or spec.config or spec.profile != "default":
        raise ConfigurationError(
            f"image:{word}: is built: no series, config, profile or coverage of it"
        )
    found = ready.read(word)
    ready.check(found, spec.fragments)

    def keep(folder: Path) -> None:
        shutil.copy(found.image, folder / "vmlinux")
        (folder / "config").write_text(
            "".join(f"{name}={value}\n" for name, value in found.config.items())
        )
        _pack(folder, found.modules, deadline)
        told = {
            "release": found.release,
            "source": f"image {found.image.name}",
            "source_hash": found.content,
            "series_hash": cache.digest(),
            "profile": "",
        }
        (folder / "provenance.json").write_text(json.dumps(told, indent=1) + "\n")

    key = cache.digest(_VERSION, "image", found.content)
    return _load(*cache.get_or_build("kernel", key, keep, deadline=deadline))


def cached() -> list[Kernel]:
    """The kernels in the cache, newest first."""
    folders = [path.parent for path in (cache.root() / "kernel").glob("*/provenance.json")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [_load(folder, True) for folder in folders]


def collect(kept: int) -> dict[Path, int]:
    """Remove all kernels but the *kept* that were used last, and trees that none left is of.

    What was removed, with its size in bytes. A tree that is being built in stays.
    """
    removed = {**cache.prune("kernel", kept), **cache.prune(_MUTANT, 0)}
    needed = {json.loads(each.provenance.read_text()).get("tree") for each in cached()}
    for kind in ("kernel-tree", "kernel-git"):
        for folder in sorted((cache.root() / kind).glob("[!.]*")):
            lock = folder.parent / f".{folder.name}.work"
            with contextlib.suppress(DeadlineExceeded):
                if folder.name not in needed:
                    with cache.locked(lock, Deadline(0.1, "removal of a tree")):
                        removed[folder] = cache.size(folder)
                        shutil.rmtree(folder, ignore_errors=True)
    return removed


def _load(folder: Path, was_there: bool) -> Kernel:
    told: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    names = ("release", "source", "series_hash", "profile")
    return Kernel(folder, folder.name, cached=was_there, **{name: told[name] for name in names})


class _Recipe:
    """All inputs, read once: what is hashed is what is built."""

    def __init__(self, spec: Spec, origin: Origin, compiler: str, deadline: Deadline) -> None:
        self.spec = spec
        self.origin = origin
        self.compiler = compiler
        self.patches = [
            patch
            for patch in _patches(spec.series, origin, deadline)
            if not any(fnmatch.fnmatchcase(patch.name, glob) for glob in spec.without)
        ]
        if spec.mutant is not None:
            self.patches.append(spec.mutant)
        self.series_hash = cache.digest(*[patch.read_bytes() for patch in self.patches])
        ours = origin.has(_OURS) or any(_OURS in tree.names(patch) for patch in self.patches)
        self.fragments, shipped = _asked(spec.fragments, spec.profile, ours)
        self.options = options.laid_over(shipped, options.read(spec.config))
        self.kind = "kernel" if spec.mutant is None else _MUTANT

    def get(self, deadline: Deadline, progress: Progress) -> Kernel:
        """The kernel."""
        asked = "\n".join(f"{option.name}={option.value}" for option in self.options)
        counting = gcov.recipe() if self.spec.profile == COVERAGE else ()
        inputs = (self.origin.content, self.series_hash, asked, self.compiler, *counting)
        key = cache.digest(_VERSION, *inputs)
        path, was_there = cache.get_or_build(
            self.kind,
            key,
            lambda folder: self._build(folder, deadline, progress),
            deadline=deadline,
            on_wait=lambda: progress("waiting for another build of the same kernel"),
        )
        if self.kind == _MUTANT:
            cache.prune(_MUTANT, MUTANTS_KEPT)
        return _load(path, was_there)

    def selftests(self, targets: Sequence[str], deadline: Deadline, progress: Progress) -> Programs:
        """Its tests; of the kernel's config they know nothing."""
        inputs = (self.origin.content, self.series_hash, self.compiler)
        key = cache.digest(selftest.VERSION, *inputs, *targets)

        def compile_them(folder: Path) -> None:
            with self._worked_in(deadline, progress) as built:
                progress(f"compiling tools/testing/selftests: {', '.join(targets)}")
                mended = selftest.mended(built.tests, targets)
                programs = built.selftests(targets, list(mended.values()), deadline)
                selftest.keep(programs, mended, folder, deadline)

        folder, _ = cache.get_or_build(selftest.KIND, key, compile_them, deadline=deadline)
        cache.prune(selftest.KIND, selftest.KEPT)
        return selftest.load(folder)

    @contextlib.contextmanager
    def _worked_in(self, deadline: Deadline, progress: Progress) -> Iterator[make.Build]:
        """The tree, holding all that is hashed and nothing else, and nobody else's meanwhile."""
        kept = origins.laid_out(self.origin, deadline, progress)
        place = kept.folder
        waiting = functools.partial(
            progress, f"waiting for another build in the tree of {self.origin}"
        )
        lock = cache.locked(place.parent / f".{place.name}.work", deadline, waiting)
        with cache.explained(place), lock:
            self.origin.renew(kept, deadline)
            progress(f"applying {len(self.patches)} patches")
            kept.apply(self.patches, deadline)
            yield make.Build(kept.src, place / f"build-{self.spec.profile}", self.spec.jobs)

    def _counted(self, built: make.Build, deadline: Deadline) -> list[gcov.Line]:
        """The lines whose counts are told, where *built* is told to count."""
        if self.spec.profile != COVERAGE:
            return []
        lines = gcov.changed(Tree(built.src.parent), self.patches, deadline)
        gcov.prepare(built, lines)
        return lines

    def _build(self, folder: Path, deadline: Deadline, progress: Progress) -> None:
        started = time.monotonic()
        with self._worked_in(deadline, progress) as built:
            counted = self._counted(built, deadline)
            progress(f"configuring: {len(self.options)} options asked for")
            built.configure(self.options, deadline)
            progress("compiling the kernel")
            built.compile(deadline, progress)
            _collect(built, folder, deadline)
            if counted:
                gcov.keep(built.out, folder / gcov.FOLDER, counted)
        told = {
            "release": built.release(),
            "source": str(self.origin),
            "source_hash": self.origin.content,
            "tree": self.origin.key,
            "series": [path.name for path in self.patches],
            "series_hash": self.series_hash,
            "profile": self.spec.profile,
            "fragments": [path.name for path in (*self.fragments, *self.spec.config)],
            "compiler": self.compiler,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - started, 1),
            "warnings": built.warnings(),
        }
        (folder / "provenance.json").write_text(json.dumps(told, indent=1) + "\n")


def _asked(folder: Path, profile: str, ours: bool) -> tuple[list[Path], list[options.Option]]:
    """The fragments in *folder* that a profile is made of, and what they ask for together.

    *ours* tells whether the kernel has the driver.
    """
    others = {*PROFILES, *([] if ours else [_DRIVER])} - {profile}
    found = [path for path in sorted(folder.glob("*.config")) if path.stem not in others]
    return found, options.read(found, folder / f"{profile}.config")


def _patches(word: str, origin: Origin, deadline: Deadline) -> list[Path]:
    """What is laid over *origin*: the series *word*, or ours where that has it not."""
    if word:
        return serieses.patches(word, deadline, origin.repository)
    own = PATCHES / origin.base
    return [] if origin.has(_OURS) else serieses.listed(own if own.is_dir() else SERIES)


def _collect(built: make.Build, folder: Path, deadline: Deadline) -> None:
    """Copy what is kept of a finished build into *folder*."""
    for name, kept in (("vmlinux", "vmlinux"), (".config", "config"), ("System.map", "System.map")):
        shutil.copy(built.out / name, folder / kept)
    shutil.copytree(built.out / "usr/include", folder / "headers/include", ignore=_not_headers)
    _pack(folder, built.modules(), deadline)


def _pack(folder: Path, modules: list[Path], deadline: Deadline) -> None:
    """Make the disks of the kernel in *folder*."""
    with cache.scratch("kernel") as scratch:
        shutil.copy(folder / "vmlinux", scratch / "vmlinuz")
        erofs.pack(scratch, folder / "kernel.erofs", deadline=deadline)
    with cache.scratch("kernel") as scratch:
        for module in modules:
            shutil.copy(module, scratch)
        (scratch / "order").write_text("".join(f"{module.name}\n" for module in modules))
        erofs.pack(scratch, folder / "modules.erofs", deadline=deadline)


def _not_headers(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if "." in name and not name.endswith(".h")]
