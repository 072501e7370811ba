"""What the host side sees: changes in guests' RAM files, and the kernel's accesses."""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.guestvm import GuestVm
    from qemu_ioasid.agent.tracing import AccessTrace
    from qemu_ioasid.agent.watch import Watch

    Json = dict[str, Any]

# fmt: off
OPERATIONS = (
    "watch", "changes", "read",
    "trace_start", "trace_clear", "trace_read", "trace_take", "trace_stop",
)
# fmt: on


class Witness:
    """One watch a guest, and one trace. The methods named in OPERATIONS are the protocol's."""

    def __init__(self, guest: Callable[[str], GuestVm]) -> None:
        """guest(name) is a guest, running or dead; KeyError: there is none."""
        self._guest = guest
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._trace: AccessTrace | None = None
        self.operations: Mapping[str, Callable[..., Any]] = {
            name: getattr(self, name) for name in OPERATIONS
        }

    def close(self) -> None:
        """Takes the probe away."""
        self.trace_stop()

    def forget(self, guest: str | None = None) -> None:
        """Drops the watch of a guest, or all."""
        with self._lock:
            if guest is None:
                self._watches.clear()
            else:
                self._watches.pop(guest, None)

    def watch(self, guest: str, gpa: int, length: int) -> Json:
        """Takes a snapshot of a range of a guest's RAM; answers with its first bytes."""
        from qemu_ioasid.agent.arena import NONCE
        from qemu_ioasid.agent.watch import Watch

        memory = self._guest(guest).memory
        with self._lock:
            taken = self._watches.get(guest)
            if taken is not None and taken.range == (memory, gpa, length):
                taken.take()
            else:
                taken = self._watches[guest] = Watch(memory, gpa, length)
        return {"nonce": taken.first(NONCE).hex()}

    def changes(self, guest: str, expect: list[Json] | None = None) -> Json:
        """What changed in the watched range since the snapshot."""
        with self._lock:
            if guest not in self._watches:
                raise KeyError(f"guest {guest!r} is not watched")
            taken = self._watches[guest]
        return taken.changes(expect or ())

    def read(self, guest: str, gpa: int, length: int) -> Json:
        """Bytes of a guest's RAM."""
        memory = self._guest(guest).memory
        if gpa < 0 or length < 0 or gpa + length > len(memory):
            raise ValueError(f"{gpa:#x}+{length:#x} is outside the RAM of {guest}")
        return {"hex": memory[gpa : gpa + length].hex()}

    def trace_start(self) -> None:
        """Starts the trace of iommufd_access_rw; running already: clears it."""
        from qemu_ioasid.agent.tracing import AccessTrace

        if self._trace:
            self._trace.clear()
            return
        trace = AccessTrace()
        trace.start()
        self._trace = trace

    def _running_trace(self) -> AccessTrace:
        if not self._trace:
            raise RuntimeError("the trace is not started")
        return self._trace

    def trace_clear(self) -> None:
        """Forgets the accesses recorded."""
        self._running_trace().clear()

    def trace_read(self) -> list[Json]:
        """The accesses recorded."""
        return [access.told() for access in self._running_trace().read()]

    def trace_take(self) -> list[Json]:
        """The accesses recorded, which are forgotten."""
        return [access.told() for access in self._running_trace().take()]

    def trace_stop(self) -> None:
        """Takes the probe away."""
        trace, self._trace = self._trace, None
        if trace:
            trace.close()
