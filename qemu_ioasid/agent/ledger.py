"""One device's part of the registrar's ledger: its lines, and what is being changed just now."""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from qemu_ioasid.agent.vfio import VfioDevice

    Row = dict[str, int | str | None]

LIVE = "live"


class Change:
    """Lines that the kernel is changing just now. state: "attaching", "replacing", "detaching".

    refused: why the change ends before what was asked for does. struck: the lines that are gone
    when it is settled; the caller says which.
    """

    __slots__ = ("pasids", "refused", "state", "struck")

    def __init__(self, pasids: Collection[int], state: str, refused: OSError | None) -> None:
        self.pasids = pasids
        self.state = state
        self.refused = refused
        self.struck: Sequence[int] = ()


class Book:
    """The lines of one device: PASID to IOAS id. Takes no lock: the registrar's covers it.

    A line is live unless a change under way has it. No two changes have a line in common.
    """

    __slots__ = ("changes", "device", "ioas")

    def __init__(self, device: VfioDevice) -> None:
        self.device = device
        self.ioas: dict[int, int] = {}
        self.changes: list[Change] = []

    def state(self, pasid: int) -> str:
        """LIVE, or that of the change that has the line."""
        for change in self.changes:
            if pasid in change.pasids:
                return change.state
        return LIVE

    def enter(self, pasids: Sequence[int], spaces: Sequence[int]) -> Change:
        """Begins new lines. Refused from the first PASID on that has one: EEXIST."""
        entered: dict[int, int] = {}
        refused = None
        for pasid, ioas in zip(pasids, spaces, strict=True):
            if pasid in self.ioas or pasid in entered:
                what = f"PASID {pasid} is registered on {self.device.name}"
                refused = OSError(errno.EEXIST, what)
                break
            entered[pasid] = ioas
        self.ioas.update(entered)
        return self._begin(Change(entered, "attaching", refused))

    def take(self, pasids: Sequence[int], state: str) -> Change:
        """Begins a change of live lines.

        Refused from the first PASID on that has no line (ENOENT), or whose line is in a change
        (EBUSY).
        """
        taken: set[int] = set()
        refused = None
        for pasid in pasids:
            if pasid not in self.ioas or pasid in taken:
                what = f"PASID {pasid} is not registered on {self.device.name}"
                refused = OSError(errno.ENOENT, what)
                break
            if self.changes and (now := self.state(pasid)) != LIVE:
                refused = OSError(errno.EBUSY, f"PASID {pasid} on {self.device.name} is {now}")
                break
            taken.add(pasid)
        return self._begin(Change(taken, state, refused))

    def _begin(self, change: Change) -> Change:
        self.changes.append(change)
        return change

    def settle(self, change: Change) -> None:
        """Ends a change."""
        self.changes.remove(change)
        for pasid in change.struck:
            del self.ioas[pasid]

    def rows(self) -> list[Row]:
        """The lines as the operations report them."""
        iommufd = self.device.iommufd.name if self.device.iommufd else None
        return [
            {
                "device": self.device.name,
                "pasid": pasid,
                "ioas": ioas,
                "iommufd": iommufd,
                "state": self.state(pasid),
            }
            for pasid, ioas in self.ioas.items()
        ]
