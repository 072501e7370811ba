# SPDX-License-Identifier: GPL-2.0-or-later
"""Avocado as a user runs it, on the shipped examples and with the commands of docs/avocado.md."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import config
from qemu_ioasid.kernel import mutant
from tests.test_stack import Running

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOC = (ROOT / "docs/avocado.md").read_text()
DOCUMENTED = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)
    for line in block.splitlines()
]
BIN = Path(sys.executable).parent
#: The matrix, with a parameter that costs nothing for the kernel that takes minutes to build, and
#: with the same four variants each time (one may come twice): which it chose, and so which rigs are
#: restored, was chance.
MATRIX = (
    re.sub("^profile.*$", "accel [ auto, tcg ]", (EXAMPLES / "matrix.cit").read_text(), flags=re.M)
    + """
host.viommu.fsts != true || guest.*.viommu.pasid-bits != 0
host.viommu.fsts != false || guest.*.viommu.pasid-bits != 20
host.viommu.fsts != true || accel != auto
host.viommu.fsts != false || accel != tcg
"""
)


@dataclasses.dataclass
class Job:
    """An ended `avocado run`."""

    code: int
    out: str
    folder: Path

    @property
    def results(self) -> list[dict[str, Any]]:
        """results.json's tests."""
        found: list[dict[str, Any]] = json.loads((self.folder / "results.json").read_text())[
            "tests"
        ]
        return found

    @property
    def tests(self) -> dict[str, Any]:
        """The same, by their names without the number in front."""
        return {test["id"].partition("-")[2]: test for test in self.results}

    def log(self, name: str) -> str:
        """What a test told."""
        return Path(self.tests[name]["logfile"]).read_text()

    def report(self, name: str) -> Any:
        """A test's report.json."""
        return reported(self.tests[name])


def reported(test: dict[str, Any]) -> Any:
    """The report.json of a test of `Job.results`."""
    return json.loads((Path(test["logdir"]) / "report/report.json").read_text())


