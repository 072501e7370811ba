# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest of a rig, and the work that its devices are given."""

from __future__ import annotations

from typing import Any

from qemu_ioasid import guestvm
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.guestvm import GuestMachine

#: A descriptor for `Guest.submit`, as docs/agent.md describes it.
Descriptor = dict[str, Any]
#: A completion record, likewise.
Completion = dict[str, Any]


def copy(pasid: int | None, source: int, destination: int, length: int) -> Descriptor:
    """Work that copies *length* bytes; *pasid* None goes through the device's own address space."""
    return {"pasid": pasid, "src": source, "dst": destination, "length": length}


class Guest:
    """A booted guest, its arena and its devices, which are open in it."""

    def __init__(
        self, machine: GuestMachine, mdevs: tuple[str, ...], arena: dict[str, int] | None = None
    ) -> None:
        """*arena* is what an earlier rig of this state was told; without it, all is made now."""
        self.machine = machine
        self.name = machine.name
        self.agent = machine.agent
        self.mdevs = mdevs
        if arena is None:
            arena = self.agent.call("arena")
            for index, mdev in enumerate(mdevs):
                self.agent.call("device_open", name=mdev, bdf=guestvm.device_address(index))
        self.arena = arena
        self.gpa: int = arena["gpa"]
        self.size: int = arena["size"]

    def submit(self, device: str, *work: Descriptor, seconds: float = 20) -> list[Completion]:
        """Have *device* do *work*; the completion records in order, refusals included."""
        deadline = Deadline(seconds + 5, f"completions of {device} in {self.name}")
        done: list[Completion] = self.agent.call(
            "submit",
            deadline=deadline,
            name=device,
            descriptors=list(work),
            seconds=seconds * calibration(),
        )
        return done

    def submit_start(self, device: str, *work: Descriptor) -> int:
        """Ring the doorbell for *work* and return a ticket for `submit_wait`."""
        answer = self.agent.call("submit_start", name=device, descriptors=list(work))
        return int(answer["ticket"])

    def submit_wait(self, ticket: int, seconds: float = 20) -> list[Completion]:
        """The completion records of work begun with `submit_start`."""
        deadline = Deadline(seconds + 5, f"completions in {self.name}")
        done: list[Completion] = self.agent.call(
            "submit_wait", deadline=deadline, ticket=ticket, seconds=seconds * calibration()
        )
        return done
