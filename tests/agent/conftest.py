"""What the agent's tests share: the agent as a real process, and the kernel's headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from qemu_ioasid.kernel import Kernel

ROOT = Path(__file__).parents[2]
SECONDS = 30.0


class AgentProcess:
    """An agent started as the orchestrator starts it, spoken to over real pipes."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self.events: Queue[dict[str, Any]] = Queue()
        self._ident = 0
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            message = json.loads(line)
            if "event" in message:
                self.events.put(message)
            else:
                self._answers[message["id"]].put(message)

    def send(self, op: str, **args: Any) -> Queue[dict[str, Any]]:
        """Sends a request; its answer comes into the queue."""
        assert self.process.stdin
        answers: Queue[dict[str, Any]] = Queue()
        with self._lock:
            self._ident += 1
            self._answers[self._ident] = answers
            request = {"id": self._ident, "op": op, "args": args}
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        return answers

    def ask(self, op: str, **args: Any) -> dict[str, Any]:
        """Sends a request and waits for the whole answer."""
        return self.send(op, **args).get(timeout=SECONDS)

    def ok(self, op: str, **args: Any) -> Any:
        """The result of a request that must succeed."""
        answer = self.ask(op, **args)
        assert "ok" in answer, answer
        return answer["ok"]

    def hang_up(self) -> int:
        """Closes the agent's stdin; its exit status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(SECONDS)

    def stderr(self) -> str:
        """What it wrote to stderr; after its end."""
        assert self.process.stderr
        return self.process.stderr.read().decode()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream
            stream.close()


@pytest.fixture(scope="session")
def uapi_headers(built_kernel: Kernel) -> Path:
    """The kernel's user API headers, as headers_install leaves them, with pdma.h."""
    return built_kernel.headers / "include"
