"""One guest on the host side: its QEMU process and everything it was given."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import signal
import threading
from contextlib import ExitStack, suppress

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.procfs import task_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from subprocess import Popen
    from typing import Any

    from qemu_ioasid.agent.iommufd import Iommufd
    from qemu_ioasid.agent.monitor import Monitor
    from qemu_ioasid.agent.spawn import Spawner
    from qemu_ioasid.agent.vfio import VfioDevice

RUNTIME = "/run/qemu-ioasid"
OUTPUT_TAIL = 8192
OUTPUT_LIMIT = 1 << 20


def substituted(argv: Sequence[str], numbers: Mapping[str, int]) -> list[str]:
    """argv with every "{key}" of numbers replaced; other brace text (JSON) is left alone."""
    result = []
    for argument in argv:
        for key, number in numbers.items():
            argument = argument.replace("{" + key + "}", str(number))
        result.append(argument)
    return result


def _bounded(name: str) -> int:
    """A memfd that takes OUTPUT_LIMIT bytes; a write past that fails (EPERM), and no harm done.

    A guest that has QEMU complain for ever does not fill the host side's memory.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, OUTPUT_LIMIT)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


def _remove_folder(folder: str) -> None:
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def _listening(folder: str, names: Sequence[str], stack: ExitStack) -> dict[str, socket.socket]:
    """Listening unix sockets in a folder that only this user may enter; stack removes all."""
    import socket

    if not names:
        return {}
    os.makedirs(RUNTIME, mode=0o700, exist_ok=True)
    # left by an agent that was killed; the name is ours, since a running guest holds it no more
    _remove_folder(folder)
    os.mkdir(folder, mode=0o700)
    stack.callback(_remove_folder, folder)
    sockets = {}
    for name in names:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(f"{folder}/{name}")
        listener.listen()
        sockets[name] = listener
    return sockets


