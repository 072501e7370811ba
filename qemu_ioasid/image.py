# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM images: an erofs per role, made from Debian packages without root privileges.

``guest-images/`` says what they hold. An image is kept by the hash of what is
written there, so a machine that has one needs no network; the packages it was
really made of stand in its manifest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import archive, cache, erofs, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError

#: What the images hold is written here.
RECIPES = Path(__file__).resolve().parent.parent / "guest-images"
#: Changes with this file's way of making an image out of the same recipe.
_VERSION = "2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LOADER = f"{_LIBRARIES}/ld-linux-x86-64.so.2"
_LISTS = ("packages", "keep", "drop", "libraries", "folders")
_TABLES = ("links", "files")
_STRINGS = ("suite", "python", "compile", "applets")

#: The QEMUs the rig has copies of, by what ``--qemu`` calls them, and the image each is in.
PRIVATE_QEMUS = {"private": "host", "10.0": "qemu-10.0"}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Image:
    """A built image: *path* is the erofs, *root* the folder it was made from."""

    name: str
    path: Path
    root: Path
    #: JSON: name, hash, recipe, packages (a list of name, version, architecture, sha256).
    manifest: Path
    hash: str
    cached: bool


@dataclass(frozen=True)
class Qemu:
    """A QEMU to run: *argv* goes before its arguments, *env* into its environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    version: str


def _read(path: Path) -> dict[str, Any]:
    """One recipe file; raises ConfigurationError naming file and key."""
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    for key, value in found.items():
        if key in _LISTS:
            good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        elif key in _TABLES:
            good = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        elif key in _STRINGS:
            good = isinstance(value, str)
        else:
            raise ConfigurationError(f"{path}: {key}: unknown key")
        if not good:
            raise ConfigurationError(f"{path}: {key}: not of strings")
    return found


def recipe(name: str, recipes: Path = RECIPES) -> dict[str, Any]:
    """``common.toml`` and ``<name>.toml`` put together, with the files' bytes in base64.

    Raises ConfigurationError for a file that is missing or wrong.
    """
    own = _read(recipes / f"{name}.toml")
    whole = _read(recipes / "common.toml")
    for key in _LISTS:
        whole[key] = [*whole.get(key, []), *own.pop(key, [])]
    for key in _TABLES:
        whole[key] = {**whole.get(key, {}), **own.pop(key, {})}
    whole.update(own)
    for key in _STRINGS:
        if key not in whole:
            raise ConfigurationError(f"{recipes / 'common.toml'}: {key}: missing")
    for where, source in whole["files"].items():
        try:
            content = (recipes / source).read_bytes()
            mode = os.stat(recipes / source).st_mode & 0o111
        except OSError as error:
            raise ConfigurationError(f"{recipes / source}: {error.strerror}") from None
        whole["files"][where] = [base64.b64encode(content).decode(), 0o755 if mode else 0o644]
    return whole


def build(name: str, *, deadline: Deadline, progress: Progress, recipes: Path = RECIPES) -> Image:
    """The image *name* (``host`` or ``guest``), made when the cache has none of its recipe.

    A build that was interrupted leaves nothing; of two at once the second waits
    for the first. Raises ConfigurationError (the recipe), RequirementError (no
    archive, no tool), DeadlineExceeded.
    """
    whole = recipe(name, recipes)
    key = cache.digest(_VERSION, json.dumps(whole, sort_keys=True))

    def make(folder: Path) -> None:
        _make(name, whole, folder, deadline, progress)

    path, cached = cache.get_or_build(
        f"image-{name}",
        key,
        make,
        deadline=deadline,
        on_wait=lambda: progress(f"waiting for another build of the {name} image"),
    )
    manifest = path / "manifest.json"
    hash_ = json.loads(manifest.read_text())["hash"]
    return Image(name, path / f"{name}.erofs", path / "root", manifest, hash_, cached)


def private_qemu(
    name: str = "private", *, deadline: Deadline, progress: Progress, recipes: Path = RECIPES
) -> Qemu:
    """A QEMU of `PRIVATE_QEMUS`, run from the folder its image was made from, without a chroot.

    Raises what `build` raises, and ProcessFailed when it does not start.
    """
    image = PRIVATE_QEMUS[name]
    root = build(image, deadline=deadline, progress=progress, recipes=recipes).root
    return qemu_in(root, deadline)


def qemu_in(root: Path, deadline: Deadline) -> Qemu:
    """The QEMU in *root*, an image's folder. Raises ProcessFailed when it does not start."""
    share = root / "usr/share"
    argv = (
        *in_root(root, "usr/bin/qemu-system-x86_64"),
        *("-L", str(share / "qemu"), "-L", str(share / "seabios")),
    )
    # No module is in the image; without this QEMU would load those of the system's own version.
    env = {"QEMU_MODULE_DIR": str(root / _LIBRARIES / "qemu")}
    said = process.run([*argv, "--version"], env=env, deadline=deadline)
    match = re.search(r"version (\d+(?:\.\d+)+)", said)
    if match is None:
        raise InfrastructureError(f"the QEMU in {root} tells no version", evidence=said)
    return Qemu(argv, env, match.group(1))


