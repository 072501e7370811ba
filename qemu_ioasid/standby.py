# SPDX-License-Identifier: GPL-2.0-or-later
"""A rig that is up in a second: restored from a snapshot, which is made when there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import cache, guestvm, hostvm, rig, snapshot
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.qmp import CommandFailed
from qemu_ioasid.rig import Phase, Rig
from qemu_ioasid.snapshot import Snapshot, Unusable

#: For another process to boot the same rig and save it, in seconds of the reference machine.
WAIT_SECONDS = 400.0
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Start:
    """How a rig is started. *cold*: boot it, whatever is kept; *verify*: trust no byte unread."""

    cold: bool = False
    verify: bool = False


def identity(config: RigConfig, parts: HostParts) -> dict[str, Any]:
    """Everything that a snapshot of this rig depends on, by names for messages."""
    with contextlib.ExitStack() as stack:
        ends = hostvm.Ends(stack)
        words = hostvm.argv(parts, config.host, config.guests, ends)
        numbers = {f"fd={fd}" for fd in ends.fds()}
    line = [",".join(p for p in word.split(",") if p not in numbers) for word in words]
    program = [Path(word) for word in parts.qemu.argv if Path(word).is_file()]
    found: dict[str, Any] = {
        "QEMU": [parts.qemu.version, *((str(p), *_stamp(p)) for p in program)],
        "accelerator": [parts.accelerator, _cpu() if parts.accelerator == "kvm" else "max"],
        "kernel": str(parts.kernel),
        **{f"disk {serial}": str(path) for serial, path in parts.disks.items()},
        "host": dataclasses.asdict(config.host),
        "mdevs": sorted(config.mdevs),
        "guests": {name: dataclasses.asdict(guest) for name, guest in config.guests.items()},
        "command line": line,
        "guests' command lines": [
            guestvm.argv(
                name, guest, guestvm.Place(parts.guest_viommu), dict.fromkeys(guest.mdevs, "")
            )
            for name, guest in config.guests.items()
        ],
    }
    # As it comes back from the file.
    return dict(json.loads(json.dumps(found)))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _cpu() -> str:
    """The processor as a KVM guest with ``-cpu host`` sees it: one block of /proc/cpuinfo."""
    block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    changing = ("cpu MHz", "bogomips", "processor", "apicid", "initial apicid", "core id")
    return "\n".join(line for line in block.splitlines() if not line.startswith(changing))


@contextlib.contextmanager
def start(
    config: RigConfig,
    parts: HostParts,
    how: Start,
    phase: Phase,
    say: Callable[[str], None],
    logs: Path,
) -> Iterator[Rig]:
    """The rig, restored where there is a snapshot of it; it ends with the block.

    Where there is none, or one that cannot be trusted, the rig is booted, saved,
    and restored; where it cannot be saved, it stays as it was booted. *say* is
    told why. Raises as `rig.boot` and `rig.restore`.
    """
    if how.cold:
        with rig.boot(config, parts, phase, logs) as running:
            yield running
        return
    with contextlib.ExitStack() as stack:
        found = _find(config, parts, how, phase, say, logs, stack)
        if isinstance(found, Rig):
            yield found
        else:
            yield stack.enter_context(rig.restore(config, parts, found, phase, logs))


def _find(
    config: RigConfig,
    parts: HostParts,
    how: Start,
    phase: Phase,
    say: Callable[[str], None],
    logs: Path,
    stack: contextlib.ExitStack,
) -> Snapshot | Rig:
    """A snapshot, made if need be, or the booted rig that could not become one; on *stack*."""
    whole = identity(config, parts)
    key = cache.digest(json.dumps(whole, sort_keys=True))
    folder = cache.entry(snapshot.KIND, key)
    with contextlib.suppress(Unusable):
        return stack.enter_context(snapshot.opened(folder, verify=how.verify))
    lock = cache.locked(
        folder.parent / f".{key}.lock",
        Deadline(WAIT_SECONDS, "snapshot, which another process is making"),
        lambda: say("waiting for another process that boots and saves the same rig"),
    )
    with lock:
        try:
            return stack.enter_context(snapshot.opened(folder, verify=how.verify))
        except Unusable as why:
            reason = str(why) if folder.exists() else snapshot.nearest(whole)
        say(f"no snapshot to restore ({reason}): this boot is cold, and saved for the next")
        with cache.scratch(snapshot.KIND) as scratch, contextlib.ExitStack() as life:
            try:
                memory = life.enter_context(snapshot.saveable(scratch, config.host.memory))
            except OSError as error:
                say(f"the rig will not be saved: {error.strerror} in {scratch.parent}")
                memory = None
            running = life.enter_context(rig.boot(config, parts, phase, logs, memory))
            if memory is None or not _saved(running, scratch, whole, phase, say):
                stack.push(life.pop_all())
                return running
            # The QEMU that saved is gone before anyone restores.
            with phase("seal what was saved"):
                life.close()
                snapshot.seal(scratch)
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
                cache.prune(snapshot.KIND, snapshot.KEPT)
            return stack.enter_context(snapshot.opened(folder, verify=False))


def _saved(
    running: Rig, folder: Path, whole: dict[str, Any], phase: Phase, say: Callable[[str], None]
) -> bool:
    """Save a booted rig into *folder*; when that cannot be done it runs on, and *say* is told."""
    running.disconnect()
    monitor = running.host.qmp
    deadline = Deadline(SAVE_SECONDS, "state of the host VM, saved")
    known = {"identity": whole, "rig": running.known()}
    try:
        with phase("save the rig"):
            running.host.agent.call("freeze", seconds=SAVE_SECONDS)
            snapshot.save(monitor, folder, known, deadline)
    except (CommandFailed, OSError) as error:
        say(f"the rig is not saved: {error}")
        if monitor.execute("query-status", deadline)["status"] != "running":
            monitor.execute("cont", deadline)
        running.host.agent.call("thaw")
        return False
    return True
