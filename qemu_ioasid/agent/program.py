"""Programs: many steps on devices and iommufds of their own, each with what it did to everything.

A step is an operation with its arguments, as the methods of Steps have them. After each step,
whatever it answered, all memory is compared with what it was, and the kernel's lists are read.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import mmap
import os
import random
import time
from contextlib import ExitStack

from qemu_ioasid.agent import kernellist
from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.iommufd import IOMMU, Iommufd
from qemu_ioasid.agent.libc import address_of, differ, protect
from qemu_ioasid.agent.pdma import ACCESS, REASON, REGISTERS, STATUS
from qemu_ioasid.agent.tracing import ensure_mounted
from qemu_ioasid.agent.uapi import iommufd as uapi
from qemu_ioasid.agent.uapi import pdma, vfio
from qemu_ioasid.agent.uapi.mman import PROT_NONE
from qemu_ioasid.agent.vfio import MDEV_DEVICES, VfioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Json = dict[str, Any]
    Slot = VfioDevice | Iommufd | mmap.mmap

PAGE = 4096
#: Where a region starts in a device's file (the ABI document in kernel-patches/).
BAR0 = pdma.PDMA_REGS_BAR << 40
BAR2 = pdma.PDMA_RING_BAR << 40
#: No file has as many open.
NO_FD = 1 << 20
COUNTS = 1 << 32
#: Descriptors, completions and the log's records are of one size, in bytes.
RECORD = 32


@functools.cache
def content(extent: int, seed: int) -> bytes:
    """What is in memory at first; the orchestrator makes the same."""
    return random.Random(seed).randbytes(extent)


class Memory:
    """length bytes made from seed, then a page to be read only, then one that nobody may touch.

    A context manager.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._memory = mmap.mmap(-1, length + 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory[:] = content(length + 2 * PAGE, seed)
        self._snapshot = mmap.mmap(-1, length + PAGE)
        self._snapshot[:] = self._memory[: length + PAGE]
        self.address = address_of(self._memory)
        self._other = address_of(self._snapshot)
        protect(self.address + length, PAGE, mmap.PROT_READ)
        protect(self.address + length + PAGE, PAGE, PROT_NONE)

    def changed(self) -> Json:
        """The pages that are not as at the last call, by number, with a digest of each."""
        found: Json = {}
        parts = [(0, len(self._snapshot))]
        while parts:
            start, size = parts.pop()
            if not differ(self.address + start, self._other + start, size):
                continue
            if size == PAGE:
                now = self._memory[start : start + PAGE]
                self._snapshot[start : start + PAGE] = now
                found[str(start // PAGE)] = digest(now)
                continue
            half = -(-size // (2 * PAGE)) * PAGE
            parts += [(start + half, size - half), (start, half)]
        return found

    def close(self) -> None:
        """Frees it; a mapping in an IOAS finds nothing there any more."""
        self._memory.close()
        self._snapshot.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def digest(data: bytes) -> str:
    """What stands for the content of a page."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Lists:
    """The kernel's table and lists, whose files stay open. A context manager."""

    def __init__(self, uuids: Mapping[str, str]) -> None:
        ensure_mounted("debugfs", kernellist.DEBUGFS)
        names = {"table": f"{kernellist.FOLDER}/table"}
        names.update({name: f"{kernellist.FOLDER}/{uuid}/pasids" for name, uuid in uuids.items()})
        with ExitStack() as stack:
            self._fds = {}
            for name, path in names.items():
                self._fds[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, self._fds[name])
            self._stack = stack.pop_all()
        self._seen: list[bytes] = []

    def changed(self) -> Json | None:
        """All of them by name, "table" among them; None when they are as at the last call."""
        # From offset 0 a seq_file starts anew; the few PASIDs of a program fit its first buffer.
        seen = [os.pread(fd, PAGE, 0) for fd in self._fds.values()]
        if seen == self._seen:
            return None
        self._seen = seen
        return {
            name: kernellist.parse(text.decode())
            for name, text in zip(self._fds, seen, strict=True)
        }

    def __enter__(self) -> Lists:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class Steps:
    """The operations: each makes its system calls and answers with what they returned.

    Slots hold fds; one that holds none, or no fd that the operation is for, answers EBADF. Every
    method raises OSError with the kernel's errno. A context manager: its end closes all.
    """

    def __init__(self, cdevs: Mapping[str, str], memory: Memory, seconds: float) -> None:
        self._cdevs = cdevs
        self._memory = memory
        self._seconds = seconds
        self._slots: dict[str, Slot] = {}

    def _put(self, fd: str, thing: Slot) -> list[int]:
        if fd in self._slots:
            self.close(fd)
        self._slots[fd] = thing
        return []

    def _device(self, fd: str) -> VfioDevice:
        found = self._slots.get(fd)
        if not isinstance(found, VfioDevice):
            raise OSError(errno.EBADF, fd)
        return found

    def _iommufd(self, fd: str) -> Iommufd:
        found = self._slots.get(fd)
        if not isinstance(found, Iommufd):
            raise OSError(errno.EBADF, fd)
        return found

    def iommufd(self, fd: str) -> list[int]:
        """open("/dev/iommu")"""
        return self._put(fd, Iommufd(Descriptor.open(IOMMU)))

    def open(self, fd: str, device: str) -> list[int]:
        """open("/dev/vfio/devices/vfioN")"""
        cdev = self._cdevs[device]
        return self._put(fd, VfioDevice(Descriptor.open(f"/dev/vfio/devices/{cdev}"), cdev))

    def dup(self, fd: str, of: str) -> list[int]:
        """dup(2)"""
        found = self._slots.get(of)
        if isinstance(found, Iommufd):
            return self._put(fd, Iommufd(found.descriptor.duplicate()))
        device = self._device(of)
        return self._put(fd, VfioDevice(device.descriptor.duplicate(), device.cdev))

    def mmap(self, fd: str, of: str) -> list[int]:
        """mmap(2) of BAR2, which keeps the file"""
        with self._device(of).descriptor.borrowed() as number:
            return self._put(fd, mmap.mmap(number, pdma.PDMA_RING_SIZE, offset=BAR2))

    def close(self, fd: str) -> list[int]:
        """close(2), or munmap(2)"""
        if fd not in self._slots:
            raise OSError(errno.EBADF, fd)
        self._slots.pop(fd).close()
        return []

    def ioas_alloc(self, fd: str) -> list[int]:
        """IOMMU_IOAS_ALLOC"""
        return [self._iommufd(fd).ioas_alloc()]

    def destroy(self, fd: str, ident: int) -> list[int]:
        """IOMMU_DESTROY"""
        self._iommufd(fd).destroy(ident)
        return []

    def map(self, fd: str, ioas: int, iova: int, length: int, at: int, flags: int) -> list[int]:
        """IOMMU_IOAS_MAP of the memory from at on"""
        argument = uapi.iommu_ioas_map(
            size=40,
            flags=flags,
            ioas_id=ioas,
            user_va=self._memory.address + at,
            length=length,
            iova=iova,
        )
        self._iommufd(fd).descriptor.ioctl(uapi.IOMMU_IOAS_MAP, argument)
        return [int(argument.iova)]

    def unmap(self, fd: str, ioas: int, iova: int, length: int) -> list[int]:
        """IOMMU_IOAS_UNMAP"""
        return [self._iommufd(fd).ioas_unmap(ioas, iova, length)]

    def bind(self, fd: str, iommufd: str) -> list[int]:
        """VFIO_DEVICE_BIND_IOMMUFD; the fd of a slot that has none is one that is not open"""
        device, found = self._device(fd), self._slots.get(iommufd)
        if isinstance(found, Iommufd):
            return [device.bind(found)]
        other = found.descriptor if isinstance(found, VfioDevice) else Descriptor(NO_FD, "none")
        return [device.bind(Iommufd(other))]

    def attach(self, fd: str, pt_id: int) -> list[int]:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT"""
        return [self._device(fd).attach(pt_id)]

    def detach(self, fd: str) -> list[int]:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT"""
        self._device(fd).detach()
        return []

    def attach_pasid(self, fd: str, pasid: int, pt_id: int) -> list[int]:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT with VFIO_DEVICE_ATTACH_PASID"""
        return [self._device(fd).attach_pasid(pasid, pt_id)]

    def attach_pasid_unwritten(self, fd: str, pasid: int, pt_id: int) -> list[int]:
        """attach_pasid with the struct where the kernel can read it, and not write pt_id back"""
        argument = vfio.vfio_device_attach_iommufd_pt(
            argsz=16, flags=vfio.VFIO_DEVICE_ATTACH_PASID, pt_id=pt_id, pasid=pasid
        )
        descriptor = self._device(fd).descriptor
        descriptor.ioctl_on_readonly(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument)
        return []

    def detach_pasid(self, fd: str, pasid: int) -> list[int]:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT with VFIO_DEVICE_DETACH_PASID"""
        self._device(fd).detach_pasid(pasid)
        return []

    def reset(self, fd: str) -> list[int]:
        """VFIO_DEVICE_RESET; answers as doorbell"""
        self._device(fd).reset()
        return _counts(self._number(fd))

    def doorbell(self, fd: str, by: int) -> list[int]:
        """TAIL written, moved by a number; answers TAIL, HEAD, STATUS and FAULT_COUNT"""
        device = self._number(fd)
        tail = (_register(device, "TAIL") + by) % COUNTS
        os.pwrite(device, tail.to_bytes(4, "little"), BAR0 + pdma.PDMA_REG_TAIL)
        return _counts(device)

    def submit(
        self, fd: str, opcode: int, flags: int, pasid: int, length: int, src: int, dst: int
    ) -> list[int | str]:
        """One descriptor, waited for; answers seq, status, pasid, error, addr and done

        and FAULT_COUNT; where the log has a record of this descriptor, its reason and access.
        """
        device = self._number(fd)
        tail = _register(device, "TAIL")
        slot = tail % pdma.PDMA_RING_ENTRIES * RECORD
        work = pdma.pdma_desc(opcode, flags, pasid, length, src, dst)
        os.pwrite(device, work, BAR2 + pdma.PDMA_DESC_OFFSET + slot)
        tail = (tail + 1) % COUNTS
        os.pwrite(device, tail.to_bytes(4, "little"), BAR0 + pdma.PDMA_REG_TAIL)
        # HEAD moves when the worker has let go of everything, which is after the completion
        deadline = time.monotonic() + self._seconds
        while _register(device, "HEAD") != tail:
            if time.monotonic() > deadline:
                raise TimeoutError
            os.sched_yield()
        record = os.pread(device, RECORD, BAR2 + pdma.PDMA_COMPLETION_OFFSET + slot)
        found = pdma.pdma_completion.from_buffer_copy(record)
        status = STATUS.get(found.status, int(found.status))
        values = [found.seq, status, found.pasid, name(found.error), found.addr, found.done]
        return [*values, *_logged(device, found)]

    def _number(self, fd: str) -> int:
        # Nobody else closes it meanwhile
        with self._device(fd).descriptor.borrowed() as number:
            return number

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *exc: object) -> None:
        with ExitStack() as stack:
            for thing in self._slots.values():
                stack.callback(thing.close)


def _register(device: int, register: str) -> int:
    return int.from_bytes(os.pread(device, 4, BAR0 + REGISTERS[register]), "little")


def _counts(device: int) -> list[int]:
    return [_register(device, each) for each in ("TAIL", "HEAD", "STATUS", "FAULT_COUNT")]


def _logged(device: int, completion: pdma.pdma_completion) -> list[int | str]:
    """FAULT_COUNT and, of work that was not done, what the log's last record says of it."""
    count = _register(device, "FAULT_COUNT")
    if completion.status in (pdma.PDMA_COMPLETION_DONE, pdma.PDMA_COMPLETION_DIFFERENT):
        return [count]
    start = BAR0 + pdma.PDMA_FAULT_OFFSET + (count - 1) % pdma.PDMA_FAULT_ENTRIES * RECORD
    words = [os.pread(device, 4, start + at) for at in range(0, RECORD, 4)]
    record = pdma.pdma_fault.from_buffer_copy(b"".join(words))
    mine = completion.seq - 1, completion.pasid, completion.error, completion.addr
    if (record.seq, record.count, record.pasid, record.error, record.addr) != (count, *mine):
        return [count, "not this one's"]
    reason, access = int(record.reason), int(record.access)
    return [count, REASON.get(reason, reason), ACCESS.get(access, access)]


def name(number: int) -> str:
    """An errno's name; "0" for none."""
    return errno.errorcode.get(number, str(number))


def run(
    uuids: Mapping[str, str],
    length: int,
    seed: int,
    steps: Sequence[tuple[str, Json]],
    seconds: float,
) -> Json:
    """Carries out steps on the mdevs of these names, from nothing; all is closed afterwards.

    max_pasids: the module's parameter, 65536 where it has none. observed: one for each step, and
    one more for the end: errno (its name, or "0"), values; and, where they are not as after the
    step before, pages (of memory, with digests) and lists. A descriptor that is not completed
    within seconds answers ETIMEDOUT, which ends the program.
    """
    cdevs = {each: os.listdir(f"{MDEV_DEVICES}/{uuid}/vfio-dev")[0] for each, uuid in uuids.items()}
    observed: list[Json] = []
    with Memory(length, seed) as memory, Lists(uuids) as lists:

        def look(answer: Json) -> None:
            pages, rows = memory.changed(), lists.changed()
            answer.update({"pages": pages} if pages else {})
            answer.update({"lists": rows} if rows else {})
            observed.append(answer)

        with Steps(cdevs, memory, seconds) as acting:
            for operation, arguments in steps:
                try:
                    look({"errno": "0", "values": getattr(acting, operation)(**arguments)})
                except TimeoutError:
                    look({"errno": "ETIMEDOUT", "values": []})
                    break
                except OSError as error:
                    look({"errno": name(error.errno or 0), "values": []})
        look({"errno": "0", "values": []})
    return {"max_pasids": max_pasids(), "observed": observed}


def max_pasids() -> int:
    """How many PASIDs a list holds."""
    try:
        with open("/sys/module/vfio_pdma/parameters/max_pasids") as file:
            return int(file.read())
    except FileNotFoundError:
        return 65536
