# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that leave running guests and come back, as a user has it tried."""

from __future__ import annotations

from tests.conftest import Command

CHECKS = ["unplugged-c", "asked-a", "passed-on", "in-flight-unplugged"]


def test_no_list_outlives_its_device(command: Command) -> None:
    ended = command("run", "hotplug", "--json")
    assert ended.code == 0, ended.err
    checks = ended.json()["checks"]
    assert {check["name"]: check["verdict"] for check in checks} == dict.fromkeys(CHECKS, "pass")
    named = {check["name"]: [each["outcome"] for each in check["attempts"]] for check in checks}
    # Before the device goes, what was its own after it has come back, and what is new.
    assert named["unplugged-c"] == ["allowed", "refused", "allowed"]
    assert named["passed-on"] == ["allowed", "refused"]
