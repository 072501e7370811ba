# SPDX-License-Identifier: GPL-2.0-or-later
"""PASIDs that a device has not, each with the memory that would be in reach by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from qemu_ioasid.scenarios.acts import SLOT
from qemu_ioasid.scenarios.attacks.ground import BASE, WIDTH, Grant, Ground


class Named(NamedTuple):
    """A PASID that a device has not: which, and the grant whose memory it would be."""

    said: str
    pick: Callable[[Ground, str], tuple[int, Grant]]


def _own(change: Callable[[int], int]) -> Callable[[Ground, str], tuple[int, Grant]]:
    def pick(ground: Ground, device: str) -> tuple[int, Grant]:
        grant = ground.standing(device)
        return change(grant.pasid), grant

    return pick


def _unregistered(ground: Ground, device: str) -> tuple[int, Grant]:
    return ground.pasid(ground.owner[device].name), ground.standing(device)


def _of(other: Callable[[Ground, str], str]) -> Callable[[Ground, str], tuple[int, Grant]]:
    def pick(ground: Ground, device: str) -> tuple[int, Grant]:
        grant = ground.standing(other(ground, device))
        return grant.pasid, grant

    return pick


def _detached(ground: Ground, device: str) -> tuple[int, Grant]:
    grant = ground.grant(device)
    ground.leave(grant)
    return grant.pasid, grant


def _freed(ground: Ground, device: str) -> tuple[int, Grant]:
    pasid, grant = _detached(ground, device)
    ground.free(pasid)
    return pasid, grant


def _moved_on(ground: Ground, device: str) -> tuple[int, Grant]:
    """What the device had is registered for a device of the other guest, with its memory."""
    return _strangers(ground, device, _detached(ground, device)[0])


def _sixteen_alias(ground: Ground, device: str) -> tuple[int, Grant]:
    """One that is the device's own in 16 bits is registered for a device of the other guest."""
    return _strangers(ground, device, ground.standing(device).pasid ^ 1 << 16)


def _strangers(ground: Ground, device: str, pasid: int) -> tuple[int, Grant]:
    """*pasid*, registered for a device of the other guest with that one's memory."""
    stranger = ground.stranger(device)
    guest = ground.owner[stranger]
    offset = ground.slot(guest)
    ioas = ground.mapped(guest, guest.name, (offset, SLOT))
    ground.registrar.register(stranger, guest.name, pasid, ioas)
    iova = BASE + offset
    return pasid, Grant(stranger, guest.name, guest.name, pasid, ioas, iova, offset, SLOT)


PASIDS: Mapping[str, Named] = {
    "unregistered": Named("that was allocated and never registered", _unregistered),
    "sibling": Named("registered for another device of its guest only", _of(Ground.sibling)),
    "stranger": Named("registered for the other guest's device only", _of(Ground.stranger)),
    "detached": Named("that was detached", _detached),
    "freed": Named("that was detached and freed", _freed),
    "moved-on": Named("that was its own and is the other guest's now", _moved_on),
    "sixteen-alias": Named("of the other guest's, its own but for bit 16", _sixteen_alias),
    "zero": Named("0", _own(lambda pasid: 0)),
    "last": Named("2^20 - 1, the last there is", _own(lambda pasid: WIDTH - 1)),
    "width": Named("2^20, one past the last", _own(lambda pasid: WIDTH)),
    "width-alias": Named("of its own plus 2^20", _own(lambda pasid: pasid + WIDTH)),
    "top-alias": Named("of its own plus 2^31", _own(lambda pasid: pasid | 1 << 31)),
    "all-ones": Named("2^32 - 1", _own(lambda pasid: (1 << 32) - 1)),
}
