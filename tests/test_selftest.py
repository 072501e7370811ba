# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own tests: what becomes of programs and targets, and one run of each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_ioasid import cli, selftest
from qemu_ioasid.errors import ConfigurationError, KernelBroke
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.kernel.selftest import Programs, mended
from qemu_ioasid.report import Report
from qemu_ioasid.selftest import expected, program, targets
from qemu_ioasid.selftest.expected import Expected
from qemu_ioasid.selftest.ktap import Result
from qemu_ioasid.selftest.program import Gone, Made, Program
from qemu_ioasid.selftest.targets import Target
from tests.conftest import Command
from tests.test_ktap import CAPTURED, HARNESS, told

# --- a program, in a VM that is none ----------------------------------------------------------


class FakeChannel:
    """Says *parts*; None is a silence. Ends with *status*."""

    def __init__(self, parts: list[str | None], status: int) -> None:
        self._parts = iter(parts)
        self._status = status
        self.waited: list[float] = []

    def settimeout(self, seconds: float) -> None:
        self.waited.append(seconds)

    def recv(self, size: int) -> bytes:
        part = next(self._parts, "")
        if part is None:
            raise TimeoutError
        return part.encode()

    def exit_status_ready(self) -> bool:
        return next(self._parts, "") is not None

    def recv_exit_status(self) -> int:
        return self._status

    def close(self) -> None:
        pass


class FakeConsole:
    """One with these reports."""

    def __init__(self, *reports: str) -> None:
        self.reports: list[Any] = []
        self.coming = [SimpleNamespace(kind="oops", text=text) for text in reports]
        self.length = 0

    def wait_end(self, seconds: float) -> None:
        self.reports += self.coming

    def excerpt(self, report: Any) -> str:
        return f"around {report.text}"

    def tail(self, lines: int) -> str:
        return "the last lines"

    def since(self, line: int) -> str:
        return "what came then"


def ran(
    tmp_path: Path, parts: list[str | None], status: int = 0, *reports: str, alive: bool = True
) -> tuple[list[Made], Gone | None, list[str]]:
    """What became of a program that says *parts*; why its VM is gone; what was asked meanwhile."""
    asked: list[str] = []

    def output(script: str, deadline: object) -> bytes:
        asked.append(script)
        return b"task:a_test state:D\n"

    ssh = SimpleNamespace(
        run=lambda script, deadline: FakeChannel(parts, status), output=output, alive=alive
    )
    host: Any = SimpleNamespace(ssh=ssh, console=FakeConsole(*reports))
    made: list[Made] = []
    try:
        Program(host, "iommu", "a_test", tmp_path / "log").run([], made.append)
    except Gone as gone:
        return made, gone, asked
    return made, None, asked


def outcomes(made: list[Made]) -> list[tuple[str, str, str]]:
    return told([each.result for each in made])


def test_a_program(tmp_path: Path) -> None:
    made, gone, asked = ran(tmp_path, [HARNESS[:100], HARNESS[100:]], 1)
    assert [each.result.outcome for each in made] == ["ok", "skip", "not ok", "xfail"]
    assert gone is None and not asked
    assert (tmp_path / "log").read_text() == HARNESS


def test_what_was_written_when_it_was_killed(tmp_path: Path) -> None:
    text = (CAPTURED / "crash.tap").read_text()
    made, _, _ = ran(tmp_path, [text], 137)
    assert outcomes(made) == [
        ("global.passes", "ok", ""),
        ("global.asserts", "not ok", ""),
        ("global.killer", "not ok", "killed by signal 9: 2 of 4 tests made"),
    ]


def test_a_crash_in_the_middle(tmp_path: Path) -> None:
    """The test under way has failed, and says how the program ended."""
    text = HARNESS[: HARNESS.index("# iommufd.c:73")]
    made, gone, _ = ran(tmp_path, [text], 139)
    assert outcomes(made)[2:] == [
        ("iommufd.cmd_fail", "not ok", "killed by signal 11: 2 of 4 tests made")
    ]
    assert gone is None


def test_a_kernel_that_dies_in_the_middle(tmp_path: Path) -> None:
    text = HARNESS[: HARNESS.index("# iommufd.c:73")]
    made, gone, _ = ran(tmp_path, [text], -1, "Oops: 0000", alive=False)
    (last,) = made[2:]
    assert last.result.name == "iommufd.cmd_fail" and last.result.outcome == "not ok"
    assert "Oops: 0000" in last.result.reason
    assert last.evidence == "around Oops: 0000"
    assert gone is not None


