# SPDX-License-Identifier: GPL-2.0-or-later
"""The only place that starts a process, and the run folder that outlives none of them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import queue
import secrets
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from qemu_ioasid import reaper
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import DeadlineExceeded, ProcessFailed, RequirementError

#: Lines of output an error carries.
TAIL = 40


def run_folders() -> Path:
    """The folder of all run folders, which need not be there."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime) / "qemu_ioasid"
    return Path(f"/tmp/qemu_ioasid-{os.getuid()}")


def _base() -> Path:
    """As `run_folders`, made: ours alone, and short (a unix socket's path ends at 107)."""
    base = run_folders()
    try:
        base.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RequirementError(
            f"{base}: {error.strerror}; make room, or set XDG_RUNTIME_DIR to a folder of yours"
        ) from None
    found = base.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or stat.S_IMODE(found.st_mode) & 0o077
    ):
        raise RequirementError(
            f"{base}: must be a folder of yours with mode 0700; remove it or set XDG_RUNTIME_DIR"
        )
    return base


def _held_base() -> tuple[Path, int]:
    while True:
        # Another run's end may remove it at any moment before it is held.
        with contextlib.suppress(FileNotFoundError):
            base = _base()
            return base, reaper.hold(str(base))


def sweep() -> list[str]:
    """Sweep the run folders that nobody holds (`reaper`); returns their names."""
    base, holding = _held_base()
    try:
        return reaper.sweep_abandoned(str(base))
    finally:
        os.close(holding)
        reaper.remove_if_last(str(base))


class Run:
    """This orchestrator's run folder, its token and its keeper. See `reaper`.

    One exists per process, made by `current_run` on first use.
    """

    def __init__(self) -> None:
        base, making = _held_base()
        self.token = secrets.token_hex(6)
        self.folder = base / self.token
        try:
            self.swept = reaper.sweep_abandoned(str(base))
            self.folder.mkdir(mode=0o700)
            lock = os.open(self.folder / reaper.LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            os.close(making)
        read_end, self._write_end = os.pipe()
        # The lock is on the open file, so the keeper's copy of it keeps the folder held.
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, str(self.folder)],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock],
            start_new_session=True,
            cwd="/",
        )
        os.close(read_end)
        self._lock = lock

    def dies_with_us(self, path: Path) -> Path:
        """Have *path* (file or folder) removed when this process ends, however it ends."""
        with open(self.folder / reaper.PATHS, "a") as file:
            file.write(f"{path}\n")
        return path

    def written_at_our_end(self, path: str, text: str) -> None:
        """Have *text* written to *path*, if it is there, when this process has ended, however."""
        with open(self.folder / reaper.WRITES, "a") as file:
            file.write(f"{path}\t{text}\n")

    def close(self) -> None:
        """End the keeper, which removes the folder. For the end of the program."""
        os.close(self._write_end)
        self._keeper.wait()
        os.close(self._lock)


_run: Run | None = None
_run_pid = 0
_run_lock = threading.Lock()


def current_run() -> Run:
    """The run folder of this process; a forked child (pytest-xdist, say) gets one of its own."""
    global _run, _run_pid
    with _run_lock:
        if _run is None or _run_pid != os.getpid():
            _run, _run_pid = Run(), os.getpid()
        return _run


