"""What changed in a piece of memory since the last look: one witness's eyes."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Iterator, Mapping

PAGE = 4096
SHOWN = 64
JOIN = 16

_DIFFERS = bytes([0]) + bytes([1]) * 255


def differing(old: bytes, new: bytes, base: int, ranges: list[tuple[int, int]]) -> None:
    """Appends the ranges (offset, length) in which two byte strings at base differ.

    Ranges less than JOIN bytes apart are one range: a byte that was written may happen to equal the
    one it replaced. The outer ends are exact.
    """
    number = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
    marks = number.to_bytes(len(old), "little").translate(_DIFFERS)
    start = marks.find(1)
    while start >= 0:
        end = marks.find(0, start)
        end = len(marks) if end < 0 else end
        first, last = base + start, base + end
        if ranges and first - sum(ranges[-1]) < JOIN:
            first = ranges.pop()[0]
        ranges.append((first, last - first))
        start = marks.find(1, end)


def _described(
    ranges: Iterable[tuple[int, int]], pages: Mapping[int, bytes]
) -> list[dict[str, int | str]]:
    """Ranges with the bytes that pages have there, the first SHOWN of them in hex."""
    answer: list[dict[str, int | str]] = []
    for offset, length in ranges:
        first, end = offset // PAGE * PAGE, offset + min(length, SHOWN)
        held = b"".join([pages[page] for page in range(first, end, PAGE)])
        shown = held[offset - first : end - first].hex()
        answer.append({"offset": offset, "length": length, "hex": shown})
    return answer


class Watch:
    """A snapshot of memory[offset:offset + length] to compare with; takes it when made.

    Memory is compared in place, and copied into what is there: under nested TCG, faulting in the
    pages of a copy takes longer than comparing them. Raises ValueError when the range leaves the
    memory.
    """

    def __init__(self, memory: mmap.mmap, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset + length > len(memory):
            raise ValueError(f"{offset:#x}+{length:#x} is outside {len(memory):#x} bytes of memory")
        self.range = memory, offset, length
        self._snapshot = bytearray(length)
        self.take()

    def take(self) -> None:
        """The memory as it is becomes the snapshot."""
        memory, offset, length = self.range
        with (
            memoryview(memory) as whole,
            whole[offset : offset + length] as now,
            memoryview(self._snapshot) as snapshot,
        ):
            snapshot[:] = now

    def first(self, length: int) -> bytes:
        """The first bytes of the snapshot."""
        return bytes(self._snapshot[:length])

    def _changed_pages(self) -> Iterator[int]:
        from qemu_ioasid.agent.libc import same_bytes

        memory, offset, length = self.range
        parts = [(0, length)]
        while parts:
            start, size = parts.pop()
            if same_bytes(memory, offset + start, self._snapshot, start, size):
                continue
            if size <= PAGE:
                yield start
                continue
            half = -(-size // (2 * PAGE)) * PAGE
            parts += [(start + half, size - half), (start, half)]

    def changes(
        self, expect: Iterable[Mapping[str, int | str]] = ()
    ) -> dict[str, list[dict[str, int | str]]]:
        """{"changed": ranges that differ from the snapshot, "unexpected": from the expectation}.

        The expectation is the snapshot with each of expect laid over it, in order: {"offset",
        "hex"}, or {"offset", "length", "source"}: bytes copied from offset source of the snapshot.
        The memory as seen becomes the snapshot. Raises ValueError for an expectation outside the
        range; then the snapshot stays.
        """
        memory, offset, length = self.range
        expected = self._expected(expect)
        seen: dict[int, bytes] = {}
        changed: list[tuple[int, int]] = []
        unexpected: list[tuple[int, int]] = []
        for page in sorted({*expected, *self._changed_pages()}):
            end = min(page + PAGE, length)
            now = seen[page] = memory[offset + page : offset + end]
            before = bytes(self._snapshot[page:end])
            differing(before, now, page, changed)
            differing(bytes(expected.get(page, before)), now, page, unexpected)
            self._snapshot[page:end] = now
        return {
            "changed": _described(changed, seen),
            "unexpected": _described(unexpected, seen),
        }

    def _expected(self, expect: Iterable[Mapping[str, int | str]]) -> dict[int, bytearray]:
        """The pages that expect is about, as they must be."""
        pages: dict[int, bytearray] = {}
        for item in expect:
            at = int(item["offset"])
            if "hex" in item:
                data = bytes.fromhex(str(item["hex"]))
            else:
                source, size = int(item["source"]), int(item["length"])
                data = bytes(self._snapshot[source : source + size])
                if source < 0 or len(data) != size:
                    raise ValueError(f"the source of {item} is outside the watched range")
            if at < 0 or at + len(data) > len(self._snapshot):
                raise ValueError(f"{item} is outside the watched range")
            for page in range(at // PAGE * PAGE, at + len(data), PAGE):
                wanted = pages.setdefault(page, self._snapshot[page : page + PAGE])
                start, end = max(at, page), min(at + len(data), page + PAGE)
                wanted[start - page : end - page] = data[start - at : end - at]
        return pages
