"""pdma devices that this process drives itself: opened, bound, with an address space and a ring."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from contextlib import ExitStack

from qemu_ioasid.agent.deadline import wait_for
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.pdma import Batch, Completion, Descriptor, Fault, Ring
from qemu_ioasid.agent.vectors import Vectors
from qemu_ioasid.agent.vfio import VfioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.storm import Storm

    Json = dict[str, Any]


class OpenDevice:
    """Device, iommufd of its own, IOAS for work without a PASID, ring. A context manager.

    Raises OSError when made, and leaves nothing open then.
    """

    def __init__(self, name: str, sysfs: str, iommufd_name: str) -> None:
        with ExitStack() as stack:
            self.iommufd = stack.enter_context(Iommufd.open(iommufd_name))
            self.device = stack.enter_context(VfioDevice.open(name, sysfs))
            self.device.bind(self.iommufd)
            self.ioas = self.iommufd.ioas_alloc()
            self.device.attach(self.ioas)
            self.ring = stack.enter_context(Ring(self.device))
            self._vectors: Vectors | None = None
            stack.callback(self.irq_stop)
            self._stack = stack.pop_all()

    @property
    def vectors(self) -> Vectors:
        """The vectors of irq_start. Raises KeyError when it was not called."""
        if self._vectors is None:
            raise KeyError(f"the interrupts of {self.device.name!r} are not started")
        return self._vectors

    def irq_start(self) -> None:
        """Every vector gets an eventfd, and is counted from here on."""
        self.irq_stop()
        self._vectors = Vectors(self.device)

    def irq_stop(self) -> None:
        """No vector has an eventfd."""
        vectors, self._vectors = self._vectors, None
        if vectors is not None:
            vectors.close()

    def unmap_all(self) -> None:
        """Empties the address space for work without a PASID."""
        try:
            self.iommufd.ioas_unmap(self.ioas, 0, (1 << 64) - 1)
        except OSError as error:
            # it was empty
            if error.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        """Closes ring, device (its PASID list dies) and iommufd."""
        self._stack.close()

    def __enter__(self) -> OpenDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _parsed(items: list[Json]) -> list[Descriptor]:
    return [Descriptor(**item) for item in items]


def _reported(records: list[Completion] | list[Fault]) -> list[Json]:
    return [{name: getattr(each, name) for name in each.__slots__} for each in records]


def completions(ring: Ring, descriptors: list[Json], seconds: float) -> list[Json]:
    """Submits a batch and waits for what the device reports of it. Raises TimeoutError."""
    return _reported(ring.wait(ring.submit(_parsed(descriptors)), seconds))


class OwnDevices:
    """The open devices by name, with the operations on them that both roles offer.

    Every operation raises KeyError for a name (or ticket) it does not know.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: dict[str, OpenDevice] = {}
        self._tickets: dict[int, tuple[OpenDevice, Batch]] = {}
        self._storms: dict[str, Storm] = {}
        self._numbers = itertools.count(1)
        self.operations: Mapping[str, Callable[..., Any]] = {
            name: getattr(self, name)
            for name in (
                "device_faults",
                "irq_start",
                "irq_wait",
                "irq_stop",
                "submit_timed",
                "storm",
                "storm_wait",
                "storm_stop",
            )
        }

    def get(self, name: str) -> OpenDevice:
        """The device of this name."""
        with self._lock:
            if name not in self._devices:
                raise KeyError(f"device {name!r} is not open here")
            return self._devices[name]

    def all(self) -> list[OpenDevice]:
        """Every device that is open."""
        with self._lock:
            return list(self._devices.values())

    def open(self, name: str, sysfs: str, iommufd_name: str) -> OpenDevice:
        """Opens the device at a sysfs folder. Raises OSError, and then nothing is open."""
        with ExitStack() as stack:
            opened = stack.enter_context(OpenDevice(name, sysfs, iommufd_name))
            with self._lock:
                self._devices[name] = opened
            stack.pop_all()
        return opened

    def close_one(self, name: str) -> None:
        """Closes a device; its tickets are void."""
        opened = self.get(name)
        with self._lock:
            self._devices.pop(name, None)
            for ticket in [t for t, (device, _) in self._tickets.items() if device is opened]:
                del self._tickets[ticket]
        opened.close()

    def close(self) -> None:
        """Closes every device."""
        with ExitStack() as stack:
            for name in list(self._devices):
                stack.callback(self.close_one, name)

    def submit(self, name: str, descriptors: list[Json], seconds: float) -> list[Json]:
        """Submits a batch and waits for its completions. Raises TimeoutError."""
        return completions(self.get(name).ring, descriptors, seconds)

    def submit_start(self, name: str, descriptors: list[Json]) -> Json:
        """Submits a batch and does not wait."""
        opened = self.get(name)
        batch = opened.ring.submit(_parsed(descriptors))
        ticket = next(self._numbers)
        with self._lock:
            self._tickets[ticket] = (opened, batch)
        return {"ticket": ticket}

    def submit_wait(self, ticket: int, seconds: float) -> list[Json]:
        """Waits for a batch of submit_start. TimeoutError keeps the ticket."""
        opened, batch = self._ticket(ticket)
        records = opened.ring.wait(batch, seconds)
        with self._lock:
            self._tickets.pop(ticket, None)
        return _reported(records)

    def _ticket(self, ticket: int) -> tuple[OpenDevice, Batch]:
        with self._lock:
            if ticket not in self._tickets:
                raise KeyError(f"no ticket {ticket}")
            return self._tickets[ticket]

    def submit_rewrite(self, ticket: int, index: int, descriptor: Json) -> None:
        """Puts another descriptor in the place of one that was submitted."""
        opened, batch = self._ticket(ticket)
        opened.ring.rewrite(batch, index, Descriptor(**descriptor))

    def read(self, name: str, region: int, offset: int, length: int) -> Json:
        """One read of a region, wherever that lies."""
        device = self.get(name).device
        return {"hex": device.read(device.region(region), offset, length).hex()}

    def touch(self, name: str) -> None:
        """Reads a register of a device by an instruction that takes a page fault first."""
        self.get(name).ring.touch()

    def doorbell(self, name: str, tail: int) -> Json:
        """Writes TAIL as it is, past all counting; the registers after that."""
        ring = self.get(name).ring
        ring.ring_doorbell(tail)
        return ring.registers()

    def submit_timed(self, name: str, descriptor: Json, count: int, seconds: float) -> Json:
        """Submits one piece of work so often, each when the last has ended; how long each took."""
        ring = self.get(name).ring
        work, took = _parsed([descriptor]), []
        for _ in range(count):
            start = time.perf_counter()
            (done,) = ring.wait(ring.submit(work), seconds)
            took.append(time.perf_counter() - start)
            if done.status != "DONE":
                raise RuntimeError(f"{name}: the work ended as {done.status}")
        return {"seconds": took}

    def storm(
        self,
        name: str,
        seed: int,
        targets: list[Json],
        seconds: float,
        operations: int | None = None,
        rings: bool = False,
        judged: bool = True,
    ) -> Json:
        """Does to a device what a hostile owner would."""
        from qemu_ioasid.agent.storm import Storm, Target

        known = [Target(**each) for each in targets]
        storm = Storm(self.get(name), seed, known, seconds, rings=rings, judged=judged)
        with self._lock:
            self._storms[name] = storm
        try:
            return storm.run(operations)
        finally:
            with self._lock:
                del self._storms[name]

    def _storm(self, name: str) -> Storm:
        with self._lock:
            if name not in self._storms:
                raise KeyError(f"there is no storm on {name!r}")
            return self._storms[name]

    def storm_wait(self, name: str, seconds: float) -> None:
        """Waits until a storm without an end is under way. Raises TimeoutError."""
        wait_for(f"storm on {name}", seconds, lambda: self._storms.get(name)).wait(seconds)

    def storm_stop(self, name: str) -> None:
        """Ends a storm: it answers soon."""
        self._storm(name).stop()

    def reset(self, name: str) -> None:
        """Resets a device."""
        self.get(name).ring.reset()

    def resume(self, name: str) -> None:
        """Goes on with a device that somebody else has reset."""
        ring = self.get(name).ring
        ring.enable()
        ring.resume()

    def registers(self, name: str) -> Json:
        """The registers of a device."""
        return self.get(name).ring.registers()

    def device_faults(self, name: str, since: int = 0) -> Json:
        """What a device's fault log still has from record `since` on."""
        count, faults = self.get(name).ring.faults(since)
        return {"count": count, "faults": _reported(faults)}

    def irq_start(self, name: str) -> None:
        """Takes a device's interrupts."""
        self.get(name).irq_start()

    def irq_wait(self, name: str, vector: int, seconds: float) -> Json:
        """Waits for an interrupt. Raises TimeoutError."""
        return {"count": self.get(name).vectors.wait(vector, seconds)}

    def irq_stop(self, name: str) -> None:
        """Lets go of a device's interrupts."""
        self.get(name).irq_stop()