class GuestVm:
    """A guest's QEMU, from start() until forget().

    Owns the RAM file, the iommufd, the device files and the socket folder. When QEMU dies, by
    itself or by stop(), a thread of this object reaps it and closes the devices (whose PASID lists
    die with them), the iommufd and the sockets; only the memory stays to be read, until forget().
    The same thread closes a device that QEMU says is gone, on whoever's wish: this object's copy of
    its file is then the last one.
    """

    def __init__(
        self,
        name: str,
        memory_size: int,
        huge: bool,
        iommufd: Iommufd,
        devices: Mapping[str, VfioDevice],
    ) -> None:
        """Takes over iommufd and devices on success. memory_size in bytes; huge: in 2 MiB pages.

        Raises OSError (ENOMEM: the kernel has not as many huge pages).
        """
        self.name = name
        self.memory_size = memory_size
        self.iommufd = iommufd
        # Replaced, never changed: others go through it meanwhile.
        self.devices = dict(devices)
        self._plugging = threading.Condition()
        self._dead = False
        self._monitor: Monitor | None = None
        self._on_unplugged: Callable[[VfioDevice], None] = lambda device: None
        self.pid = 0
        self.returncode: int | None = None
        self.socket_paths: dict[str, str] = {}
        self._gone = threading.Event()
        self._gone.set()
        with ExitStack() as stack:
            flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0)
            self.memory_fd = os.memfd_create(f"ram-{name}", flags)
            stack.callback(os.close, self.memory_fd)
            os.ftruncate(self.memory_fd, memory_size)
            self.memory = stack.enter_context(mmap.mmap(self.memory_fd, memory_size))
            self._output = _bounded(f"output-{name}")
            stack.callback(os.close, self._output)
            self._memory_stack = stack.pop_all()
        self._running_stack = ExitStack()

    def start(
        self,
        spawner: Spawner,
        argv: Sequence[str],
        socket_names: Sequence[str],
        on_exit: Callable[[GuestVm], None],
        on_unplugged: Callable[[VfioDevice], None],
        inherit: Sequence[int] = (),
    ) -> int:
        """Starts QEMU; returns its pid. Once. On failure everything but forget() is undone.

        inherit are open fds of this process that QEMU gets, too, by the same numbers.

        on_exit runs in this object's thread when QEMU is dead and its files are closed, before
        stop() returns; on_unplugged when a device is gone and its file closed, before
        wait_unplugged() returns. Raises OSError.
        """
        self._on_unplugged = on_unplugged
        with ExitStack() as stack:
            stack.callback(self.iommufd.close)
            stack.callback(self._close_devices)
            sockets = _listening(f"{RUNTIME}/{self.name}", socket_names, stack)
            process = self._spawn(spawner, argv, sockets, inherit, stack)
            for name, listener in sockets.items():
                self.socket_paths[name] = listener.getsockname()
                # QEMU's copy is the only one left: after its death a connect is refused
                listener.close()
            self._running_stack = stack.pop_all()
        self.pid = process.pid
        self._gone.clear()
        watcher = threading.Thread(
            target=self._watch, args=(process, on_exit), name=f"guest-{self.name}", daemon=True
        )
        watcher.start()
        return self.pid

    def _spawn(
        self,
        spawner: Spawner,
        argv: Sequence[str],
        sockets: Mapping[str, socket.socket],
        inherit: Sequence[int],
        stack: ExitStack,
    ) -> Popen[bytes]:
        with ExitStack() as borrowed:
            numbers = {
                "memory": self.memory_fd,
                "iommufd": borrowed.enter_context(self.iommufd.descriptor.borrowed()),
            }
            for name, device in self.devices.items():
                fd = borrowed.enter_context(device.descriptor.borrowed())
                numbers[f"device:{name}"] = fd
            for name, listener in sockets.items():
                numbers[f"socket:{name}"] = listener.fileno()
            numbers["monitor"] = borrowed.enter_context(self._monitored(stack)).fileno()
            command = substituted(argv, numbers)
            process = spawner.spawn(command, [*numbers.values(), *inherit], self._output)
        try:
            self._pidfd = Descriptor(os.pidfd_open(process.pid), f"pidfd of {self.name}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        stack.callback(self._pidfd.close)
        return process

    def _monitored(self, stack: ExitStack) -> socket.socket:
        """A monitor that ends with stack; gives QEMU's end of its socket."""
        import socket

        from qemu_ioasid.agent.monitor import Monitor

        ours, theirs = socket.socketpair()
        self._monitor = Monitor(ours, self._event)
        stack.callback(self._monitor.close)
        return theirs

    def _watch(self, process: Popen[bytes], on_exit: Callable[[GuestVm], None]) -> None:
        assert self._monitor
        monitor = self._monitor.fileno()
        with self._pidfd.borrowed() as fd:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(monitor, select.POLLIN)
            while fd not in (ready := {number for number, _ in poll.poll()}):
                if monitor in ready and not self._monitor.receive():
                    poll.unregister(monitor)
        # Nobody else waits for it, so the pid stays its own until here.
        self.returncode = process.wait()
        try:
            self._running_stack.close()
            on_exit(self)
        finally:
            self._gone.set()

    # --- devices that come and go ------------------------------------------------------

    def _close_devices(self) -> None:
        with self._plugging:
            self._dead = True
        for device in self.devices.values():
            device.close()

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        device = self.devices.get(data.get("device", "")) if name == "DEVICE_DELETED" else None
        if device:
            self._remove(device)

    def _remove(self, device: VfioDevice) -> None:
        device.close()
        self._on_unplugged(device)
        with self._plugging:
            self.devices = {k: v for k, v in self.devices.items() if v is not device}
            self._plugging.notify_all()

    def plug(self, device: VfioDevice, arguments: Mapping[str, Any], seconds: float) -> None:
        """Has QEMU plug in a device by device_add's arguments, but for its id and its fd.

        Takes over the device, and closes it on failure. Raises monitor.Refused, TimeoutError,
        ConnectionError; OSError EEXIST: it has one of that name.
        """
        fdname = f"plug-{device.name}"
        with ExitStack() as undo:
            undo.callback(device.close)
            with self._plugging:
                if self._dead or not self._monitor:
                    raise ConnectionResetError(f"guest {self.name} is gone")
                if device.name in self.devices:
                    raise OSError(errno.EEXIST, f"{self.name} has a device {device.name!r}")
                self.devices = {**self.devices, device.name: device}
            undo.callback(self._remove, device)
            with device.descriptor.borrowed() as fd:
                self._monitor.execute("getfd", {"fdname": fdname}, seconds, [fd])
            named = {**arguments, "id": device.name, "fd": fdname}
            self._monitor.execute("device_add", named, seconds)
            undo.pop_all()

    def unplug(self, name: str, seconds: float) -> None:
        """Has QEMU ask the guest to let go of a device. Raises as plug(), KeyError."""
        if name not in self.devices:
            raise KeyError(f"{self.name} has no device {name!r}")
        if not self._monitor:
            raise ConnectionResetError(f"guest {self.name} is gone")
        self._monitor.execute("device_del", {"id": name}, seconds)

    def wait_unplugged(self, name: str, seconds: float) -> None:
        """Returns when a device is gone, and closed here. Raises TimeoutError."""
        with self._plugging:
            if not self._plugging.wait_for(lambda: name not in self.devices, seconds):
                raise TimeoutError(f"{self.name} let go of {name}: not within {seconds:g} s")

    @property
    def running(self) -> bool:
        """QEMU lives, or its teardown is not over."""
        return not self._gone.is_set()

    def output(self) -> str:
        """The end of what QEMU wrote to stdout and stderr, of the first OUTPUT_LIMIT bytes."""
        # QEMU's writes moved the offset, which is the open file's.
        size = os.lseek(self._output, 0, os.SEEK_CUR)
        start = max(0, size - OUTPUT_TAIL)
        return os.pread(self._output, size - start, start).decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL; does not wait. On a dead guest: does nothing."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> bool:
        """Whether there was a QEMU to send it to."""
        try:
            with self._pidfd.borrowed() as fd:
                signal.pidfd_send_signal(fd, number)
        except OSError as error:
            # EBADF: the teardown has closed the pidfd
            if error.errno not in (errno.ESRCH, errno.EBADF):
                raise
            return False
        return True

    def freeze(self, seconds: float) -> None:
        """Stops every thread of QEMU where it is, until thaw(). Raises TimeoutError.

        On a dead guest: does nothing.
        """
        if self._signal(signal.SIGSTOP):
            wait_for(f"guest {self.name} stopped", seconds, self._all_stopped)

    def _all_stopped(self) -> bool | None:
        states = []
        for task in os.listdir(f"/proc/{self.pid}/task"):
            # a thread may end while this looks
            with suppress(FileNotFoundError, ProcessLookupError):
                states.append(task_state(f"/proc/{self.pid}/task/{task}"))
        return True if set(states) == {"T"} else None

    def thaw(self) -> None:
        """Lets QEMU go on. On a dead guest, or one that runs: does nothing."""
        self._signal(signal.SIGCONT)

    def stop(self, seconds: float) -> None:
        """Kills QEMU and waits until its files are closed here, too.

        Raises TimeoutError: QEMU does not die, or work in flight holds a device file.
        """
        if self.running:
            self.kill()
        self.wait(seconds)

    def wait(self, seconds: float) -> None:
        """Waits for QEMU's end, whoever brings it about, and its files'. Raises as stop()."""
        if not self._gone.wait(seconds):
            raise TimeoutError(f"guest {self.name}: dead and torn down, not within {seconds:g} s")

    def forget(self) -> None:
        """Frees the memory and the output. OSError EBUSY: it runs."""
        if self.running:
            raise OSError(errno.EBUSY, f"guest {self.name} is running")
        self._memory_stack.close()
