# SPDX-License-Identifier: GPL-2.0-or-later
"""pdma's engine as a program: what comes of a descriptor, and which bytes it writes.

Source: kernel-patches/ABI.md; where that leaves open what a failed write leaves behind, Linux 7.2.
"""

from __future__ import annotations

from typing import NamedTuple

from qemu_ioasid.model.iommufd import READABLE, U64, WRITEABLE, Ioas, Memory

NOP, COPY, FILL, COMPARE = range(4)
#: Flags.
PASID, INTERRUPT = 1, 2
#: Work is done so many bytes at a time.
CHUNK = 64 * 1024
MAX_LENGTH = 1 << 20
#: Of the fault log, by the errno of a fault.
REASONS = {"ENOENT": "UNMAPPED", "EPERM": "NO_RIGHT", "EFAULT": "GONE"}


class End(NamedTuple):
    """How a descriptor ends: status and why; its completion; reason and access in the log."""

    outcome: str
    error: str = "0"
    addr: int = 0
    done: int = 0
    reason: str = ""
    access: str = "NONE"


def invalid(opcode: int, flags: int, pasid: int, length: int, src: int, dst: int) -> End | None:
    """What is wrong with a descriptor as such, in the order in which pdma looks."""
    last = max(length, 1) - 1
    wraps = [at for at in (0 if opcode == FILL else src, dst) if at + last > U64]
    for wrong, reason, why in (
        (opcode > COMPARE, "OPCODE", "opcode"),
        (flags > PASID | INTERRUPT, "FLAGS", "flag"),
        (pasid and not flags & PASID, "NO_PASID", "PASID without the flag"),
        (length > MAX_LENGTH, "LENGTH", "too long"),
        (opcode != NOP and not length, "LENGTH", "nothing to do"),
        (wraps, "WRAP", "past 2^64"),
    ):
        if wrong:
            addr = wraps[0] if reason == "WRAP" else 0
            return End(f"INVALID: {why}", "EINVAL", addr, reason=reason)
    return None


def refused(why: str) -> End:
    """The PASID is not in the device's list."""
    return End(f"REFUSED: {why}", "EACCES", reason="NOT_LISTED")


class _Fault(Exception):
    pass


def work(memory: Memory, ioas: Ioas | None, opcode: int, length: int, src: int, dst: int) -> End:
    """Carry out a valid descriptor in an address space that it may use."""
    names = {COPY: "COPY", FILL: "FILL", COMPARE: "COMPARE"}
    space, at, done, access = ioas or Ioas(), 0, 0, "READ"
    try:
        for done in range(0, 0 if opcode == NOP else length, CHUNK):
            size = min(CHUNK, length - done)
            access, at = "READ", src + done
            data = _read(memory, space, at, size) if opcode != FILL else _pattern(src, size)
            at = dst + done
            if opcode == COMPARE:
                other = _read(memory, space, at, size)
                if other != data:
                    same = next(i for i in range(size) if data[i] != other[i])
                    return End("DIFFERENT", addr=at + same, done=done + same)
                continue
            access = "WRITE"
            _write(memory, space, at, data)
    except _Fault as fault:
        error = str(fault)
        why = f"FAULT: {error}, {access.lower()}{', later' if done else ''}"
        return End(why, error, at, done, REASONS[error], access)
    if opcode == NOP:
        return End("DONE: NOP")
    return End(f"DONE: {names[opcode]}", done=length)


def _read(memory: Memory, space: Ioas, iova: int, size: int) -> bytes:
    data = b""
    for error, at, count in space.walk(iova, size, READABLE):
        if error:
            raise _Fault(error)
        data += memory.read(at, count)
    return data


def _write(memory: Memory, space: Ioas, iova: int, data: bytes) -> None:
    for error, at, count in space.walk(iova, len(data), WRITEABLE):
        # What lies before the first byte that must not be written is written.
        memory.write(at, data[:count])
        data = data[count:]
        if error:
            raise _Fault(error)


def _pattern(src: int, size: int) -> bytes:
    return (src.to_bytes(8, "little") * (size // 8 + 1))[:size]
