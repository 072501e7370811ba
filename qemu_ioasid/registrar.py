# SPDX-License-Identifier: GPL-2.0-or-later
"""The host-side module's registrar, as the orchestrator sees it.

Each method is one operation of the agent in the host VM, which holds the fds;
what the kernel refuses arrives as `CallFailed` with its errno.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qemu_ioasid.client import CALL_SECONDS, Agent, Pending
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import BatchFailed

#: What a batch may take beside `CALL_SECONDS`, for each of its items.
ITEM_SECONDS = 0.002


class Registrar:
    """PASIDs, IOASes and the lists of devices, by the names of guests and mdevs."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def alloc(self, owner: str) -> int:
        """A PASID nobody holds, from the parent's one space."""
        return int(self._agent.call("pasid_alloc", owner=owner)["pasid"])

    def free(self, pasid: int) -> None:
        """Give a PASID back; EBUSY while a device has it in the ledger."""
        self._agent.call("pasid_free", pasid=pasid)

    def owner(self, pasid: int) -> str:
        """Who *pasid* was given to; "" when it is nobody's."""
        rows = self._agent.call("pasids")
        return next((str(row["owner"]) for row in rows if row["pasid"] == pasid), "")

    def ioas(self, iommufd: str) -> int:
        """A new, empty address space of guest *iommufd*'s iommufd."""
        return int(self._agent.call("ioas_alloc", iommufd=iommufd)["ioas"])

    def destroy(self, iommufd: str, ioas: int) -> None:
        """Destroy an address space; EBUSY while something is attached to it."""
        self._agent.call("ioas_destroy", iommufd=iommufd, ioas=ioas)

    def map(self, guest: str, ioas: int, iova: int, gpa: int, length: int) -> None:
        """Map *length* bytes of *guest*'s memory at *gpa* to *iova*, read and write."""
        self._agent.call(
            "ioas_map_guest", iommufd=guest, ioas=ioas, iova=iova, gpa=gpa, length=length
        )

    def alloc_many(self, owner: str, count: int) -> list[range]:
        """As many PASIDs, or none (ENOSPC); one range, unless they had to be sought."""
        answer = self._batch("pasid_alloc_many", count, owner=owner, count=count)
        return [range(first, first + size) for first, size in answer["pasids"]]

    def free_many(self, pasids: Sequence[range]) -> None:
        """Give PASIDs back. Raises BatchFailed; what was freed before stays free."""
        self._batch("pasid_free_many", _count(pasids), pasids=_pairs(pasids))

    def ioas_many(self, iommufd: str, count: int) -> list[int]:
        """As many new, empty address spaces, or none."""
        answer = self._batch("ioas_alloc_many", count, iommufd=iommufd, count=count)
        return [int(ioas) for ioas in answer["ioas"]]

    def destroy_many(self, iommufd: str, ioas: Sequence[int]) -> None:
        """Destroy address spaces. Raises BatchFailed; what was destroyed before is gone."""
        self._batch("ioas_destroy_many", len(ioas), iommufd=iommufd, ioas=list(ioas))

    def register_many(
        self, device: str, iommufd: str, pasids: Sequence[range], ioas: Sequence[int]
    ) -> float:
        """Enter *pasids* in *device*'s list, each naming the next of *ioas*, which go round.

        Returns the seconds that it took in the host VM. Raises BatchFailed;
        what was registered before stays, and is in the ledger. One ioctl each,
        as in `register`: a thousand or so on one IOAS take milliseconds each.
        """
        args = {"device": device, "iommufd": iommufd, "ioas": list(ioas)}
        answer = self._batch("register_many", _count(pasids), pasids=_pairs(pasids), **args)
        return float(answer["seconds"])

    def unregister_many(self, device: str, pasids: Sequence[range]) -> float:
        """Take *pasids* out of *device*'s list; returns and raises as `register_many`."""
        answer = self._batch(
            "unregister_many", _count(pasids), device=device, pasids=_pairs(pasids)
        )
        return float(answer["seconds"])

    def _batch(self, op: str, count: int, /, **args: Any) -> dict[str, Any]:
        what = f"answer of {self._agent.name} to {op} of {count}"
        deadline = Deadline(CALL_SECONDS + count * ITEM_SECONDS, what)
        answer: dict[str, Any] = self._agent.call(op, deadline=deadline, **args)
        failed = answer.get("failed")
        if failed is not None:
            raise BatchFailed(
                f"{self._agent.name}: {op}: item {failed['index']} of {count} "
                f"({failed['number']}): {failed['message']}",
                failed["errno"],
                done=answer["done"],
            )
        return answer

    def register(self, device: str, iommufd: str, pasid: int, ioas: int) -> None:
        """Enter *pasid* in *device*'s list, naming an IOAS of the iommufd it is bound to."""
        self._agent.call("register", device=device, iommufd=iommufd, pasid=pasid, ioas=ioas)

    def replace(self, device: str, pasid: int, ioas: int) -> None:
        """Have a registered *pasid* name another IOAS; on failure the old one stays."""
        self._agent.call("replace", device=device, pasid=pasid, ioas=ioas)

    def unregister(self, device: str, pasid: int) -> None:
        """Take *pasid* out of *device*'s list; nothing in flight is left when it returns."""
        self._agent.call("unregister", device=device, pasid=pasid)

    def unregister_start(self, device: str, pasid: int) -> Pending:
        """As `unregister`, without waiting for it."""
        return self._agent.start("unregister", device=device, pasid=pasid)

    def raw_attach(self, device: str, pasid: int | None, ioas: int) -> None:
        """The bare ioctl on *device*'s fd, past every check of ours: for attacks.

        Without a PASID it is the device's own address space.
        """
        self._agent.call("raw_attach", device=device, pasid=pasid, ioas=ioas)

    def audit(self) -> dict[str, Any]:
        """The ledger against the kernel's own lists; ``agrees`` says whether they are the same."""
        answer: dict[str, Any] = self._agent.call("audit")
        return answer

    def kernel_list(self, device: str) -> list[int]:
        """The PASIDs in *device*'s list, as the kernel shows it."""
        return [int(row["pasid"]) for row in self._agent.call("kernel_list", device=device)]

    def kernel_table(self) -> list[int]:
        """The PASIDs in the parent's table, as the kernel shows it."""
        return [int(row["pasid"]) for row in self._agent.call("kernel_table")]


def _count(pasids: Sequence[range]) -> int:
    return sum(map(len, pasids))


def _pairs(pasids: Sequence[range]) -> list[tuple[int, int]]:
    return [(each.start, len(each)) for each in pasids]
