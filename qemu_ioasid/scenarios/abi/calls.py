# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that no driver makes: to a device's file, to the module, to sysfs and debugfs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import CallFailed, DeadlineExceeded
from qemu_ioasid.scenarios.checks import Broken, Skipped, Trial
from qemu_ioasid.scenarios.flight.ground import PLAIN, Flight, fill
from qemu_ioasid.scenarios.table import Table

#: Where the host VM has the driver, if it is a module, and what that was told.
DRIVER = "vfio_pdma"
MODULE = f"/run/modules/{DRIVER}.ko"
PARAMETER = f"/sys/module/{DRIVER}/parameters/max_pasids"
DEBUGFS = "/sys/kernel/debug/pdma"
TYPE = "/sys/class/mdev_bus/pdma/mdev_supported_types/pdma-1"
INSTANCES = 64
SHELL_SECONDS = 30.0
#: What rmmod says of EWOULDBLOCK, which is how the kernel refuses it (kernel/module/main.c).
BUSY = "Resource temporarily unavailable"
#: Makes mdevs until the kernel refuses one, and tells their uuids.
MAKE = f"""
while read -r uuid </proc/sys/kernel/random/uuid && echo $uuid >{TYPE}/create 2>/dev/null
do echo $uuid
done
"""
#: Reads the list of an mdev that was removed after its list was opened; what that ends with.
READ_LATE = f"""
read -r uuid </proc/sys/kernel/random/uuid && echo $uuid >{TYPE}/create
exec 3<{DEBUGFS}/$uuid/pasids
echo 1 >/sys/bus/mdev/devices/$uuid/remove
cat <&3 2>&1 || :
"""
EIO = "Input/output error"
#: What max_pasids takes, and what it does not.
CAPS = {
    **dict.fromkeys(("1", "1048575"), True),
    **dict.fromkeys(("0", "-1", "1048576", "4294967297", "many", ""), False),
}

TABLE = Table()
_CHECK = TABLE.phase("calls that no driver makes")


def answers(flight: Flight, trial: Trial, part: str, expected: dict[str, Any]) -> None:
    """Require the kernel to answer so to the agent's *part* of such calls (agent/misuse.py)."""
    flight.host.call("device_close", name=flight.device)
    found = flight.host.call("misuse", device=flight.device, part=part)
    trial.answer(", ".join(found))
    wrong = [
        f"{what}: {found.get(what)} where it must be {answer}"
        for what, answer in expected.items()
        if found.get(what) != answer
    ]
    trial.require(not wrong, "; ".join(wrong))
    trial.saw("each answer as it must be")


@_CHECK("bind", "bind with a token, with an argument that can only be read, and twice")
def bind(flight: Flight, trial: Trial) -> None:
    expected = {"with a token": "EINVAL", "unwritable": "EFAULT", "unbound": "EINVAL"}
    answers(flight, trial, "bind", {**expected, "bound": "0", "again": "EINVAL"})


@_CHECK("irqs", "ask for interrupts in every way there is")
def irqs(flight: Flight, trial: Trial) -> None:
    expected = {
        "info": [[0, 0], [0, 0], [1, 2], [0, 0], [0, 0]],
        "other indexes": ["EINVAL"] * 4,
        "no such index": "EINVAL",
        "past the end": ["EINVAL"] * 3,
        "wrapping": "EINVAL",
        "two kinds": "EINVAL",
        "unknown flag": "EINVAL",
        "no action": "ENOTTY",
        "mask": "ENOTTY",
        "too short": "EINVAL",
        "nothing to raise": ["0", [0, 0]],
        "both": ["0", "0", [1, 1]],
        "chosen": ["0", [0, 1]],
        "chosen from 1 on": ["0", "0", [0, 1]],
        "no eventfd": ["EINVAL", "EBADF"],
        "nothing changed": ["0", [1, 0]],
        "swapped": ["0", "0", [1, 0]],
        "one away": ["0", "0", [1, 0]],
        "reset": ["0", [1, 0]],
        "all away": ["0", "0", [0, 0]],
    }
    answers(flight, trial, "irqs", expected)


@_CHECK("log-written", "write to the fault log and to the BAR of the vectors")
def log(flight: Flight, trial: Trial) -> None:
    expected = {"logged": 1, "same": True, "bar4": [4096, 3, True], "outside": "EINVAL"}
    answers(flight, trial, "log", expected)


@_CHECK("misused", "read, write, map and ask where there is nothing, or not so much")
def misused(flight: Flight, trial: Trial) -> None:
    expected: dict[str, Any] = {
        "nothing": [0, 0],
        "nowhere": "EFAULT",
        # BAR0; BAR2 privately, and as it must be
        "mmap": ["EINVAL", "EINVAL", "0"],
        "unknown": "ENOTTY",
        # the argument nowhere, too short, and of no such index or with nothing behind it
        "INFO": ["EFAULT", "EINVAL", 0],
        "REGION_INFO": ["EFAULT", "EINVAL", "EINVAL"],
        "IRQ_INFO": ["EFAULT", "EINVAL", "EINVAL"],
        "SET_IRQS": ["EFAULT", "EINVAL", "EFAULT"],
    }
    answers(flight, trial, "misused", expected)


