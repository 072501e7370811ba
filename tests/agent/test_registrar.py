"""PASID allocation and the ledger's own rules. What the kernel answers is tried in the VMs.

Devices here are /dev/null: the kernel refuses every VFIO ioctl on it (ENOTTY), for real.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence

import pytest

from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.registrar import CHUNK, LAST_PASID, PasidPool, Registrar
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

    def attach_pasids(
        self, pasids: Sequence[int], pt_ids: Sequence[int]
    ) -> tuple[int, OSError | None]:
        return each(self.attach_pasid, zip(pasids, pt_ids, strict=True))

    def detach_pasids(self, pasids: Sequence[int]) -> tuple[int, OSError | None]:
        return each(self.detach_pasid, ((pasid,) for pasid in pasids))


def each(
    call: Callable[..., object], arguments: Iterable[tuple[int, ...]]
) -> tuple[int, OSError | None]:
    done = 0
    try:
        for some in arguments:
            call(*some)
            done += 1
    except OSError as error:
        return done, error
    return done, None


def failing(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def failing_at(call: int, number: int) -> Callable[[], None]:
    """Fails from the call-th call on, the first being 1."""
    calls = itertools.count(1)

    def fail() -> None:
        if next(calls) >= call:
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


def listed(registrar: Registrar) -> dict[int, int]:
    rows = registrar.ledger()
    assert {row["state"] for row in rows} <= {"live"}
    return {int(row["pasid"] or 0): int(row["ioas"] or 0) for row in rows}


def stopped(outcome: tuple[int, OSError | None]) -> tuple[int, int | None]:
    done, error = outcome
    assert error
    return done, error.errno


def test_a_batch_takes_the_address_spaces_in_turn() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    size = 2 * CHUNK + 7
    pasids = range(10, 10 + size)
    assert registrar.register_many(device, space, pasids, itertools.cycle((3, 4, 5))) == (
        size,
        None,
    )
    wanted = {pasid: 3 + index % 3 for index, pasid in enumerate(pasids)}
    assert listed(registrar) == wanted
    assert device.calls == list(wanted.items())
    assert registrar.unregister_many(device, reversed(pasids)) == (size, None)
    assert registrar.ledger() == []


@pytest.mark.parametrize("at", [1, 2, CHUNK, CHUNK + 1, 2 * CHUNK - 1])
def test_what_was_done_before_a_failure_stays(at: int) -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    pasids = range(1, 2 * CHUNK + 1)
    device.during = failing_at(at, errno.EBUSY)
    outcome = registrar.register_many(device, space, pasids, itertools.repeat(3))
    assert stopped(outcome) == (at - 1, errno.EBUSY)
    assert listed(registrar) == dict.fromkeys(pasids[: at - 1], 3)
    assert len(device.calls) == at

    device.during = lambda: None
    rest = registrar.register_many(device, space, pasids[at - 1 :], itertools.repeat(3))
    assert rest == (len(pasids) - at + 1, None)
    device.during = failing_at(at, errno.EINTR)
    assert stopped(registrar.unregister_many(device, pasids)) == (at - 1, errno.EINTR)
    assert listed(registrar) == dict.fromkeys(pasids[at - 1 :], 3)


def test_a_batch_ends_where_a_single_request_would_be_refused() -> None:
    registrar = Registrar()
    space, other = Iommufd(null("g1")), Iommufd(null("g1"))
    device = Attached("a", space)
    registrar.register(device, space, 5, 3)
    device.calls.clear()
    outcome = registrar.register_many(device, space, range(1, 9), itertools.repeat(4))
    assert stopped(outcome) == (4, errno.EEXIST)
    assert listed(registrar) == {5: 3, 1: 4, 2: 4, 3: 4, 4: 4}
    assert [pasid for pasid, _ in device.calls] == [1, 2, 3, 4]
    twice = registrar.register_many(device, space, (7, 8, 7), itertools.repeat(4))
    assert stopped(twice) == (2, errno.EEXIST)
    assert stopped(registrar.unregister_many(device, (7, 8, 7, 1))) == (2, errno.ENOENT)
    assert stopped(registrar.unregister_many(device, range(1, 9))) == (5, errno.ENOENT)
    assert registrar.ledger() == []
    with pytest.raises(OSError) as caught:
        registrar.register_many(device, other, (1,), (3,))
    assert caught.value.errno == errno.EXDEV


def test_single_requests_beside_a_batch() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device, other = Attached("a", space), Attached("b", space)
    registrar.register(device, space, 1000, 3)
    entered, gate = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert gate.wait(20)

    device.during = block
    outcomes: list[object] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(
            registrar.register_many(device, space, range(1, 11), itertools.repeat(3))
        )
    )
    thread.start()
    assert entered.wait(20)
    device.during = lambda: None
    states = {row["pasid"]: row["state"] for row in registrar.ledger()}
    assert states == {1000: "live", **dict.fromkeys(range(1, 11), "attaching")}
    assert errno_of(lambda: registrar.register(device, space, 7, 4)) == errno.EEXIST
    assert errno_of(lambda: registrar.unregister(device, 7)) == errno.EBUSY
    assert errno_of(lambda: registrar.replace(device, 7, 4)) == errno.EBUSY
    assert stopped(registrar.unregister_many(device, (1000, 7))) == (1, errno.EBUSY)
    registrar.register(device, space, 11, 4)
    registrar.register(other, space, 7, 3)
    gate.set()
    thread.join(20)
    assert outcomes == [(10, None)]
    ledger = {(row["device"], row["pasid"]): row["ioas"] for row in registrar.ledger()}
    assert ledger == {**{("a", p): 3 for p in range(1, 11)}, ("a", 11): 4, ("b", 7): 3}


def test_a_device_that_dies_during_a_batch_stays_out() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)

    def die() -> None:
        device.during = failing(errno.EBADF)
        registrar.drop_device(device)

    device.during = die
    outcome = registrar.register_many(device, space, range(1, 11), itertools.repeat(3))
    assert stopped(outcome) == (1, errno.EBADF)
    assert registrar.ledger() == []


def test_the_kernel_refuses_a_batch_at_its_first_item() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = VfioDevice(null("a"), "vfio0", space)
    outcome = registrar.register_many(device, space, range(1, 11), itertools.repeat(3))
    assert stopped(outcome) == (0, errno.ENOTTY)
    assert registrar.ledger() == []
    device.descriptor.close()
    outcome = registrar.register_many(device, space, range(1, 11), itertools.repeat(3))
    assert stopped(outcome) == (0, errno.EBADF)


def test_pasids_by_the_range() -> None:
    registrar = Registrar()
    space = Iommufd(null("g1"))
    device = Attached("a", space)
    assert registrar.alloc_many("g1", 5) == [1, 2, 3, 4, 5]
    assert errno_of(lambda: registrar.alloc_many("g1", LAST_PASID - 4)) == errno.ENOSPC
    registrar.register(device, space, 3, 7)
    assert stopped(registrar.free_many((1, 2, 3, 4))) == (2, errno.EBUSY)
    assert stopped(registrar.free_many((4, 4))) == (1, errno.ENOENT)
    assert [row["pasid"] for row in registrar.allocated()] == [3, 5]
