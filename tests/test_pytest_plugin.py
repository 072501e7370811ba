# SPDX-License-Identifier: GPL-2.0-or-later
"""The pytest plugin as its users run it: pytest in a process of its own, on real rigs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from qemu_ioasid import reaper

ROOT = Path(__file__).parents[1]
(NEWCOMERS,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

OUTCOMES = """
import pytest
from qemu_ioasid.rig import copy

pytestmark = pytest.mark.ioasid_rig(mdevs=["m"])

def test_first(shared_rig):
    registrar = shared_rig.registrar
    shared_rig.host.agent.call("device_open", name="m")
    pasid = registrar.alloc("agent:m")
    registrar.register("m", "agent:m", pasid, registrar.ioas("agent:m"))
    registrar.raw_attach("m", 77, registrar.ioas("agent:m"))
    test_first.host = shared_rig.host

def test_second_finds_the_same_rig_empty(shared_rig):
    assert shared_rig.host is test_first.host
    assert shared_rig.registrar.kernel_table() == []
    assert shared_rig.registrar.alloc("x") > 0

def test_mdev(mdev, shared_rig):
    (done,) = mdev.submit(copy(5, 0, 64, 64))
    assert done["status"] == "REFUSED"

def test_own(rig, host):
    assert host is rig.host
    assert host is not test_first.host

def test_kernel_warns(shared_rig):
    shared_rig.host.agent.call("mark", text="WARNING: made up by a test")

def test_after_the_warning(shared_rig):
    assert shared_rig.host is not test_first.host

def test_fails(rig):
    assert rig.mdevs == {}

@pytest.mark.ioasid_requires("kvm" if ACCELERATOR == "tcg" else "tcg")
def test_lacks(rig):
    pass

@pytest.mark.ioasid_requires("pasid-bits=20", "fsts", "svm")
def test_has(shared_rig):
    pass

@pytest.mark.ioasid_requires("fast")
def test_misspelt(shared_rig):
    pass

@pytest.mark.ioasid_requires("pasid-bits=999")
def test_too_many(shared_rig):
    pass

@pytest.mark.ioasid_rig("nonesuch.toml")
def test_no_such_file(rig):
    pass
