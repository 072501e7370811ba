# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel that somebody else has built: its image, its modules, and what it lacks for a rig."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.kernel import options

#: What init needs before it can load a module, and the rig to reach it.
_BUILT_IN = (
    *("VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_CONSOLE", "EROFS_FS", "DEVTMPFS", "TMPFS", "PROC_FS"),
    *("SYSFS", "UNIX", "BINFMT_ELF", "BINFMT_SCRIPT", "SERIAL_8250_CONSOLE", "UNIX98_PTYS"),
)
#: Which fragments a rig cannot do without, in an image or in its modules.
_NEEDED = ("iommu", "vfio", "hugetlb", "kvm")
_RELEASE = re.compile(rb"Linux version (\S+) \(")
#: CONFIG_IKCONFIG, kernel/configs.c.
_IKCONFIG = b"IKCFG_ST"
#: Documentation/arch/x86/boot.rst, offsets in a bzImage.
_SETUP_SECTS, _MAGIC, _KERNEL_VERSION, _PAYLOAD = 0x1F1, 0x202, 0x20E, 0x248


@dataclass(frozen=True)
class Ready:
    """An image and its modules in the order in which they are loaded.

    *config*: of each option its value, none known where neither the image has it (IKCONFIG) nor
    the folders around it.
    """

    image: Path
    modules: list[Path]
    release: str
    content: str
    config: Mapping[str, str] = field(default_factory=dict)


def read(word: str) -> Ready:
    """What ``PATH[,modules=DIR]`` names; raises ConfigurationError for what is no kernel image."""
    name, _, rest = word.partition(",")
    folder = rest.removeprefix("modules=")
    if rest and (folder == rest or not folder):
        raise ConfigurationError(f"image:{word}: after the path comes modules=DIR, nothing else")
    path = Path(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"image:{path}: {error.strerror}") from None
    whole = data if data.startswith(b"\x7fELF") else _unpacked(data)
    release = _release(data, whole)
    if not release:
        raise ConfigurationError(f"image:{path}: neither a vmlinux nor a bzImage")
    modules = _modules(Path(folder)) if folder else []
    hasher = hashlib.sha256(data)
    for module in modules:
        hasher.update(module.name.encode() + module.read_bytes())
    return Ready(path, modules, release, hasher.hexdigest(), _config(path, release, whole))


def check(ready: Ready, fragments: Path) -> None:
    """Raises RequirementError naming what a rig needs and the image, by its config, lacks."""
    if not ready.config:
        return
    enough = ("y", "m") if ready.modules else ("y",)
    wanted: dict[str, tuple[str, ...]] = {f"CONFIG_{name}": ("y",) for name in _BUILT_IN}
    for option in options.read(fragments / f"{name}.config" for name in _NEEDED):
        if option.value in ("y", "m"):
            wanted.setdefault(option.name, enough)
    lacking = [
        f"{name}={found}" if (found := ready.config.get(name)) else name
        for name, values in wanted.items()
        if ready.config.get(name) not in values
    ]
    if lacking:
        hint = "" if ready.modules else " (built in, or modules=DIR)"
        raise RequirementError(
            f"image:{ready.image}: kernel {ready.release} lacks {', '.join(lacking)}{hint}"
        )


def _modules(folder: Path) -> list[Path]:
    """Those of a build or of an installed tree, by its modules.order."""
    try:
        names = (folder / "modules.order").read_text().split()
    except OSError as error:
        raise ConfigurationError(f"modules={folder}: modules.order: {error.strerror}") from None
    found = [(folder / name).with_suffix(".ko") for name in names]
    for module in found:
        if not module.is_file():
            raise ConfigurationError(f"modules={folder}: {module.name}: no such module, unpacked")
    return found


def _release(data: bytes, whole: bytes) -> str:
    found = _RELEASE.search(whole)
    if found:
        return found[1].decode(errors="replace")
    if data[_MAGIC : _MAGIC + 4] == b"HdrS":
        at = int.from_bytes(data[_KERNEL_VERSION : _KERNEL_VERSION + 2], "little") + 0x200
        return data[at : at + 100].split(b" ")[0].decode(errors="replace")
    return ""


def _unpacked(data: bytes) -> bytes:
    """A bzImage's payload, empty where it is packed in a way that Python does not know."""
    if data[_MAGIC : _MAGIC + 4] != b"HdrS":
        return b""
    offset, length = (
        int.from_bytes(data[at : at + 4], "little") for at in (_PAYLOAD, _PAYLOAD + 4)
    )
    start = (data[_SETUP_SECTS] + 1) * 512 + offset
    payload = data[start : start + length]
    try:
        if payload.startswith(b"\x1f\x8b"):
            # The size follows it, which is none of gzip's.
            return zlib.decompressobj(31).decompress(payload)
        if payload.startswith(b"\xfd7zXZ"):
            return lzma.LZMADecompressor().decompress(payload)
    except (zlib.error, lzma.LZMAError):
        pass
    return b""


def _config(path: Path, release: str, whole: bytes) -> Mapping[str, str]:
    """The image's own, or the file that is its neighbour in /boot or where it was built."""
    text = None
    start = whole.find(_IKCONFIG)
    if start >= 0:
        text = gzip.decompress(whole[start + len(_IKCONFIG) : whole.find(b"IKCFG_ED", start)])
    places = [path.with_name(name) for name in (f"config-{release}", "config", ".config")]
    if path.name == "bzImage" and len(path.absolute().parents) > 3:
        places.append(path.absolute().parents[3] / ".config")
    for place in places:
        if text is None and place.is_file():
            text = place.read_bytes()
    try:
        return options.parse((text or b"").decode(errors="replace"))
    except ValueError:
        return {}
