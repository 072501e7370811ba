# SPDX-License-Identifier: GPL-2.0-or-later
"""The command as a careless user meets it: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_ioasid import session
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import Kernel
from tests.conftest import Command


def one_line(text: str) -> str:
    """The only line of *text*."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_help_tells_the_exit_codes(command: Command) -> None:
    ended = command("--help")
    assert ended.code == 0
    assert "5  the kernel under test failed to boot or broke" in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonesuch"],
        ["run", "--accel", "xen"],
        ["run", "--nonesuch"],
        ["run", "--set", "x"],
        ["kernel"],
    ],
)
def test_usage_is_exit_2(command: Command, arguments: list[str]) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_broken_toml_is_exit_2_in_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "rig.toml").write_text("[host\n")
    ended = command("run", "--rig", "rig.toml")
    assert ended.code == 2
    assert one_line(ended.err).startswith("qemu-ioasid: rig.toml: ")
    assert not (tmp_path / "reports").exists()


def test_impossible_viommu_starts_nothing(command: Command, tmp_path: Path) -> None:
    (tmp_path / "rig.toml").write_text(
        "[mdev.a]\n[mdev.b]\n[mdev.c]\n[guest.g1]\nmdevs = ['a', 'b']\n[guest.g2]\nmdevs = ['c']\n"
    )
    ended = command("run", "--rig", "rig.toml", timeout=20)
    assert ended.code == 2
    assert "guest.g1.viommu.caching-mode" in one_line(ended.err)


def test_a_rig_without_the_scenarios_shape(command: Command, tmp_path: Path) -> None:
    (tmp_path / "rig.toml").write_text("[guest.g1]\n")
    ended = command("run", "--rig", "rig.toml")
    assert ended.code == 2
    assert "isolation needs two guests" in one_line(ended.err)


def test_unknown_scenario(command: Command) -> None:
    ended = command("run", "nonesuch")
    assert ended.code == 2
    assert "known are isolation" in one_line(ended.err)


def test_unknown_check(command: Command) -> None:
    ended = command("run", "--check", "intra-vm", "--check", "nonesuch")
    assert ended.code == 2
    assert "check nonesuch: unknown; there are 40" in one_line(ended.err)


def test_checks_are_listed_and_nothing_boots(command: Command, tmp_path: Path) -> None:
    ended = command("run", "attacks", "--list", "--json")
    found = ended.json()
    assert len({row["name"] for row in found}) == len(found) > 100
    assert all(row["tried"] and row["phase"] for row in found)
    one = command("run", "--list", "--check", "inter-vm-use")
    assert one.out.startswith("inter-vm-use ") and len(one.out.splitlines()) == 1
    near = command("run", "--list", "--check", "inter-vm-usd")
    assert near.code == 2 and "inter-vm-use" in one_line(near.err)
    assert not (tmp_path / "reports").exists()


def test_missing_rig_file(command: Command) -> None:
    ended = command("run", "--rig", "nonesuch.toml")
    assert ended.code == 2
    assert "nonesuch.toml: No such file" in one_line(ended.err)


def test_a_report_folder_in_use_keeps_what_is_in_it(command: Command, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("x")
    ended = command("run", "--report", "there")
    assert ended.code == 2
    assert "--report there" in one_line(ended.err)
    assert (tmp_path / "there/file").read_text() == "x"


def test_a_report_folder_is_one_runs_alone(tmp_path: Path) -> None:
    """Of two that are told the same one has it, whether it was there or not."""
    folder = session.report_folder(tmp_path / "there", "x")
    assert folder == tmp_path / "there"
    with pytest.raises(ConfigurationError, match="is there already"):
        session.report_folder(tmp_path / "there", "x")
    (tmp_path / "made").mkdir()
    session.report_folder(tmp_path / "made", "x")
    with pytest.raises(ConfigurationError, match="is there already"):
        session.report_folder(tmp_path / "made", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--kernel", "", "boot"), "--kernel: is empty"),
        (("run", "--series", ""), "--series: is empty"),
        (("run", ""), "scenario : unknown"),
        (("run", "--set", "host.memory=8192G"), "host.memory: must be at most 1024G"),
        (("run", "--replay", "/dev/null", "--seed", "3"), "--seed: a program that is replayed"),
        (("bench", "--edit", "a.c", "--restores", "3"), "--edit and --restores: one of the two"),
        (("bench", "--edit", "/etc/passwd"), "/etc/passwd: must be a path in the kernel's tree"),
        (("bench", "--edit", "../a.c"), "../a.c: must be a path in the kernel's tree"),
        (("image", "build", "--mutant", "x"), "unrecognized arguments: --mutant"),
        (("run", "--host", "local", "--config", "x"), "--config: a local host"),
    ],
)
def test_what_is_not_silently_something_else(
    command: Command, arguments: tuple[str, ...], said: str
) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert said in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("kernel list >&-", 0, ""),
        ("kernel list >/dev/full", 3, "standard output: No space left on device"),
    ],
)
def test_an_output_that_takes_nothing(
    script: str, code: int, said: str, environment: dict[str, str], built_kernel: Kernel
) -> None:
    program = f"{sys.executable} -m qemu_ioasid.cli {script}"
    done = subprocess.run(["sh", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "folder", ["/etc/passwd/x", "/etc/passwd/a/b", "/proc/x", f"none/{'../' * 20}proc/y"]
)
def test_a_report_folder_that_cannot_be(command: Command, folder: str) -> None:
    ended = command("run", "--report", folder)
    assert ended.code == 2
    assert "--report takes another folder" in one_line(ended.err)


def test_a_system_qemu_that_is_broken_is_passed_over(command: Command, tmp_path: Path) -> None:
    """The private copy is taken; the series that is no series, found next, ends the run."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu-system-x86_64").symlink_to("/bin/false")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    ended = command("run", "--accel", "tcg", "--series", "nonesuch", "--report", "r", PATH=path)
    assert ended.code == 2
    assert "does not work as a QEMU" in ended.out
    assert "series nonesuch: must be one of" in ended.err


def test_no_runtime_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ended = command("run", "--report", "r", TMPDIR="/", XDG_RUNTIME_DIR="/proc/self")
    assert ended.code == 3
    assert "XDG_RUNTIME_DIR" in ended.err


def test_a_qemu_that_is_none(command: Command, tmp_path: Path) -> None:
    assert command("run", "--qemu", "nonesuch", "--report", "r1").code == 3
    ended = command("run", "--qemu", "/bin/false", "--report", "r2")
    assert ended.code == 3
    assert "does not work as a QEMU" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "r2/report.json").exists()


def test_no_qemu_of_either_kind(command: Command, tmp_path: Path) -> None:
    """Neither the system's QEMU nor the means to make the private copy: exit 3."""
    (tmp_path / "bin").mkdir()
    ended = command(
        "run", PATH=str(tmp_path / "bin"), QEMU_IOASID_CACHE=str(tmp_path / "empty-cache")
    )
    assert ended.code == 3
    assert "no QEMU to run" in ended.err
    assert "Traceback" not in ended.err


def test_a_cache_that_cannot_be_written(command: Command) -> None:
    ended = command("run", "--qemu", "private", QEMU_IOASID_CACHE="/proc/cache")
    assert ended.code == 3
    assert "QEMU_IOASID_CACHE" in ended.err


def test_a_bad_time_scale(command: Command) -> None:
    ended = command("run", QEMU_IOASID_TIME_SCALE="fast")
    assert ended.code == 2
    assert "QEMU_IOASID_TIME_SCALE=fast" in ended.err
