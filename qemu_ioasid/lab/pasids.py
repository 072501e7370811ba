# SPDX-License-Identifier: GPL-2.0-or-later
"""PASIDs by hand: what is registered, by whose word, and what the kernel says to it."""

from __future__ import annotations

from typing import Any

from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.rig import Binding, Guest, Rig

#: What is bound where nobody says otherwise; an arena's first slot holds the nonce.
SLOT = 0x10000

Json = dict[str, Any]


def _bindings(rig: Rig) -> dict[tuple[str, int], Json]:
    """What the guests say they were given, by device and PASID; with the guest's name."""
    found = {}
    for guest in _alive(rig).values():
        for row in guest.agent.call("bindings"):
            found[row["device"], row["pasid"]] = {**row, "guest": guest.name}
    return found


def _alive(rig: Rig) -> dict[str, Guest]:
    return {name: guest for name, guest in rig.guests.items() if not guest.agent.lost}


def listed(rig: Rig) -> Json:
    """Every registration: the ledger's lines, the kernel's lists and table, and the audit."""
    agent = rig.host.agent
    rows: dict[tuple[str, int], Json] = {}
    for line in agent.call("ledger"):
        rows[line["device"], line["pasid"]] = {**line, "kernel": None}
    for guest in _alive(rig).values():
        for device in guest.mdevs:
            for line in agent.call("kernel_list", device=device):
                blank = {"ioas": None, "iommufd": None, "state": None}
                row = rows.setdefault(
                    (device, line["pasid"]), {"device": device, "pasid": line["pasid"], **blank}
                )
                row["kernel"] = line
    for key, binding in _bindings(rig).items():
        if key in rows:
            rows[key]["bound"] = binding
    return {
        "registrations": [rows[key] for key in sorted(rows)],
        "allocated": agent.call("pasids"),
        # Without mdevs there may be no driver to have one.
        "table": agent.call("kernel_table") if rig.mdevs else [],
        "audit": agent.call("audit"),
    }


def register(
    rig: Rig, guest: str, device: str, offset: int | None, length: int, pasid: int | None
) -> Json:
    """Bind *length* bytes of *guest*'s arena to a PASID on its *device*; what the guest was given.

    At a free place of the arena unless *offset* says where. Raises
    ConfigurationError; CallFailed with the kernel's errno.
    """
    alive = _alive(rig)
    if guest not in alive:
        raise ConfigurationError(f"no guest {guest} is up: {', '.join(alive) or 'none'} is")
    given = alive[guest]
    if device not in given.mdevs:
        raise ConfigurationError(f"{guest} has no mdev {device}: it has {', '.join(given.mdevs)}")
    if offset is None:
        offset = _free(rig, given, length)
    if length <= 0 or offset < 0 or offset + length > given.size:
        raise ConfigurationError(
            f"{offset:#x}+{length:#x} is not in {guest}'s arena, which has {given.size:#x} bytes"
        )
    bound = rig.bind(guest, device, offset, length, pasid)
    return {
        "guest": guest,
        "device": device,
        "pasid": bound.pasid,
        "ioas": bound.ioas,
        "iova": bound.iova,
        "gpa": given.gpa + offset,
        "offset": offset,
        "length": length,
    }


def _free(rig: Rig, guest: Guest, length: int) -> int:
    taken = [row for row in _bindings(rig).values() if row["guest"] == guest.name]
    for offset in range(SLOT, guest.size - length + 1, SLOT):
        if all(
            offset + length <= row["offset"] or row["offset"] + row["length"] <= offset
            for row in taken
        ):
            return offset
    raise ConfigurationError(
        f"{guest.name}'s arena has no {length} bytes left that nothing is bound to; "
        "--offset says where, all the same"
    )


def unregister(rig: Rig, device: str, pasid: int) -> None:
    """Take *pasid* off *device*, and undo what `register` did for it.

    Raises ConfigurationError; CallFailed with the kernel's errno.
    """
    lines = {(line["device"], line["pasid"]): line for line in rig.host.agent.call("ledger")}
    line = lines.get((device, pasid))
    if line is None:
        there = ", ".join(str(each) for name, each in sorted(lines) if name == device)
        raise ConfigurationError(f"{device} has no PASID {pasid}: it has {there or 'none'}")
    bound = _bindings(rig).get((device, pasid))
    if bound is None:
        rig.registrar.unregister(device, pasid)
    else:
        place = bound["iova"], bound["offset"], bound["length"]
        rig.unbind(Binding(bound["guest"], device, pasid, line["ioas"], *place))
    # One that `register` was given may never have been allocated.
    given = {row["pasid"] for row in rig.host.agent.call("pasids")}
    if pasid in given and not any(other == pasid for name, other in lines if name != device):
        rig.registrar.free(pasid)
