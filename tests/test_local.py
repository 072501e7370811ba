# SPDX-License-Identifier: GPL-2.0-or-later
"""``--host local`` on a machine that has all it takes, a rig's host VM, and on one that has not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import localhost, parts
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, RequirementError
from qemu_ioasid.kernel import Kernel, Spec
from qemu_ioasid.parts import GuestParts
from qemu_ioasid.rig import Rig
from tests.conftest import Command, progress
from tests.test_stack import CHECKS

pytestmark = pytest.mark.ioasid_rig("local.toml")

TRIAL = Path(__file__).with_name("local_trial.py")
#: Where the VM has what was exported.
PARTS = "/run/parts"
#: One guest is enough to be killed, and none to leave an mdev and a trace behind.
RIGS = {
    "one.toml": '[mdev.a]\n[guest.g1]\nmdevs = ["a"]\n[guest.g1.viommu]\ncaching-mode = true\n',
    "none.toml": "[mdev.a]\n",
}

NO_GUEST = ("--rig", "none.toml", "--accel", "tcg", "boot")
#: An mdev that somebody else made.
THEIRS = "7f3c1a52-9d1b-4a39-8a52-6d1f0a5f3b77"

Trial = Callable[..., Any]


@pytest.fixture(scope="module")
def made(built_kernel: Kernel) -> GuestParts:
    """What guests are booted from."""
    return parts.build(Spec(), deadline=Deadline(3000, "parts"), progress=progress)


@pytest.fixture(scope="module")
def exported(made: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``qemu-ioasid parts`` makes it."""
    folder = tmp_path_factory.mktemp("exported") / "parts"
    parts.export(made, folder)
    return folder


@pytest.fixture
def trial(shared_rig: Rig, exported: Path) -> Trial:
    """Tries the command in the VM, as a user of the exported folder: `local_trial`."""
    host = shared_rig.host
    there = host.ssh.output(f"ls {PARTS} 2>&1; true", Deadline(20, "ls"))
    if b"qemu-ioasid" not in there:
        # The VM's own disks are the very parts that were exported, which saves the way.
        disks = {"vmlinux": "/boot/vmlinuz", "guest.erofs": "/run/disk/guest"}
        disks["agent.erofs"] = "/run/disk/agent"
        files = {
            f"{PARTS}/{path.relative_to(exported)}": path.read_bytes()
            for path in exported.rglob("*")
            if path.is_file() and path.name not in disks
        }
        files[f"{PARTS}/trial.py"] = TRIAL.read_bytes()
        files.update({f"{PARTS}/{name}": text.encode() for name, text in RIGS.items()})
        host.ssh.put(files, Deadline(60, "copy of the program"))
        links = [f"ln -s {target} {PARTS}/{name}" for name, target in disks.items()]
        links.append(f"chmod 755 {PARTS}/qemu-ioasid")
        host.ssh.output(" && ".join(links), Deadline(20, "links"))

    def run(when: str, whom: str, number: int, *arguments: str) -> Any:
        command = (
            f"cd {PARTS} && export QEMU_IOASID_CACHE={PARTS}/cache QEMU_IOASID_TIME_SCALE=3 && "
            f"python3 trial.py {when} {whom} {number} ./qemu-ioasid run --host local "
            f"--parts {PARTS} --report {PARTS}/reports/$$ {' '.join(arguments)}"
        )
        return json.loads(host.ssh.output(command, Deadline(300, "trial in the VM")))

    return run


def test_isolation_holds_and_nothing_is_changed(trial: Trial) -> None:
    ended = trial("never", "none", 0, "--json", "isolation")
    # Progress is on standard error, and comes first.
    report = json.loads(ended["said"][ended["said"].index("\n{\n") :])
    assert ended["code"] == 0, ended["said"]
    assert "a local host is not saved" in ended["said"]
    assert [check["name"] for check in report["checks"]] == CHECKS
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts.pop("stage-host") == "skip"
    assert set(verdicts.values()) == {"pass"}
    assert "no VM with a monitor. sysfs: 1 VT-d units, scalable mode offered" in ended["said"]
    assert report["accelerator"] == "kvm"
    assert ended["after"] == ended["before"]


def test_interrupted_while_guests_boot(trial: Trial) -> None:
    ended = trial("mdev", "command", signal.SIGINT, "--rig", "one.toml", "--accel", "tcg", "boot")
    assert ended["code"] == 130, ended["said"]
    assert len(ended["broken"]["mdevs"]) == 1
    assert ended["after"] == ended["before"]