def test_a_test_that_hangs_and_is_ended_by_its_harness(tmp_path: Path) -> None:
    """The kernel is asked while it hangs, and what it said goes with the failure."""
    at = HARNESS.index("# cmd_fail: Test terminated")
    made, gone, asked = ran(tmp_path, [HARNESS[:at], None, HARNESS[at:]], 1)
    assert gone is None and len(asked) == 1 and "sysrq-trigger" in asked[0]
    assert "task:a_test state:D" in made[2].evidence
    assert not any(each.evidence for each in (*made[:2], made[3]))


def test_a_program_that_hangs(tmp_path: Path) -> None:
    text = HARNESS[: HARNESS.index("# iommufd.c:73")]
    made, gone, asked = ran(tmp_path, [text, None, None], 137)
    (last,) = made[2:]
    assert last.result.name == "iommufd.cmd_fail"
    assert last.result.reason.startswith("hangs: nothing said for")
    assert "task:a_test state:D" in last.evidence
    assert gone is None and "kill -9" in asked[1]


def test_a_program_that_cannot_be_killed(tmp_path: Path) -> None:
    text = HARNESS[: HARNESS.index("# iommufd.c:73")]
    made, gone, _ = ran(tmp_path, [text, None, None, None, None], 0)
    assert made[-1].result.name == "iommufd.cmd_fail"
    assert "cannot be killed" in made[-1].result.reason
    assert gone is not None


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        ("No driver found for device\n", 4, ("", "skip", "No driver found for device")),
        ("", 0, ("", "ok", "")),
        ("1..0 # SKIP no device\n", 4, ("", "skip", "no device")),
        ("", 1, ("", "not ok", "ended with exit code 1: no test made")),
        ("sh: not found\n", 127, ("", "not ok", "cannot be run (exit code 127): no test made")),
        ("1..1\nok 1 a\n", 3, ("", "not ok", "ended with exit code 3")),
        ("1..2\nok 1 a\n", 0, ("the end", "not ok", "ended with exit code 0: 1 of 2 tests made")),
        ("1..2\nBail out! no\n", 1, ("the end", "not ok", "gave up: no: 0 of 2 tests made")),
        ("1..1\nnot ok 1 a\n", 1, ("a", "not ok", "")),
    ],
)
def test_how_programs_end(
    tmp_path: Path, text: str, status: int, found: tuple[str, str, str]
) -> None:
    made, gone, _ = ran(tmp_path, [text], status)
    assert outcomes(made)[-1] == found
    assert gone is None


def test_what_a_kernel_forgot_is_mended(tmp_path: Path) -> None:
    """Only where it did: another one's own definition stays as it is."""
    library, header = tmp_path / "vfio/lib/a.c", tmp_path / "vfio/lib/a.h"
    library.parent.mkdir(parents=True)
    library.write_text("\tirq = calloc_assert(1, argsz);\n")
    assert mended(tmp_path, ["iommu"]) == {}
    assert list(mended(tmp_path, ["iommu", "vfio"])) == ["calloc_assert"]
    for text in (
        "#define calloc_assert(n, size) calloc(n, size)\n",
        "static inline void *calloc_assert(size_t n, size_t size)\n{\n",
    ):
        header.write_text(text)
        assert mended(tmp_path, ["vfio"]) == {}


# --- what is expected -------------------------------------------------------------------------

KNOWN = [
    Expected("vfio/p/a", "broken there", "commit 1", mode="legacy", since="7.2", until="7.4"),
    Expected("vfio/p/b*", "now and then", "commit 2", sometimes=True),
]
VFIO = targets.find(["vfio"], [])[0]


def judged(test: str, outcome: str, mode: str, release: str) -> tuple[str, str]:
    made = Made(Result(test, outcome, "", ["said"]), 1.0)  # type: ignore[arg-type]
    found = selftest.check(VFIO, mode, "p", made, KNOWN, release)
    return found.verdict, found.answered


def test_an_expected_failure() -> None:
    verdict, answered = judged("a", "not ok", "legacy", "7.2.12")
    assert verdict == "skip" and "broken there (commit 1)" in answered
    for mode, release in (("first-stage", "7.2.12"), ("legacy", "7.1"), ("legacy", "7.4.0-rc1")):
        assert judged("a", "not ok", mode, release)[0] == "fail"


