# SPDX-License-Identifier: GPL-2.0-or-later
"""``pasidloop``, the C program that does the registrar's ioctls and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from qemu_ioasid import cprogram
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.kernel import Kernel
from qemu_ioasid.machine import Machine

SOURCE = Path(__file__).with_name("pasidloop.c")
#: Where it is put in the VM.
PROGRAM = "/run/bench/pasidloop"


def build(kernel: Kernel, deadline: Deadline) -> bytes:
    """The program, for a VM without a C library, compiled against *kernel*'s headers."""
    return cprogram.build([SOURCE], kernel.headers, deadline)


class CLoop:
    """The program, in *machine*."""

    def __init__(self, machine: Machine, program: bytes) -> None:
        self._ssh = machine.ssh
        cprogram.put(machine, PROGRAM, program)

    def run(self, cdev: str, pasids: int, ioases: int, times: int = 1) -> dict[str, float]:
        """Microseconds of each kind of call (pasidloop.c names them), on an mdev nobody has open.

        All *pasids* come and go *times* times.
        Raises InfrastructureError with what it wrote when a call fails.
        """
        deadline = Deadline(60 + pasids * times * 0.001, f"end of {SOURCE.stem} of {pasids} PASIDs")
        command = f"exec {PROGRAM} /dev/vfio/devices/{cdev} {pasids} {ioases} {times}"
        said = json.loads(self._ssh.output(command, deadline))
        return {kind: nanoseconds / 1000 for kind, nanoseconds in said.items()}
