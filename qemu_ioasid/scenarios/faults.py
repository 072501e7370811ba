# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``faults``: what can fail inside a call of the registrar's does, one after another.

The kernel fails the first allocation (or copy from or to user space) of an operation, then the
second, until the operation passes with nothing failed. After each failure the lists are as before,
the errno says what failed, and the same operation then succeeds. It needs a kernel with fault
injection, which ``--profile debug`` is, and makes mdevs of its own.
"""

from __future__ import annotations

import errno
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import CallFailed, ConfigurationError, KernelLacks
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios.checks import Broken, Checks, Trial
from qemu_ioasid.scenarios.table import Row, Table

TABLE = Table()
_SWEEP = TABLE.phase("failed allocations")

#: The device that is registered on, one that comes and goes, and the first's iommufd.
DEVICE, OTHER, IOMMUFD = "a", "b", "agent:a"
PASID = 7
IOVA, LENGTH = 0x10000, 0x4000
#: What fails is an allocation (ENOMEM) or a copy from or to user space (EFAULT).
FAILS = (errno.ENOMEM, errno.EFAULT)
#: An operation that did not pass after as many failures never will.
MOST = 1000
#: How often a place is failed that the kernel seems to bear.
TRIES = 3
CALL_SECONDS = 30.0
SCAN_SECONDS = 120.0
#: One object may go unnoticed: its address is left somewhere. Of several, some do not.
TIMES = 3

Json = dict[str, Any]
Undo = Callable[[Any], None]
#: How an operation ends with a place failed, beside its errno: done all the same; it has fewer.
BORNE, PASSED = "borne", "passed"


class Swept(NamedTuple):
    """An operation, and what goes around it.

    *prepare* brings about what it needs and gives its arguments; *undo* takes its answer, and
    what it did back. *may*: errnos that it may answer besides. *lost*: called after EFAULT, which
    has taken away what was there (ABI.md), to bring it back. *untold*: what it answers once more
    where EFAULT meant that it was done, and only that could not be told.
    """

    op: str
    prepare: Callable[[], Json]
    undo: Undo
    may: Sequence[int] = ()
    lost: Callable[[], None] | None = None
    untold: int = 0


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises ConfigurationError for a rig with guests."""
    if config.guests:
        raise ConfigurationError(f"{config.path}: scenario faults takes a rig without guests")
    return TABLE.rows(config, {})


def run(rig: Rig, report: Report, rows: Sequence[Row]) -> None:
    """Sweep the operations of *rows*; KernelLacks on a kernel without fault injection."""
    kernel = rig.host.hello["kernel"]
    if not kernel.get("fail_nth"):
        raise KernelLacks(
            f"scenario faults: kernel {rig.host.hello['release']} has no fault injection "
            "(CONFIG_FAILSLAB and others): run it with --profile debug"
        )
    checks = Checks(rig, report)
    with report.phase("failed allocations"):
        faults = Faults(rig)
        checks.make(rows, faults)
        faults.close()


