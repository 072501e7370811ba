"""The protocol, with the agent as a real process behind real pipes."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys

import pytest

from tests.agent.conftest import ROOT, SECONDS, AgentProcess

GUEST = "from qemu_ioasid.agent.server import main; main('guest')"

# A role with operations that misbehave, served by the real main().
ODD = """
import os, subprocess, sys, threading
from qemu_ioasid.agent import server

class Odd:
    def __init__(self):
        self.gate = threading.Event()
        self.operations = {name: getattr(self, name) for name in
            ("wait", "open_gate", "print", "child", "fail", "strange", "leave", "swallow", "big")}
    def wait(self):
        if not self.gate.wait(20):
            raise TimeoutError("the gate")
        return "waited"
    def open_gate(self):
        self.gate.set()
    def print(self, text):
        print(text, flush=True)
        os.write(1, b"raw\\n")
    def child(self):
        return subprocess.run(["sh", "-c", "echo from a child; cat"]).returncode
    def fail(self):
        try:
            os.open("/nowhere", os.O_RDONLY)
        except OSError as error:
            raise OSError(16, "it is busy") from error
    def strange(self):
        return object()
    def leave(self):
        raise SystemExit(3)
    def swallow(self, **keys):
        return sorted(keys)
    def big(self, size):
        return "x" * size
    def close(self):
        sys.stderr.write("closed\\n")
        sys.stderr.flush()

server._role = lambda name, emit: Odd()
server.main("odd")
"""


def test_ready_comes_first_and_end_of_input_ends_it() -> None:
    with AgentProcess(ODD) as agent:
        ready = agent.events.get(timeout=SECONDS)
        assert ready == {"event": "ready", "role": "odd", "pid": agent.process.pid}
        assert agent.hang_up() == 0
        assert agent.stderr() == "closed\n"


def test_end_of_input_ends_it_with_a_request_in_progress() -> None:
    with AgentProcess(ODD) as agent:
        agent.send("wait")
        agent.ok("swallow")
        assert agent.hang_up() == 0


def test_a_socket_whose_other_end_dies_with_lines_unread_ends_it() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        agent = subprocess.Popen(
            [sys.executable, "-c", GUEST], cwd=ROOT, stdin=theirs.fileno(), stdout=theirs.fileno()
        )
    with ours:
        # "ready" is there, and left there.
        assert ours.recv(1, socket.MSG_PEEK)
    try:
        assert agent.wait(SECONDS) == 0
    finally:
        agent.kill()
        agent.wait()


def test_requests_run_at_the_same_time() -> None:
    with AgentProcess(ODD) as agent:
        waiting = [agent.send("wait") for _ in range(5)]
        agent.ok("open_gate")
        assert [w.get(timeout=SECONDS)["ok"] for w in waiting] == ["waited"] * 5


def test_stray_output_does_not_reach_the_protocol() -> None:
    with AgentProcess(ODD) as agent:
        assert agent.ok("print", text='{"id": 1, "ok": "forged"}') is None
        assert agent.ok("child") == 0
        assert agent.ok("swallow", b=1, a=2) == ["a", "b"]
        agent.hang_up()
        assert agent.stderr() == '{"id": 1, "ok": "forged"}\nraw\nfrom a child\nclosed\n'


def test_an_error_carries_type_errno_message_and_where() -> None:
    with AgentProcess(ODD) as agent:
        error = agent.ask("fail")["error"]
        assert (error["type"], error["errno"]) == ("OSError", errno.EBUSY)
        assert "it is busy" in error["message"]
        assert "fail" in error["traceback"] and "FileNotFoundError" in error["traceback"]


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("nothing", {}, "LookupError"),
        ("wait", {"colour": "red"}, "TypeError"),
        ("strange", {}, "TypeError"),
        ("leave", {}, "SystemExit"),
    ],
)
def test_a_bad_request_is_an_error_and_the_agent_lives(
    op: str, args: dict[str, str], expected: str
) -> None:
    with AgentProcess(ODD) as agent:
        error = agent.ask(op, **args)["error"]
        assert error["type"] == expected
        assert "errno" not in error
        assert agent.ok("swallow") == []


def test_long_lines_from_many_threads_stay_whole() -> None:
    with AgentProcess(ODD) as agent:
        answers = [agent.send("big", size=300_000) for _ in range(8)]
        assert {a.get(timeout=SECONDS)["ok"] for a in answers} == {"x" * 300_000}


def test_sigterm_closes_the_role() -> None:
    with AgentProcess(ODD) as agent:
        agent.events.get(timeout=SECONDS)
        agent.process.terminate()
        assert agent.process.wait(SECONDS) == 128 + 15
        assert agent.stderr() == "closed\n"


def test_a_line_that_is_not_json_is_answered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUEST],
        input=b"rubbish\n",
        capture_output=True,
        cwd=ROOT,
        timeout=SECONDS,
    )
    # the answer races with the end of input; what is there is whole
    for line in done.stdout.splitlines():
        json.loads(line)
    assert done.returncode == 0


def test_both_roles_start_and_greet() -> None:
    for role in ("host", "guest"):
        code = f"from qemu_ioasid.agent.server import main; main({role!r})"
        with AgentProcess(code) as agent:
            hello = agent.ok("hello")
            assert hello["role"] == role
            assert hello["pid"] == agent.process.pid
            assert all(isinstance(known, bool) for known in hello["kernel"].values())
            assert agent.hang_up() == 0


def test_the_agent_imports_nothing_heavy() -> None:
    heavy = {"asyncio", "typing", "dataclasses", "subprocess", "inspect", "hashlib", "traceback"}
    for role in ("host", "guest"):
        code = f"import sys; import qemu_ioasid.agent.server, qemu_ioasid.agent.{role}"
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                f"import sys; sys.path[0:0] = [{str(ROOT)!r}]; {code}; print(*sys.modules)",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert not heavy & set(done.stdout.split())