@pytest.fixture
def home(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A user's environment, with Avocado's own files in the test's folder and not in CI."""
    cache = os.environ.get("QEMU_IOASID_CACHE", os.path.expanduser("~/.cache/qemu_ioasid"))
    # Avocado's tasks report on a unix socket in there, and wait for ever where its path is longer
    # than 107 characters.
    with tempfile.TemporaryDirectory(prefix="avocado-") as temporary:
        yield {
            **environment,
            "HOME": str(tmp_path),
            "TMPDIR": temporary,
            "QEMU_IOASID_CACHE": cache,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "CI": "",
        }


Avocado = Callable[..., Job]


@pytest.fixture
def avocado(home: dict[str, str], tmp_path: Path) -> Avocado:
    """Runs ``avocado`` in the project's folder, and leaves nothing behind."""

    def call(*arguments: str, timeout: float = 900, **extra: str) -> Job:
        results = ["--disable-sysinfo", "--job-results-dir", str(tmp_path / "results")]
        run = [*arguments, *results] if "run" in arguments else arguments
        done = subprocess.run(
            ["avocado", *run],
            cwd=ROOT,
            env={**home, **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        base = Path(home["XDG_RUNTIME_DIR"]) / "qemu_ioasid"
        assert not base.exists(), "a run folder was left behind"
        return Job(done.returncode, done.stdout, tmp_path / "results/latest")

    return call


def documented(*words: str) -> list[str]:
    """The one command of docs/avocado.md with all these *words*, `avocado` itself left out."""
    (found,) = [line[1:] for line in DOCUMENTED if line[0] == "avocado" and set(words) <= {*line}]
    return found


# References


def test_each_check_of_a_scenario_file_is_listed(avocado: Avocado) -> None:
    listed = avocado(*documented("list"))
    assert listed.code == 0
    names = ["unregistered-a", "intra-vm", "inter-vm-use", "inter-vm-register"]
    assert listed.out.split("\n")[:-1] == [f"ioasid examples/attacks.ioasid:{n}" for n in names]


def test_rig_files_scenario_files_and_nothing_else(avocado: Avocado) -> None:
    """A folder is searched; the hosts' files and the matrix in it are no references."""
    listed = avocado("list", "examples/", "pyproject.toml").out.splitlines()
    assert {line.rpartition(":")[0] for line in listed} == {
        f"ioasid examples/{name}" for name in ("attacks.ioasid", "isolation.ioasid")
    } | {"ioasid examples/two-guests.toml"}
    assert len(listed) == 4 + 40 + 40


def test_the_shipped_rig_is_the_default_one() -> None:
    found = config.load(EXAMPLES / "two-guests.toml")
    assert found == dataclasses.replace(
        config.load(config.DEFAULT), path=found.path, text=found.text
    )


WRONG = {
    "0.ioasid": ("cheks = []", "cheks: unknown key; known are checks, rig, scenario"),
    "1.ioasid": ("checks = 'audit'", "checks: must be a list of strings"),
    "2.ioasid": ("checks = ['nonesuch']", "check nonesuch: unknown; there are 40"),
    "3.ioasid": ("scenario = 'nonesuch'", "scenario nonesuch: unknown; known are isolation"),
    "4.ioasid": ("rig = 'nonesuch.toml'", "nonesuch.toml: No such file"),
    "5.toml": ("[host]\ncpu = 1", "host.cpu: unknown key"),
    "6.toml": ("[guest.g1]", "isolation needs two guests"),
    "7.toml": ("[host", "7.toml: "),
}


def test_what_is_wrong_with_each_file_is_told(avocado: Avocado, tmp_path: Path) -> None:
    for name, (text, _) in WRONG.items():
        (tmp_path / name).write_text(text)
    job = avocado("run", *(str(tmp_path / name) for name in WRONG))
    assert job.code != 0
    told = [line for line in job.out.splitlines() if "is corrupted: " in line]
    for (name, (_, reason)), line in zip(WRONG.items(), told, strict=True):
        reference, _, why = line.partition(" is corrupted: ")
        assert f"/{name} " in reference and reason in why
    assert "Traceback" not in job.out


# Results


def test_the_examples_print_a_result_a_check(avocado: Avocado) -> None:
    job = avocado(*documented("run", "examples/attacks.ioasid"))
    assert job.code == 0, job.out
    assert len(re.findall(r"\(\d/4\) examples/attacks\.ioasid:[\w-]+: +PASS", job.out)) == 4
    for name, test in job.tests.items():
        check = name.rpartition(":")[2]
        (found,) = job.report(name)["checks"]
        assert (found["name"], found["verdict"]) == (check, "pass")
        assert f"tried: {found['tried']}" in job.log(name)
        made_with = json.loads((Path(test["logdir"]) / "whiteboard").read_text())
        assert made_with["kernel"] == job.report(name)["versions"]["kernel"]
        for vm in ("host", "g1", "g2"):
            assert (Path(test["logdir"]) / f"report/{vm}.console.log").exists()
    assert "examples/attacks.ioasid:intra-vm" in (job.folder / "results.html").read_text()
    builds = [log.read_text() for log in job.folder.glob("dependencies/*/debug.log")]
    assert len(builds) == 8
    assert sum("fulfilled from cache" in text for text in builds) == 6


def test_settings_and_one_check(avocado: Avocado, tmp_path: Path) -> None:
    command = documented("run", "--ioasid-qemu")
    job = avocado(*command, "--ioasid-report", str(tmp_path / "reports"))
    assert job.code == 0, job.out
    assert list(job.tests) == ["examples/two-guests.toml:audit"]
    (report,) = (tmp_path / "reports").glob("job-*/1-*/report.json")
    document = json.loads(report.read_text())
    assert document["versions"]["qemu"]["host"].startswith("10.0.")
    assert document["accelerator"] == "tcg"


def test_a_check_that_fails(avocado: Avocado, tmp_path: Path) -> None:
    """On a driver without its list (as tests/test_stack.py builds it)."""
    series = tmp_path / "7.2"
    shutil.copytree(ROOT / "kernel-patches/7.2", series)
    shutil.copy(mutant.find("no-list-check").patch, series)
    with open(series / "series", "a") as file:
        file.write("no-list-check.patch\n")
    job = avocado("run", "--ioasid-series", str(series), "examples/attacks.ioasid:intra-vm")
    assert job.code == 1
    (test,) = job.tests.values()
    assert test["status"] == "FAIL"
    assert "LEAK: g1 from the host: 4099 bytes" in test["fail_reason"]


def test_a_kernel_that_breaks_has_failed_its_test(avocado: Avocado) -> None:
    command = ("--ioasid-append", "root=/dev/nonesuch", "examples/attacks.ioasid:intra-vm")
    job = avocado("run", *command)
    (test,) = job.tests.values()
    assert test["status"] == "FAIL", job.out
    assert "host did not boot: panic" in test["fail_reason"]
    assert "Kernel panic" in Path(test["logfile"]).read_text()


@pytest.mark.parametrize(("ci", "status", "code"), [("", "CANCEL", 0), ("true", "ERROR", 1)])
def test_a_missing_requirement(avocado: Avocado, ci: str, status: str, code: int) -> None:
    command = ("--ioasid-qemu", "nonesuch", "examples/attacks.ioasid:intra-vm")
    job = avocado("run", *command, CI=ci)
    (test,) = job.tests.values()
    assert (test["status"], job.code) == (status, code), job.out
    assert "nonesuch: no such program" in test["fail_reason"]


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("nonesuch=1", "parameter nonesuch: unknown; known are qemu, accel"),
        ("host.viommu.nonesuch=1", "host.viommu.nonesuch: unknown key"),
        ("profile=nonesuch", "profile nonesuch: there are default, debug, selftest, coverage"),
    ],
)
def test_a_parameter_that_changes_nothing_is_an_error(
    avocado: Avocado, parameter: str, reason: str
) -> None:
    job = avocado("run", "-p", parameter, "examples/attacks.ioasid:intra-vm")
    (test,) = job.tests.values()
    assert test["status"] == "ERROR", job.out
    assert reason in test["fail_reason"]


# Ends

Start = Callable[..., Running]


@pytest.fixture
def running(home: dict[str, str]) -> Iterator[Start]:
    """Starts commands that are killed at the end if they still live."""
    started: list[Running] = []

    def start(*command: str) -> Running:
        started.append(Running(ROOT, home, "--disable-sysinfo", command=command))
        return started[-1]

    yield start
    for each in started:
        each.popen.kill()
        each.popen.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_check_ends_with_avocado(running: Start, number: signal.Signals) -> None:
    job = running("avocado", "run", "examples/attacks.ioasid:intra-vm")
    token = job.wait_for_child(b"virtserialport", 120)
    job.popen.send_signal(number)
    job.nothing_left(token)
    job.popen.wait(20)


def test_a_timeout_ends_a_check(running: Start) -> None:
    """A host VM that waits for ever is the rig that hangs."""
    hangs = ("--ioasid-append", "init=/usr/bin/cat", "examples/attacks.ioasid:intra-vm")
    job = running("avocado", "run", "--job-timeout", "20", *hangs)
    token = job.wait_for_child(b"virtserialport", 120)
    job.wait_for("INTERRUPTED", 60)
    job.nothing_left(token)
    job.popen.wait(20)


# The matrix


def test_every_two_values_of_the_shipped_matrix_meet(avocado: Avocado) -> None:
    shown = avocado(*documented("variants"), "--contents").out
    variants = [
        dict(re.findall(r"/:(\S+) +=> (\S+)", block)) for block in shown.split("\nVariant ")[1:]
    ]
    values = {key: {variant[key] for variant in variants} for key in variants[0]}
    assert values == {
        "profile": {"default", "debug"},
        "qemu": {"private", "10.0"},
        "host.viommu.fsts": {"false", "true"},
        "guest.*.viommu.pasid-bits": {"0", "20"},
    }
    for one, other in itertools.combinations(values, 2):
        met = {(variant[one], variant[other]) for variant in variants}
        assert met == set(itertools.product(values[one], values[other]))


def matrix_of(command: list[str], folder: Path) -> list[str]:
    """*command* with `MATRIX`."""
    (folder / "matrix.cit").write_text(MATRIX)
    return [
        str(folder / "matrix.cit") if word == "examples/matrix.cit" else word for word in command
    ]


def test_a_variant_changes_what_runs(avocado: Avocado, tmp_path: Path) -> None:
    command = matrix_of(documented("run", "--cit-parameter-file"), tmp_path)
    job = avocado(*command)
    assert job.code == 0, job.out
    assert len(job.tests) == 4
    for name in job.tests:
        accelerator, qemu, fsts, bits = name.partition(";")[2].split("-")
        host, *guests = job.report(name)["vms"]
        old, on = qemu == "10.0", "on" if fsts == "true" else "off"
        version = job.report(name)["versions"]["qemu"]["host"]
        assert version.startswith("10.0." if old else "11.")
        assert f",{'x-flts' if old else 'fsts'}={on}" in host["viommu"]
        assert all(f",pasid-bits={bits}," in guest["viommu"] for guest in guests)
        assert job.report(name)["accelerator"] in (
            ["tcg"] if accelerator == "tcg" else ["tcg", "kvm"]
        )


def test_a_matrix_without_variants_is_an_error(avocado: Avocado, tmp_path: Path) -> None:
    """Avocado goes on without variants when its varianter fails."""
    (tmp_path / "matrix.cit").write_text("PARAMETERS\n\nCONSTRAINTS\n")
    command = ("--cit-parameter-file", str(tmp_path / "matrix.cit"))
    job = avocado("run", *command, "examples/attacks.ioasid:intra-vm")
    (test,) = job.tests.values()
    assert test["status"] == "ERROR", job.out
    assert "made no variants" in test["fail_reason"]


# More than one machine


@pytest.fixture
def hosts() -> None:
    """Skips where there can be no hosts; in CI that is an error."""
    missing = [name for name in ("sshd", "ssh", "ip", "unshare", "setpriv") if not which(name)]
    why = "not root" if os.getuid() else f"no {', '.join(missing)}" if missing else ""
    if why:
        assert not os.environ.get("CI"), f"two hosts: {why}"
        pytest.skip(f"two hosts: {why}")


def which(program: str) -> str | None:
    """Where a program is, also one that only root's PATH leads to."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def runs_a_vm(ancestor: int) -> bool:
    """Whether a host VM's QEMU is among the processes below *ancestor*."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry)
            if b"virtserialport" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                continue
            while pid > 1:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if pid == ancestor:
                    return True
    return False


def test_one_of_two_hosts_dies(
    hosts: None, home: dict[str, str], running: Start, tmp_path: Path
) -> None:
    (command,) = [line for line in DOCUMENTED if line[0] == "ci/two-hosts"]
    assert command[1] == "results" and command[command.index("--job-results-dir") + 1] == "results"
    results = tmp_path / "results"
    words = [str(results) if word == "results" else word for word in matrix_of(command, tmp_path)]
    home["PATH"] += ":/usr/sbin:/sbin"
    job = running(*words)
    job.wait_for("(1/", 300)
    job.wait_for("(2/", 300)
    inside = Path(f"/proc/{job.popen.pid}/root/run/two-hosts")
    second = int((inside / "h2.pid").read_text())
    # In the middle of a check: between two of them nothing is lost with the host.
    end = time.monotonic() + 120
    while not runs_a_vm(second):
        assert time.monotonic() < end
    killed = time.monotonic()
    os.kill(second, signal.SIGKILL)
    job.wait_for("the host was lost", 60)
    assert time.monotonic() - killed < 30
    job.output += job.popen.communicate(timeout=600)[0]
    ended = Job(job.popen.returncode, job.output, results / "latest")
    assert ended.code == 1, ended.out
    made = ended.results
    (lost,) = [test for test in made if test["status"] != "PASS"]
    assert (lost["status"], lost["fail_reason"]) == ("ERROR", "on 10.77.0.12: the host was lost")
    assert len(made) in (4, 5)
    for test in made:
        if test is not lost:
            # It came over the network: h1 does not see the folder.
            assert reported(test)["checks"][0]["verdict"] == "pass"
