"""pdma's ring: descriptors in, completions out, through the device's BARs.

Layout and meaning: include/uapi/linux/pdma.h and the ABI document in kernel-patches/.
"""

from __future__ import annotations

import ctypes
import errno
import threading

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.uapi import pdma as uapi
from qemu_ioasid.agent.uapi import vfio as vfio_uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_ioasid.agent.vfio import VfioDevice

REGISTERS = {
    "MAGIC": uapi.PDMA_REG_MAGIC,
    "VERSION": uapi.PDMA_REG_VERSION,
    "RING_ENTRIES": uapi.PDMA_REG_RING_ENTRIES,
    "MAX_LENGTH": uapi.PDMA_REG_MAX_LENGTH,
    "PASID_BITS": uapi.PDMA_REG_PASID_BITS,
    "OPCODES": uapi.PDMA_REG_OPCODES,
    "FAULT_ENTRIES": uapi.PDMA_REG_FAULT_ENTRIES,
    "TAIL": uapi.PDMA_REG_TAIL,
    "HEAD": uapi.PDMA_REG_HEAD,
    "STATUS": uapi.PDMA_REG_STATUS,
    "FAULT_COUNT": uapi.PDMA_REG_FAULT_COUNT,
}

STATUS = {
    uapi.PDMA_COMPLETION_DONE: "DONE",
    uapi.PDMA_COMPLETION_REFUSED: "REFUSED",
    uapi.PDMA_COMPLETION_FAULT: "FAULT",
    uapi.PDMA_COMPLETION_INVALID: "INVALID",
    uapi.PDMA_COMPLETION_DIFFERENT: "DIFFERENT",
}

REASON = {
    uapi.PDMA_FAULT_OPCODE: "OPCODE",
    uapi.PDMA_FAULT_FLAGS: "FLAGS",
    uapi.PDMA_FAULT_NO_PASID: "NO_PASID",
    uapi.PDMA_FAULT_LENGTH: "LENGTH",
    uapi.PDMA_FAULT_WRAP: "WRAP",
    uapi.PDMA_FAULT_NOT_LISTED: "NOT_LISTED",
    uapi.PDMA_FAULT_UNMAPPED: "UNMAPPED",
    uapi.PDMA_FAULT_NO_RIGHT: "NO_RIGHT",
    uapi.PDMA_FAULT_GONE: "GONE",
    uapi.PDMA_FAULT_ENDED: "ENDED",
    uapi.PDMA_FAULT_OTHER: "OTHER",
}

ACCESS = {
    uapi.PDMA_ACCESS_NONE: "NONE",
    uapi.PDMA_ACCESS_READ: "READ",
    uapi.PDMA_ACCESS_WRITE: "WRITE",
}

_COUNT = 1 << 32
_DESC = ctypes.sizeof(uapi.pdma_desc)
_COMPLETION = ctypes.sizeof(uapi.pdma_completion)
_FAULT = ctypes.sizeof(uapi.pdma_fault)
_COMMAND = 0x04  # PCI_COMMAND (include/uapi/linux/pci_regs.h)
_MEMORY_AND_MASTER = 0x06


class Descriptor:
    """One piece of work. src (for FILL 8 bytes to store) and dst are IOVAs; length is in bytes.

    pasid None: the device's own address space. interrupt: raise vector 0 when it has ended.
    flags None: what pasid and interrupt imply; given: as it is.
    """

    __slots__ = ("dst", "flags", "length", "opcode", "pasid", "src")

    def __init__(
        self,
        src: int = 0,
        dst: int = 0,
        length: int = 0,
        pasid: int | None = None,
        opcode: int = uapi.PDMA_OP_COPY,
        flags: int | None = None,
        interrupt: bool = False,
    ) -> None:
        self.src = src
        self.dst = dst
        self.length = length
        self.pasid = pasid or 0
        self.opcode = opcode
        if flags is None:
            flags = 0 if pasid is None else uapi.PDMA_DESC_PASID
            flags |= uapi.PDMA_DESC_INTERRUPT if interrupt else 0
        self.flags = flags


class Completion:
    """What the device reports of one descriptor.

    status: a name of STATUS, or the bare number. error: positive errno. addr: the IOVA to blame.
    done: bytes written for certain (a fault may have written more, up to the edge of what is
    bound), or equal.
    """

    __slots__ = ("addr", "done", "error", "pasid", "seq", "status")

    def __init__(self, record: uapi.pdma_completion) -> None:
        self.seq = int(record.seq)
        self.status: str | int = STATUS.get(record.status, int(record.status))
        self.pasid = int(record.pasid)
        self.error = int(record.error)
        self.addr = int(record.addr)
        self.done = int(record.done)