def test_one_that_passes_unexpectedly() -> None:
    verdict, answered = judged("a", "ok", "legacy", "7.3.0-rc2")
    assert verdict == "fail" and "expects a failure: broken there" in answered
    assert judged("b1", "ok", "legacy", "7.2")[0] == "pass"
    assert judged("b1", "not ok", "legacy", "7.2")[0] == "skip"
    assert judged("a", "skip", "legacy", "7.2")[0] == "skip"


def test_a_check_of_a_failure() -> None:
    made = Made(Result("a.b", "not ok", "why", ["first", "last"]), 2.5, "more")
    found = selftest.check(VFIO, "legacy", "p", made, [], "7.2")
    assert found.name == "vfio/p/a.b [legacy]"
    assert (found.answered, found.witnesses, found.seconds) == ("not ok: why", "last", 2.5)
    assert found.evidence == "first\nlast\nmore"


def test_the_shipped_file() -> None:
    for entry in expected.load():
        assert entry.mode in ("", *targets.MODES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[failure]]\ntest = 'a'\nreason = 'b'\n", "failure 1: link: missing"),
        ("[[failure]]\ntest = 1\n", "test: must be a str"),
        ("[[failure]]\ncolour = 'red'\n", "colour: unknown"),
        ("[[failure]]\ntest='a'\nreason='b'\nlink='c'\nsince='soon'\n", "soon is no version"),
        ("[other]\n", "nothing else"),
        ("failure = 1\n", "nothing else"),
        ("[[", "expected.toml"),
    ],
)
def test_what_is_no_list_of_failures(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "expected.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        expected.load(tmp_path / "expected.toml")


# --- a target -------------------------------------------------------------------------------


class FakeProgram:
    """`crash` takes its VM with it, `warns` has the kernel complain; the others pass."""

    def __init__(self, host: Any, target: str, name: str, log: Path) -> None:
        self._name = name

    def run(self, arguments: Any, enter: Any) -> None:
        crashes = self._name == "crash"
        enter(Made(Result("a", "not ok" if crashes else "ok"), 0.1))
        if crashes:
            raise Gone("panic")

    def reported(self, deadline: object) -> Made | None:
        return Made(Result("kernel", "not ok", "WARNING"), 0.0) if self._name == "warns" else None


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The VMs that were booted, which are none."""
    booted: list[str] = []

    @contextlib.contextmanager
    def boot(target: Any, mode: str, parts: Any, report: Any, logs: Path) -> Iterator[Any]:
        booted.append(logs.name)
        console = FakeConsole()
        console.reports = [SimpleNamespace(kind="panic", text="panic")]
        yield SimpleNamespace(console=console), []

    monkeypatch.setattr(selftest, "_booted", boot)
    monkeypatch.setattr(selftest, "Program", FakeProgram)
    return booted


VIOMMU = SimpleNamespace(viommu=frozenset({"scalable-mode", "fsts", "fs1gp"}))
PARTS = HostParts(VIOMMU, "tcg", Path("kernel"), {}, frozenset())  # type: ignore[arg-type]


def test_a_target_goes_on_in_another_vm(tmp_path: Path, booted: list[str]) -> None:
    report = Report(tmp_path, "selftest", lambda line: None)
    tests = selftest.Tests(report, [], "7.2.12", ())
    names = ["first", "crash", "script.sh", "warns", "last"]
    programs = Programs(Path("disk"), {"demo": names}, ["demo/script.sh"])
    tests.run(targets.find(["demo"], [])[0], "second-stage", PARTS, programs)
    assert booted == ["demo-second-stage-1", "demo-second-stage-2"]
    assert [(check.name, check.verdict) for check in report.checks] == [
        ("demo/first/a", "pass"),
        ("demo/crash/a", "fail"),
        ("demo/script.sh", "skip"),
        ("demo/warns/a", "pass"),
        ("demo/warns/kernel", "fail"),
        ("demo/last/a", "pass"),
    ]
    with pytest.raises(KernelBroke, match="demo/crash"):
        tests.close()
    with pytest.raises(ConfigurationError, match="program nonesuch: unknown"):
        selftest.Tests(report, [], "7.2.12", ["nonesuch"]).choose(programs)


def test_a_target_without_a_test_here(tmp_path: Path) -> None:
    """arm64 has none on x86-64: nothing held."""
    report = Report(tmp_path, "selftest", lambda line: None)
    tests = selftest.Tests(report, [], "7.2.12", ())
    with pytest.raises(ConfigurationError, match="selftest arm64: this kernel has no test of it"):
        tests.choose(Programs(Path("disk"), {"iommu": ["iommufd"], "arm64": []}))


@pytest.mark.parametrize(
    ("only", "vms", "made"),
    [
        (
            [],
            ["demo-legacy-1", "demo-first-stage-1"],
            ["demo/each/a [legacy]", "demo/same/a", "demo/each/a [first-stage]"],
        ),
        (["same"], ["demo-legacy-1"], ["demo/same/a"]),
    ],
)
def test_what_no_mode_changes_is_run_once(
    tmp_path: Path, booted: list[str], only: list[str], vms: list[str], made: list[str]
) -> None:
    """In the first mode that is asked for; no VM is booted for nothing."""
    report = Report(tmp_path, "selftest", lambda line: None)
    tests = selftest.Tests(report, [], "7.2.12", only)
    programs = Programs(Path("disk"), {"demo": ["each", "same"]})
    target = Target("demo", modes=("legacy", "first-stage"), by_mode=True, once=["same"])
    for mode in target.modes:
        tests.run(target, mode, PARTS, programs)
    assert booted == vms
    assert [check.name for check in report.checks] == made


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["../iommu"], "not a folder of tools/testing/selftests"),
        (["--kernel", "image:/vmlinux"], "tests are built from a source"),
        (["--mode", "sideways"], "invalid choice"),
    ],
)
def test_what_it_does_not_take(
    command: Command, arguments: list[str], message: str, tmp_path: Path
) -> None:
    ended = command("selftest", *arguments)
    assert ended.code == 2
    assert message in ended.err


def test_its_profile_is_no_other_commands() -> None:
    parser = cli._parser()
    found = {name: parser.parse_args([name]).profile for name in ("run", "bench", "selftest")}
    assert found == {"run": "default", "bench": "default", "selftest": "selftest"}


def test_a_silence_is_looked_at_before_the_harness_ends_it() -> None:
    assert program.ASK_SECONDS < program.ASK_BEFORE < 30


def verdicts(ended: Any) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in ended.json()["checks"]}


def test_what_a_real_kernel_does_to_them(command: Command) -> None:
    """A test that panics the kernel costs no other program; one that hangs says where."""
    patch = str(Path(__file__).parent / "programs" / "selftest.patch")
    words = [word for name in ("crash", "hang") for word in ("--program", name)]
    ended = command("selftest", "iommu", "--mutant", patch, *words, "--json", timeout=3000)
    assert ended.code == 5, ended.err
    made = verdicts(ended)
    assert list(made) == [
        "iommu/crash/global.before",
        "iommu/crash/global.panics",
        "iommu/hang/global.before",
        "iommu/hang/global.sleeps",
        "iommu/hang/global.after",
    ]
    failed = [name for name, check in made.items() if check["verdict"] == "fail"]
    assert failed == ["iommu/crash/global.panics", "iommu/hang/global.sleeps"]
    crash, hang = (made[name] for name in failed)
    assert "panic" in crash["answered"] and "sysrq triggered crash" in crash["evidence"]
    assert "vfork" in hang["evidence"] and "Show Blocked State" in hang["evidence"]


def test_iommufds_own_tests(command: Command) -> None:
    """The issue's measure: 241 pass, none fails."""
    ended = command("selftest", "iommu", "--json", timeout=3000)
    assert ended.code == 0, ended.err
    made = verdicts(ended)
    assert sum(check["verdict"] == "pass" for check in made.values()) >= 241
    assert {name.split("/")[1] for name in made} == {"iommufd", "iommufd_fail_nth"}


def test_vfios_own_tests(command: Command) -> None:
    """Three of them in one mode; ci/soak has all in all three."""
    chosen = ("vfio_pci_device_test", "vfio_pci_driver_test", "vfio_pdma_pasid_test")
    words = [word for name in chosen for word in ("--program", name)]
    ended = command("selftest", "vfio", "--mode", "first-stage", "--json", *words, timeout=3000)
    assert ended.code == 0, ended.err
    made = verdicts(ended)
    assert (
        made["vfio/vfio_pci_device_test/vfio_pci_device_test.reset [first-stage]"]["verdict"]
        == "pass"
    )
    skipped = [name for name, check in made.items() if check["verdict"] == "skip"]
    assert skipped == ["vfio/vfio_pci_driver_test [first-stage]"]
    ours = "vfio/vfio_pdma_pasid_test/vfio_pdma_pasid_test.attach_detach"
    assert made[ours]["verdict"] == "pass"
