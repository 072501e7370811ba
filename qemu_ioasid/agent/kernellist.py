"""What the kernel says of PASIDs: pdma's debugfs files, one per device and one for the parent.

drivers/vfio/pdma/debugfs.c. A device's columns: pasid, ioas, inflight, state (OPEN, or otherwise
while a change drains). The parent's: pasid, ioas, users, state.
"""

from __future__ import annotations

from qemu_ioasid.agent.tracing import ensure_mounted

DEBUGFS = "/sys/kernel/debug"
FOLDER = f"{DEBUGFS}/pdma"
OPEN = "open"

TYPE_CHECKING = False
if TYPE_CHECKING:
    Row = dict[str, int | str]


def parse(text: str) -> list[Row]:
    """Rows of a table under a header line, as dicts by column name; numbers become ints.

    Raises ValueError: no header, or a row with another number of columns.
    """
    lines = text.splitlines()
    if not lines:
        raise ValueError("a kernel list without a header")
    header = lines[0].lstrip("# ").split()
    rows: list[Row] = []
    for line in lines[1:]:
        words = line.split()
        if len(words) != len(header):
            raise ValueError(f"{line!r} does not fit the header {lines[0]!r}")
        rows.append(
            {
                name: int(word, 0) if word[0].isdigit() else word
                for name, word in zip(header, words, strict=True)
            }
        )
    return rows


def _read(path: str) -> list[Row]:
    ensure_mounted("debugfs", DEBUGFS)
    with open(path) as file:
        return parse(file.read())


def device_list(uuid: str) -> list[Row]:
    """The PASIDs in one mdev's list. Raises FileNotFoundError: no such mdev."""
    return _read(f"{FOLDER}/{uuid}/pasids")


def parent_table() -> list[Row]:
    """The parent's PASID table. Raises FileNotFoundError: the driver is not there."""
    return _read(f"{FOLDER}/table")
