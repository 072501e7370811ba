# SPDX-License-Identifier: GPL-2.0-or-later
"""Two witnesses for every claim about memory, and the kernel's own word on top.

Before an act each guest has written a fresh nonce into its arena, and the host
side has found it in the guest's RAM file: both mean the same bytes. After it,
both compare every arena of every guest with what it was. A refused read leaves no
trace in memory, so a kprobe on ``iommufd_access_rw`` tells whether any DMA was
made at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from qemu_ioasid.client import Call, Pending
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import InfrastructureError
from qemu_ioasid.rig import Guest, Rig
from qemu_ioasid.scenarios.checks import Broken, Trial

#: Bytes of the nonce at the start of each arena.
NONCE = 16
#: An access of the kernel: iova, length, write (docs/agent.md, trace_read).
Access = dict[str, Any]
#: What each view of an arena shows: changed, unexpected.
Views = dict[str, Any]
#: An address, of whatever kind, and a length.
Span = tuple[int, int]

#: What a change may be: *length* bytes at *offset* of the arena, copied from *source* of it.
Expected = dict[str, Any]


def moved(offset: int, length: int, source: int) -> Expected:
    """The change a copy within one arena makes, by offsets in it."""
    return {"offset": offset, "length": length, "source": source}


class Witnesses:
    """Watches all arenas of a rig around one act at a time."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._host = rig.host.agent
        self._gone: set[str] = set()
        #: What each guest has written last, to be found at the start of its arena.
        self._nonces: dict[str, str] = {}

    def gone(self, guest: str) -> None:
        """*guest* has died: the host side alone goes on watching its memory."""
        self._gone.add(guest)

    def stale(self) -> None:
        """An arena is written to, or will be, and not by an act: look anew before the next one."""
        self._nonces.clear()

    def _alive(self) -> list[Guest]:
        return [guest for guest in self._rig.guests.values() if guest.name not in self._gone]

    @contextlib.contextmanager
    def around(
        self,
        trial: Trial,
        *,
        target: str | None = None,
        expect: Expected | None = None,
        within: Span | None = None,
        reads: Span | None = None,
        writes: Span | None = None,
    ) -> Iterator[None]:
        """Watch while the block acts, then require what must be.

        In guest *target*: exactly *expect*, or anything *within* (offset, length).
        Everywhere else, and without a target: nothing. The kernel's accesses
        stay in *reads* and *writes*; with *expect* they cover them, byte for
        byte; without a span there are none. The witnesses are heard even when
        the block itself finds something wrong. What they see after one act they
        compare with after the next, unless the arenas are `stale`, so nothing
        happens unseen in between either.
        """
        if not self._nonces:
            self._before()
        earlier = len(trial.attempts)
        wrong: list[str] = []
        try:
            yield
        except Broken as broken:
            wrong.append(str(broken))
        except BaseException:
            self.stale()
            raise
        views, made = self._look(target, expect)
        leaks = _strays(views, target, within)
        wrong += _unmoved(views, target, expect)
        for name, write, span in (("read", False, reads), ("write", True, writes)):
            ours = [each for each in made if each["write"] == write]
            leaks += _outside(name, ours, span)
            if span is not None and expect is not None:
                wrong += _short(name, ours, span)
        wrong += [f"LEAK: {leak}" for leak in leaks]
        if wrong:
            made_here = trial.attempts[earlier:]
            # One that ended as it must is not to blame where another did not.
            astray = [each for each in made_here if each.outcome in ("wrong", "unanswered")]
            for attempt in astray or made_here:
                attempt.outcome = "leaked" if leaks else "wrong"
            raise Broken("; ".join(wrong))
        trial.saw(self._told(views, made, target, expect, within))

    def _all(self, pending: dict[str, Pending], what: str) -> dict[str, Any]:
        deadline = Deadline(30, what)
        return {name: each.result(deadline) for name, each in pending.items()}

    def _before(self) -> None:
        inside = self._all(
            {guest.name: guest.agent.start("watch") for guest in self._alive()},
            "snapshots in the guests",
        )
        guests = list(self._rig.guests.values())
        watches: list[Call] = [
            ("watch", {"guest": guest.name, "gpa": guest.gpa, "length": guest.size})
            for guest in guests
        ]
        deadline = Deadline(30, "snapshots of the RAM files")
        answers = self._host.several(*watches, ("trace_clear", {}), deadline=deadline)
        nonces = dict(zip(self._rig.guests, answers, strict=False))
        for name, snapshot in inside.items():
            if nonces[name]["nonce"] != snapshot["nonce"]:
                raise InfrastructureError(
                    f"{name}: its nonce is not in its RAM file: the witnesses mean different bytes"
                )
        self._nonces = {name: taken["nonce"] for name, taken in nonces.items()}

    def _look(self, target: str | None, expect: Expected | None) -> tuple[Views, list[Access]]:
        """What each guest sees, then a fresh nonce of each, then what the host side sees."""

        def expected(name: str) -> list[Expected]:
            nonce = {"offset": 0, "hex": self._nonces[name]}
            return [nonce, expect] if expect is not None and name == target else [nonce]

        inside = self._all(
            {
                guest.name: guest.agent.start_several(
                    ("changes", {"expect": expected(guest.name)}), ("nonce", {})
                )
                for guest in self._alive()
            },
            "comparison of the arenas, inside",
        )
        views = {}
        for name, (seen, nonce) in inside.items():
            views[f"{name} from inside"] = seen
            self._nonces[name] = nonce["hex"]
        comparisons: list[Call] = [
            ("changes", {"guest": name, "expect": expected(name)}) for name in self._rig.guests
        ]
        *seen_outside, made = self._host.several(
            *comparisons,
            ("trace_take", {}),
            deadline=Deadline(30, "comparison of the arenas"),
        )
        outside = dict(zip(self._rig.guests, seen_outside, strict=True))
        if any(each["offset"] < NONCE for seen in outside.values() for each in seen["unexpected"]):
            # Either work has hit it, which is a leak, or they mean different bytes, which raises.
            self._before()
        return {f"{name} from the host": seen for name, seen in outside.items()} | views, made

    def _told(
        self,
        views: Views,
        made: list[Access],
        target: str | None,
        expect: Expected | None,
        within: Span | None,
    ) -> str:
        count = f"{len(made)} kernel accesses" if made else "no kernel access"
        arenas = f"{len(views)} views of {len(self._rig.guests)} arenas"
        if expect is not None:
            return f"{arenas}: exactly {expect['length']} bytes in {target}; {count}"
        if within is not None:
            return f"{arenas}: nothing outside the range in {target}; {count}"
        return f"{arenas}: unchanged; {count}"


