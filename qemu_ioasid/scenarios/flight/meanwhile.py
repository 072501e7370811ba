# SPDX-License-Identifier: GPL-2.0-or-later
"""What work under way means for other devices, for the ring and for who has the file still."""

from __future__ import annotations

from typing import Any

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.scenarios.checks import Trial, told
from qemu_ioasid.scenarios.flight.ground import (
    CHUNK,
    HEAD,
    HOLDER,
    PLAIN,
    REGISTERS,
    SLOW,
    Flight,
    fill,
)
from qemu_ioasid.scenarios.table import Table

#: The file that stays when its opener is gone.
KEPT = "kept"
#: So often such work sleeps, and so long: half of what the driver lets pass.
SLEEPS, SLEEP_SECONDS = 7, 0.5
#: SIGKILL to a process and to a thread: a thread alone would take the second (tgkill(2), x86-64).
KILL = """
kill -9 {pid}
python3 -I -S -c 'import ctypes; ctypes.CDLL(None).syscall(234, {pid}, {pid}, 9)'
"""

TABLE = Table()
_CHECK = TABLE.phase("beside work that sleeps")


@_CHECK("beside", "use another device while a detach waits for work that sleeps")
def beside(flight: Flight, trial: Trial) -> None:
    """Nobody's work holds up anybody else's, nor what others register."""
    space, ticket = flight.sleeping()
    leaving = flight.host.start("unregister", device=flight.device, pasid=space.pasid)
    flight.blocked(space)
    other = flight.beside()
    free = other.registered()
    other.completions(trial, other.submit(fill(free.pasid, PLAIN)), "DONE")
    other.registrar.unregister(other.device, free.pasid)
    trial.require(other.holds(free.plain), "the other device's work is not whole")
    flight.waits(trial, leaving, "detach", space.slow)
    flight.completions(trial, ticket, "DONE")
    trial.saw("the other device's work whole before that of the first")


@_CHECK("overrun", "fill the ring behind work that sleeps, and one more")
def overrun(flight: Flight, trial: Trial) -> None:
    """What is under way counts. The rest of the ring is NOPs, as it was zeroed."""
    space, ticket = flight.sleeping()
    entries = flight.registers()["RING_ENTRIES"]
    flight.host.call("device_doorbell", name=flight.device, tail=entries + 1)
    tail, _ = flight.counts()
    trial.answer(f"TAIL {tail} after one too many")
    trial.require(tail == 1, "more was submitted than the ring has room for")
    flight.host.call("device_doorbell", name=flight.device, tail=entries)
    tail, _ = flight.counts()
    trial.require(tail == entries, f"TAIL is {tail} with a full ring")
    flight.release(space.slow)
    flight.completions(trial, ticket, "DONE")
    trial.saw("the ring full, and no fuller")


@_CHECK("opener-gone", "have a device work on whose opener was killed, through a duplicate")
def opener_gone(flight: Flight, trial: Trial) -> None:
    """The driver looks after such work once a second, and ends what has slept for one only."""
    flight.host.call("file_open", name=KEPT, device=flight.other)
    flight.host.call("holder_start", name=HOLDER, device=KEPT, iommufd=flight.iommufd)
    flight.host.call("holder_call", name=HOLDER, what="bind", args={})
    space = flight.space()
    flight.registrar.raw_attach(KEPT, space.pasid, space.ioas)
    flight.kill(trial)
    flight.host.call("raw_irqs", device=KEPT, start=0, count=2)
    for number in range(SLEEPS):
        iova = SLOW + (2 + number) * CHUNK
        slow = flight.memory(space.ioas, iova)
        work = flight.host.start(
            "file_submit",
            device=KEPT,
            descriptors=[{**fill(space.pasid, iova), "interrupt": True}],
            seconds=60,
        )
        flight.asleep(slow)
        ended = work.ends_within(SLEEP_SECONDS)
        flight.release(slow)
        (done,) = work.result(Deadline(45, "end of the work"))
        trial.require(not ended, f"work that sleeps ended: {told(done)}")
        trial.require(done["status"] == "DONE", f"such work ended as {told(done)}")
    # The last work's interrupt comes after its completion, and with its HEAD.
    place: dict[str, Any] = {"region": REGISTERS, "how": "read", "offset": HEAD, "length": 4}
    deadline = Deadline(20, "end of the last work")
    head = SLEEPS.to_bytes(4, "little").hex()
    while flight.host.call("file_access", device=KEPT, like=KEPT, **place)["hex"] != head:
        deadline.remaining()
    raised = flight.host.call("irqs_seen", device=KEPT)["counts"]
    trial.require(raised == [SLEEPS, 0], f"{SLEEPS} works raised the vectors {raised} times")
    trial.answer(f"{SLEEPS} works, all DONE")
    trial.saw("no work of it ended")


@_CHECK("signal", "send SIGKILL to a device's thread whose work sleeps")
def signal(flight: Flight, trial: Trial) -> None:
    """That is the kernel's to do: nobody ends another's work so."""
    space, ticket = flight.sleeping(PLAIN)
    deadline = Deadline(20, "kill in the host VM")
    shell = flight.rig.host.ssh
    uuid = flight.rig.mdevs[flight.device]
    found = shell.output(f"grep -ls {uuid[:8]} /proc/[0-9]*/comm || :", deadline).decode().split()
    trial.require(len(found) == 1, f"the device has {len(found)} threads")
    shell.output(KILL.format(pid=found[0].split("/")[2]), deadline)
    flight.release(space.slow)
    flight.completions(trial, ticket, "DONE", "DONE")
    trial.require(flight.holds(space.slow) and flight.holds(space.plain), "work is not whole")
    trial.saw("both works whole")