def in_root(root: Path, program: str) -> tuple[str, ...]:
    """The words that run *program* of an extracted *root* with its own C library."""
    libraries = str(root / _LIBRARIES)
    return (str(root / _LOADER), "--library-path", libraries, str(root / program))


def _make(
    name: str, whole: dict[str, Any], folder: Path, deadline: Deadline, progress: Progress
) -> None:
    progress(f"fetching the {name} image's packages")
    tree = folder / "tree"
    archive.extract(whole["suite"], whole["packages"], tree, deadline=deadline)
    packages = _fetched(tree)
    progress(f"making the {name} image of {len(packages)} packages")
    root = folder / "root"
    root.mkdir()
    _keep(whole, tree, root, deadline)
    shutil.rmtree(tree, ignore_errors=True)
    _add(whole, root, deadline)
    modules = whole["compile"]
    compile_tree(root, whole["python"], root / modules, f"/{modules}", deadline=deadline)
    _set_modes(root)
    disk = folder / f"{name}.erofs"
    erofs.pack(root, disk, deadline=deadline)
    manifest = {
        "name": name,
        "hash": hashlib.sha256(disk.read_bytes()).hexdigest(),
        "recipe": whole,
        "packages": packages,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _fetched(tree: Path) -> list[dict[str, str]]:
    packages = []
    for line in (tree / archive.FETCHED).read_text().splitlines():
        sha256, _, file = line.partition("  ")
        name, version, rest = file.replace("%3a", ":").split("_")
        architecture = rest.removesuffix(".deb")
        packages.append(
            {"name": name, "version": version, "architecture": architecture, "sha256": sha256}
        )
    return packages


def _keep(whole: dict[str, Any], tree: Path, root: Path, deadline: Deadline) -> None:
    """Move what the recipe keeps, and the libraries it needs, from *tree* to *root*."""
    for pattern in whole["drop"]:
        for path in sorted(tree.glob(pattern)):
            _remove(path)
    kept = []
    for pattern in whole["keep"]:
        found = sorted(tree.glob(pattern))
        if not found:
            raise ConfigurationError(f"guest-images: keep: {pattern}: in none of the packages")
        kept += found
    needed = {Path(_LOADER).name, *whole["libraries"]}
    for program in _dynamic(kept):
        needed |= _needed(tree, program, deadline)
    for library in sorted(needed):
        kept += _library(tree / _LIBRARIES / library)
    for path in dict.fromkeys(kept):
        target = root / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _dynamic(paths: Iterable[Path]) -> Iterable[Path]:
    """The ELF files in *paths* and below that name a loader or libraries."""
    for path in paths:
        below = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
        for file in below:
            if file.is_file() and not file.is_symlink():
                with open(file, "rb") as stream:
                    if stream.read(4) == b"\x7fELF":
                        yield file


def _needed(tree: Path, program: Path, deadline: Deadline) -> set[str]:
    """The file names of the shared libraries that *program* is linked with, all levels down."""
    loader = [str(tree / _LOADER), "--library-path", str(tree / _LIBRARIES), "--list"]
    # A static program has no list, and the loader says so with an exit code.
    argv = ["sh", "-c", '"$@" || :', "sh", *loader, str(program)]
    text = process.run(argv, deadline=deadline)
    found = set()
    for line in text.splitlines():
        library, arrow, where = line.strip().partition(" => ")
        if arrow and where.startswith("not found"):
            raise ConfigurationError(f"guest-images: {program.name} wants {library}: not there")
        if arrow and where.startswith(str(tree)):
            found.add(Path(library).name)
    return found


def _library(path: Path) -> list[Path]:
    """A library and what its links lead to."""
    found = [path]
    while path.is_symlink():
        path = path.parent / os.readlink(path)
        found.append(path)
    return found


def _add(whole: dict[str, Any], root: Path, deadline: Deadline) -> None:
    for folder in whole["folders"]:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for where, target in whole["links"].items():
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / where).symlink_to(target)
    for where, (content, mode) in whole["files"].items():
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / where).write_bytes(base64.b64decode(content))
        (root / where).chmod(mode)
    applets = root / whole["applets"]
    for applet in process.run([str(applets), "--list"], deadline=deadline).split():
        link = applets.parent / applet
        if not link.exists() and not link.is_symlink():
            link.symlink_to(applets.name)


def _set_modes(root: Path) -> None:
    """Make what may be run or entered 0755 and the rest 0644, whatever the builder's umask was."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o111 else 0o644)


def compile_tree(
    root: Path, python: str, tree: Path, prefix: str, *options: str, deadline: Deadline
) -> None:
    """Byte code beside each module of *tree*, by *root*'s own *python*.

    Unchecked, since the files in an image never change. Tracebacks name a file
    by its path below *tree*, with *prefix* before it. *options* are compileall's.
    """
    # One process, one order, one hash seed: the same sources give the same bytes.
    flags = ["-q", "-f", "-j1", "--invalidation-mode=unchecked-hash", "-s", str(tree), "-p", prefix]
    program = [*in_root(root, python), "-s", "-S", "-m", "compileall"]
    process.run(
        [*program, *flags, *options, str(tree)],
        env={"PYTHONHOME": str(root / "usr"), "PYTHONPATH": "", "PYTHONHASHSEED": "0"},
        deadline=deadline,
    )
