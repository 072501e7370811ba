# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent's channel that outlives its agent: a VM is killed, and booted again."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from qemu_ioasid import client
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConnectionLost


@pytest.mark.parametrize("left", [b"", b'{"id": 1, "ok": [1, 2, "', b"{", b'{"event": "rea'])
def test_another_agent_on_the_same_channel(tmp_path: Path, left: bytes) -> None:
    ours, theirs = socket.socketpair()
    deadline = Deadline(10, "agent")
    with theirs, client.attach(ours, "g1", tmp_path / "log") as agent:
        theirs.sendall(b'{"event": "ready", "role": "guest"}\n')
        agent.wait_ready(deadline)
        asked = agent.start("hello")
        theirs.sendall(left)
        agent.lose()
        with pytest.raises(ConnectionLost):
            asked.result(deadline)
        with pytest.raises(ConnectionLost):
            agent.start("hello")
        agent.renew()
        theirs.sendall(b'{"event": "ready", "role": "guest"}\n')
        agent.wait_ready(deadline)
        asked = agent.start("hello")
        number = json.loads(theirs.recv(4096).splitlines()[-1])["id"]
        # An answer to what the one before was asked is nobody's.
        theirs.sendall(b'{"id": 1, "ok": "old"}\n')
        theirs.sendall(json.dumps({"id": number, "ok": "new"}).encode() + b"\n")
        assert asked.result(deadline) == "new"
