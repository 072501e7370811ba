# SPDX-License-Identifier: GPL-2.0-or-later
"""SSH to a VM, through `paramiko`, over a stream that is connected already.

Each VM gets a host key made before it boots and is accepted with that key
only; each run logs in with a client key of its own. Nothing listens.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost, InfrastructureError
from qemu_ioasid.text import visible

# Its tracebacks of lost connections would land on the user's terminal.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

#: The most that is read of what a command in a VM writes, in bytes.
LONGEST = 64 << 20
#: So soon a watch over a command notices that the command is over.
WATCH_SECONDS = 0.5


class Stream(Protocol):
    """What paramiko asks of a socket: a socket or another connection's channel."""

    def send(self, data: bytes, /) -> int: ...
    def recv(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...
    def settimeout(self, seconds: float | None, /) -> None: ...


@dataclass(frozen=True)
class KeyPair:
    """An ed25519 key: paramiko's object, and the two raw 32-byte halves."""

    key: paramiko.PKey
    seed: bytes
    public: bytes

    def authorized_keys(self) -> str:
        """The line for ``authorized_keys``."""
        return f"{self.key.get_name()} {self.key.get_base64()}\n"

    def dropbear(self) -> bytes:
        """As dropbear's host key file (signkey.c, ed25519.c of dropbear): name, seed and public."""
        name, both = b"ssh-ed25519", self.seed + self.public
        return b"".join(len(part).to_bytes(4, "big") + part for part in (name, both))


def generate() -> KeyPair:
    """A fresh key; nothing touches the disk."""
    private = Ed25519PrivateKey.generate()
    text = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    ).decode()
    raw = serialization.Encoding.Raw
    return KeyPair(
        key=paramiko.Ed25519Key.from_private_key(io.StringIO(text)),
        seed=private.private_bytes(
            raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        ),
        public=private.public_key().public_bytes(raw, serialization.PublicFormat.Raw),
    )


@dataclass(frozen=True)
class Terminal:
    """What a program in the VM is told of the terminal that it writes to; *kind* is ``TERM``."""

    kind: str
    columns: int
    rows: int


