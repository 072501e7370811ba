# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checks of ``flight`` are made of: an open device, memory that sleeps, and moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qemu_ioasid.client import Pending
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import InfrastructureError
from qemu_ioasid.model.engine import FILL
from qemu_ioasid.rig import Completion, Descriptor, Rig
from qemu_ioasid.scenarios.checks import Broken, Trial, told

PAGE = 4096
#: The engine works in such pieces.
CHUNK = 64 * 1024
#: Where an address space has the memory that sleeps, and, from its end on, memory that does not.
SLOW = 0x1000_0000
PLAIN = SLOW + CHUNK
#: Regions by their numbers: BAR0, BAR2 and the config space.
REGISTERS, RINGS, CONFIG = 0, 2, 7
#: Where BAR2 has the completions and BAR0 the fault log, which goes to its end.
COMPLETIONS, LOG = 0x8000, 0x800
RINGS_SIZE, REGISTERS_SIZE = 0x10000, 0x1000
#: A register: how many descriptors have ended.
HEAD = 0x24
#: A descriptor, a completion and a record of the log, in bytes.
RECORD = 32
#: What a fill stores.
PATTERN = 0x5A5A_5A5A_5A5A_5A5A
STORED = b"\x5a"
#: What STATUS says while there is work.
BUSY = 1
#: The process that is killed while it waits.
HOLDER = "holder"
#: How long what must wait is watched for returning.
EARLY_SECONDS = 0.5
#: How long what must not wait may take.
SOON_SECONDS = 10.0


@dataclass(frozen=True)
class Space:
    """An IOAS and a PASID for it; handles of its memory that sleeps and of that which does not."""

    ioas: int
    pasid: int
    slow: int
    plain: int


def fill(pasid: int | None, iova: int, length: int = PAGE) -> Descriptor:
    """Work that stores `PATTERN` by that PASID, or without one."""
    return {"opcode": FILL, "pasid": pasid, "src": PATTERN, "dst": iova, "length": length}


def _row(rows: list[dict[str, Any]], pasid: int) -> dict[str, Any]:
    return next((each for each in rows if each["pasid"] == pasid), {})


