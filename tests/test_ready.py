# SPDX-License-Identifier: GPL-2.0-or-later
"""``--kernel image:``: what a ready image is, and what it lacks, said before anything boots."""

from __future__ import annotations

import gzip
import subprocess
import zlib
from pathlib import Path

import pytest

from qemu_ioasid import kernel
from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.kernel import Kernel, options, ready
from tests.conftest import Command

FRAGMENTS = kernel.PATCHES / "config"
VERSION = b"\0Linux version 7.2.99-x (somebody@localhost) #1\n\0"


def bzimage(payload: bytes) -> bytes:
    """A bzImage as far as anybody here reads one."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x300 - 0x200).to_bytes(2, "little")
    head[0x248:0x250] = (16).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    head[0x300:0x310] = b"7.2.98-y (x@y) #"
    return bytes(head) + bytes(16) + payload


def whole(config: str) -> bytes:
    return VERSION + b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED"


@pytest.fixture
def config(built_kernel: Kernel) -> str:
    return built_kernel.config.read_text()


def without(config: str, *names: str) -> str:
    for name in names:
        config = config.replace(f"{name}=y\n", f"# {name} is not set\n")
    return config


@pytest.mark.parametrize("kind", ["vmlinux", "bzImage", "beside"])
def test_what_it_lacks_is_named(kind: str, tmp_path: Path, config: str) -> None:
    path = tmp_path / "image"
    lacking = without(config, "CONFIG_IOMMUFD", "CONFIG_VIRTIO_BLK")
    if kind == "vmlinux":
        path.write_bytes(b"\x7fELF" + whole(lacking))
    elif kind == "bzImage":
        path.write_bytes(bzimage(gzip.compress(whole(lacking)) + b"size"))
    else:
        path.write_bytes(b"\x7fELF" + VERSION)
        (tmp_path / "config-7.2.99-x").write_text(lacking)
    found = ready.read(str(path))
    assert found.release == "7.2.99-x"
    with pytest.raises(RequirementError) as refused:
        ready.check(found, FRAGMENTS)
    assert refused.value.exit_code == 3
    assert "CONFIG_IOMMUFD=n" in refused.value.message
    assert "CONFIG_VIRTIO_BLK=n" in refused.value.message
    # Ours are modules, and none were given.
    assert "CONFIG_KVM=m" in refused.value.message and "modules=DIR" in refused.value.message


def test_a_config_that_is_enough(tmp_path: Path, config: str) -> None:
    (tmp_path / "image").write_bytes(b"\x7fELF" + whole(config))
    (tmp_path / "modules.order").write_text("drivers/a.o\n")
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers/a.ko").write_text("module")
    found = ready.read(f"{tmp_path / 'image'},modules={tmp_path}")
    assert [path.name for path in found.modules] == ["a.ko"]
    assert options.parse(config) == found.config
    ready.check(found, FRAGMENTS)
    alone = ready.read(str(tmp_path / "image"))
    assert alone.content != found.content


def test_a_payload_nobody_can_unpack(tmp_path: Path) -> None:
    """It says its release all the same, and nothing is known of its options."""
    for payload in (b"\x28\xb5\x2f\xfd zstd", b"\x1f\x8b broken", zlib.compress(b"x")):
        (tmp_path / "image").write_bytes(bzimage(payload))
        found = ready.read(str(tmp_path / "image"))
        assert (found.release, found.config) == ("7.2.98-y", {})
        ready.check(found, FRAGMENTS)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("{tmp}/none", "image:.*none: No such file"),
        ("{tmp}/text", "neither a vmlinux nor a bzImage"),
        ("{tmp}/text,initrd=x", "modules=DIR, nothing else"),
        ("{tmp}/good,modules={tmp}", "modules.order: No such file"),
    ],
)
def test_no_image(word: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "good").write_bytes(b"\x7fELF" + VERSION)
    with pytest.raises(ConfigurationError, match=message):
        ready.read(word.format(tmp=tmp_path))


def test_a_rig_of_an_image(command: Command, tmp_path: Path, built_kernel: Kernel) -> None:
    """Our own kernel as somebody else would hand it over: it is a rig's like any other."""
    modules = tmp_path / "modules"
    modules.mkdir()
    argv = ["fsck.erofs", f"--extract={modules}", str(built_kernel.modules)]
    subprocess.run(argv, check=True, capture_output=True)
    (modules / "modules.order").write_text((modules / "order").read_text().replace(".ko", ".o"))
    image = f"image:{built_kernel.vmlinux},modules={modules}"
    ended = command("run", "flight", "--check", "detach", "--json", "--kernel", image)
    assert ended.code == 0, ended.err
    document = ended.json()
    assert document["versions"]["kernel"]["source"] == "image vmlinux"
    assert [check["verdict"] for check in document["checks"]] == ["pass"]
    refused = command("run", "--kernel", image, "--series", "7.2", "--report", "r")
    assert refused.code == 2 and "is built" in refused.err
