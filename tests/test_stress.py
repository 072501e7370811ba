# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios that want the debug kernel, in short; ci/soak has them in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_ioasid import config
from tests.conftest import Command


def test_races_on_the_debug_kernel(command: Command) -> None:
    """Warm, the debug kernel is restored from a snapshot as any rig is."""
    ended = command("run", "stress", "--profile", "debug", "--json", "--seconds", "10")
    assert ended.code == 0, ended.err
    races, leaks = ended.json()["checks"]
    assert (races["name"], races["verdict"]) == ("races", "pass")
    assert "seed" in races["tried"]
    assert (leaks["name"], leaks["verdict"]) == ("leaks", "pass"), leaks["answered"]


SHORT = ("register", "replace", "unregister")


def test_failed_allocations(command: Command) -> None:
    chosen = [word for name in SHORT for word in ("--check", name)]
    ended = command("run", "faults", "--profile", "debug", "--json", *chosen)
    assert ended.code == 0, ended.err
    checks = ended.json()["checks"]
    assert [check["name"] for check in checks] == list(SHORT)
    assert {check["verdict"] for check in checks} == {"pass"}
    register = checks[0]
    # the entries of list and table, and the access; the structs, on their way in and out
    once, twice = (
        dict(reversed(count.split()) for count in swept.split(", "))
        for swept in register["answered"].split("; ")
    )
    assert int(once["ENOMEM"]) >= 3 and int(once["EFAULT"]) >= 3
    # and the list's and the table's own nodes, which are asked for a second time
    assert int(twice["ENOMEM"]) > 3


def test_a_kernel_that_fails_nothing_is_told(command: Command) -> None:
    ended = command("run", "faults", "--check", "register")
    assert ended.code == 3
    assert "--profile debug" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stress", "--rig", str(config.DEFAULT)], "a host VM of 2 vCPUs and no guests"),
        (["faults", "--rig", str(config.DEFAULT)], "a rig without guests"),
        (["boot", "--seconds", "5"], "--seconds: scenario boot takes none"),
        (["stress", "--host", "local"], "needs a host VM"),
        (["stress", "--seconds", "0"], "must be a whole number from 1 on"),
    ],
)
def test_what_they_do_not_take(
    command: Command, arguments: list[str], message: str, tmp_path: Path
) -> None:
    ended = command("run", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "reports").exists()