class Ssh:
    """A logged-in connection; channels are opened on it."""

    def __init__(self, transport: paramiko.Transport, name: str) -> None:
        self._transport = transport
        self._name = name

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return self._transport.is_active()

    def run(
        self, command: str, deadline: Deadline, terminal: Terminal | None = None
    ) -> paramiko.Channel:
        """Start *command* in the VM; the channel is its standard input and output.

        On a *terminal* of its own where one is given; "" is then the login shell.
        """
        try:
            channel = self._transport.open_session(timeout=deadline.remaining())
            with bounded(channel, deadline):
                if terminal is not None:
                    channel.get_pty(terminal.kind, terminal.columns, terminal.rows)
                if command:
                    channel.exec_command(command)
                else:
                    channel.invoke_shell()
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise ConnectionLost(f"{self._name}: SSH: {str(error) or 'connection ended'}") from None
        return channel

    def put(self, files: dict[str, bytes], deadline: Deadline) -> None:
        """Write *files* (absolute path = content) in the VM, for root alone; folders are made."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for path, data in files.items():
                member = tarfile.TarInfo(path.lstrip("/"))
                member.size, member.mode = len(data), 0o600
                tar.addfile(member, io.BytesIO(data))
        self.output("umask 077; exec tar -x -C /", deadline, packed.getvalue())

    def get(self, path: str, deadline: Deadline) -> bytes:
        """The content of a file in the VM."""
        return self.output(f"cat {shlex.quote(path)}", deadline)

    def output(
        self,
        script: str,
        deadline: Deadline,
        data: bytes = b"",
        unless: threading.Event | None = None,
    ) -> bytes:
        """What *script*, fed with *data*, writes in the VM.

        Raises InfrastructureError when it fails, writes more than `LONGEST`, or has not ended when
        *unless* is set: then nobody waits for it any more.
        """
        channel = self.run(script, deadline)
        with contextlib.closing(channel):
            out = bytearray()
            try:
                with bounded(channel, deadline), _ended(channel, unless):
                    channel.sendall(data)
                    channel.shutdown_write()
                    while part := channel.recv(65536):
                        out += part
                        if len(out) > LONGEST:
                            what = f"{script} writes more than {LONGEST >> 20} MiB"
                            raise InfrastructureError(f"{self._name}: {what}")
                    status = channel.recv_exit_status()
            except OSError:
                raise ConnectionLost(f"{self._name}: SSH connection ended") from None
            if status and unless is not None and unless.is_set():
                raise InfrastructureError(
                    f"{self._name}: {script}: given up, something else is wrong"
                )
            if status:
                said = channel.recv_stderr(4096).decode(errors="replace").strip()
                raise InfrastructureError(
                    f"{self._name}: {script}: exit code {status}: {visible(said)}"
                )
        return bytes(out)


@contextlib.contextmanager
def _ended(channel: paramiko.Channel, unless: threading.Event | None) -> Iterator[None]:
    """Close *channel* when *unless* is set before the block has ended."""
    if unless is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if unless.wait(WATCH_SECONDS):
                channel.close()
                return

    thread = threading.Thread(target=watch, name="watch over a command", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def bounded(channel: paramiko.Channel, deadline: Deadline) -> Iterator[None]:
    """Close *channel* at the deadline if the block has not ended: paramiko's own waits have none.

    Raises DeadlineExceeded when that is what ended it.
    """
    timer = threading.Timer(deadline.remaining(), channel.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        # Raises in place of what the closed channel made the block raise.
        deadline.remaining()


@contextlib.contextmanager
def connect(
    stream: Stream, name: str, host_key: KeyPair, client_key: KeyPair, deadline: Deadline
) -> Iterator[Ssh]:
    """Log in as root; the stream is closed at the end.

    Raises ConnectionLost when the other end goes away or shows another host
    key than *host_key*, DeadlineExceeded when it does not answer.
    """
    transport = paramiko.Transport(stream)  # type: ignore[arg-type]
    transport.daemon = True
    try:
        # The peer's banner comes when the VM has booted: that wait is the boot.
        transport.banner_timeout = deadline.remaining()
        transport.handshake_timeout = transport.auth_timeout = deadline.remaining()
        try:
            done = threading.Event()
            transport.start_client(event=done)
            if not done.wait(deadline.remaining()):
                raise deadline.exceeded()
            if not transport.is_active():
                raise transport.get_exception() or EOFError()
            shown = transport.get_remote_server_key()
            if shown.asbytes() != host_key.key.asbytes():
                raise InfrastructureError(f"{name}: SSH host key is not the one made for this VM")
            transport.auth_publickey("root", client_key.key)
        except paramiko.AuthenticationException as error:
            raise InfrastructureError(f"{name}: SSH: login refused: {error}") from None
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise ConnectionLost(f"{name}: SSH: {str(error) or 'connection ended'}") from None
        yield Ssh(transport, name)
    finally:
        transport.close()


@contextlib.contextmanager
def as_socket(channel: paramiko.Channel, name: str) -> Iterator[socket.socket]:
    """A real socket whose bytes are the channel's, for code that needs a file descriptor."""
    ours, theirs = socket.socketpair()

    def inward() -> None:
        with contextlib.suppress(OSError):
            while data := channel.recv(65536):
                ours.sendall(data)
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_WR)

    def outward() -> None:
        with contextlib.suppress(OSError):
            while data := ours.recv(65536):
                channel.sendall(data)
        channel.close()

    threads = [
        threading.Thread(target=work, name=f"{name} {work.__name__}", daemon=True)
        for work in (inward, outward)
    ]
    try:
        for thread in threads:
            thread.start()
        yield theirs
    finally:
        channel.close()
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
        ours.close()
        theirs.close()