def _strays(views: Views, target: str | None, within: Span | None) -> list[str]:
    """What changed and must not have."""
    leaks = []
    for name, seen in views.items():
        mine = name.split()[0] == target
        stray = [
            each
            for each in seen["unexpected"]
            if not (mine and within is not None and _inside(each, within))
        ]
        if stray:
            leaks.append(f"{name}: {', '.join(map(_range, stray))} changed and must not have")
    return leaks


def _unmoved(views: Views, target: str | None, expect: Expected | None) -> list[str]:
    """What must have changed and has not."""
    return [
        f"{name}: nothing changed where bytes must have moved"
        for name, seen in views.items()
        if name.split()[0] == target
        and expect is not None
        and not any(each["offset"] >= NONCE for each in seen["changed"])
    ]


def _outside(name: str, made: list[Access], span: Span | None) -> list[str]:
    """The accesses *made* that do not lie in *span*."""
    if span is None:
        return [f"the kernel made a {name} of {each['length']} bytes" for each in made]
    start, length = span
    return [
        f"the kernel made a {name} of {each['length']} bytes at {each['iova']:#x}"
        for each in made
        if not (start <= each["iova"] and each["iova"] + each["length"] <= start + length)
    ]


def _short(name: str, made: list[Access], span: Span) -> list[str]:
    """What is wrong when the accesses *made* are not of as many bytes as *span*."""
    total = sum(each["length"] for each in made)
    return [] if total == span[1] else [f"the kernel's {name}s are of {total} bytes, not {span[1]}"]


def _inside(change: dict[str, Any], within: Span) -> bool:
    offset, length = within
    start, end = int(change["offset"]), int(change["offset"]) + int(change["length"])
    return offset <= start and end <= offset + length


def _range(change: dict[str, Any]) -> str:
    return f"{change['length']} bytes at +{change['offset']:#x}"
