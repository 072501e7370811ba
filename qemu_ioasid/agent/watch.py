"""What changed in a piece of memory since the last look: one witness's eyes."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Mapping

PAGE = 4096
SHOWN = 64
JOIN = 16

_DIFFERS = bytes([0]) + bytes([1]) * 255


def digest(data: bytes) -> str:
    """blake2b of the data, 16 bytes, in hex."""
    import hashlib

    return hashlib.blake2b(data, digest_size=16).hexdigest()


def differing(old: bytes, new: bytes) -> list[tuple[int, int]]:
    """The ranges (offset, length) in which two equally long byte strings differ.

    Ranges less than JOIN bytes apart are one range: a byte that was written may happen to equal the
    one it replaced. The outer ends are exact.
    """
    if old == new:
        return []
    ranges: list[tuple[int, int]] = []
    for page in range(0, len(old), PAGE):
        before, after = old[page : page + PAGE], new[page : page + PAGE]
        if before == after:
            continue
        number = int.from_bytes(before, "little") ^ int.from_bytes(after, "little")
        marks = number.to_bytes(len(before), "little").translate(_DIFFERS)
        start = marks.find(1)
        while start >= 0:
            end = marks.find(0, start)
            end = len(marks) if end < 0 else end
            _append(ranges, page + start, page + end)
            start = marks.find(1, end)
    return ranges


def _append(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    if ranges and start - sum(ranges[-1]) < JOIN:
        start = ranges.pop()[0]
    ranges.append((start, end - start))


def described(ranges: Iterable[tuple[int, int]], data: bytes) -> list[dict[str, int | str]]:
    """Ranges with the bytes that data has there (the first SHOWN in hex) and their digest."""
    answer: list[dict[str, int | str]] = []
    for offset, length in ranges:
        part = data[offset : offset + length]
        answer.append(
            {
                "offset": offset,
                "length": length,
                "hex": part[:SHOWN].hex(),
                "blake2b": digest(part),
            }
        )
    return answer


class Watch:
    """A snapshot of memory[offset:offset + length] to compare with; takes it when made.

    Raises ValueError when the range leaves the memory.
    """

    def __init__(self, memory: mmap.mmap, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset + length > len(memory):
            raise ValueError(f"{offset:#x}+{length:#x} is outside {len(memory):#x} bytes of memory")
        self._memory = memory
        self._offset = offset
        self._length = length
        self.snapshot = self.now()

    def now(self) -> bytes:
        """The memory as it is."""
        return self._memory[self._offset : self._offset + self._length]

    def _unchanged(self) -> bool:
        # In place: under TCG, faulting in the pages of a copy takes longer than comparing them.
        from qemu_ioasid.agent.libc import same_bytes

        return same_bytes(self._memory, self._offset, self.snapshot)

    def changes(
        self, expect: Iterable[Mapping[str, int | str]] = (), update: bool = True
    ) -> dict[str, list[dict[str, int | str]]]:
        """{"changed": ranges that differ from the snapshot, "unexpected": from the expectation}.

        The expectation is the snapshot with each of expect laid over it, in order: {"offset",
        "hex"}, or {"offset", "length", "source"}: bytes copied from offset source of the snapshot.
        update: the memory as seen becomes the snapshot. Raises ValueError for an expectation
        outside the range; then the snapshot stays.
        """
        expect = tuple(expect)
        if not expect and self._unchanged():
            return {"changed": [], "unexpected": []}
        expected = bytearray(self.snapshot)
        for item in expect:
            offset = int(item["offset"])
            if "hex" in item:
                data = bytes.fromhex(str(item["hex"]))
            else:
                source = int(item["source"])
                data = self.snapshot[source : source + int(item["length"])]
                if len(data) != int(item["length"]):
                    raise ValueError(f"the source of {item} is outside the watched range")
            if offset < 0 or offset + len(data) > self._length:
                raise ValueError(f"{item} is outside the watched range")
            expected[offset : offset + len(data)] = data
        now = self.now()
        answer = {
            "changed": described(differing(self.snapshot, now), now),
            "unexpected": described(differing(bytes(expected), now), now),
        }
        if update:
            self.snapshot = now
        return answer
