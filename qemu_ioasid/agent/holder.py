"""Processes that hold a device's file and die: what a host side leaves behind, and what not.

A holder is a child of the agent, forked with its own copies of a device's file and of an iommufd,
and with no other file. It answers as an agent does.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import ExitStack
from glob import glob

from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.opendevice import completions
from qemu_ioasid.agent.pdma import Ring
from qemu_ioasid.agent.procfs import task_state
from qemu_ioasid.agent.server import Server
from qemu_ioasid.agent.vfio import VfioDevice

#: arch/x86/entry/syscalls/syscall_64.tbl, as proc(5) has it.
IOCTL = "16"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.spawn import Spawner

    Json = dict[str, Any]


def _in_ioctl(task: str) -> bool:
    with open(f"{task}/syscall") as file:
        number = file.read().split()[0]
    return number == IOCTL and task_state(task) == "D"


class Holder:
    """The child: operations on the device's file."""

    def __init__(self, device: int, iommufd: int) -> None:
        """Both are the files' numbers in this process."""
        # Not the parent's objects: one of its threads may hold their locks for ever.
        self._device = VfioDevice(Descriptor(device, "the holder's device"), "")
        self._iommufd = Iommufd(Descriptor(iommufd, "the holder's iommufd"))
        names = ("bind", "attach", "detach", "reset", "submit")
        self.operations: Mapping[str, Callable[..., Any]] = {n: getattr(self, n) for n in names}

    def bind(self) -> None:
        """Binds the device to the iommufd: to the driver this process is who has opened it."""
        self._device.bind(self._iommufd)

    def attach(self, pasid: int | None, ioas: int) -> None:
        """Puts a PASID into the device's list; none: the device's own address space."""
        if pasid is None:
            self._device.attach(ioas)
        else:
            self._device.attach_pasid(pasid, ioas)

    def detach(self, pasid: int | None) -> None:
        """Takes a PASID out of the device's list, or that address space from it."""
        if pasid is None:
            self._device.detach()
        else:
            self._device.detach_pasid(pasid)

    def reset(self) -> None:
        """Resets the device."""
        self._device.reset()

    def submit(self, descriptors: list[Json], seconds: float) -> list[Json]:
        """Submits a batch and waits for its completions."""
        with Ring(self._device) as ring:
            return completions(ring, descriptors, seconds)


class _Running:
    """A holder's process and the pipes to it, of which this side owns its ends."""

    def __init__(self, spawner: Spawner, device: VfioDevice, iommufd: Iommufd) -> None:
        with ExitStack() as stack, ExitStack() as lent:
            theirs, self._requests = os.pipe()
            lent.callback(os.close, theirs)
            stack.callback(os.close, self._requests)
            answers, mine = os.pipe()
            lent.callback(os.close, mine)
            self._answers = stack.enter_context(open(answers, "rb"))
            file = lent.enter_context(device.descriptor.borrowed())
            held = lent.enter_context(iommufd.descriptor.borrowed())

            def serve() -> None:
                Server(theirs, mine).serve(Holder(file, held).operations)

            self.pid = spawner.fork(serve, [theirs, mine, file, held])
            stack.callback(os.waitpid, self.pid, 0)
            stack.callback(os.kill, self.pid, signal.SIGKILL)
            self._life = stack.pop_all()

    def call(self, op: str, args: Json) -> Any:
        """What the holder answers; its error is raised as OSError or RuntimeError."""
        request = {"id": 0, "op": op, "args": args}
        os.write(self._requests, json.dumps(request).encode() + b"\n")
        line = self._answers.readline()
        answer = json.loads(line) if line else {"error": {"message": "the holder is gone"}}
        if "error" not in answer:
            return answer["ok"]
        error = answer["error"]
        if error.get("errno"):
            raise OSError(error["errno"], error["message"])
        raise RuntimeError(error["message"])

    def close(self) -> None:
        """SIGKILL; the process is gone, and its files, when this returns."""
        self._life.close()


class Holders:
    """The host's operations on holders by name; device and iommufd find what they are given."""

    def __init__(
        self,
        device: Callable[[str], VfioDevice],
        iommufd: Callable[[str], Iommufd],
        spawner: Callable[[], Spawner],
    ) -> None:
        self._device = device
        self._iommufd = iommufd
        self._spawner = spawner
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self.operations: Mapping[str, Callable[..., Any]] = {
            "holder_start": self.start,
            "holder_call": self.call,
            "holder_waits": self.waits,
            "holder_kill": self.kill,
        }

    def start(self, name: str, device: str, iommufd: str) -> Json:
        """Forks a process that has a device's file and an iommufd."""
        running = _Running(self._spawner(), self._device(device), self._iommufd(iommufd))
        with self._lock:
            self._running[name] = running
        return {"pid": running.pid}

    def call(self, name: str, what: str, args: Json) -> Any:
        """Has it do one of its operations."""
        with self._lock:
            running = self._running[name]
        return running.call(what, args)

    def waits(self, name: str) -> Json:
        """Whether a thread of it sleeps in an ioctl that no signal but SIGKILL may end."""
        with self._lock:
            pid = self._running[name].pid
        return {"waits": any(map(_in_ioctl, glob(f"/proc/{pid}/task/*")))}

    def kill(self, name: str) -> None:
        """SIGKILL; its files are closed when this answers."""
        with self._lock:
            running = self._running.pop(name)
        running.close()

    def close(self) -> None:
        """Kills all of them."""
        with ExitStack() as stack:
            for name in list(self._running):
                stack.callback(self.kill, name)
