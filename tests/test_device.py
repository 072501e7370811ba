# SPDX-License-Identifier: GPL-2.0-or-later
"""What devices tell guests, and what they are to each other; the rest is scenarios' to find."""

from __future__ import annotations

from typing import Any

import pytest

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import CallFailed
from qemu_ioasid.hostdevice import HostDevice
from qemu_ioasid.rig import Descriptor, Rig, copy
from tests.conftest import Command

NOP, COMPARE = 0, 3
#: Where the mdev finds g1's arena.
BASE, SIZE = 1 << 33, 1 << 20


@pytest.mark.parametrize("scenario", ["abi", "flight"])
def test_a_device_alone_is_as_it_must_be(command: Command, scenario: str) -> None:
    ended = command("run", scenario, "--json")
    assert ended.code == 0, ended.err
    checks = ended.json()["checks"]
    assert {check["name"]: check["verdict"] for check in checks if check["verdict"] != "pass"} == {}


def work(opcode: int, src: int, dst: int, length: int, pasid: int | None = None) -> Descriptor:
    """One descriptor."""
    return {**copy(pasid, src, dst, length), "opcode": opcode}


def test_interrupts_and_the_log_in_a_guest(shared_rig: Rig) -> None:
    """MSI-X through QEMU, KVM and the guest's interrupt remapping; each device its own."""
    guest = shared_rig.guests["g1"]
    for device in ("a", "b"):
        guest.agent.call("irq_start", name=device)
    for device, other in (("a", "b"), ("b", "a"), ("a", "b")):
        for descriptor, vector in (
            ({**work(NOP, 0, 0, 0), "interrupt": True}, 0),
            (work(NOP, 0, 0, 0, 5), 1),
        ):
            guest.submit(device, descriptor)
            told = guest.agent.call("irq_wait", name=device, vector=vector, seconds=10)
            assert told == {"count": 1}
        with pytest.raises(CallFailed, match="not raised"):
            guest.agent.call("irq_wait", name=other, vector=0, seconds=0)
    told = guest.agent.call("device_faults", name="a")
    assert (told["count"], [fault["reason"] for fault in told["faults"]]) == (2, ["NOT_LISTED"] * 2)
    assert {fault["pasid"] for fault in told["faults"]} == {5}
    guest.agent.call("irq_stop", name="a")
    guest.submit("a", work(NOP, 0, 0, 0, 5))
    guest.agent.call("irq_start", name="a")
    guest.submit("a", work(NOP, 0, 0, 0, 5))
    assert guest.agent.call("irq_wait", name="a", vector=1, seconds=10) == {"count": 1}


def test_work_of_one_device_does_not_hold_anothers(shared_rig: Rig, mdev: HostDevice) -> None:
    """A full ring of the longest work there is, and g2's in the middle of it."""
    agent = shared_rig.host.agent
    memory: dict[str, Any] = {"gpa": shared_rig.guests["g1"].gpa, "length": SIZE, "guest": "g1"}
    agent.call("ioas_map_guest", iommufd=mdev.iommufd, ioas=mdev.ioas, iova=BASE, **memory)
    longest = work(COMPARE, BASE, BASE, SIZE)
    args = {"name": mdev.name, "descriptors": [longest] * 1024, "seconds": 60}
    storm = agent.start("device_submit", **args)
    while not agent.call("device_registers", name=mdev.name)["HEAD"]:
        assert not storm.ends_within(0)
    guest = shared_rig.guests["g2"]
    for _ in range(5):
        (done,) = guest.submit("c", work(NOP, 0, 0, 0))
        assert done["status"] == "DONE"
    registers = agent.call("device_registers", name=mdev.name)
    assert 0 < registers["HEAD"] < registers["TAIL"] == 1024
    mdev.reset()
    with pytest.raises(CallFailed, match="lost in a reset"):
        storm.result(Deadline(10, "end of the storm"))