"""


def _pytest(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=junit.xml"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    outside.pop("CI", None)
    return subprocess.run(
        [*argv, *arguments],
        cwd=folder,
        env={**outside, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _cases(folder: Path) -> dict[str, ElementTree.Element]:
    tree = ElementTree.parse(folder / "junit.xml")
    return {str(case.get("name")): case for case in tree.iter("testcase")}


def test_a_newcomers_test_two_at_a_time(tmp_path: Path) -> None:
    assert len([line for line in NEWCOMERS.splitlines() if line.strip()]) <= 15
    for name in ("test_mine.py", "test_yours.py"):
        (tmp_path / name).write_text(NEWCOMERS)
    ended = _pytest(tmp_path, "-n", "2")
    assert ended.returncode == 0, ended.stdout
    assert "2 passed" in ended.stdout
    for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase"):
        told = {str(each.get("name")): str(each.get("value")) for each in case.iter("property")}
        assert told["ioasid.kernel"].startswith("7.")
        assert told["ioasid.accelerator"] in ("tcg", "kvm")
        assert "pasid-bits=20" in told["ioasid.viommu.g1"]
        assert {"ioasid.qemu", "ioasid.series", "ioasid.viommu.host"} <= set(told)
    assert not (tmp_path / "reports").exists(), "a test that passed leaves nothing"


def test_outcomes(tmp_path: Path, accelerator: str) -> None:
    (tmp_path / "test_it.py").write_text(f"ACCELERATOR = {accelerator!r}\n{OUTCOMES}")
    ended = _pytest(tmp_path, "-v", "--ioasid-report=kept", "--ioasid-keep-rig")
    found = dict(re.findall(r"::(\w+) (PASSED|FAILED|ERROR|SKIPPED)", ended.stdout))
    assert found == {
        **dict.fromkeys(("test_first", "test_second_finds_the_same_rig_empty"), "PASSED"),
        **dict.fromkeys(("test_mdev", "test_own", "test_after_the_warning"), "PASSED"),
        **dict.fromkeys(("test_kernel_warns", "test_fails"), "FAILED"),
        "test_lacks": "SKIPPED",
        "test_has": "PASSED",
        **dict.fromkeys(("test_misspelt", "test_too_many", "test_no_such_file"), "ERROR"),
    }, ended.stdout
    cases = _cases(tmp_path)
    warned = cases["test_kernel_warns"].find("failure")
    assert warned is not None
    assert "host: WARNING: WARNING: made up by a test" in str(warned.get("message"))
    assert "nonesuch.toml: No such file" in ended.stdout
    assert "ioasid_requires: fast: unknown" in ended.stdout
    assert "Traceback" not in ended.stdout
    for name in ("test_kernel_warns", "test_fails"):
        (folder,) = (tmp_path / "kept").glob(f"*{name}")
        assert (folder / "host.console.log").exists()
        assert json.loads((folder / "report.json").read_text())["exit_code"] == 1
        assert (folder / "snapshot/snapshot.json").exists()
        assert f"lab open kept/{folder.name}" in ended.stdout


def test_what_is_missing_fails_in_ci(tmp_path: Path, accelerator: str) -> None:
    other = "kvm" if accelerator == "tcg" else "tcg"
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.ioasid_rig()\n"
        f"@pytest.mark.ioasid_requires({other!r})\ndef test_it(rig): pass\n"
    )
    ended = _pytest(tmp_path, CI="true")
    assert "1 error" in ended.stdout
    assert f"runs under {accelerator}, not {other}" in ended.stdout


def test_a_matrix(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.ioasid_rig()\n"
        "def test_it(shared_rig, host):\n"
        "    print('MODE', 'fsts=on' in (shared_rig.logs / 'host.qemu.txt').read_text())\n"
    )
    (tmp_path / "matrix.toml").write_text(
        "[qemu.private]\nprogram = 'private'\n"
        "[viommu.second]\n[viommu.first]\n'host.viommu.fsts' = true\n"
    )
    ended = _pytest(tmp_path, "-v", "-s", "--ioasid-matrix=matrix.toml")
    assert ended.returncode == 0, ended.stdout
    modes = re.findall(r"test_it\[private-(\w+)\] .*?MODE (\w+)", ended.stdout, re.DOTALL)
    assert modes == [("second", "False"), ("first", "True")]
    (tmp_path / "matrix.toml").write_text("[qemus.x]\n")
    ended = _pytest(tmp_path, "--ioasid-matrix=matrix.toml")
    assert ended.returncode == 4
    assert "qemus: unknown; known are kernel, qemu, viommu" in ended.stderr


def test_a_killed_worker_leaves_nothing(tmp_path: Path) -> None:
    """SIGKILL of a pytest-xdist worker in mid-test: within 5 s its VM and folders are gone."""
    (tmp_path / "test_it.py").write_text(
        "import pytest, time\n@pytest.mark.ioasid_rig()\n"
        "def test_it(rig):\n    open('up', 'w').close()\n    time.sleep(300)\n"
    )
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "up").exists():
            assert time.monotonic() < end and run.poll() is None
            time.sleep(0.05)
        base = runtime / "qemu_ioasid"
        (token,) = os.listdir(base)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        end = time.monotonic() + 5
        while reaper.marked(token) or (base / token).exists():
            assert time.monotonic() < end, (reaper.marked(token), os.listdir(base))
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()


@pytest.fixture
def accelerator(pytestconfig: pytest.Config) -> str:
    """What rigs here run under."""
    from qemu_ioasid import config
    from qemu_ioasid.pytest_plugin import _options, _pool

    parts = _pool(pytestconfig).parts(config.shape({}), _options(pytestconfig))
    return parts.accelerator