@_CHECK("cap", "load the driver with each max_pasids that might be one")
def cap(flight: Flight, trial: Trial) -> None:
    with _unloaded(flight) as shell:
        for value, fits in CAPS.items():
            load = f"insmod {MODULE} max_pasids={value} 2>/dev/null || exit 0"
            found = shell(f"{load}; cat {PARAMETER} && stat -c %a {PARAMETER} && rmmod {DRIVER}")
            trial.answer(f"{value or 'nothing'}: {found or 'not loaded'}")
            # Nobody changes it later.
            expected = f"{value}\n444" if fits else ""
            trial.require(found == expected, f"with max_pasids={value} the driver has {found!r}")
    trial.saw("the driver, with 1 to 1048575 only")


@_CHECK("module", "unload the driver while a device is open, and while its debugfs is read")
def module(flight: Flight, trial: Trial) -> None:
    shell = _shell(flight)
    _require_module(shell)
    uuid = flight.rig.mdevs[flight.device]
    modes = shell(f"cd {DEBUGFS} && stat -c %a table {uuid}/pasids")
    trial.require(modes.split() == ["400", "400"], f"debugfs: modes {modes.split()}")

    def refused(what: str, stdin: str) -> None:
        try:
            said = shell(f"rmmod {DRIVER} 2>&1 <{stdin} || :")
        except DeadlineExceeded:
            raise Broken(f"{what}: rmmod waits for the end of that") from None
        trial.answer(f"{what}: {said or 'unloaded'}")
        trial.require(BUSY in said, f"{what}: rmmod says {said!r}, not {BUSY}")

    refused("with a device open", "/dev/null")
    flight.host.call("device_close", name=flight.device)
    try:
        _remove(flight)
        refused("with its table open", f"{DEBUGFS}/table")
    finally:
        _restore(flight)
    trial.saw("mode 400 of the table and of a list")


@_CHECK("removal", "remove an mdev whose device is open, and read its list meanwhile")
def removal(flight: Flight, trial: Trial) -> None:
    """The removal waits for the close, and the list is there as long as the mdev."""
    shell, uuid = _shell(flight), flight.rig.mdevs[flight.other]
    shown = f"cat {DEBUGFS}/{uuid}/pasids 2>&1 || :"
    before = shell(shown)
    opened = flight.joined().device
    removing = flight.host.start("mdev_remove", name=flight.other)
    deadline = Deadline(20, f"the removal of mdev {flight.other}")
    # The file to remove it by goes first.
    while shell(f"ls /sys/bus/mdev/devices/{uuid}/remove 2>/dev/null || :"):
        deadline.remaining()
    found, early = shell(shown), removing.ends_within(0)
    flight.host.call("file_close", name=opened)
    removing.result(deadline)
    left = shell(f"ls -d {DEBUGFS}/{uuid} 2>/dev/null || :")
    flight.host.call("mdev_create", name=flight.other, uuid=uuid)
    trial.answer(found)
    trial.require(not early, "the removal returned with the device open")
    trial.require(found == before, f"the list said {found!r} under the removal")
    trial.require(not left, "the list outlives the mdev")
    late = shell(READ_LATE)
    trial.require(late.endswith(EIO), f"a list that was open says {late!r} after the removal")
    trial.saw("the list until the mdev was gone, and no longer")


@_CHECK("order", "attach what may not be for two reasons")
def order(flight: Flight, trial: Trial) -> None:
    """ABI.md, "PASIDs": which errno is decided first."""
    with _unloaded(flight) as shell, contextlib.ExitStack() as stack:
        shell(f"insmod {MODULE} max_pasids=1")
        stack.callback(shell, f"rmmod {DRIVER}")
        for name in (flight.device, flight.other):
            flight.host.call("mdev_create", name=name, uuid=flight.rig.mdevs[name])
            stack.callback(flight.host.call, "mdev_remove", name=name)
            flight.host.call("device_open", name=name)
            stack.callback(flight.host.call, "device_close", name=name)
        _attach_for_two_reasons(flight, trial)
    trial.saw("the first reason of each")


