# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenario hostile, in short: a storm harms and delays nobody, and is what its seed says."""

from __future__ import annotations

import random
import re

from qemu_ioasid.agent import storm
from qemu_ioasid.agent.uapi import pdma
from tests.conftest import Command

TARGETS = [storm.Target(7, 0x4000_0000, 1 << 16), storm.Target(None, 0x7000_0000, 1 << 16)]


def drawn(seed: int) -> list[bytes]:
    """Descriptors of a seed."""
    draw = random.Random(seed)
    return [storm.descriptor(draw, TARGETS) for _ in range(storm.PALETTE)]


def test_a_seed_is_its_bytes() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_what_is_drawn_ends_in_every_way() -> None:
    ways = {storm.verdict(record, 7) for record in drawn(1)}
    done, refused = pdma.PDMA_COMPLETION_DONE, pdma.PDMA_COMPLETION_REFUSED
    assert ways == {None, done, refused, pdma.PDMA_COMPLETION_INVALID}


def test_a_storm_in_short(command: Command) -> None:
    ended = command("run", "hostile", "--json", "--seed", "1", "--operations", "2000")
    assert ended.code == 0, ended.err
    checks = {check["name"]: check for check in ended.json()["checks"]}
    assert list(checks) == [
        "storm",
        "storm-reset",
        *(f"{what}-{device}" for device in "abc" for what in ("works", "unregistered")),
        *("audit", "latency", "storm-file", "cap"),
    ]
    made = [int(count) for count in re.findall(r"(\d+) operations", checks["storm"]["answered"])]
    assert len(made) == 2 and sum(made) >= 2000
    assert "the host's kernel said nothing" in checks["storm"]["witnesses"]
    assert "times as long" in checks["latency"]["witnesses"]
    assert checks["cap"]["answered"].count("ENOSPC") == 2
