"""What an agent does for its VM whatever its role."""

from __future__ import annotations

import time

from qemu_ioasid.agent import wake
from qemu_ioasid.agent.kernellog import KMSG, KernelLog
from qemu_ioasid.agent.sshserver import SshServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def with_several(operations: Mapping[str, Callable[..., Any]]) -> Mapping[str, Callable[..., Any]]:
    """The operations and one more, which does several of them in one request."""

    def several(calls: list[dict[str, Any]]) -> list[Any]:
        """Does one after another; ends at the first error, and is it."""
        return [operations[call["op"]](**call.get("args", {})) for call in calls]

    return {**operations, "several": several}


class Common:
    """Operations of both roles."""

    def __init__(self) -> None:
        self._ssh = SshServer()
        self._log = KernelLog()
        self.operations: Mapping[str, Callable[..., Any]] = {
            name: getattr(self, name)
            for name in ("wake", "clock", "mark", "news", "ssh_start", "ssh_stop")
        }

    def wake(self, now: int, entropy: str) -> dict[str, int]:
        """The VM was restored: no SSH connection of before is one, the time and chance are new."""
        self._ssh.stop()
        wake.reseed(bytes.fromhex(entropy))
        wake.set_clock(now)
        return {"now": time.time_ns()}

    def clock(self, by: int) -> None:
        """Sets the clock forward by nanoseconds: what the message that set it was late."""
        wake.set_clock(time.time_ns() + by)

    def mark(self, text: str) -> None:
        """A line on the console, after everything the kernel has said so far."""
        with open(KMSG, "w") as kmsg:
            kmsg.write(f"<3>{text}\n")

    def news(self) -> dict[str, list[str]]:
        """What the kernel has said since the last call, of level warning and worse."""
        return {"news": self._log.news()}

    def ssh_start(self, host_key: str, authorized_keys: str) -> dict[str, int]:
        """Serves one SSH connection on the port that is for it."""
        return {"pid": self._ssh.start(bytes.fromhex(host_key), authorized_keys.encode())}

    def ssh_stop(self) -> None:
        """Ends the SSH connection, if there is one."""
        self._ssh.stop()

    def close(self) -> None:
        """Ends what was started."""
        self._log.close()
        self._ssh.stop()
