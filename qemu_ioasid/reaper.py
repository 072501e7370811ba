# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends and removes what an orchestrator left behind when it could not do so itself.

Every orchestrator has a *run folder* with a token. Each process it starts
carries that token in its environment, and so do the children of those, so
they are found in /proc without anybody having written down a pid: there is no
moment at which a child exists and is not known. The orchestrator and its
keeper (this file, run as a program) hold a lock on the run folder; the keeper
waits for its standard input to end, which it does when the orchestrator dies
of whatever cause, then kills, removes and exits. A run folder whose lock is
free has lost both, and the next start sweeps it.

Standard library only, and no import of the package: it starts in 15 ms.
"""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import sys
import time

TOKEN = "QEMU_IOASID_TOKEN"
#: Lists, one a line, paths outside the run folder that end with it.
PATHS = "paths"
#: Lists, one a line, files of the kernel's and after a tab what is written to them at the end:
#: that is how mdevs and probes are removed.
WRITES = "writes"
LOCK = "lock"
#: No execve() is longer in its last steps.
EXECVE_SECONDS = 1.0


def _environment(pid: str) -> bytes:
    """A process's environment; raises OSError. One in the middle of execve() is waited for.

    That has none to show from where it closes files, which is how its parent learns that it runs,
    to where env_end is set (fs/exec.c, fs/binfmt_elf.c).
    """
    end = time.monotonic() + EXECVE_SECONDS
    while True:
        with open(f"/proc/{pid}/environ", "rb") as file:
            data = file.read()
        if data or time.monotonic() > end:
            return data
        # Neither a kernel thread nor a zombie has one.
        os.readlink(f"/proc/{pid}/exe")
        with open(f"/proc/{pid}/stat") as stat:
            # proc(5), field 51; what is counted here begins with the third.
            env_end = stat.read().rpartition(")")[2].split()[48]
        if env_end != "0":
            return data


def marked(token: str) -> list[int]:
    """The processes that carry *token* in their environment, ours excluded."""
    needle = f"{TOKEN}={token}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            if needle in _environment(entry).split(b"\0"):
                found.append(int(entry))
        except OSError:
            continue
    return found


def kill_marked(token: str, seconds: float = 5.0) -> None:
    """SIGKILL all of them, until none is left: one of them may fork while we look."""
    end = time.monotonic() + seconds
    while (pids := marked(token)) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                try:
                    # The pidfd pins the process: looking again now shuts out a reused pid.
                    if pid in marked(token):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                        select.select([fd], [], [], max(0.0, end - time.monotonic()))
                finally:
                    os.close(fd)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        # A folder of tracefs goes in one call, whatever is in it, and in no other way.
        try:
            os.rmdir(path)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write(path: str, text: str) -> None:
    with contextlib.suppress(OSError):
        # Of tracefs's lists, anything but appending would empty the whole.
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def sweep(folder: str) -> None:
    """Kill what carries the run folder's token, remove what it lists, then the folder."""
    kill_marked(os.path.basename(folder))
    with contextlib.suppress(OSError), open(os.path.join(folder, PATHS)) as file:
        for line in file:
            _remove(line.rstrip("\n"))
    with contextlib.suppress(OSError), open(os.path.join(folder, WRITES)) as file:
        for line in file:
            path, _, text = line.rstrip("\n").partition("\t")
            _write(path, text)
    shutil.rmtree(folder, ignore_errors=True)


def sweep_abandoned(base: str) -> list[str]:
    """Sweep each run folder below *base* that nobody holds; returns their names.

    The caller holds the lock under which run folders are made, so none is seen half made.
    """
    swept = []
    for name in sorted(os.listdir(base)):
        folder = os.path.join(base, name)
        try:
            fd = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            sweep(folder)
            swept.append(name)
        finally:
            os.close(fd)
    return swept


def hold(base: str) -> int:
    """Lock the folder of all run folders; returns the descriptor that holds it.

    Raises FileNotFoundError when there is none, or it was removed meanwhile.
    """
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Whoever had the lock before may have been the last, and have removed it.
        if not os.path.samestat(os.fstat(fd), os.stat(base)):
            raise FileNotFoundError(base)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_if_last(base: str) -> None:
    """Remove the folder of all run folders when no run is left in it."""
    with contextlib.suppress(OSError):
        fd = hold(base)
        try:
            os.rmdir(base)
        finally:
            os.close(fd)


def _keep(folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    sweep(folder)
    remove_if_last(os.path.dirname(folder))


if __name__ == "__main__":
    _keep(sys.argv[1])
