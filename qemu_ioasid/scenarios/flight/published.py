# SPDX-License-Identifier: GPL-2.0-or-later
"""What there is to be read at the moment at which a completion's seq is stored."""

from __future__ import annotations

import re

from qemu_ioasid import gdbstub, process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.gdbstub import Stub
from qemu_ioasid.scenarios.checks import Skipped, Trial
from qemu_ioasid.scenarios.flight.ground import (
    CHUNK,
    COMPLETIONS,
    LOG,
    PAGE,
    PLAIN,
    REGISTERS,
    RINGS,
    RINGS_SIZE,
    Flight,
    fill,
)
from qemu_ioasid.scenarios.table import Table

#: A completion and an entry of the log; the first 4 bytes of either are its seq.
RECORD = 32
#: The device's structure, with its log, lies so near to a pointer into it.
NEAR = 2
#: What the driver has of vmalloc(); at 1, root is shown where (Documentation, kptr_restrict).
SHOW = """
cd /proc/sys/kernel && before=$(cat kptr_restrict) && echo 1 >kptr_restrict
grep ' pdma_' /proc/vmallocinfo
echo $before >kptr_restrict
"""

TABLE = Table()
_CHECK = TABLE.phase("while a completion is stored")


@_CHECK("published", "stop the host VM as a completion's seq is stored, and read the rest")
def published(flight: Flight, trial: Trial) -> None:
    """Who sees seq may read the completion and the log: another processor, at that moment."""
    space = flight.registered()
    # Every field of what comes of it is something: its second chunk is not mapped.
    work = fill(space.pasid, PLAIN, 2 * CHUNK)
    flight.completions(trial, flight.submit(work), "FAULT")
    second = COMPLETIONS + RECORD
    deadline = Deadline(20, "store of a completion's seq")
    path = process.current_run().folder / "gdb.published"
    ring = _rings(flight, deadline)
    with gdbstub.stopped(flight.rig.host.qmp, "host", path, deadline) as stub:
        call = flight.host.start("device_submit_start", name=flight.device, descriptors=[work])
        trial.require(stub.run_to_store(ring + second, 4), "the VM stopped for another reason")
        seen, memory = stub.read(ring + second, RECORD), _pointed_at(stub)
    flight.completions(trial, call.result(deadline)["ticket"], "FAULT")
    trial.require(
        seen == flight.region(RINGS, second, RECORD),
        f"with its seq the completion was {seen.hex()}",
    )
    before, logged = (flight.region(REGISTERS, LOG + at, RECORD) for at in (0, RECORD))
    if before not in memory:
        raise Skipped("the completion was whole; no register of the processor leads to the log")
    trial.require(logged in memory, "the fault was not in the log yet")
    trial.saw("the whole completion, and the fault in the log")


def _rings(flight: Flight, deadline: Deadline) -> int:
    """Where the kernel has the rings of the device, which is the only one open."""
    said = flight.rig.host.ssh.output(SHOW, deadline).decode()
    found = re.findall(rf"^0x(\w+)-0x\w+ +{RINGS_SIZE + PAGE} pdma_.*\buser\b", said, re.MULTILINE)
    if len(found) != 1:
        raise Skipped(f"which of the driver's memory are the rings cannot be told: {said.strip()}")
    return int(found[0], 16)


def _pointed_at(stub: Stub) -> bytes:
    """The memory around all that the processor's registers point at."""
    pages = {
        page
        for pointer in stub.registers()
        for page in range(pointer // PAGE - NEAR, pointer // PAGE + NEAR + 1)
        # The kernel's half.
        if page << 12 >> 63 == 1
    }
    return b"".join(stub.read(page * PAGE, PAGE) for page in sorted(pages))
