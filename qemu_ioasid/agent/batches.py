"""The host role's batched operations: many PASIDs, many address spaces, one request.

A batch does what as many single requests would do, in order, and ends at the first error. What was
done before stays: done says how many, failed which one and why.
"""

from __future__ import annotations

import time
from itertools import chain, cycle, islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from qemu_ioasid.agent.iommufd import Iommufd
    from qemu_ioasid.agent.registrar import Registrar
    from qemu_ioasid.agent.vfio import VfioDevice

    Json = dict[str, Any]
    # [first, how many] each
    Ranges = Sequence[tuple[int, int]]

U32 = 1 << 32


def _each(pasids: Ranges) -> Iterator[int]:
    for first, count in pasids:
        if not 0 <= first <= first + count <= U32:
            raise ValueError(f"[{first}, {count}] is no range of PASIDs")
    return chain.from_iterable(range(first, first + count) for first, count in pasids)


def _ranges(numbers: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


def _outcome(done: int, error: OSError | None, what: Iterator[int], started: float) -> Json:
    seconds = time.monotonic() - started
    failed = None
    if error:
        failed = {
            "index": done,
            "number": next(islice(what, done, None)),
            "errno": error.errno,
            "message": str(error),
        }
    return {"done": done, "failed": failed, "seconds": seconds}


class Batches:
    """The operations, on devices and iommufds that the given functions find by name."""

    def __init__(
        self,
        registrar: Registrar,
        device: Callable[[str], VfioDevice],
        iommufd: Callable[[str], Iommufd],
    ) -> None:
        self._registrar = registrar
        self._device = device
        self._iommufd = iommufd
        self.operations: Mapping[str, Callable[..., Any]] = {
            "ioas_alloc_many": self.ioas_alloc_many,
            "ioas_destroy_many": self.ioas_destroy_many,
            "pasid_alloc_many": self.pasid_alloc_many,
            "pasid_free_many": self.pasid_free_many,
            "register_many": self.register_many,
            "unregister_many": self.unregister_many,
        }

    def ioas_alloc_many(self, iommufd: str, count: int) -> Json:
        """Fresh IOASes of an iommufd, or none."""
        return {"ioas": self._iommufd(iommufd).ioas_alloc_many(count)}

    def ioas_destroy_many(self, iommufd: str, ioas: list[int]) -> Json:
        """Destroys IOASes."""
        found = self._iommufd(iommufd)
        started = time.monotonic()
        done, error = found.destroy_many(ioas)
        return _outcome(done, error, iter(ioas), started)

    def pasid_alloc_many(self, owner: str, count: int) -> Json:
        """PASIDs of the parent, or none."""
        return {"pasids": _ranges(self._registrar.alloc_many(owner, count))}

    def pasid_free_many(self, pasids: Ranges) -> Json:
        """Gives PASIDs back."""
        started = time.monotonic()
        done, error = self._registrar.free_many(_each(pasids))
        return _outcome(done, error, _each(pasids), started)

    def register_many(self, device: str, iommufd: str, pasids: Ranges, ioas: list[int]) -> Json:
        """Puts PASIDs into a device's list; they take the IOASes in turn."""
        if not ioas or min(ioas) < 0 or max(ioas) >= U32:
            raise ValueError("IOAS ids: at least one, of 32 bits")
        found, space = self._device(device), self._iommufd(iommufd)
        started = time.monotonic()
        done, error = self._registrar.register_many(found, space, _each(pasids), cycle(ioas))
        return _outcome(done, error, _each(pasids), started)

    def unregister_many(self, device: str, pasids: Ranges) -> Json:
        """Takes PASIDs out of a device's list."""
        found = self._device(device)
        started = time.monotonic()
        done, error = self._registrar.unregister_many(found, _each(pasids))
        return _outcome(done, error, _each(pasids), started)
