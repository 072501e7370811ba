# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in the host VM: a command with --host local, perhaps broken off, and what it left there.

``local_trial.py WHEN WHOM SIGNAL COMMAND...``: once there is an mdev (WHEN is ``mdev``) or a trace
(``trace``), SIGNAL goes to the command (WHOM is ``command``), after SIGKILL to its keeper where
WHOM is ``keeper``, and to all that it started where that is ``all``; ``never none 0`` lets it run.
Prints JSON: the exit code, the output, and the machine before, when it was broken off, and at last.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

MDEVS, TRACES = "/sys/bus/mdev/devices", "/sys/kernel/tracing/instances"
PROBES = "/sys/kernel/tracing/kprobe_events"
RUNS = f"/tmp/qemu_ioasid-{os.getuid()}"
OUTPUT = "/run/output"
SECONDS = 180


def read(path: str) -> str:
    """A file's content."""
    with open(path) as file:
        return file.read()


def processes() -> Iterator[tuple[int, str, str]]:
    """Pid, command line and environment of all but kernel threads and this process."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                words = read(f"/proc/{name}/cmdline").replace("\0", " ")
                environment = read(f"/proc/{name}/environ")
            except OSError:
                continue
            if words:
                yield int(name), words, environment


def machine() -> dict[str, Any]:
    """All that a run may change here."""
    return {
        "mdevs": os.listdir(MDEVS),
        "traces": os.listdir(TRACES),
        "probes": read(PROBES),
        "mounts": read("/proc/mounts"),
        "modules": sorted(line.split()[0] for line in read("/proc/modules").splitlines()),
        "runs": os.listdir(RUNS) if os.path.exists(RUNS) else None,
        "run": sorted(os.listdir("/run")),
        "huge pages": read("/proc/sys/vm/nr_hugepages"),
        "processes": sorted(words for _, words, _ in processes()),
    }


def until(happened: Callable[[], object], what: str) -> None:
    """Wait for something that no event tells."""
    end = time.monotonic() + SECONDS
    while not happened():
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {SECONDS} s: {read(OUTPUT)}")
        # The VM has one processor, and what is waited for wants it.
        time.sleep(0.002)


def of_runs() -> list[int]:
    """Keepers, which have a run's folder for their argument, and what has a run's token."""
    return [
        pid
        for pid, words, environment in processes()
        if RUNS in words or "QEMU_IOASID_TOKEN=" in environment
    ]


def until_gone() -> None:
    """Wait for the end of all that belongs to a run; looking again and again would delay it."""
    while pids := of_runs():
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            ended, _, _ = select.select([fd], [], [], SECONDS)
            os.close(fd)
            if not ended:
                sys.exit(f"process {pid} has not ended within {SECONDS} s: {read(OUTPUT)}")


def break_off(
    child: subprocess.Popen[bytes], when: str, whom: str, number: int
) -> dict[str, Any] | None:
    """Signal the command at that moment; returns the machine as it was just before."""
    if when == "never":
        return None
    until(lambda: os.listdir({"mdev": MDEVS, "trace": TRACES}[when]), when)
    # The moment lasts while the command is stopped; its agent finishes what it was told.
    child.send_signal(signal.SIGSTOP)
    if when == "trace":
        until(lambda: read(PROBES), "probe")
    found = machine()
    if whom == "all":
        for pid in of_runs():
            os.kill(pid, signal.SIGKILL)
    elif whom == "keeper":
        (pid,) = [pid for pid, words, _ in processes() if RUNS in words]
        os.kill(pid, signal.SIGKILL)
    child.send_signal(number)
    child.send_signal(signal.SIGCONT)
    return found


def main(when: str, whom: str, number: str, *command: str) -> None:
    """Make the trial and tell."""
    before = machine()
    with open(OUTPUT, "w+b") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
        broken = break_off(child, when, whom, int(number))
        code = child.wait()
        # A command that was killed has a keeper at work.
        until_gone()
        output.seek(0)
        said = output.read().decode()
    os.unlink(OUTPUT)
    told = {"code": code, "said": said, "before": before, "broken": broken, "after": machine()}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
