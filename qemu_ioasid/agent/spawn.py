"""Starts children that die with this process, even when it is killed with SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from queue import SimpleQueue

from qemu_ioasid.agent.libc import prctl_caller
from qemu_ioasid.agent.uapi.prctl import PR_SET_PDEATHSIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any


class _Order:
    """One thing asked of the spawning thread, and its outcome."""

    __slots__ = ("act", "answer", "done", "error")

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.answer: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()


class Spawner:
    """Owns the one thread that forks.

    PR_SET_PDEATHSIG fires when the *thread* that forked ends, and requests run in threads that end.
    This one runs until the process does.
    """

    def __init__(self) -> None:
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._die_with_parent = prctl_caller(PR_SET_PDEATHSIG, signal.SIGKILL)
        self._agent = os.getpid()
        threading.Thread(target=self._work, name="spawner", daemon=True).start()

    def spawn(
        self, argv: Sequence[str], fds: Collection[int], output: int
    ) -> subprocess.Popen[bytes]:
        """Starts argv with exactly these fds inherited, stdin empty, stdout and stderr to output.

        The child leads a session of its own, so that no terminal's signal reaches it. Raises
        OSError when it cannot be executed; then there is no child.
        """
        process: subprocess.Popen[bytes] = self._ordered(
            lambda: subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(fds),
                start_new_session=True,
                preexec_fn=self._in_child,
            )
        )
        return process

    def fork(self, main: Callable[[], object], fds: Collection[int]) -> int:
        """Forks a child that keeps stderr and exactly these fds, runs main and exits; its pid.

        The caller waits for it. The child has this process's memory, and of its threads the one
        that runs main: main must take no lock that a thread of now may hold.
        """
        pid: int = self._ordered(lambda: self._forked(main, fds))
        return pid

    def _forked(self, main: Callable[[], object], fds: Collection[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            self._in_child()
            start = 0
            for fd in sorted({2, *fds}):
                os.closerange(start, fd)
                start = fd + 1
            os.closerange(start, os.sysconf("SC_OPEN_MAX"))
            main()
            status = 0
        finally:
            os._exit(status)

    def _ordered(self, act: Callable[[], Any]) -> Any:
        order = _Order(act)
        self._orders.put(order)
        order.done.wait()
        if order.error:
            raise order.error
        return order.answer

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            try:
                order.answer = order.act()
            except BaseException as error:
                order.error = error
            order.done.set()

    def _in_child(self) -> None:
        # Forked from a process with threads: takes no lock, imports nothing. An agent that died
        # between fork and prctl sends no signal any more, but has left another parent behind.
        if self._die_with_parent() or os.getppid() != self._agent:
            os._exit(127)