class Fault:
    """Why one descriptor was not carried out: a record of the fault log.

    reason, access: names of REASON and ACCESS, or the bare number. count: the descriptor's, so
    that its completion's seq is count + 1. The rest is as in the completion.
    """

    __slots__ = ("access", "addr", "count", "error", "pasid", "reason", "seq")

    def __init__(self, record: uapi.pdma_fault) -> None:
        self.seq = int(record.seq)
        self.reason: str | int = REASON.get(record.reason, int(record.reason))
        self.count = int(record.count)
        self.pasid = int(record.pasid)
        self.error = int(record.error)
        self.access: str | int = ACCESS.get(record.access, int(record.access))
        self.addr = int(record.addr)


class Batch:
    """Descriptors submitted by one doorbell: the ring's count before the first, and how many.

    resets: how often the ring had been reset by then.
    """

    __slots__ = ("count", "first", "resets")

    def __init__(self, first: int, count: int, resets: int) -> None:
        self.first = first
        self.count = count
        self.resets = resets


class Ring:
    """The ring of one open, bound device, used by this process alone. A context manager.

    Threads may submit and wait at once. close() unmaps the ring memory, which keeps the device
    file open; it does not close the device. region is that of the registers, memory that of the
    rings.
    """

    def __init__(self, device: VfioDevice) -> None:
        """Raises OSError; ENODEV when the registers are not those of a pdma this code knows."""
        self.device = device
        self._lock = threading.Lock()
        self._resets = 0
        self.region = device.region(vfio_uapi.VFIO_PCI_BAR0_REGION_INDEX)
        self.enable()
        found = (self.register("MAGIC"), self.register("VERSION"), self.register("RING_ENTRIES"))
        if found != (uapi.PDMA_MAGIC, uapi.PDMA_VERSION, uapi.PDMA_RING_ENTRIES):
            raise OSError(errno.ENODEV, f"{device.name}: magic, version, entries are {found}")
        self._tail = self.register("TAIL")
        self.memory = device.map(device.region(vfio_uapi.VFIO_PCI_BAR2_REGION_INDEX))

    def enable(self) -> None:
        """Sets the function's memory and bus master bits, which a reset clears."""
        config = self.device.region(vfio_uapi.VFIO_PCI_CONFIG_REGION_INDEX)
        command = int.from_bytes(self.device.read(config, _COMMAND, 2), "little")
        command |= _MEMORY_AND_MASTER
        self.device.write(config, _COMMAND, command.to_bytes(2, "little"))

    def touch(self) -> None:
        """Reads a register by an instruction that takes a page fault first, of a function anew.

        Its memory has been off: whoever emulates it has nothing of it mapped.
        """
        config = self.device.region(vfio_uapi.VFIO_PCI_CONFIG_REGION_INDEX)
        command = self.device.read(config, _COMMAND, 2)
        for value in (b"\0\0", command):
            self.device.write(config, _COMMAND, value)
        with self.device.map(self.region) as registers:
            _ = registers[0]

    def register(self, name: str) -> int:
        """A register of BAR0 by its name in REGISTERS."""
        return int.from_bytes(self.device.read(self.region, REGISTERS[name], 4), "little")

    def registers(self) -> dict[str, int]:
        """All registers of BAR0."""
        return {name: self.register(name) for name in REGISTERS}

    def faults(self, since: int = 0) -> tuple[int, list[Fault]]:
        """FAULT_COUNT, and those of the log's records from count `since` on that are still there.

        In order. A record that is overwritten or cleared meanwhile is left out.
        """
        count = self.register("FAULT_COUNT")
        kept = min((count - since) % _COUNT, uapi.PDMA_FAULT_ENTRIES)
        records = (self._fault((count - back) % _COUNT) for back in range(kept, 0, -1))
        return count, [Fault(record) for record in records if record]

    def _fault(self, number: int) -> uapi.pdma_fault | None:
        start = uapi.PDMA_FAULT_OFFSET + number % uapi.PDMA_FAULT_ENTRIES * _FAULT
        read = self.device.read
        words = [read(self.region, start + at, 4) for at in range(0, _FAULT, 4)]
        seq = int.from_bytes(read(self.region, start, 4), "little")
        record = uapi.pdma_fault.from_buffer_copy(b"".join(words))
        return record if record.seq == seq == (number + 1) % _COUNT else None

    def submit(self, descriptors: Sequence[Descriptor]) -> Batch:
        """Writes the descriptors and rings the doorbell once. Does not wait.

        Raises ValueError for more than the ring holds, OSError EAGAIN when too much is in flight;
        then nothing was submitted.
        """
        if not 0 < len(descriptors) <= uapi.PDMA_RING_ENTRIES:
            raise ValueError(f"a batch is 1 to {uapi.PDMA_RING_ENTRIES} descriptors")
        with self._lock:
            first = self._tail
            if (first - self.register("HEAD")) % _COUNT + len(descriptors) > uapi.PDMA_RING_ENTRIES:
                raise OSError(errno.EAGAIN, f"{self.device.name}: the ring is full")
            for number, descriptor in enumerate(descriptors, first):
                slot = number % uapi.PDMA_RING_ENTRIES
                self._put(slot, descriptor)
                # a record of before a reset may carry the number that is expected next
                start = uapi.PDMA_COMPLETION_OFFSET + slot * _COMPLETION
                self.memory[start : start + _COMPLETION] = bytes(_COMPLETION)
            tail = (first + len(descriptors)) % _COUNT
            self.ring_doorbell(tail)
            self._tail = tail
            return Batch(first, len(descriptors), self._resets)

    def _put(self, slot: int, descriptor: Descriptor) -> None:
        record = uapi.pdma_desc(
            opcode=descriptor.opcode,
            flags=descriptor.flags,
            pasid=descriptor.pasid,
            length=descriptor.length,
            src=descriptor.src,
            dst=descriptor.dst,
        )
        start = uapi.PDMA_DESC_OFFSET + slot * _DESC
        self.memory[start : start + _DESC] = bytes(record)

    def rewrite(self, batch: Batch, index: int, descriptor: Descriptor) -> None:
        """Overwrites a descriptor of a batch where it lies, whatever the device does with it.

        Raises ValueError: the batch has no such descriptor.
        """
        if not 0 <= index < batch.count:
            raise ValueError(f"a batch of {batch.count} descriptors has no number {index}")
        self._put((batch.first + index) % uapi.PDMA_RING_ENTRIES, descriptor)

    def ring_doorbell(self, tail: int) -> None:
        """Writes TAIL, and nothing else: what submit() counts is not changed."""
        self.device.write(self.region, uapi.PDMA_REG_TAIL, tail.to_bytes(4, "little"))

    def wait(self, batch: Batch, seconds: float) -> list[Completion]:
        """The batch's completions, in order of submission.

        Raises TimeoutError (the batch can be waited for again); OSError ECANCELED when a reset
        came between, EBADF when the ring was closed; RuntimeError when later work has overwritten a
        record.
        """
        completions: list[Completion] = []

        def collect() -> list[Completion] | None:
            if self.memory.closed:
                raise OSError(errno.EBADF, f"{self.device.name}: the ring is closed")
            if self._resets != batch.resets:
                raise OSError(errno.ECANCELED, f"{self.device.name}: lost in a reset")
            while len(completions) < batch.count:
                completion = self._poll(batch.first + len(completions))
                if completion is None:
                    return None
                completions.append(completion)
            return completions

        return wait_for(f"{self.device.name}: {batch.count} completions", seconds, collect)

    def _poll(self, number: int) -> Completion | None:
        start = uapi.PDMA_COMPLETION_OFFSET + number % uapi.PDMA_RING_ENTRIES * _COMPLETION
        expected = (number + 1) % _COUNT
        seq = int.from_bytes(self.memory[start : start + 4], "little")
        if seq != expected:
            if seq and (seq - expected) % _COUNT < _COUNT // 2:
                raise RuntimeError(f"{self.device.name}: completion {expected} was overwritten")
            return None
        # seq is written last, so only a copy made after it was seen is whole
        return Completion(
            uapi.pdma_completion.from_buffer_copy(self.memory[start : start + _COMPLETION])
        )

    def reset(self) -> None:
        """Resets the device: batches in flight are lost, counting starts where TAIL says."""
        with self._lock:
            self.device.reset()
            self._resets += 1
            self.enable()
            self._tail = self.register("TAIL")

    def resume(self) -> None:
        """Counts on from where TAIL is, whoever moved it; batches of before are lost."""
        with self._lock:
            self._resets += 1
            self._tail = self.register("TAIL")

    def close(self) -> None:
        """Unmaps the ring memory."""
        self.memory.close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