class Faults:
    """A device that is open, with two address spaces to register, and the sweeps on it."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        for name in (DEVICE, OTHER):
            self._call("mdev_create", name=name, uuid=str(uuid.uuid4()))
        self._own = self._call("device_open", name=DEVICE)["ioas"]
        self._spaces = [self._alloc(), self._alloc()]

    def close(self) -> None:
        """Give everything back."""
        self._call("device_close", name=DEVICE)
        for name in (DEVICE, OTHER):
            self._call("mdev_remove", name=name)

    def _call(self, name: str, /, **args: Any) -> Any:
        deadline = Deadline(SCAN_SECONDS, f"answer of the host side to {name}")
        return self._rig.host.agent.call(name, deadline=deadline, **args)

    def _alloc(self) -> int:
        return int(self._call("ioas_alloc", iommufd=IOMMUFD)["ioas"])

    def _state(self) -> Json:
        """The kernel's table and list, the ledger, and what the device says to work."""
        nop = {"pasid": PASID, "src": 0, "dst": 0, "length": 0, "opcode": 0}
        work = {
            "name": DEVICE,
            "descriptors": [nop],
            "seconds": CALL_SECONDS * calibration(),
        }
        table, kernel_list, ledger, (done,) = self._rig.host.agent.several(
            ("kernel_table", {}),
            ("kernel_list", {"device": DEVICE}),
            ("ledger", {}),
            ("device_submit", work),
            deadline=Deadline(SCAN_SECONDS, "the state of everything"),
        )
        return {"table": table, "list": kernel_list, "ledger": ledger, "work": done["status"]}

    def _sweep(self, trial: Trial, swept: Swept) -> None:
        """Fail an operation at its first, second, ... place, until it passes.

        Then each place and the next one: some allocations are tried a second time, with patience.
        """
        for more in (0, 1):
            self._passes(trial, swept, more)

    def _passes(self, trial: Trial, swept: Swept, more: int) -> None:
        failed: Counter[str] = Counter()
        for nth in range(1, MOST):
            # The slab allocator refills itself now and then, and bears it where it cannot: the
            # place that is meant comes one later then. It does not do so time after time.
            tries = (self._fail(trial, swept, nth, more) for _ in range(TRIES))
            found = next((each for each in tries if each != BORNE), BORNE)
            if found == PASSED:
                break
            failed[found] += 1
        else:
            raise Broken(f"{swept.op} does not pass after {MOST} failures")
        borne = failed.pop(BORNE, 0)
        trial.answer(", ".join(f"{count} {name}" for name, count in sorted(failed.items())) or "0")
        how = ", each with the next one" if more else ""
        trial.saw(
            f"{nth - 1} places failed{how}, {borne} of them borne; after each the table, the list, "
            "the ledger and the device as before, and the same succeeded"
        )

    def _fail(self, trial: Trial, swept: Swept, nth: int, more: int) -> str:
        """The errno's name with the *nth* place failed, BORNE, or PASSED: it has fewer."""
        op, args = swept.op, swept.prepare()
        before = self._state()
        told = self._call("fail_nth", op=op, args=args, nth=nth, more=more)
        error = told["error"]
        if error is None:
            swept.undo(told["answer"])
            return BORNE if told["failed"] else PASSED
        where = f"{op}, failure {nth}: {error['message']}"
        trial.require(told["failed"], f"{where}, and nothing was failed")
        trial.require(error["errno"] in (*FAILS, *swept.may), f"{where}: not one of its errnos")
        after = self._state()
        if after != before and swept.lost is not None and error["errno"] == errno.EFAULT:
            swept.lost()
            after = self._state()
        trial.require(after == before, f"{where}: was {before}, is {after}")
        try:
            swept.undo(self._call(op, **args))
        except CallFailed as again:
            if error["errno"] != errno.EFAULT or again.errno != swept.untold:
                what = f"{where}; once more, with nothing failed: {again.name}"
                raise Broken(what) from None
            swept.undo(None)
        return errno.errorcode.get(error["errno"], str(error["errno"]))

    # --- what each sweep begins with ----------------------------------------------------

    def _registration(self) -> Json:
        return {
            "device": DEVICE,
            "iommufd": IOMMUFD,
            "pasid": PASID,
            "ioas": self._spaces[0],
        }

    def _registered(self) -> None:
        with suppress(CallFailed):
            self._call("register", **self._registration())

    def _unregister(self, _: object = None) -> None:
        self._call("unregister", device=DEVICE, pasid=PASID)

    @_SWEEP("register", "register a PASID")
    def _register(self, trial: Trial) -> None:
        self._sweep(trial, Swept("register", self._registration, self._unregister))

    @_SWEEP("replace", "have a registered PASID name another address space")
    def _replace(self, trial: Trial) -> None:
        def prepare() -> Json:
            self._registered()
            return {"device": DEVICE, "pasid": PASID, "ioas": self._spaces[1]}

        self._sweep(trial, Swept("replace", prepare, self._unregister, lost=self._registered))

    @_SWEEP("unregister", "unregister a PASID")
    def _unregister_it(self, trial: Trial) -> None:
        def prepare() -> Json:
            self._registered()
            return {"device": DEVICE, "pasid": PASID}

        self._sweep(trial, Swept("unregister", prepare, lambda _: None))

    @_SWEEP("own-address-space", "attach the device's own address space, and detach it")
    def _attach_own(self, trial: Trial) -> None:
        def attach(_: object) -> None:
            self._call("raw_attach", device=DEVICE, ioas=self._own)

        def detached() -> Json:
            self._call("raw_detach", device=DEVICE)
            return {"device": DEVICE, "ioas": self._own}

        self._sweep(trial, Swept("raw_attach", detached, lambda _: None))
        self._sweep(trial, Swept("raw_detach", lambda: {"device": DEVICE}, attach))

    @_SWEEP("address-space", "make an address space, and destroy it")
    def _space(self, trial: Trial) -> None:
        def destroy(made: Json) -> None:
            self._call("ioas_destroy", iommufd=IOMMUFD, ioas=made["ioas"])

        self._sweep(trial, Swept("ioas_alloc", lambda: {"iommufd": IOMMUFD}, destroy))

        def made() -> Json:
            return {"iommufd": IOMMUFD, "ioas": self._alloc()}

        self._sweep(trial, Swept("ioas_destroy", made, lambda _: None))

    @_SWEEP("map", "map memory, and unmap it")
    def _map(self, trial: Trial) -> None:
        where = {"iommufd": IOMMUFD, "ioas": self._spaces[0], "iova": IOVA, "length": LENGTH}
        handles: list[int] = []

        def close(made: Json) -> None:
            self._call("slow_close", handle=made["handle"])

        self._sweep(trial, Swept("slow_create", lambda: where, close, may=[errno.ENOSPC]))

        def mapped() -> Json:
            made = self._call("slow_create", **where)
            handles.append(made["handle"])
            self._call("slow_release", handle=made["handle"])
            return where

        def unmapped(_: object) -> None:
            self._call("slow_close", handle=handles.pop())

        self._sweep(trial, Swept("ioas_unmap", mapped, unmapped, untold=errno.ENOENT))

    @_SWEEP("open", "open a device, and with it an iommufd; close them")
    def _open(self, trial: Trial) -> None:
        def close(_: object) -> None:
            self._call("device_close", name=OTHER)

        self._sweep(trial, Swept("device_open", lambda: {"name": OTHER}, close))

    @_SWEEP("mdev", "create an mdev, and remove it")
    def _mdev(self, trial: Trial) -> None:
        name = {"name": "c", "uuid": str(uuid.uuid4())}

        def remove(_: object) -> None:
            self._call("mdev_remove", name="c")

        self._sweep(trial, Swept("mdev_create", lambda: name, remove))

        def made() -> Json:
            self._call("mdev_create", **name)
            return {"name": "c"}

        self._sweep(trial, Swept("mdev_remove", made, lambda _: None))

    def _everything(self, trial: Trial) -> None:
        """Each call, and those that the kernel refuses; by a process that is killed, too."""
        self._call("mdev_create", name="c", uuid=str(uuid.uuid4()))
        for part in ("bind", "irqs", "log", "misused", "regions"):
            self._call("misuse", device="c", part=part)
        self._call("file_open", name="file", device="c")
        self._call("holder_start", name="holder", device="file", iommufd=IOMMUFD)
        self._call("holder_call", name="holder", what="bind", args={})
        self._call("raw_attach", device="file", ioas=self._alloc(), pasid=PASID + 1)
        self._call("raw_irqs", device="file", start=0, count=2)
        self._call("holder_kill", name="holder")
        self._call("file_close", name="file")
        self._call("mdev_remove", name="c")

        self._registered()
        own = self._call("device_open", name=OTHER)["ioas"]
        free = PASID + 1
        for name, args in (
            ("EBUSY", {"pasid": PASID, "ioas": own}),
            ("ENOENT", {"pasid": free, "ioas": 1 << 20}),
            ("EFAULT", {"pasid": free, "ioas": own, "readonly": True}),
        ):
            with trial.refusal(name, "attach"):
                self._call("raw_attach", device=OTHER, **args)
        self._call("device_close", name=OTHER)
        self._unregister()

    @_SWEEP("leaks", "whether the kernel has lost memory by any of it, or by everything at all")
    def _leaks(self, trial: Trial) -> None:
        for _ in range(TIMES):
            self._everything(trial)
        lost = self._call("leaks")["lost"]
        trial.answer(f"{len(lost)} objects that nothing points to")
        trial.require(not lost, "\n".join(lost[:3]))
        trial.saw("two scans found nothing")
