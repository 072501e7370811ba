# SPDX-License-Identifier: GPL-2.0-or-later
"""iommufd as a program: address spaces, the ids they go by, and what drivers reach them through.

Source: drivers/iommu/iommufd/{main,ioas,io_pagetable,device}.c of Linux 7.2, whose order of checks
this is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

PAGE = 4096
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
#: IOMMU_IOAS_MAP_*
FIXED, WRITEABLE, READABLE = 1, 2, 4

#: The memory that programs map: so many bytes, then a page to be read only, then one that nobody
#: may touch.
MEMORY = 48 * PAGE
READ_PAGE, NO_PAGE = MEMORY, MEMORY + PAGE
EXTENT = MEMORY + 2 * PAGE


class Refused(Exception):
    """The call ends with this errno; nothing has changed but what `Ioas.unmap` says."""


def require(holds: object, otherwise: str) -> None:
    """Refuse with the outcome *otherwise* unless it *holds*."""
    if not holds:
        raise Refused(otherwise)


class Memory:
    """The bytes that areas are of."""

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)
        self._before: dict[int, bytes] = {}

    def read(self, at: int, size: int) -> bytes:
        """The bytes from *at* on."""
        return bytes(self._content[at : at + size])

    def write(self, at: int, data: bytes) -> None:
        """They are *data* now."""
        for page in range(at // PAGE, -(-(at + len(data)) // PAGE)):
            self._before.setdefault(page, self.read(page * PAGE, PAGE))
        self._content[at : at + len(data)] = data

    def changed(self) -> dict[int, bytes]:
        """The pages that are not as they were at the last call, by number."""
        before, self._before = self._before, {}
        now = {page: self.read(page * PAGE, PAGE) for page in before}
        return {page: data for page, data in now.items() if data != before[page]}


@dataclass(frozen=True, order=True)
class Area:
    """In an IOAS, [iova, end) is the memory from *at* on."""

    iova: int
    end: int
    at: int
    flags: int

    @property
    def whole_pages(self) -> bool:
        """Whether an access that pins pages can use it."""
        return not (self.iova | self.end | self.at) % PAGE


@dataclass(eq=False)
class Ioas:
    """An address space, and who is attached to it."""

    areas: list[Area] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)

    def overlapping(self, iova: int, end: int) -> list[Area]:
        """The areas that have a byte in [iova, end), in order."""
        return sorted(area for area in self.areas if area.iova < end and iova < area.end)

    def map(self, iova: int, length: int, at: int, flags: int) -> None:
        """Map the memory from *at* on."""
        pages = any(access.whole_pages for access in self.accesses)
        require(length, "EINVAL: length 0")
        require(not pages or not (length | iova) % PAGE, "EINVAL: not whole pages")
        require(iova + length - 1 <= U64, "EOVERFLOW: past the end")
        require(not self.overlapping(iova, iova + length), "EEXIST")
        require(not pages or not at % PAGE, "EINVAL: not whole pages")
        self.areas.append(Area(iova, iova + length, at, flags))

    def unmap(self, iova: int, length: int) -> int:
        """Unmap whole areas; when one sticks out, those before it are gone. Gives the bytes."""
        everything = (iova, length) == (0, U64)
        end = U64 + 1 if everything else iova + length
        require(everything or max(iova, length) < U64, "EOVERFLOW")
        require(length, "EINVAL: length 0")
        require(end - 1 <= U64, "EOVERFLOW")
        unmapped = 0
        for area in self.overlapping(iova, end):
            require(area.iova >= iova and area.end <= end, "ENOENT: a mapping sticks out")
            self.areas.remove(area)
            unmapped += area.end - area.iova
        require(unmapped or everything, "ENOENT: nothing there")
        return unmapped

    def walk(self, iova: int, length: int, right: int) -> Iterator[tuple[str, int, int]]:
        """What is behind a range: pieces of memory (where, size), the last one with an errno."""
        end = iova + length
        for area in self.overlapping(iova, end):
            if area.iova > iova:
                break
            if not area.flags & right:
                yield "EPERM", 0, 0
                return
            at, size = area.at + iova - area.iova, min(end, area.end) - iova
            good = max(0, (NO_PAGE if right == READABLE else READ_PAGE) - at)
            if good < size:
                yield "EFAULT", at, good
                return
            yield "", at, size
            iova += size
        if iova < end:
            yield "ENOENT", 0, 0


@dataclass(eq=False)
class Context:
    """An iommufd: its objects by id. It lives as long as a fd of it, or a device bound to it."""

    fds: int = 1
    objects: dict[int, Ioas | Access] = field(default_factory=dict)

    def enter(self, thing: Ioas | Access) -> int:
        """Give it the lowest free id."""
        ident = next(ident for ident in range(1, U32) if ident not in self.objects)
        self.objects[ident] = thing
        return ident

    def destroy(self, ident: int) -> None:
        """The id is free again."""
        thing = self.objects.get(ident)
        require(thing is not None, "ENOENT")
        require(not isinstance(thing, Access), "EBUSY: a driver's access")
        require(not isinstance(thing, Ioas) or not thing.accesses, "EBUSY: attached")
        del self.objects[ident]

    def ioas(self, ident: int) -> Ioas:
        """The IOAS of that id."""
        found = self.objects.get(ident)
        if not isinstance(found, Ioas):
            raise Refused("ENOENT: no IOAS of this iommufd")
        return found


class Access:
    """What a driver reaches an IOAS through, with an id as an IOAS has one.

    A device's own wants *whole_pages* (needs_pin_pages), a PASID's takes any byte.
    """

    def __init__(self, context: Context, whole_pages: bool) -> None:
        self.context, self.whole_pages = context, whole_pages
        self.ioas: Ioas | None = None
        self.ident = context.enter(self)

    def attach(self, pt_id: int) -> str:
        """Attach it, or have it move."""
        ioas = self.context.ioas(pt_id)
        if ioas is self.ioas:
            return "0: the same IOAS"
        fits = not self.whole_pages or all(area.whole_pages for area in ioas.areas)
        require(fits, "EADDRINUSE: a mapping is not of whole pages")
        moved = self.ioas is not None
        self.detach()
        self.ioas = ioas
        ioas.accesses.append(self)
        return "0: replaced" if moved else "0: attached"

    def detach(self) -> None:
        """Nothing is reached through it."""
        if self.ioas is not None:
            self.ioas.accesses.remove(self)
        self.ioas = None

    def destroy(self) -> None:
        """Its id is free again."""
        self.detach()
        del self.context.objects[self.ident]
