"""PASID allocation and the ledger's own rules. What the kernel answers is tried in the VMs.

Devices here are /dev/null: the kernel refuses every VFIO ioctl on it (ENOTTY), for real.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest

from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.registrar import LAST_PASID, PasidPool, Registrar
from qemu_ioasid.agent.vfio import VfioDevice


def null(name: str) -> Descriptor:
    return Descriptor.open(os.devnull, name=name)


class Attached(VfioDevice):
    """A device whose attach and detach only note the call: the ledger's logic is what is tried."""

    def __init__(self, name: str, iommufd: Iommufd) -> None:
        super().__init__(null(name), "vfio0", iommufd)
        self.calls: list[tuple[int, int | None]] = []
        self.during: Callable[[], None] = lambda: None

    def attach_pasid(self, pasid: int, pt_id: int) -> int:
        self.calls.append((pasid, pt_id))
        self.during()
        return pt_id

    def detach_pasid(self, pasid: int) -> None:
        self.calls.append((pasid, None))
        self.during()


def failing(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def test_pool_is_next_fit_and_comes_round() -> None:
    pool = PasidPool(1, 4)
    assert [pool.alloc("g") for _ in range(3)] == [1, 2, 3]
    pool.free(2)
    assert pool.alloc("g") == 4
    assert pool.alloc("g") == 2
    assert errno_of(lambda: pool.alloc("g")) == errno.ENOSPC
    pool.free(4)
    assert pool.alloc("h") == 4
    assert pool.owners == {1: "g", 2: "g", 3: "g", 4: "h"}
    pool.free(4)
    assert errno_of(lambda: pool.free(4)) == errno.ENOENT


def test_pool_covers_the_parents_pasids() -> None:
    assert LAST_PASID == 0xFFFFF
    assert PasidPool().alloc("g") == 1


def test_ledger_through_a_life() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    pasid = registrar.alloc("g1")
    registrar.register(device, space, pasid, 3)
    row = {"device": "a", "pasid": pasid, "ioas": 3, "iommufd": "g1", "state": "live"}
    assert registrar.ledger() == [row]
    assert errno_of(lambda: registrar.register(device, space, pasid, 4)) == errno.EEXIST
    assert errno_of(lambda: registrar.free(pasid)) == errno.EBUSY
    registrar.replace(device, pasid, 4)
    assert registrar.ledger() == [{**row, "ioas": 4}]
    registrar.unregister(device, pasid)
    assert registrar.ledger() == []
    assert errno_of(lambda: registrar.unregister(device, pasid)) == errno.ENOENT
    assert errno_of(lambda: registrar.replace(device, pasid, 4)) == errno.ENOENT
    registrar.free(pasid)
    assert registrar.allocated() == []
    assert device.calls == [(pasid, 3), (pasid, 4), (pasid, None)]


def test_another_iommufd_is_refused_before_the_kernel_is_asked() -> None:
    registrar = Registrar()
    space, namesake = Iommufd(null("g1")), Iommufd(null("g1"))
    device = Attached("a", space)
    assert errno_of(lambda: registrar.register(device, namesake, 1, 3)) == errno.EXDEV
    assert device.calls == []


def test_a_refused_register_leaves_no_line() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = VfioDevice(null("a"), "vfio0", space)
    assert errno_of(lambda: registrar.register(device, space, 1, 3)) == errno.ENOTTY
    assert registrar.ledger() == []


def test_a_refused_replace_or_unregister_keeps_the_line() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    registrar.register(device, space, 1, 3)
    before = registrar.ledger()
    device.during = failing(errno.EBUSY)
    assert errno_of(lambda: registrar.replace(device, 1, 4)) == errno.EBUSY
    assert errno_of(lambda: registrar.unregister(device, 1)) == errno.EBUSY
    assert registrar.ledger() == before


def test_the_ledger_answers_while_a_detach_blocks() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    registrar.register(device, space, 1, 3)
    entered, gate = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert gate.wait(20)

    device.during = block
    thread = threading.Thread(target=registrar.unregister, args=(device, 1))
    thread.start()
    assert entered.wait(20)
    assert [row["state"] for row in registrar.ledger()] == ["detaching"]
    assert errno_of(lambda: registrar.replace(device, 1, 4)) == errno.EBUSY
    assert registrar.alloc("g1") == 1
    unsettled = registrar.audit([device], lambda device: {1: 3})["unsettled"]
    assert unsettled == [{"device": "a", "pasid": 1, "ledger": 3, "kernel": 3}]
    gate.set()
    thread.join(20)
    assert registrar.ledger() == []


def test_a_dead_device_and_its_owner_leave_the_books() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    a, b = Attached("a", space), Attached("b", space)
    own, shared = registrar.alloc("g1"), registrar.alloc("g1")
    registrar.register(a, space, own, 3)
    registrar.register(a, space, shared, 3)
    registrar.register(b, space, shared, 3)
    registrar.drop_device(a)
    assert [(row["device"], row["pasid"]) for row in registrar.ledger()] == [("b", shared)]
    registrar.drop_owner("g1")
    assert registrar.allocated() == [{"pasid": shared, "owner": "g1"}]


def test_a_device_that_died_during_its_register_stays_out() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    device.during = lambda: registrar.drop_device(device)
    registrar.register(device, space, 1, 3)
    assert registrar.ledger() == []


def test_audit_names_each_difference() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    for pasid in (1, 2, 3):
        registrar.register(device, space, pasid, 10)
    assert registrar.audit([device], lambda device: {1: 10, 2: 10, 3: 10})["agrees"] is True
    audit = registrar.audit([device], lambda device: {1: 10, 2: 11, 9: 12})
    assert audit == {
        "agrees": False,
        "missing": [{"device": "a", "pasid": 3, "ledger": 10, "kernel": None}],
        "unexpected": [{"device": "a", "pasid": 9, "ledger": None, "kernel": 12}],
        "different": [{"device": "a", "pasid": 2, "ledger": 10, "kernel": 11}],
        "unsettled": [],
    }
