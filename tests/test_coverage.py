# SPDX-License-Identifier: GPL-2.0-or-later
"""Which lines ran, by a real gcov and a real series."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qemu_ioasid import cli, client, coverage, gcov, kernel, session
from qemu_ioasid.coverage import page, reasons
from qemu_ioasid.coverage.reasons import Reason
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError
from qemu_ioasid.gcov import Coverage, Line
from tests.conftest import Command
from tests.counted import Small, agent, collect


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path / "cache"))
    return Small(tmp_path)


def _counts(found: Coverage) -> dict[str, tuple[str, str, int]]:
    """By text: the patch, the function and the count."""
    return {
        line.text: (line.patch.removesuffix(".patch"), line.function, line.count)
        for line in found.lines
    }


# --- what counts ------------------------------------------------------------------------------


def test_a_line_is_the_last_patches_that_changed_it(small: Small) -> None:
    built = small.build()
    lines = {
        (line.file, line.number): (line.patch, line.text) for line in kernel.gcov.load(built.gcov)
    }
    assert lines["drivers/dma/main.c", 3] == (
        "0001-first.patch",
        "static int dma_check(int length)",
    )
    assert lines["drivers/dma/main.c", 5] == (
        "0002-second.patch",
        "if (length == 0 || length == 7)",
    )
    assert lines["drivers/dma/dma.h", 4] == ("0001-first.patch", "return 999;")
    unchanged = {("drivers/dma/main.c", 1), ("drivers/dma/dma.h", 3)}
    assert not unchanged & lines.keys()
    assert not any(file.startswith("tools/") for file, _ in lines)
    for (file, number), (_, text) in lines.items():
        tree = (small.repository / file).read_text().splitlines()
        assert tree[number - 1].strip() == text
    assert built.series == ["0001-first.patch", "0002-second.patch"]


def test_only_what_the_series_touches_counts(small: Small) -> None:
    built = small.build()
    (out,) = (small.folder / "cache/kernel-tree").glob("*/build-coverage")
    made = {str(path.relative_to(out)) for path in out.rglob("*.gcno")}
    assert made == {"drivers/dma/main.gcno", "drivers/dma/late.gcno"}
    assert {str(path.relative_to(built.gcov)) for path in built.gcov.rglob("*.gcno")} == made
    assert not small.build(profile="default").gcov.exists()
    assert built.hash == small.build().hash


def test_the_counts_of_the_changed_lines(small: Small) -> None:
    built = small.build()
    found = collect(built, small.run(built, 5, 6, 0))
    assert found.kernel["hash"] == built.hash
    counts = _counts(found)
    assert counts["if (length == 0 || length == 7)"] == ("0002-second", "dma_check", 3)
    assert counts["return 2;"] == ("0001-first", "dma_check", 1)
    assert counts["return 4;"] == ("0002-second", "dma_check", 0)
    assert counts["goto err_out;"] == ("0001-first", "dma_copy", 1)
    assert counts["return 999;"] == ("0001-first", "limit", 0)
    # An object that was compiled and never loaded; a file that was not compiled.
    assert counts["return 5;"] == ("0002-second", "late", 0)
    assert found.missing == ["drivers/dma/spare.c"]
    branches = next(line.branches for line in found.lines if line.text == "if (length < 0)")
    assert sorted(branches) == [0, 2]
    # Unchanged lines with code are nobody's.
    assert "if (length > 1000)" not in counts


def test_counts_of_another_build_are_refused(small: Small) -> None:
    first, second = small.build("base..first"), small.build()
    debugfs = small.run(first, 1)
    with pytest.raises(InfrastructureError, match="mismatch"):
        collect(second, debugfs)
    for path in debugfs.rglob("*.gcda"):
        path.write_bytes(b"\xff" * 40)
    with pytest.raises(InfrastructureError, match="counts of"):
        collect(second, debugfs)


def test_a_kernel_that_does_not_count_says_so(small: Small, tmp_path: Path) -> None:
    built = small.build()
    debugfs = small.run(built, 1)
    with agent(debugfs) as vm:
        debugfs.rename(tmp_path / "elsewhere")
        with pytest.raises(InfrastructureError, match="CONFIG_GCOV_KERNEL"):
            gcov.collect(vm, built)


def test_a_series_without_an_object_is_refused(small: Small) -> None:
    (small.repository / "README").write_text("none\n")
    small.commit("text")
    with pytest.raises(ConfigurationError, match="changes no object of the kernel"):
        small.build("second..text")
    with pytest.raises(ConfigurationError, match="changes no object of the kernel"):
        small.build("none")


# --- a run ------------------------------------------------------------------------------------


def _run(vm: client.Agent, built: kernel.Kernel, folder: Path) -> list[str]:
    """What a run on a rig says that ends with an error."""
    said: list[str] = []
    rig = SimpleNamespace(host=SimpleNamespace(agent=vm, parts=SimpleNamespace(counting=built)))
    with (
        pytest.raises(InfrastructureError, match="the reason"),
        session.counted(rig, folder, said.append),  # type: ignore[arg-type]
    ):
        raise InfrastructureError("the reason")
    return said


def test_a_run_that_failed_leaves_its_counts(small: Small, tmp_path: Path) -> None:
    built = small.build()
    with agent(small.run(built, 5)) as vm:
        (said,) = _run(vm, built, tmp_path / "report")
    found = gcov.load(tmp_path / "report" / gcov.FILE)
    ran = sum(line.count > 0 for line in found.lines)
    assert 0 < ran < len(found.lines)
    assert said == f"coverage: {ran} of {len(found.lines)} changed lines ran since the boot"


def test_a_host_vm_that_died_has_none_and_hides_nothing(small: Small, tmp_path: Path) -> None:
    built = small.build()
    with agent(small.run(built, 5)) as vm:
        vm.lose()
        (said,) = _run(vm, built, tmp_path / "report")
    assert said == "no coverage of this run: host: the agent went away"
    assert not (tmp_path / "report").exists()


# --- what is told -----------------------------------------------------------------------------

GOTO = Reason("drivers/dma/main.c", "dma_copy", "goto err_out;", "it never fails")


def _reports(small: Small, tmp_path: Path) -> list[Path]:
    """Those of two runs of the same kernel."""
    built = small.build()
    folders = [tmp_path / "reports" / name for name in ("one", "two")]
    for folder, lengths in zip(folders, [(5,), (-1, 5)], strict=True):
        folder.mkdir(parents=True)
        collect(built, small.run(built, *lengths)).write(folder)
    return folders


def test_runs_are_added(small: Small, tmp_path: Path) -> None:
    one, two = _reports(small, tmp_path)
    whole, runs = coverage.read([one, two])
    assert runs == 2
    first, second = (_counts(gcov.load(folder / gcov.FILE)) for folder in (one, two))
    for text, (patch, function, count) in _counts(whole).items():
        assert (patch, function) == first[text][:2]
        assert count == first[text][2] + second[text][2]
    assert (first["return 4;"][2], second["return 4;"][2]) == (0, 1)
    # A folder of reports, and each once.
    assert coverage.read([tmp_path / "reports", one]) == (whole, 2)


def test_runs_of_two_kernels_are_not(small: Small, tmp_path: Path) -> None:
    one, two = _reports(small, tmp_path)
    found = gcov.load(two / gcov.FILE)
    found.kernel["hash"] = "another"
    found.write(two)
    with pytest.raises(ConfigurationError, match=r"another: counts of one kernel are added"):
        coverage.read([one, two])


def _line(text: str, count: int, number: int) -> Line:
    return Line("0001.patch", "drivers/dma/main.c", number, text, "dma_copy", count, [count, 0])


def _judged(known: list[Reason], *counts: int) -> coverage.Judgement:
    lines = [_line("goto err_out;", count, number) for number, count in enumerate(counts, 1)]
    kernel = {"hash": "", "release": "", "source": ""}
    return coverage.judge(Coverage(kernel, ["0001.patch"], [], lines), 1, known)


def test_a_reason_is_one_lines() -> None:
    assert _judged([GOTO], 0).held
    assert not _judged([], 0).held
    both = _judged([GOTO], 0, 0)
    assert not both.held
    assert [line.number for line in both.untested] == [2]
    assert _judged([GOTO, GOTO], 0, 0).held
    # What has no way around it does not ask for it.
    assert _judged([GOTO], 3, 0).stale == []


def test_a_reason_that_no_line_needs_is_told() -> None:
    other = Reason(GOTO.file, GOTO.function, "return 7;", "it never fails")
    elsewhere = Reason("drivers/other.c", "f", "return 7;", "of another series")
    found = _judged([GOTO, other, elsewhere], 3)
    assert found.held
    assert found.stale == [(GOTO, "has run"), (other, "no such line")]
    told = "\n".join(coverage.text(found))
    assert "a reason that no line needs (2):" in told
    assert "goto err_out;  (has run)" in told


def test_the_file_of_reasons(tmp_path: Path) -> None:
    assert reasons.load(tmp_path / "none.toml") == []
    path = tmp_path / "unreached.toml"
    entry = '[[unreached]]\nfile = "a.c"\nfunction = "f"\nline = "x;"\n'
    path.write_text(f'{entry}reason = "so"\n')
    assert reasons.load(path) == [Reason("a.c", "f", "x;", "so")]
    for text, message in {
        entry: "unreached 1: reason: must be given",
        f'{entry}reason = " "\n': "reason: says nothing",
        f'{entry}reason = "so"\nnumber = "3"\n': "number: must be given, with file,",
        f"{entry}reason = 3\n": "must be a table of strings",
        "[other]\n": "holds .*unreached.* tables and nothing else",
        "unreached": "Expected",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            reasons.load(path)


def test_ours_is_one() -> None:
    files = {reason.file for reason in reasons.load(reasons.FILE)}
    patches = "".join(path.read_text() for path in kernel.SERIES.glob("*.patch"))
    assert all(f"+++ b/{file}\n" in patches for file in files)


def test_the_page_shows_what_did_not_run_and_runs_nothing(small: Small, tmp_path: Path) -> None:
    whole, runs = coverage.read(_reports(small, tmp_path))
    text = page.render(coverage.judge(whole, runs, []))
    assert "return 999;" in text and "drivers/dma/spare.c" in text
    assert "<script" not in text and "default-src 'none'" in text
    assert '<h1 class="bad">' in text


# --- the command ------------------------------------------------------------------------------


def test_the_command(
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _reports(small, tmp_path)
    monkeypatch.setattr(reasons, "FILE", tmp_path / "unreached.toml")
    words = ["coverage", str(tmp_path / "reports")]
    capsys.readouterr()
    assert cli.main([*words, "--report", str(tmp_path / "a"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == ["drivers/dma/spare.c"]
    unreached = {(each["text"], each["reason"]) for each in told["unreached"]}
    assert unreached == {("return 2;", None), ("return 999;", None), *LATE}
    assert Path(told["report"]).read_text().count("return 999;") == 1
    assert cli.main([*words, "--report", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert "not run, and no reason is known (4):" in said
    assert "drivers/dma/dma.h:4  limit: return 999;" in said
    # A reason for each, and a kernel that has every file: all is well.
    (tmp_path / "unreached.toml").write_text(
        "".join(
            f"[[unreached]]\nfile = {json.dumps(each['file'])}\nreason = 'a test'\n"
            f"function = {json.dumps(each['function'])}\nline = {json.dumps(each['text'])}\n"
            for each in told["unreached"]
        )
    )
    for path in (tmp_path / "reports").rglob(gcov.FILE):
        found = gcov.load(path)
        found.missing = []
        found.write(path.parent)
    assert cli.main([*words, "--report", str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "not run, for a reason (4):" in said
    assert "(a test)" in said


#: What of a module that was never loaded has code.
LATE = {("int late(void)", None), ("return 5;", None)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coverage", "."], "holds no coverage.json: qemu-ioasid run --coverage leaves one"),
        (["run", "--coverage", "--profile", "debug"], "--coverage: is a profile of its own"),
        (["run", "--coverage", "--host", "local"], "--coverage: a local host is this machine"),
    ],
)
def test_what_cannot_be_is_told(command: Command, words: list[str], message: str) -> None:
    ended = command(*words)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_an_image_counts_nothing(tmp_path: Path) -> None:
    spec = kernel.Spec(source=f"image:{tmp_path / 'vmlinux'}", profile="coverage")
    with pytest.raises(
        ConfigurationError, match="is built: no series, config, profile or coverage"
    ):
        kernel.build(spec, deadline=Deadline(10, "kernel"), progress=print)
