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
    from collections.abc import Collection, Sequence


class _Order:
    """One spawn asked of the spawning thread, and its outcome."""

    __slots__ = ("argv", "done", "error", "fds", "output", "process")

    def __init__(self, argv: Sequence[str], fds: Collection[int], output: int) -> None:
        self.argv = argv
        self.fds = fds
        self.output = output
        self.process: subprocess.Popen[bytes] | None = None
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
        order = _Order(argv, fds, output)
        self._orders.put(order)
        order.done.wait()
        if order.error:
            raise order.error
        assert order.process
        return order.process

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            try:
                order.process = subprocess.Popen(
                    order.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=order.output,
                    stderr=order.output,
                    pass_fds=tuple(order.fds),
                    start_new_session=True,
                    preexec_fn=self._in_child,
                )
            except BaseException as error:
                order.error = error
            order.done.set()

    def _in_child(self) -> None:
        # Forked from a process with threads: takes no lock, imports nothing. An agent that died
        # between fork and prctl sends no signal any more, but has left another parent behind.
        if self._die_with_parent() or os.getppid() != self._agent:
            os._exit(127)
