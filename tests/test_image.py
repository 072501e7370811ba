# SPDX-License-Identifier: GPL-2.0-or-later
"""The images, really made: the same bytes twice, without root, with a key dropbear takes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from qemu_ioasid import image, process, ssh
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError, RequirementError


def _build(name: str) -> image.Image:
    return image.build(name, deadline=Deadline(300, f"{name} image"), progress=print)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy of ``guest-images`` to spoil."""
    return Path(shutil.copytree(image.RECIPES, tmp_path / "guest-images"))


def _as_nobody(cache: Path) -> str:
    """The guest image's hash, made by a process that is not root; the child never returns."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.environ.update(QEMU_IOASID_CACHE=str(cache), HOME=str(cache))
            os.environ.pop("XDG_RUNTIME_DIR", None)
            # The interpreter may lie where only root may look; the keeper is plain Python.
            sys.executable = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
            os.write(write_end, _build("guest").hash.encode())
            process.close_run()
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    with open(read_end) as stream:
        return stream.read()


@pytest.mark.skipif(os.getuid() != 0, reason="every test here is unprivileged already")
def test_without_root_the_same_bytes() -> None:
    # Below /tmp: pytest's own folders are closed to other users.
    place = Path(f"/tmp/qemu_ioasid-test-{os.getpid()}")
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    try:
        assert _as_nobody(place) == _build("guest").hash
    finally:
        shutil.rmtree(place)


def test_the_same_bytes_twice(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _build("guest")
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path_factory.mktemp("elsewhere")))
    before = os.umask(0o077)
    try:
        second = _build("guest")
    finally:
        os.umask(before)
    assert not second.cached
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.hash == second.hash


def test_warm_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("host", "guest"):
        _build(name)

    def no(*arguments: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("qemu_ioasid.archive._mmdebstrap", no)
    started = time.monotonic()
    assert _build("host").cached
    assert _build("guest").cached
    assert time.monotonic() - started < 1


def test_the_manifest_names_every_package() -> None:
    told = json.loads(_build("host").manifest.read_text())
    packages = {package["name"]: package for package in told["packages"]}
    assert {"busybox-static", "dropbear-bin", "python3-minimal", "qemu-system-x86"} <= set(packages)
    assert all(len(package["sha256"]) == 64 for package in packages.values())
    assert told["hash"] == _build("host").hash


@pytest.mark.parametrize(
    ("name", "version", "properties"),
    [
        ("private", "11.", {"scalable-mode", "fsts", "pasid-bits"}),
        ("10.0", "10.0.", {"x-scalable-mode", "x-flts", "x-pasid-mode"}),
    ],
)
def test_the_private_qemus(name: str, version: str, properties: set[str]) -> None:
    found = image.private_qemu(name, deadline=Deadline(300, "QEMU"), progress=print)
    assert found.version.startswith(version)
    devices = process.run(
        [*found.argv, "-machine", "none", "-device", "intel-iommu,help"],
        env=found.env,
        deadline=Deadline(30, "QEMU's properties"),
    )
    assert all(f"{each}=" in devices for each in properties)


def test_dropbear_takes_our_host_key(tmp_path: Path) -> None:
    """And the login's other half: our SSH accepts that key and no other."""
    dropbear = image.in_root(_build("guest").root, "usr/sbin/dropbear")
    made, other = ssh.generate(), ssh.generate()
    (tmp_path / "key").write_bytes(made.dropbear())
    for expected, message in ((made, "login refused"), (other, "host key is not the one")):
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [*dropbear, "-i", "-E", "-s", "-r", str(tmp_path / "key")]
            with (
                process.spawn(argv, stdin=theirs.fileno(), stdout=theirs.fileno()),
                pytest.raises(InfrastructureError, match=message),
                ssh.connect(ours, "vm", expected, ssh.generate(), Deadline(20, "login")),
            ):
                pass


def test_a_wrong_recipe_is_named(recipes: Path) -> None:
    def refused(text: str, reason: str) -> None:
        (recipes / "guest.toml").write_text(text)
        with pytest.raises(ConfigurationError, match=reason):
            image.recipe("guest", recipes)

    refused("packages = 7", r"guest\.toml: packages: not of strings")
    refused("package = []", r"guest\.toml: package: unknown key")
    refused("= broken", r"guest\.toml: Invalid")
    refused('files = {"etc/x" = "files/none"}', r"files/none: No such file")
    (recipes / "guest.toml").unlink()
    with pytest.raises(ConfigurationError, match=r"guest\.toml: No such file"):
        image.recipe("guest", recipes)


def test_a_package_that_does_not_exist(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path / "cache"))
    (recipes / "guest.toml").write_text('packages = ["no-such-package-here"]')
    deadline = Deadline(120, "image")
    with pytest.raises(RequirementError, match=r"no-such-package-here"):
        image.build("guest", deadline=deadline, progress=print, recipes=recipes)
    assert not list((tmp_path / "cache/image-guest").glob("[!.]*"))
