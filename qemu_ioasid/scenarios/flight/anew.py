# SPDX-License-Identifier: GPL-2.0-or-later
"""What the next opener of a device finds, and who had it before; what is shown of a device."""

from __future__ import annotations

from typing import Any

from qemu_ioasid.model.engine import NOP
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.flight.ground import (
    COMPLETIONS,
    CONFIG,
    PAGE,
    PLAIN,
    RINGS,
    RINGS_SIZE,
    Flight,
    fill,
)
from qemu_ioasid.scenarios.table import Table

#: PCI_COMMAND (include/uapi/linux/pci_regs.h), and what the agent sets there.
COMMAND, ENABLED = 4, "0600"
#: So many PASIDs take several reads of the list.
MANY = 600
#: The largest PASID there is.
LAST = (1 << 20) - 1

TABLE = Table()
_CHECK = TABLE.phase("what the next one finds, and what is shown")


@_CHECK("rings", "open a device anew and have it take what is in its ring")
def rings(flight: Flight, trial: Trial) -> None:
    """It is zeroed: NOP, which no log has. What was there before would be refused."""
    space = flight.registered()
    flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "DONE")
    flight.reopen()
    flight.host.call("device_doorbell", name=flight.device, tail=1)
    flight.ends()
    logged = flight.registers()["FAULT_COUNT"]
    trial.answer(f"FAULT_COUNT {logged}")
    trial.require(not logged, "the ring has the work of before")
    trial.saw("nothing of before in the ring")


@_CHECK("pinned", "keep hold of a device's rings over a close, and have the next one use them")
def pinned(flight: Flight, trial: Trial) -> None:
    """Its work and what came of it are its own: who could write there could give it work."""
    flight.host.call("region_pin", device=flight.device, region=RINGS)
    flight.reopen()
    space = flight.registered()
    flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "DONE")
    kept = bytes.fromhex(flight.host.call("region_pinned", device=flight.device)["hex"])
    trial.require(len(kept) == RINGS_SIZE, f"{len(kept)} bytes of the rings were kept")
    trial.require(not any(kept), "who had the device before sees the next one's work")
    trial.saw("the pages of before, and nothing in them")


@_CHECK("past-the-rings", "read at the end of BAR2, and on")
def past(flight: Flight, trial: Trial) -> None:
    place: dict[str, Any] = {"name": flight.device, "region": RINGS, "offset": RINGS_SIZE - 8}
    flight.host.call("device_read", **place, length=8)
    with trial.refusal("EINVAL", "read of 8 bytes too many"):
        flight.host.call("device_read", **place, length=16)
    trial.saw("the last 8 bytes alone can be read")


@_CHECK("map", "map BAR2 from its completions on")
def mapped(flight: Flight, trial: Trial) -> None:
    space = flight.registered()
    flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "DONE")
    place: dict[str, Any] = {
        "like": flight.device,
        "region": RINGS,
        "offset": COMPLETIONS,
        "length": PAGE,
    }
    found = {
        how: flight.host.call("file_access", device=flight.device, how=how, **place)["hex"]
        for how in ("read", "map")
    }
    trial.require(any(bytes.fromhex(found["read"])), "there is no completion")
    trial.require(found["read"] == found["map"], "another part of the BAR is mapped")
    trial.saw("the same as is read there")


@_CHECK("records", "read the fault log after a reset, and as the next opener")
def records(flight: Flight, trial: Trial) -> None:
    after = {
        "a reset": lambda: flight.host.call("device_reset", name=flight.device),
        "a close": flight.reopen,
    }
    for what, leave in after.items():
        space = flight.space()
        flight.completions(trial, flight.submit(fill(space.pasid, PLAIN)), "REFUSED")
        trial.require(any(flight.log()), "there is no record of that")
        leave()
        trial.require(not any(flight.log()), f"records of before are left after {what}")
    trial.saw("no record of before")


@_CHECK("config", "read PCI_COMMAND as the next opener, and after a reset")
def config(flight: Flight, trial: Trial) -> None:
    place: dict[str, Any] = {"region": CONFIG, "offset": COMMAND, "length": 2, "how": "read"}

    def command(file: str) -> str:
        found = flight.host.call("file_access", device=file, like=file, **place)
        return str(found["hex"])

    trial.require(command(flight.device) == ENABLED, "the agent has not enabled the device")
    flight.host.call("device_close", name=flight.device)
    flight.host.call("device_open", name=flight.other)
    flight.host.call("file_open", name="next", device=flight.device)
    flight.host.call("raw_bind", device="next", iommufd=f"agent:{flight.other}")
    trial.require(command("next") == "0000", "the next opener finds it enabled")
    flight.host.call("raw_reset", device=flight.other)
    trial.require(command(flight.other) == "0000", "it is enabled after a reset")
    trial.answer("0, twice")
    trial.saw("as it was made")


#: Work by what it does, how it ends, and how often it raises either vector.
RAISING: tuple[tuple[dict[str, Any], str, list[int]], ...] = (
    ({"opcode": NOP, "pasid": None, "interrupt": True}, "DONE", [1, 0]),
    ({"opcode": NOP, "pasid": None}, "DONE", [0, 0]),
    (fill(1, PLAIN), "REFUSED", [0, 1]),
)


@_CHECK("vectors", "name eventfds, close, and have the next opener's work raise its own")
def vectors(flight: Flight, trial: Trial) -> None:
    def raised(work: dict[str, Any], status: str) -> list[int]:
        flight.completions(trial, flight.submit(work), status)
        flight.ends()
        return list(flight.host.call("irqs_seen", device=flight.device)["counts"])

    flight.host.call("raw_irqs", device=flight.device, start=0, count=2)
    for work, status, expected in RAISING:
        found = raised(work, status)
        trial.require(found == expected, f"{work} raised {found}")
    flight.reopen()
    for work, status, _ in RAISING:
        trial.require(not any(raised(work, status)), "the next one's work raised those of before")
    with trial.refusal("EINVAL", "a third vector"):
        flight.host.call("raw_irqs", device=flight.device, start=2, count=1)
    trial.saw("each its own, and none of the next one's")


@_CHECK("long-list", f"read a list of {MANY} PASIDs")
def long_list(flight: Flight, trial: Trial) -> None:
    """It takes several reads, and each goes on where the one before has ended."""
    space = flight.space()
    expected: list[int] = []
    for pasids in (range(LAST, LAST + 1), range(space.pasid + 1, space.pasid + MANY)):
        flight.registrar.register_many(flight.device, flight.iommufd, [pasids], [space.ioas])
        expected = [*pasids, *expected]
        for name, found in (
            ("list", flight.registrar.kernel_list(flight.device)),
            ("table", flight.registrar.kernel_table()),
        ):
            trial.answer(f"{name}: {len(found)}")
            trial.require(found == expected, f"the {name} is not what was registered")
    trial.saw("all of them, once each, in order")