class Flight:
    """A mdev that the host side has to itself, and the name of another one."""

    def __init__(self, rig: Rig, device: str, other: str) -> None:
        self.rig = rig
        self.host = rig.host.agent
        self.registrar = rig.registrar
        self.device, self.other = device, other
        self.iommufd = f"agent:{device}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The device, open; with the block goes all that was made in it, asleep or not."""
        self.host.call("device_open", name=self.device)
        try:
            yield
        except BaseException:
            # What does not do as it must may not even end.
            with contextlib.suppress(InfrastructureError):
                self.host.call("reset")
            raise
        self.host.call("reset")

    def reopen(self) -> None:
        """Close the device and open it: whoever has it now is the next one."""
        self.host.call("device_close", name=self.device)
        self.host.call("device_open", name=self.device)

    def beside(self) -> Flight:
        """The other device, open on an iommufd of its own; it goes with the first one's block."""
        self.host.call("device_open", name=self.other)
        return Flight(self.rig, self.other, self.device)

    def joined(self) -> Flight:
        """A file of the other device, by its name, bound to the first one's iommufd."""
        self.host.call("file_open", name=self.other, device=self.other)
        self.host.call("raw_bind", device=self.other, iommufd=self.iommufd)
        found = Flight(self.rig, self.other, self.device)
        found.iommufd = self.iommufd
        return found

    def memory(self, ioas: int, iova: int, length: int = CHUNK) -> int:
        """Memory at *iova* that puts accesses to sleep; its handle."""
        place: dict[str, Any] = {
            "iommufd": self.iommufd,
            "ioas": ioas,
            "iova": iova,
            "length": length,
        }
        return int(self.host.call("slow_create", **place)["handle"])

    def space(self) -> Space:
        """An IOAS with both kinds of memory, and a PASID that is to name it."""
        ioas = self.registrar.ioas(self.iommufd)
        slow, plain = self.memory(ioas, SLOW), self.memory(ioas, PLAIN)
        self.release(plain)
        return Space(ioas, self.registrar.alloc(self.iommufd), slow, plain)

    def registered(self) -> Space:
        """As `space`, and the PASID is in the device's list."""
        space = self.space()
        self.registrar.register(self.device, self.iommufd, space.pasid, space.ioas)
        return space

    def submit(self, *work: Descriptor) -> int:
        """Give the device *work*; a ticket for `completions`."""
        return int(
            self.host.call("device_submit_start", name=self.device, descriptors=work)["ticket"]
        )

    def sleeping(self, *queued: int) -> tuple[Space, int]:
        """A PASID whose work sleeps, with fills at *queued* behind it; the ticket of all."""
        space = self.registered()
        ticket = self.submit(*(fill(space.pasid, iova) for iova in (SLOW, *queued)))
        self.asleep(space.slow)
        return space, ticket

    def sleeping_own(self, space: Space, *queued: int) -> int:
        """As `sleeping`, of work without a PASID, for which the device gets *space*."""
        self.host.call("raw_attach", device=self.device, ioas=space.ioas)
        ticket = self.submit(*(fill(None, iova) for iova in (SLOW, *queued)))
        self.asleep(space.slow)
        return ticket

    def release(self, handle: int) -> None:
        """Wake who sleeps in that memory, and let everybody through from now on."""
        self.host.call("slow_release", handle=handle)

    def asleep(self, handle: int) -> None:
        """Return when an access sleeps in the memory of *handle*."""
        self.host.call("slow_wait", handle=handle, seconds=20 * calibration())

    def blocked(self, space: Space) -> None:
        """Return when the kernel's list says that work by a PASID is refused, or has to wait."""
        seconds = SOON_SECONDS * calibration()
        self.host.call("wait_blocked", device=self.device, pasid=space.pasid, seconds=seconds)

    def done(self, ticket: int) -> list[Completion]:
        """The completions of *ticket*'s work, all of it ended."""
        found: list[Completion] = self.host.call(
            "device_submit_wait", ticket=ticket, seconds=20 * calibration()
        )
        return found

    def completions(self, trial: Trial, ticket: int, *expected: str) -> None:
        """Require the work of *ticket* to end so."""
        found = self.done(ticket)
        trial.answer(", ".join(told(each) for each in found))
        statuses = [str(each["status"]) for each in found]
        trial.require(
            statuses == list(expected), f"the work must end as {expected}, ended as {statuses}"
        )

    def content(self, handle: int, offset: int, length: int) -> bytes:
        """What is in released memory."""
        found = self.host.call("slow_read", handle=handle, offset=offset, length=length)
        return bytes.fromhex(found["hex"])

    def holds(self, handle: int, at: int = 0) -> bool:
        """Whether the page at *at* of released memory has been filled; else it is as it was."""
        return self.content(handle, at, PAGE) == STORED * PAGE

    def untouched(self, trial: Trial, handle: int, what: str) -> None:
        """Require that nothing has been stored in released memory."""
        found = self.content(handle, 0, CHUNK)
        trial.require(not any(found), f"{what} has been carried out")

    def listed(self, pasid: int) -> dict[str, Any]:
        """What the kernel's list says of *pasid*; nothing when it is not there."""
        return _row(self.host.call("kernel_list", device=self.device), pasid)

    def tabled(self, pasid: int) -> dict[str, Any]:
        """What the parent's table says of it."""
        return _row(self.host.call("kernel_table"), pasid)

    def registers(self) -> dict[str, int]:
        """The registers of the device by name."""
        return dict(self.host.call("device_registers", name=self.device))

    def region(self, region: int, offset: int, length: int) -> bytes:
        """These bytes of a region of the device, in reads of 4."""
        words = [
            ("device_read", {"name": self.device, "region": region, "offset": at, "length": 4})
            for at in range(offset, offset + length, 4)
        ]
        answers = self.host.start_several(*words).result(Deadline(20, "parts of a region"))
        return b"".join(bytes.fromhex(each["hex"]) for each in answers)

    def config(self) -> bytes:
        """The config space."""
        found = self.host.call("device_read", name=self.device, region=CONFIG, offset=0, length=256)
        return bytes.fromhex(found["hex"])

    def log(self) -> bytes:
        """The fault log, all slots of it."""
        return self.region(REGISTERS, LOG, REGISTERS_SIZE - LOG)

    def rings(self) -> bytes:
        """The descriptors and the completions."""
        found = self.host.call(
            "device_read", name=self.device, region=RINGS, offset=0, length=RINGS_SIZE
        )
        return bytes.fromhex(found["hex"])

    def faults(self) -> list[dict[str, Any]]:
        """The records in the log, the oldest first."""
        found: list[dict[str, Any]] = self.host.call("device_faults", name=self.device)["faults"]
        return found

    def logged_as_ended(self, trial: Trial) -> None:
        """Require the log to say that an access was ended."""
        reason = self.faults()[0]["reason"]
        trial.require(reason == "ENDED", f"an access that was ended is logged as {reason}")

    def counts(self) -> tuple[int, int]:
        """TAIL and HEAD."""
        found = self.registers()
        return found["TAIL"], found["HEAD"]

    def ends(self) -> None:
        """Return when the device has ended all its work, and raised what that raises."""
        deadline = Deadline(20, "end of all work")
        while len({*self.counts()}) > 1:
            if deadline.elapsed() > deadline.seconds:
                raise Broken(f"the device goes no further: {self.registers()}")

    def waits(self, trial: Trial, call: Pending, what: str, handle: int) -> Any:
        """Require *call* to return after the release of the memory of *handle*, and not before."""
        early = call.ends_within(EARLY_SECONDS)
        self.release(handle)
        deadline = Deadline(45, f"return of {what}")
        trial.require(call.ends_within(deadline.seconds), f"{what} never returns")
        answer = call.result(deadline)
        trial.answer(f"{what}: 0")
        trial.require(not early, f"{what} returned with work in flight")
        return answer

    def ends_work(self, trial: Trial, close: Pending, handle: int, what: str) -> None:
        """Require *close* to return while the memory of *handle* sleeps: not to wait for *what*."""
        soon = close.ends_within(SOON_SECONDS * calibration())
        # Whatever became of it, nothing may sleep on.
        self.release(handle)
        close.result(Deadline(45, "return of close"))
        trial.answer("close: 0")
        trial.require(soon, f"close waits for {what}")

    def waiting(self, trial: Trial, what: str, **args: object) -> None:
        """Another process begins an operation on the device, which must not return yet."""
        self.host.call("holder_start", name=HOLDER, device=self.device, iommufd=self.iommufd)
        call = self.host.start("holder_call", name=HOLDER, what=what, args=args)
        deadline = Deadline(SOON_SECONDS, f"a process that waits in {what}")
        early = False
        while not (early or self.host.call("holder_waits", name=HOLDER)["waits"]):
            early = call.ends_within(0)
            deadline.remaining()
        early = early or call.ends_within(EARLY_SECONDS)
        trial.require(not early, f"{what} returned with work in flight")

    def kill(self, trial: Trial) -> None:
        """SIGKILL that process; it is gone when this returns."""
        self.host.call("holder_kill", name=HOLDER)
        trial.answer("killed")
