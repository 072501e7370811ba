# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's QEMU as gdb sees it: a VM that is stopped where it stores to memory, and read there."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, InfrastructureError
from qemu_ioasid.qmp import Qmp

#: What QEMU's stub for x86-64 tells first of all registers: rax to r15 (gdb-xml/i386-64bit.xml).
_GENERAL, _WORD = 16, 8
#: To let go of a VM, in seconds of the reference machine.
END_SECONDS = 10.0


def serve(monitor: Qmp, name: str, path: str, deadline: Deadline) -> None:
    """Have the QEMU of *monitor*, which runs the VM *name*, serve gdb on the unix socket *path*.

    Raises InfrastructureError with QEMU's words.
    """
    said = monitor.monitor(f"gdbserver unix:{path},server=on,wait=off", deadline).strip()
    if "Could not" in said or "rror" in said:
        raise InfrastructureError(f"{name}: QEMU opens no door for gdb: {said}")


@contextlib.contextmanager
def stopped(monitor: Qmp, name: str, folder: Path, deadline: Deadline) -> Iterator[Stub]:
    """The VM, stopped; it runs on after the block. There is a socket in *folder* meanwhile."""
    with (
        _short(folder) as short,
        _served(monitor, name, short / "gdb", deadline) as path,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock,
    ):
        stub = Stub(sock, name, deadline)
        stub.connect(path)
        try:
            yield stub
        finally:
            stub.detach(Deadline(END_SECONDS, f"end of gdb's hold on {name}"))


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[Path]:
    """Another name of *folder* for every process of ours: a socket's ends at 107 bytes."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def _served(monitor: Qmp, name: str, path: Path, deadline: Deadline) -> Iterator[Path]:
    serve(monitor, name, str(path), deadline)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        monitor.monitor("gdbserver none", Deadline(END_SECONDS, f"end of {name}'s door for gdb"))


class Stub:
    """A VM that is stopped. Each call raises ConnectionLost, and DeadlineExceeded of *deadline*.

    See "Remote Serial Protocol" in gdb's manual.
    """

    def __init__(self, sock: socket.socket, name: str, deadline: Deadline) -> None:
        self._sock = sock
        self._name = name
        self._deadline = deadline
        self._unread = b""
        self._runs = False

    def connect(self, path: Path) -> None:
        """The VM has stopped when this returns: connected is also who has not been heard yet."""
        with self._blamed():
            self._sock.settimeout(self._deadline.remaining())
            self._sock.connect(str(path))
        self._ask("?")

    def run_to_store(self, address: int, length: int) -> bool:
        """Have the VM run on until it has stored to these bytes of the kernel's, and stop there.

        False: it has stopped for another reason.
        """
        place = f"2,{address:x},{length:x}"
        if self._ask(f"Z{place}") != "OK":
            raise InfrastructureError(f"{self._name}: QEMU watches no store to {address:#x}")
        self._runs = True
        why = self._ask("c")
        self._runs = False
        self._ask(f"z{place}")
        return "watch:" in why

    def registers(self) -> list[int]:
        """The general registers of the processor that has stopped."""
        data = bytes.fromhex(self._ask("g")[: _GENERAL * _WORD * 2])
        return [
            int.from_bytes(data[at : at + _WORD], "little") for at in range(0, len(data), _WORD)
        ]

    def read(self, address: int, length: int) -> bytes:
        """Memory as that processor sees it; nothing where nothing is mapped."""
        said = self._ask(f"m{address:x},{length:x}")
        return b"" if said.startswith("E") else bytes.fromhex(said)

    def write(self, address: int, data: bytes) -> None:
        """Change memory as that processor sees it."""
        if self._ask(f"M{address:x},{len(data):x}:{data.hex()}") != "OK":
            raise InfrastructureError(f"{self._name}: QEMU writes nothing to {address:#x}")

    def detach(self, deadline: Deadline) -> None:
        """Let the VM run on, by another *deadline*; nothing is watched any more."""
        self._deadline = deadline
        if self._runs:
            # It hears nothing else while it runs, and says that it has stopped.
            self._send(b"\x03")
            self._answer()
        self._ask("D")

    def _ask(self, packet: str) -> str:
        self._send(f"${packet}#{sum(packet.encode()) & 0xFF:02x}".encode())
        return self._answer()

    def _answer(self) -> str:
        said, self._unread = self._until(b"#", 2)
        self._send(b"+")
        # Before it is the stub's own "+".
        return said.partition(b"$")[2][:-3].decode()

    def _send(self, data: bytes) -> None:
        with self._blamed():
            self._sock.settimeout(self._deadline.remaining())
            self._sock.sendall(data)

    def _until(self, mark: bytes, more: int) -> tuple[bytes, bytes]:
        """All up to *mark* and *more* bytes after it, and what is left."""
        while (end := self._unread.find(mark) + 1 + more) <= more or len(self._unread) < end:
            with self._blamed():
                self._sock.settimeout(self._deadline.remaining())
                data = self._sock.recv(65536)
            if not data:
                raise ConnectionLost(f"{self._name}: QEMU has closed its door for gdb")
            self._unread += data
        return self._unread[:end], self._unread[end:]

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise self._deadline.exceeded() from None
        except OSError as error:
            raise ConnectionLost(f"{self._name}: its QEMU's door for gdb: {error}") from None
