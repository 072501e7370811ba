# SPDX-License-Identifier: GPL-2.0-or-later
"""Rig files: what is read, and what is refused naming file, key and reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_ioasid import config, hostvm, session
from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.qemu import Qemu
from qemu_ioasid.scenarios import SCENARIOS
from qemu_ioasid.viommu import Viommu

#: Properties of intel-iommu as `device-list-properties` gave them (docs/facts.md).
QEMU_10_0 = frozenset(
    "x-scalable-mode x-flts x-pasid-mode eim aw-bits caching-mode device-iotlb dma-translation "
    "intremap snoop-control stale-tm fs1gp dma-drain pt x-buggy-eim version".split()
)
QEMU_11_1 = frozenset(
    "scalable-mode fsts pasid-bits svm eim aw-bits caching-mode device-iotlb dma-translation "
    "intremap snoop-control stale-tm fs1gp version".split()
)


def test_default_rig_suits_the_default_scenario() -> None:
    found = config.load(config.DEFAULT)
    assert list(found.guests) == ["g1", "g2"]
    assert found.guests["g1"].mdevs == ("a", "b")
    assert found.host.cpus == 0
    SCENARIOS["isolation"].rows(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[host", "rig.toml: "),
        ("hots = 1", "rig.toml: hots: unknown key; known are guest, host, mdev"),
        ("[host]\ncpu = 1", "rig.toml: host.cpu: unknown key"),
        ("host = 3", "rig.toml: host: must be a table"),
        ('[host]\ncpus = "1"', "rig.toml: host.cpus: must be a whole number"),
        ("[host]\ncpus = true", "rig.toml: host.cpus: must be a whole number"),
        ("[host]\ncpus = 65", "rig.toml: host.cpus: must be from 1 to 64"),
        ("[host]\nmemory = 512", "rig.toml: host.memory: must be a size"),
        ('[host]\nmemory = "64M"', "rig.toml: host.memory: 64M is too little"),
        ("[host.viommu]\nfsts = 1", "rig.toml: host.viommu.fsts: must be true or false"),
        ("[host.viommu]\nflts = true", "rig.toml: host.viommu.flts: unknown key"),
        ("[guest.G1]", "rig.toml: guest.G1: a name is"),
        ("[guest.host]", "rig.toml: guest.host: host is the host VM's name"),
        ("[mdev.a]\ntype = 'x'", "rig.toml: mdev.a.type: unknown key"),
        ("[guest.g1]\nmdevs = 'a'", "rig.toml: guest.g1.mdevs: must be a list of strings"),
        ("[guest.g1]\nmdevs = ['a']", "rig.toml: guest.g1.mdevs: no mdev a in this file"),
        (
            '[guest.g1]\nmemory = "4G"',
            "rig.toml: guest.g1.memory: must be from 96M to 2G, and even",
        ),
        (
            "[mdev.a]\n[guest.g1]\nmdevs = ['a']\n[guest.g1.viommu]\ncaching-mode = true\n"
            "[guest.g2]\nmdevs = ['a']",
            "rig.toml: guest.g2.mdevs: a is guest g1's already",
        ),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.parse(text, "rig.toml")
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("scalable-mode = false", "scalable-mode"),
        ("scalable-mode = false\nfsts = true", "scalable-mode"),
        ("pasid-bits = 21", "pasid-bits"),
        ("pasid-bits = -1", "pasid-bits"),
        ("fsts = true\naw-bits = 39", "aw-bits"),
        ("aw-bits = 47", "aw-bits"),
        ("svm = true", "svm"),
        ("svm = true\nfsts = true\ndevice-iotlb = true", "svm"),
        ("eim = true\nintremap = false", "eim"),
        ("dma-translation = false", "dma-translation"),
        ("fsts = true", "fsts"),
        ("", "caching-mode"),
    ],
)
def test_impossible_viommu(options: str, key: str) -> None:
    text = f"[mdev.a]\n[guest.g1]\nmdevs = ['a']\n[guest.g1.viommu]\n{options}\n"
    if key != "caching-mode":
        text += "caching-mode = true\n"
    with pytest.raises(ConfigurationError, match=rf"^rig.toml: guest.g1.viommu.{key}: "):
        config.parse(text, "rig.toml")


def test_changes_are_laid_over_the_file() -> None:
    text = config.DEFAULT.read_text()
    changes = {"host.viommu.fsts": "true", "guest.*.memory": "96M", "guest.g2.cpus": "2"}
    found = config.parse(text, "rig.toml", changes)
    assert found.host.viommu.fsts and found.host.viommu.scalable_mode
    assert [guest.memory >> 20 for guest in found.guests.values()] == [96, 96]
    assert [guest.cpus for guest in found.guests.values()] == [1, 2]
    # What is kept of it says so, and is a rig file still.
    assert "# changed: host.viommu.fsts = 'true'" in found.text
    assert config.parse(found.text, "rig.toml").mdevs == found.mdevs


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("host.viommu.nonesuch", "1", ": host.viommu.nonesuch: unknown key"),
        ("nonesuch", "1", ": nonesuch: unknown key"),
        ("host.cpus", "many", ": host.cpus: must be a whole number"),
        ("host.cpus", "1\nmemory = 2", ": host.cpus: must be a whole number"),
    ],
)
def test_a_change_that_cannot_be(key: str, value: str, message: str) -> None:
    text = config.DEFAULT.read_text()
    with pytest.raises(ConfigurationError) as caught:
        config.parse(text, "rig.toml", {key: value})
    # The file itself is right.
    assert caught.value.message.startswith(f"rig.toml with {key}={value}{message}")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("host.memory.low", "no such key"),
        ("guest.g3.cpus", "no guest g3 in this file"),
        ("mdev.z.size", "no mdev z in this file"),
    ],
)
def test_a_change_of_what_is_not_there(key: str, message: str) -> None:
    """A guest that only a misspelt name has made would be booted."""
    with pytest.raises(ConfigurationError) as caught:
        config.parse(config.DEFAULT.read_text(), "rig.toml", {key: "1"})
    assert caught.value.message == f"rig.toml: {key}: {message}"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no\.toml: No such file"):
        config.load(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        config.load(tmp_path / "bad.toml")


def test_either_spelling() -> None:
    options = Viommu(fsts=True, pasid_bits=20, caching_mode=True)
    new = options.device(QEMU_11_1)
    assert "scalable-mode=on" in new and "fsts=on" in new and "pasid-bits=20" in new
    old = options.device(QEMU_10_0)
    assert "x-scalable-mode=on" in old and "x-flts=on" in old and "x-pasid-mode=on" in old
    assert ",svm" not in old


def test_what_a_qemu_cannot_do_is_a_requirement() -> None:
    options = Viommu(fsts=True, pasid_bits=4, device_iotlb=True, svm=True)
    assert "svm=on" in options.device(QEMU_11_1)
    with pytest.raises(RequirementError, match="svm"):
        options.device(QEMU_10_0)


def test_two_vcpus_with_two_guests_only_without_tcg() -> None:
    qemu = Qemu(("qemu",), "11.1.3", QEMU_11_1)
    asked = config.parse("[host]\ncpus = 2\n[guest.g1]\n[guest.g2]\n", "rig.toml")
    with pytest.raises(ConfigurationError, match=r"host\.cpus"):
        session.check(asked, qemu, "tcg")
    session.check(asked, qemu, "kvm")
    session.check(config.parse("[host]\ncpus = 2\n[guest.g1]\n", "rig.toml"), qemu, "tcg")
    silent = config.shape({"g1": [], "g2": []})
    session.check(silent, qemu, "tcg")
    assert [hostvm.cpus(silent.host, each) for each in ("tcg", "kvm")] == [1, 2]
    assert hostvm.cpus(asked.host, "tcg") == 2
