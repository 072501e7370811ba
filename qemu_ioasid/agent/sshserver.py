"""The VM's SSH server: dropbear behind the virtio-serial port "ssh", while somebody wants it."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from subprocess import Popen

    from qemu_ioasid.agent.spawn import Spawner

PORT = "/dev/virtio-ports/ssh"
HOST_KEY = "/run/host_key"
AUTHORIZED_KEYS = "/root/.ssh/authorized_keys"
# dropbear insists on a socket, so socat stands between. A port takes 32 KiB at a time
# (drivers/char/virtio_console.c).
ARGV = (
    *("socat", "-b", "32768", f"OPEN:{PORT}"),
    f"EXEC:dropbear -i -E -s -r {HOST_KEY}",
)


def _write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


class SshServer:
    """One connection at a time, started for it and gone with it.

    A server that waited in a snapshot would bring its random state, and so its session keys, to
    every rig restored from it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spawner: Spawner | None = None
        self._process: Popen[bytes] | None = None

    def start(self, host_key: bytes, authorized_keys: bytes) -> int:
        """Serves the port's next connection with these keys; returns the pid. Ends one before.

        host_key is in dropbear's format. The other end of the port is connected already.
        """
        from qemu_ioasid.agent.spawn import Spawner

        with self._lock:
            self._end()
            _write(HOST_KEY, host_key)
            _write(AUTHORIZED_KEYS, authorized_keys)
            if self._spawner is None:
                self._spawner = Spawner()
            log = os.open("/run/ssh.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                self._process = self._spawner.spawn(ARGV, (), log)
            finally:
                os.close(log)
            return self._process.pid

    def stop(self) -> None:
        """Ends the server, whose connection ends with it."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # unreaped, its pid and so its group's id cannot be another's
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
