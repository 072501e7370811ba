# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes and the run folder, with real children and real kills."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qemu_ioasid import process, reaper
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import DeadlineExceeded, ProcessFailed, RequirementError


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether process *pid* ends within *seconds*."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def orchestrator(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A Python of its own that runs *body*, with its run folders below *tmp_path*."""
    code = "from pathlib import Path\nfrom qemu_ioasid import process, cache\n" + textwrap.dedent(
        body
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "XDG_RUNTIME_DIR": str(tmp_path),
            "QEMU_IOASID_CACHE": str(tmp_path / "cache"),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_run_returns_output_and_calls_back() -> None:
    lines: list[str] = []
    out = process.run(
        ["sh", "-c", "echo one; echo two >&2"],
        deadline=Deadline(10, "shell"),
        on_line=lines.append,
    )
    assert out == "one\ntwo\n"
    assert lines == ["one", "two"]


def test_run_feeds_input_larger_than_a_pipe() -> None:
    data = b"x" * 300_000
    out = process.run(["wc", "-c"], deadline=Deadline(10, "wc"), input=data)
    assert int(out) == len(data)


def test_failure_carries_argv_code_and_last_words() -> None:
    with pytest.raises(ProcessFailed) as caught:
        process.run(["sh", "-c", "echo reason; exit 3"], deadline=Deadline(10, "shell"))
    assert caught.value.returncode == 3
    assert caught.value.argv[0] == "sh"
    assert "reason" in caught.value.evidence
    assert "exit code 3: reason" in caught.value.message


def test_deadline_ends_the_child_and_names_what_was_awaited(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(DeadlineExceeded, match="a nap"):
        process.run(
            ["sh", "-c", f"echo $$ >{pid_file}; exec sleep 1000"], deadline=Deadline(0.5, "a nap")
        )
    assert gone(int(pid_file.read_text()))


def test_missing_program_is_a_requirement() -> None:
    with pytest.raises(RequirementError, match="nonesuch"):
        process.run(["nonesuch"], deadline=Deadline(1, "nothing"))


def test_the_whole_group_ends_with_the_block() -> None:
    with process.spawn(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE) as child:
        assert child.popen.stdout is not None
        grandchild = int(child.popen.stdout.readline())
    assert gone(child.pid)
    assert gone(grandchild)


def test_exception_in_the_block_ends_the_child() -> None:
    with pytest.raises(KeyboardInterrupt), process.spawn(["sleep", "1000"]) as child:
        raise KeyboardInterrupt
    assert child.poll() == -signal.SIGKILL


def test_kill_9_leaves_nothing(tmp_path: Path) -> None:
    """Children, children in sessions of their own, scratch folders, the run folder: all go."""
    dying = orchestrator(
        tmp_path,
        """
        import os, signal, subprocess
        with cache.scratch("kind") as folder:
            (folder / "file").write_text("x")
            with process.spawn(
                ["sh", "-c", "setsid sleep 1000 & echo $!; sleep 1001 & echo $!; wait"],
                stdout=subprocess.PIPE,
            ) as child:
                pids = [child.pid, *(int(child.popen.stdout.readline()) for _ in range(2))]
                keeper = process.current_run()._keeper.pid
                print(*pids, keeper, folder, process.current_run().folder, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    out, _ = dying.communicate(timeout=20)
    assert dying.returncode == -signal.SIGKILL
    *pids, keeper, scratch, folder = out.split()
    for pid in map(int, pids):
        assert gone(pid)
    assert gone(int(keeper))
    assert not Path(scratch).exists()
    assert not Path(folder).parent.exists()


def test_next_start_sweeps_what_lost_its_keeper_too(tmp_path: Path) -> None:
    """Both killed at once: the next orchestrator finds the child by its token."""
    dying = orchestrator(
        tmp_path,
        """
        import os, signal
        with process.spawn(["sleep", "1000"]) as child:
            keeper = process.current_run()._keeper.pid
            print(child.pid, process.current_run().folder, flush=True)
            os.kill(keeper, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    out, _ = dying.communicate(timeout=20)
    pid, folder = out.split()
    assert Path(folder).exists()
    following = orchestrator(tmp_path, "print(process.current_run().swept)\nprocess.close_run()")
    out, _ = following.communicate(timeout=20)
    assert Path(folder).name in out
    assert gone(int(pid))
    assert not Path(folder).exists()


def test_a_live_run_is_not_swept(tmp_path: Path) -> None:
    living = orchestrator(
        tmp_path,
        """
        with process.spawn(["sleep", "1000"]) as child:
            print(child.pid, flush=True)
            input()
        process.close_run()
        """,
    )
    assert living.stdout is not None
    pid = int(living.stdout.readline())
    other = orchestrator(tmp_path, "print(process.current_run().swept)\nprocess.close_run()")
    out, _ = other.communicate(timeout=20)
    assert out.strip() == "[]"
    assert not gone(pid, 0.0)
    living.communicate("\n", timeout=20)
    assert living.returncode == 0
    assert gone(pid)
    assert not (tmp_path / "qemu_ioasid").exists()


def test_someone_elses_base_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qemu_ioasid").mkdir(mode=0o777)
    (tmp_path / "qemu_ioasid").chmod(0o777)
    refused = orchestrator(
        tmp_path,
        """
        from qemu_ioasid.errors import RequirementError
        try:
            process.current_run()
        except RequirementError as error:
            print(error.message)
        """,
    )
    out, _ = refused.communicate(timeout=20)
    assert "mode 0700" in out


def test_marked_finds_only_its_own_token() -> None:
    with process.spawn(["sleep", "1000"]) as child:
        assert child.pid in reaper.marked(process.current_run().token)
        assert reaper.marked("0" * 12) == []


def test_many_runs_at_once_share_the_base_folder(tmp_path: Path) -> None:
    """Each start may meet another's end, which removes the folder of all."""
    body = """
    for _ in range(20):
        process.current_run()
        process.close_run()
    """
    runs = [orchestrator(tmp_path, body) for _ in range(6)]
    for run in runs:
        run.communicate(timeout=60)
        assert run.returncode == 0
    assert not (tmp_path / "qemu_ioasid").exists()
