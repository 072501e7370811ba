# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent's channel that outlives its agent: a VM is killed, and booted again."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_ioasid import client, logfile
from qemu_ioasid.client import Agent
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import AgentError, CallFailed, ConnectionLost


@pytest.mark.parametrize("left", [b"", b'{"id": 1, "ok": [1, 2, "', b"{", b'{"event": "rea'])
def test_another_agent_on_the_same_channel(tmp_path: Path, left: bytes) -> None:
    ours, theirs = socket.socketpair()
    deadline = Deadline(10, "agent")
    with theirs, client.attach(ours, "g1", tmp_path / "log") as agent:
        theirs.sendall(b'{"event": "ready", "role": "guest"}\n')
        agent.wait_ready(deadline)
        asked = agent.start("ledger")
        theirs.sendall(left)
        agent.lose()
        with pytest.raises(ConnectionLost):
            asked.result(deadline)
        with pytest.raises(ConnectionLost):
            agent.start("ledger")
        agent.renew()
        theirs.sendall(b'{"event": "ready", "role": "guest"}\n')
        agent.wait_ready(deadline)
        asked = agent.start("ledger")
        number = json.loads(theirs.recv(4096).splitlines()[-1])["id"]
        # An answer to what the one before was asked is nobody's.
        theirs.sendall(b'{"id": 1, "ok": "old"}\n')
        theirs.sendall(json.dumps({"id": number, "ok": "new"}).encode() + b"\n")
        assert asked.result(deadline) == "new"


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[tuple[Agent, socket.socket]]:
    """An agent that has begun, and what is said in its place."""
    ours, theirs = socket.socketpair()
    with theirs, client.attach(ours, "g1", tmp_path / "log") as agent:
        theirs.sendall(b'{"event": "ready", "role": "guest"}\n')
        agent.wait_ready(Deadline(10, "agent"))
        yield agent, theirs


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b"\x1b[2J\x1b]0;owned\x07",
        b"[" * 100_000,
        b"[]",
        b"7",
        b"null",
        b'"../../etc/passwd"',
        b'{"id": 1}',
        b'{"id": "1", "ok": 1}',
        b'{"id": {}, "ok": 1}',
        b'{"id": 1, "error": "../x"}',
        b'{"event": ["ready"]}',
        b'{"id": ' + b"9" * 10_000 + b', "ok": 1}',
        b'{"id": 1, "ok": 1',
    ],
)
def test_what_is_no_answer_ends_the_agent(spoken: tuple[Agent, socket.socket], line: bytes) -> None:
    """By name, at once, for those who wait and those who come; and it is read on."""
    agent, theirs = spoken
    asked = agent.start("nonce")
    theirs.sendall(line + b"\n")
    with pytest.raises(AgentError, match=r"^g1: what the agent says is no answer: ") as caught:
        asked.result(Deadline(10, "answer"))
    assert (caught.value.message + caught.value.evidence).isprintable()
    with pytest.raises(AgentError):
        agent.start("nonce")
    theirs.sendall(b"x" * (1 << 20))
    assert agent.lost


def test_an_agent_of_a_restored_vm_says_no_more_that_it_is_ready(tmp_path: Path) -> None:
    """Its first answer says so: what comes after that and is none ends it, too."""
    ours, theirs = socket.socketpair()
    with theirs, client.attach(ours, "g1", tmp_path / "log") as agent:
        asked = agent.start("wake")
        theirs.sendall(b'half said\n{"id": 1, "ok": {"now": 7}}\n')
        assert asked.result(Deadline(10, "answer")) == {"now": 7}
        asked = agent.start("nonce")
        theirs.sendall(b"nonsense\n")
        with pytest.raises(AgentError, match="is no answer"):
            asked.result(Deadline(10, "answer"))


@pytest.mark.parametrize(
    ("op", "answer", "what"),
    [
        ("nonce", 7, "ok must be an object"),
        ("nonce", {"hex": ["../x"]}, "ok.hex must be"),
        ("arena", {"gpa": "0"}, "ok.gpa must be"),
        ("submit", {}, "ok must be a list"),
        ("submit", [{"status": "DONE"}], "ok[0].pasid is missing"),
        ("changes", {"changed": [], "unexpected": [7]}, "ok.unexpected[0] must be an object"),
    ],
)
def test_an_answer_of_another_shape(
    spoken: tuple[Agent, socket.socket], op: str, answer: object, what: str
) -> None:
    agent, theirs = spoken
    asked = agent.start(op)
    theirs.sendall(json.dumps({"id": agent._next, "ok": answer}).encode() + b"\n")
    with pytest.raises(AgentError, match=f"^g1: {op}: what the agent says is no answer") as caught:
        asked.result(Deadline(10, "answer"))
    assert what in caught.value.message


def test_an_error_acts_on_nothing(spoken: tuple[Agent, socket.socket]) -> None:
    agent, theirs = spoken
    evil = "\x1b[2J\r\n\u202e" * 100_000
    asked = agent.start("nonce")
    error = {"type": "OSError", "errno": 5, "message": evil, "traceback": evil}
    theirs.sendall(json.dumps({"id": agent._next, "error": error}).encode() + b"\n")
    with pytest.raises(CallFailed) as caught:
        asked.result(Deadline(10, "answer"))
    assert caught.value.message.startswith("g1: nonce: \\x1b[2J\\r\\n\\u202e")
    assert caught.value.message.isprintable() and len(caught.value.message) < 3000
    assert all(line.isprintable() for line in caught.value.evidence.split("\n"))
    assert len(caught.value.evidence) < 10 * client.TRACEBACK
    # It is an answer: the agent is asked on.
    assert not agent.lost


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither memory nor disk grows with it."""
    monkeypatch.setattr(client, "LONGEST", 1 << 20)
    monkeypatch.setattr(logfile, "LIMIT", 1 << 20)
    ours, theirs = socket.socketpair()
    with client.attach(ours, "g1", tmp_path / "log") as agent:
        theirs.sendall(b'{"event": "ready", "role": "guest"}\n')
        agent.wait_ready(Deadline(10, "agent"))
        asked = agent.start("nonce")
        endless = threading.Thread(target=theirs.sendall, args=(b"A" * (20 << 20),))
        endless.start()
        with pytest.raises(AgentError, match="no answer: a line of more than 1 MiB"):
            asked.result(Deadline(10, "answer"))
        endless.join(30)
        assert not endless.is_alive()
        theirs.sendall(b"\n" + b'{"event": "more"}\n' * 10_000)
        theirs.close()
    assert (tmp_path / "log").stat().st_size < (1 << 20) + 200
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