def test_killed_the_keeper_restores(trial: Trial) -> None:
    ended = trial("trace", "command", signal.SIGKILL, *NO_GUEST)
    assert ended["code"] == -signal.SIGKILL
    broken = ended["broken"]
    assert (len(broken["mdevs"]), len(broken["traces"])) == (1, 1)
    assert "access_rw" in broken["probes"]
    assert ended["after"] == ended["before"]


def test_killed_with_its_keeper_the_agent_restores(trial: Trial) -> None:
    ended = trial("trace", "keeper", signal.SIGKILL, *NO_GUEST)
    assert (len(ended["broken"]["mdevs"]), len(ended["broken"]["traces"])) == (1, 1)
    # An empty run folder waits for the next start.
    assert len(ended["after"]["runs"]) == 1
    assert {**ended["after"], "runs": None} == ended["before"]


def test_killed_with_keeper_and_agent_the_next_start_restores_and_refuses(
    trial: Trial, shared_rig: Rig
) -> None:
    killed = trial("trace", "all", signal.SIGKILL, *NO_GUEST)
    (left,) = killed["after"]["mdevs"]
    assert len(killed["after"]["traces"]) == 1
    assert killed["after"]["probes"]
    call, shell = shared_rig.host.agent.call, shared_rig.host.ssh.output
    call("mdev_create", name="theirs", uuid=THEIRS)
    shell("umount /sys/kernel/debug", Deadline(20, "umount"))
    try:
        ended = trial("never", "none", 0, "--qemu", "/bin/true", *NO_GUEST)
    finally:
        call("mdev_remove", name="theirs")
        shell("mount -t debugfs debugfs /sys/kernel/debug", Deadline(20, "mount"))
    assert ended["code"] == 3
    assert f"the mdev parent pdma for itself (it has {THEIRS}, whose" in ended["said"]
    assert "mount -t debugfs debugfs /sys/kernel/debug" in ended["said"]
    assert "a QEMU for the guests (/bin/true: does not work as a QEMU" in ended["said"]
    # Of what it found it has removed what was a run's own, and changed nothing else.
    ended["before"]["mdevs"].remove(left)
    assert ended["after"] == {**ended["before"], "traces": [], "probes": "", "runs": None}


@pytest.mark.skipif(os.path.exists("/dev/iommu"), reason="this machine has /dev/iommu")
def test_refuses_this_machine(command: Command) -> None:
    ended = command("run", "--host", "local")
    assert ended.code == 3
    assert "this machine lacks" in ended.err
    assert "/dev/iommu (CONFIG_IOMMUFD; modprobe iommufd)" in ended.err
    assert (
        "the mdev parent pdma (CONFIG_VFIO_PDMA of kernel-patches/; modprobe vfio_pdma)"
        in ended.err
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "/nowhere"], "--parts: goes with --host local"),
        (["--host", "local", "--append", "quiet"], "--append: a local host is this machine"),
        (["--host", "local", "--profile", "debug"], "--profile: a local host"),
        (["--host", "local", "--series", "7.2"], "--series: a local host"),
        (["--host", "local", "--set", "host.cpus=2"], "--set host: a local host"),
    ],
)
def test_options_that_mean_nothing(command: Command, arguments: list[str], said: str) -> None:
    ended = command("run", *arguments)
    assert ended.code == 2
    assert said in ended.err


def test_parts_are_compared(
    command: Command, made: GuestParts, exported: Path, tmp_path: Path
) -> None:
    assert parts.load(exported).versions == made.versions
    with pytest.raises(ConfigurationError, match="is not empty"):
        parts.export(made, exported)
    with pytest.raises(ConfigurationError, match="No such file"):
        parts.load(tmp_path)
    other = tmp_path / "other"
    assert command("parts", str(other)).out.endswith("run --host local --parts DIR\n")
    with open(other / "agent.erofs", "r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(RequirementError, match=r"agent\.erofs: damaged"):
        parts.load(other)
    (other / "parts.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"parts\.json: damaged"):
        parts.load(other)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (b"4,7,1500000,-;WARNING: bad\n SUBSYSTEM=pci\n", b"[    1.500000] WARNING: bad\n"),
        (b"12,8,1500000,-;WARNING: said systemd\n", b""),
        (b"11,9,2000000,-;~12ab9f\n", b"[    2.000000] ~12ab9f\n"),
    ],
)
def test_only_the_kernel_is_judged(record: bytes, line: bytes) -> None:
    assert localhost._line(record) == line
