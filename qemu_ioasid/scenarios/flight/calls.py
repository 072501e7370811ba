# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of calls that no driver makes: to the device's file, and to load the module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from qemu_ioasid.deadline import Deadline
from qemu_ioasid.scenarios.checks import Skipped, Trial
from qemu_ioasid.scenarios.flight.ground import Flight
from qemu_ioasid.scenarios.table import Table

#: Where the host VM has the driver, if it is a module, and what that was told.
DRIVER = "vfio_pdma"
MODULE = f"/run/modules/{DRIVER}.ko"
PARAMETER = f"/sys/module/{DRIVER}/parameters/max_pasids"
#: What max_pasids takes, and what it does not.
CAPS = {
    **dict.fromkeys(("1", "1048575"), True),
    **dict.fromkeys(("0", "-1", "1048576", "4294967297", "many", ""), False),
}

TABLE = Table()
_CHECK = TABLE.phase("calls that no driver makes")


def _answers(flight: Flight, trial: Trial, part: str, expected: dict[str, Any]) -> None:
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


@_CHECK("calls-bind", "bind with a token, with an argument that can only be read, and twice")
def bind(flight: Flight, trial: Trial) -> None:
    expected = {"with a token": "EINVAL", "unwritable": "EFAULT", "unbound": "EINVAL"}
    _answers(flight, trial, "bind", {**expected, "bound": "0", "again": "EINVAL"})


@_CHECK("calls-irqs", "ask for interrupts in every way there is")
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
        "no eventfd": ["EINVAL", "EBADF"],
        "nothing changed": ["0", [1, 0]],
        "swapped": ["0", "0", [1, 0]],
        "one away": ["0", "0", [1, 0]],
        "reset": ["0", [1, 0]],
        "all away": ["0", "0", [0, 0]],
    }
    _answers(flight, trial, "irqs", expected)


@_CHECK("calls-log", "write to the fault log and to the BAR of the vectors")
def log(flight: Flight, trial: Trial) -> None:
    expected = {"logged": 1, "same": True, "bar4": [4096, 3, True], "outside": "EINVAL"}
    _answers(flight, trial, "log", expected)


@_CHECK("calls-misused", "read, write, map and ask where there is nothing, or not so much")
def misused(flight: Flight, trial: Trial) -> None:
    expected: dict[str, Any] = {
        "config 0xc": ["ff"],
        "config 0x3c": ["ff"],
        "past the end": "EINVAL",
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
    _answers(flight, trial, "misused", expected)


@_CHECK("calls-cap", "load the driver with each max_pasids that might be one")
def cap(flight: Flight, trial: Trial) -> None:
    flight.host.call("device_close", name=flight.device)
    with _unloaded(flight) as shell:
        for value, fits in CAPS.items():
            script = f"insmod {MODULE} max_pasids={value} && cat {PARAMETER} && rmmod {DRIVER} || :"
            found = shell(script)
            trial.answer(f"{value or 'nothing'}: {found or 'not loaded'}")
            expected = value if fits else ""
            trial.require(found == expected, f"with max_pasids={value} the driver has {found!r}")
    trial.saw("the driver, with 1 to 1048575 only")


@contextlib.contextmanager
def _unloaded(flight: Flight) -> Iterator[Callable[[str], str]]:
    """The driver is not there meanwhile; gives what tells the output of a shell in the host VM."""
    deadline = Deadline(60, f"{DRIVER}, unloaded and loaded")

    def shell(script: str) -> str:
        return flight.rig.host.ssh.output(script, deadline).decode().strip()

    if not shell(f"ls {MODULE} 2>/dev/null || :"):
        raise Skipped("the driver is built into this kernel")
    for name in flight.rig.mdevs:
        flight.host.call("mdev_remove", name=name)
    shell(f"rmmod {DRIVER}")
    try:
        yield shell
    finally:
        shell(f"insmod {MODULE}")
        for name, uuid in flight.rig.mdevs.items():
            flight.host.call("mdev_create", name=name, uuid=uuid)