def close_run() -> None:
    """Remove this process's run folder, if it ever had one."""
    global _run
    with _run_lock:
        if _run is not None and _run_pid == os.getpid():
            _run.close()
        _run = None


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends; its keeper then does the rest."""
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")


class Child:
    """A process in a session of its own, whose whole group ends with the `with` block.

    A terminal's Ctrl-C reaches us and not it, so the order of ending is ours.
    """

    def __init__(self, argv: Sequence[str], popen: subprocess.Popen[bytes]) -> None:
        self.argv = list(argv)
        self.popen = popen
        self.pid = popen.pid

    def poll(self) -> int | None:
        """The exit code (negative: a signal), or None while it runs."""
        return self.popen.poll()

    def ended_within(self, seconds: float) -> int | None:
        """As `poll`, after *seconds* at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.popen.wait(seconds)
        return None

    def wait(self, deadline: Deadline) -> int:
        """The exit code; raises DeadlineExceeded, and the child lives on."""
        try:
            return self.popen.wait(deadline.remaining())
        except subprocess.TimeoutExpired:
            raise deadline.exceeded() from None

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def end(self, grace: float = 0.0) -> None:
        """SIGTERM and *grace* seconds when there is any grace, then SIGKILL to the group."""
        if grace and self.popen.poll() is None:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(grace)
        # The leader unreaped, its pid, and so the group's id, cannot be another's.
        if self.popen.returncode is None:
            self._signal_group(signal.SIGKILL)
            self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def spawn(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    grace: float = 0.0,
) -> Iterator[Child]:
    """Start *argv*; it and its group are ended when the block is left.

    *env* is added to our environment, what is None in it taken away. Raises RequirementError
    when the program does not exist or may not be run.
    """
    wanted = {**os.environ, **(env or {}), reaper.TOKEN: current_run().token}
    full = {name: value for name, value in wanted.items() if value is not None}
    try:
        popen = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            env=full,
            cwd=cwd,
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise RequirementError(f"{argv[0]}: cannot be run ({error.strerror})") from None
    child = Child(argv, popen)
    try:
        yield child
    finally:
        child.end(grace)


def detach(argv: Sequence[str], *, pass_fds: Sequence[int], log: int) -> int:
    """Start *argv* to outlive us, in a session of its own, and not as a part of our run.

    Its output goes to *log*. Returns its pid.
    """
    env = {name: value for name, value in os.environ.items() if name != reaper.TOKEN}
    popen = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=pass_fds,
        env=env,
        start_new_session=True,
    )
    # Nobody here waits for it: without this, Python complains.
    popen.returncode = 0
    return popen.pid


def run(
    argv: Sequence[str],
    *,
    deadline: Deadline,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    input: bytes | None = None,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> str:
    """Run to the end and return what it wrote to standard output and standard error, mixed.

    *on_line* is called with each line as it comes; *log* receives them too.
    Raises ProcessFailed (its evidence the last lines), DeadlineExceeded (the
    child is ended) or RequirementError.
    """
    lines: list[str] = []
    arrived: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(log, "ab")) if log is not None else None
        child = stack.enter_context(
            spawn(
                argv,
                stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
            )
        )
        assert child.popen.stdout is not None
        fd = os.dup(child.popen.stdout.fileno())
        threading.Thread(target=_pump, args=(fd, arrived), daemon=True).start()
        if input is not None:
            threading.Thread(target=_feed, args=(child.popen, input), daemon=True).start()
        while True:
            try:
                raw = arrived.get(timeout=deadline.remaining())
            except (queue.Empty, DeadlineExceeded):
                error = deadline.exceeded()
                error.evidence = "".join(lines[-TAIL:])
                raise error from None
            if raw is None:
                break
            if sink is not None:
                sink.write(raw)
                sink.flush()
            lines.append(raw.decode(errors="replace"))
            if on_line is not None:
                on_line(lines[-1].rstrip("\n"))
        returncode = child.wait(deadline)
    if returncode:
        raise ProcessFailed(argv, returncode, "".join(lines[-TAIL:]))
    return "".join(lines)


def _pump(fd: int, arrived: queue.SimpleQueue[bytes | None]) -> None:
    # A duplicate of its own: what keeps the pipe open after the child's end keeps this thread,
    # and not the caller, who closes the original.
    with os.fdopen(fd, "rb") as stream:
        for line in stream:
            arrived.put(line)
    arrived.put(None)


def _feed(popen: subprocess.Popen[bytes], data: bytes) -> None:
    assert popen.stdin is not None
    with contextlib.suppress(BrokenPipeError, ValueError):
        popen.stdin.write(data)
        popen.stdin.close()