def _attach_for_two_reasons(flight: Flight, trial: Trial) -> None:
    def attach(device: str, pasid: int, ioas: int) -> None:
        flight.registrar.raw_attach(device, pasid, ioas)

    others = flight.registrar.ioas(f"agent:{flight.other}")
    attach(flight.device, 1, flight.registrar.ioas(flight.iommufd))
    nothing = 1 << 20
    with trial.refusal("EINVAL", "PASID 0, no such IOAS, list full"):
        attach(flight.device, 0, nothing)
    with trial.refusal("ENOSPC", "no such IOAS, list full"):
        attach(flight.device, 2, nothing)
    with trial.refusal("EBUSY", "another's PASID, no such IOAS"):
        attach(flight.other, 1, nothing)
    attach(flight.other, 2, others)
    with trial.refusal("ENOSPC", "another's PASID, list full"):
        attach(flight.other, 1, others)
    with trial.refusal("EINVAL", "PASID too wide, list full"):
        attach(flight.other, 1 << 20, others)


@_CHECK("failed", "replace a PASID's IOAS by one there is not, and go on")
def failed(flight: Flight, trial: Trial) -> None:
    """After any error the list and the mapping are as before, and so is the parent's table."""
    one, two = flight.registered(), flight.space()
    before = flight.tabled(one.pasid), flight.listed(one.pasid)
    with trial.refusal("ENOENT", "replace"):
        flight.registrar.raw_attach(flight.device, one.pasid, 1 << 20)
    after = flight.tabled(one.pasid), flight.listed(one.pasid)
    trial.require(after == before, f"table and list were {before}, are {after}")
    flight.completions(trial, flight.submit(fill(one.pasid, PLAIN)), "DONE")
    trial.require(flight.holds(one.plain), "the work is not in the old memory")
    flight.registrar.raw_attach(flight.device, one.pasid, two.ioas)
    flight.completions(trial, flight.submit(fill(one.pasid, PLAIN)), "DONE")
    trial.require(flight.holds(two.plain), "the work is not in the new memory")
    trial.saw("as before, and a replace that can be")


@_CHECK("failed-own", "replace the device's own address space by one that cannot be one")
def failed_own(flight: Flight, trial: Trial) -> None:
    """ABI.md: EADDRINUSE, for a mapping that is not of whole pages; and work goes on."""
    own = flight.space()
    flight.registrar.raw_attach(flight.device, None, own.ioas)
    bad = flight.registrar.ioas(flight.iommufd)
    flight.memory(bad, PLAIN + 16)
    with trial.refusal("EADDRINUSE", "attach"):
        flight.registrar.raw_attach(flight.device, None, bad)
    flight.completions(trial, flight.submit(fill(None, PLAIN)), "DONE")
    trial.require(flight.holds(own.plain), "the work is not in the old memory")
    flight.registrar.raw_attach(flight.device, None, flight.space().ioas)
    trial.saw("as before, and a replace that can be")


@_CHECK("instances", f"make as many mdevs as there may be, twice, of {INSTANCES}")
def instances(flight: Flight, trial: Trial) -> None:
    shell = _shell(flight)
    there = len(flight.rig.mdevs)
    api = shell(f"cat {TYPE}/device_api")
    trial.require(api == "vfio-pci", f"device_api is {api}")
    for _ in range(2):
        available = shell(f"cat {TYPE}/available_instances")
        trial.require(available == str(INSTANCES - there), f"available_instances is {available}")
        made = shell(MAKE).split()
        trial.answer(f"{len(made)} made beside {there}")
        shell("".join(f"echo 1 >/sys/bus/mdev/devices/{uuid}/remove\n" for uuid in made))
        trial.require(len(made) == INSTANCES - there, f"{len(made)} were made beside {there}")
    trial.saw(f"{INSTANCES} at a time")


def _shell(flight: Flight) -> Callable[[str], str]:
    """What tells the output of a shell in the host VM."""

    def shell(script: str) -> str:
        deadline = Deadline(SHELL_SECONDS, f"a shell beside {DRIVER}")
        return flight.rig.host.ssh.output(script, deadline).decode().strip()

    return shell


def _require_module(shell: Callable[[str], str]) -> None:
    if not shell(f"ls {MODULE} 2>/dev/null || :"):
        raise Skipped("the driver is built into this kernel")


def _remove(flight: Flight) -> None:
    for name in flight.rig.mdevs:
        flight.host.call("mdev_remove", name=name)


def _restore(flight: Flight) -> None:
    """The driver is there, and all mdevs of the rig, whichever were."""
    _shell(flight)(f"[ -e /sys/module/{DRIVER} ] || insmod {MODULE}")
    for name, uuid in flight.rig.mdevs.items():
        # There already: not all had gone.
        with contextlib.suppress(CallFailed):
            flight.host.call("mdev_create", name=name, uuid=uuid)


@contextlib.contextmanager
def _unloaded(flight: Flight) -> Iterator[Callable[[str], str]]:
    """The driver is not there meanwhile; gives what tells the output of a shell in the host VM."""
    shell = _shell(flight)
    _require_module(shell)
    flight.host.call("device_close", name=flight.device)
    try:
        _remove(flight)
        shell(f"rmmod {DRIVER}")
        yield shell
    finally:
        _restore(flight)
