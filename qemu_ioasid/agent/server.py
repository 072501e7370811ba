"""The protocol: one JSON object a line on stdin and stdout.

request  {"id": 7, "op": "register", "args": {...}}
response {"id": 7, "ok": ...} or {"id": 7, "error": {"type", "errno", "message", "traceback"}}
event    {"event": "guest-exit", ...}; the first line is {"event": "ready", ...}

Requests run side by side, each in a thread that has nothing else to do meanwhile, since it may
block in the kernel while others are answered. End of input means that the orchestrator is gone.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType
    from typing import Any, BinaryIO, NoReturn, Protocol

    Emit = Callable[[dict[str, Any]], None]

    class Role(Protocol):
        """What a role offers: named operations, and an end."""

        operations: Mapping[str, Callable[..., Any]]

        def close(self) -> None:
            """Ends everything the role started."""


# threads that wait for work, kept for the next requests
SPARE = 4


def _traceback(error: BaseException) -> list[str]:
    # the traceback module costs more to import than everything else that a request needs
    lines = []
    entry = error.__traceback__
    while entry:
        code = entry.tb_frame.f_code
        lines.append(f"{os.path.basename(code.co_filename)}:{entry.tb_lineno} {code.co_name}")
        entry = entry.tb_next
    cause = error.__cause__ or error.__context__
    if cause:
        lines.append(f"from {type(cause).__name__}: {cause}")
        lines.extend(_traceback(cause))
    return lines


def described(error: BaseException) -> dict[str, Any]:
    """An exception as the protocol reports it; errno is there for an OSError without a path."""
    answer = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "\n".join(_traceback(error)),
    }
    number = getattr(error, "errno", None)
    # A call on an open file has been answered; a path that cannot be opened is our own trouble.
    if isinstance(number, int) and getattr(error, "filename", None) is None:
        return {**answer, "errno": number}
    return answer


class Server:
    """Reads requests from one fd and writes lines to another, both owned by the caller."""

    def __init__(self, requests: int, lines: int) -> None:
        self._requests = requests
        self._lines = lines
        self._lock = threading.Lock()
        self._operations: Mapping[str, Callable[..., Any]] = {}
        self._reading = threading.Lock()
        self._ended = threading.Event()
        # the threads that read or wait for their turn to
        self._waiting = 1
        self._count = threading.Lock()

    def emit(self, line: dict[str, Any]) -> None:
        """Writes one line, whole. When nobody reads any more it is dropped: input ends, too."""
        self._write(json.dumps(line))

    def _write(self, line: str) -> None:
        data = memoryview(line.encode() + b"\n")
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._lines, data) :]
            except BrokenPipeError:
                pass

    def serve(self, operations: Mapping[str, Callable[..., Any]]) -> None:
        """Answers requests until the end of input. Threads may outlive it."""
        self._operations = operations
        # Not closed here: that would wait for the thread that reads.
        self._start(io.BufferedReader(io.FileIO(self._requests, closefd=False)))
        self._ended.wait()

    def _start(self, stream: BinaryIO) -> None:
        threading.Thread(target=self._work, args=(stream,), daemon=True).start()

    def _work(self, stream: BinaryIO) -> None:
        # Whoever has read a request answers it, and the next in line reads on: starting a thread
        # takes longer than most requests (5 ms in a guest nested in TCG).
        while True:
            with self._reading:
                if self._ended.is_set():
                    return
                try:
                    line = stream.readline()
                except ConnectionResetError:
                    # a socket whose other end died with answers unread
                    line = b""
                if not line:
                    self._ended.set()
                    return
                with self._count:
                    self._waiting -= 1
                    nobody = not self._waiting
                    self._waiting += nobody
                if nobody:
                    self._start(stream)
            self._answer(line)
            with self._count:
                if self._waiting >= SPARE:
                    return
                self._waiting += 1

    def _answer(self, line: bytes) -> None:
        ident = None
        try:
            request = json.loads(line)
            ident = request["id"]
            operation = self._operations.get(request["op"])
            if operation is None:
                raise LookupError(f"no operation {request['op']!r}")
            response = json.dumps({"id": ident, "ok": operation(**request.get("args", {}))})
        except BaseException as error:
            response = json.dumps({"id": ident, "error": described(error)})
        self._write(response)


def _take_over(fd: int, flags: int) -> int:
    """Moves fd to a private number; the old one becomes /dev/null, or stderr for output."""
    private = os.dup(fd)
    if flags == os.O_RDONLY:
        null = os.open(os.devnull, flags)
        os.dup2(null, fd)
        os.close(null)
    else:
        os.dup2(2, fd)
    return private


def _role(name: str, emit: Emit) -> Role:
    if name == "host":
        from qemu_ioasid.agent.host import Host

        return Host(emit)
    if name == "guest":
        from qemu_ioasid.agent.guest import Guest

        return Guest()
    raise ValueError(f"no role {name!r}")


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(role: str, stdin_fd: int = 0, stdout_fd: int = 1) -> NoReturn:
    """Serves a role ("host" or "guest") on the process's stdin and stdout, then exits.

    At the end of input, and on SIGTERM or SIGHUP, everything the role holds is closed (guests are
    killed) and the process exits; threads still blocked in the kernel do not keep it. stdout is
    moved away first, so that a stray print or a child ends up on stderr.
    """
    requests = _take_over(stdin_fd, os.O_RDONLY)
    server = Server(requests, _take_over(stdout_fd, os.O_WRONLY))
    signal.signal(signal.SIGTERM, _ended)
    signal.signal(signal.SIGHUP, _ended)
    status = 0
    try:
        acting = _role(role, server.emit)
        try:
            server.emit({"event": "ready", "role": role, "pid": os.getpid()})
            server.serve(acting.operations)
        finally:
            acting.close()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        sys.stderr.write(json.dumps(described(error)) + "\n")
        status = 1
    os._exit(status)
