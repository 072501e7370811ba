# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario ``model-guests``: random steps of the registrar and of guests, as the rules say.

What scenario ``model`` does at length with devices that the host side opens, this does with real
guests and all witnesses: each step is told to the model first, and then has to come true.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import CallFailed
from qemu_ioasid.model.engine import COMPARE, COPY, FILL
from qemu_ioasid.model.engine import PASID as NAMED
from qemu_ioasid.model.iommufd import (
    FIXED,
    MEMORY,
    PAGE,
    READABLE,
    WRITEABLE,
    Access,
    Context,
    Ioas,
)
from qemu_ioasid.model.rules import Answer, File, Model
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.scenarios import acts
from qemu_ioasid.scenarios.acts import SLOT
from qemu_ioasid.scenarios.checks import Trial
from qemu_ioasid.scenarios.stage import Stage
from qemu_ioasid.scenarios.table import Row, Table

STEPS = 60
IOVA = 0x10000
#: Slots of each guest's arena that are bound here; the model's memory holds those of both.
SLOTS = MEMORY // SLOT // 2

TABLE = Table()
_MODEL = TABLE.phase("random steps")


class _Numbered(Context):
    """A guest's iommufd: ids are the kernel's, but for those that nobody is told."""

    def enter(self, thing: Ioas | Access) -> int:
        ident = max([1 << 20, *self.objects]) + 1
        self.objects[ident] = thing
        return ident


def rows(config: RigConfig) -> list[Row]:
    """The checks; raises as `acts.parts`."""
    return TABLE.rows(config, acts.parts(config, "model-guests"))


def run(
    rig: Rig, report: Report, rows: Sequence[Row], steps: int = STEPS, seed: int | None = None
) -> None:
    """Make *steps* random steps from *seed*."""
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    report.say(f"seed {chosen}")
    ModelGuests(rig, report, steps, chosen).run(rows)


class ModelGuests(Stage):
    """The scenario on a rig."""

    def __init__(self, rig: Rig, report: Report, steps: int, seed: int) -> None:
        super().__init__(rig, report)
        self._steps, self._seed = steps, seed
        self._random = random.Random(seed)
        self._guests = list(rig.guests.values())[:2]
        self._told: list[str] = []

    def _prepared(self) -> None:
        """A model of the rig as it is, and PASIDs that both sides try."""
        memory = b""
        for guest in self._guests:
            length = SLOTS * SLOT
            memory += bytes.fromhex(guest.agent.call("read", offset=SLOT, length=length)["hex"])
        self._model = Model(memory, tuple(self.owner), 1 << 20)
        self._contexts = {guest.name: _Numbered() for guest in self._guests}
        for device, guest in self.owner.items():
            file = File(device, own=Access(self._contexts[guest.name], whole_pages=True))
            self._model.slots[device] = file
        self._pasids = [self.registrar.alloc("model") for _ in range(3)]

    @_MODEL("model-guests", "random registrations and work, each as the rules say")
    def _random_steps(self, trial: Trial) -> None:
        self._prepared()
        kinds: list[Callable[[Trial], None]] = [
            *[self._submit] * 6,
            *[self._register] * 4,
            *[self._space] * 2,
            *[self._unregister, self._replace],
        ]
        for guest in self._guests:
            self._map(guest.name)
        for _ in range(self._steps):
            self._random.choice(kinds)(trial)
            self._lists(trial)
        trial.answer(f"{self._steps} steps, seed {self._seed}")
        audit = self.registrar.audit()
        trial.require(audit["agrees"], f"ledger and kernel differ: {audit}")

    # --- steps ----------------------------------------------------------------------------

    def _space(self, trial: Trial) -> None:
        self._map(self._random.choice(self._guests).name)

    def _map(self, name: str) -> None:
        """A new IOAS of a guest, which maps a slot of its arena, or a page less."""
        number = [guest.name for guest in self._guests].index(name)
        guest, slot = self._guests[number], self._random.randrange(SLOTS)
        length = self._random.choice((SLOT, SLOT - PAGE))
        ioas = self.registrar.ioas(name)
        self.registrar.map(name, ioas, IOVA, guest.gpa + (slot + 1) * SLOT, length)
        space = Ioas()
        space.map(IOVA, length, (number * SLOTS + slot) * SLOT, FIXED | READABLE | WRITEABLE)
        self._contexts[name].objects[ioas] = space
        self._told.append(f"IOAS {ioas} of {name}")

    def _named(self) -> tuple[str, int, int]:
        """A device, a PASID and an IOAS id, which mostly is one of its guest's."""
        device = self._random.choice(list(self.owner))
        contexts = [self._contexts[self.owner[device].name]] * 3 + list(self._contexts.values())
        objects = self._random.choice(contexts).objects
        spaces = [ident for ident, thing in objects.items() if isinstance(thing, Ioas)]
        return device, self._random.choice(self._pasids), self._random.choice(spaces)

    def _register(self, trial: Trial) -> None:
        device, pasid, ioas = self._named()
        known = pasid in self._file(device).pasids
        must = self._model.step("attach_pasid", {"fd": device, "pasid": pasid, "pt_id": ioas})
        if known:
            must = Answer("EEXIST")
        owner = self.owner[device].name
        self._call(
            trial, f"register {device} PASID {pasid} IOAS {ioas}", must,
            lambda: self.registrar.register(device, owner, pasid, ioas),
        )  # fmt: skip

    def _replace(self, trial: Trial) -> None:
        device, pasid, ioas = self._named()
        must = Answer("ENOENT")
        if pasid in self._file(device).pasids:
            must = self._model.step("attach_pasid", {"fd": device, "pasid": pasid, "pt_id": ioas})
        self._call(
            trial, f"replace {device} PASID {pasid} IOAS {ioas}", must,
            lambda: self.registrar.replace(device, pasid, ioas),
        )  # fmt: skip

    def _unregister(self, trial: Trial) -> None:
        device, pasid, _ = self._named()
        must = Answer("ENOENT")
        if pasid in self._file(device).pasids:
            must = self._model.step("detach_pasid", {"fd": device, "pasid": pasid})
        self._call(
            trial, f"unregister {device} PASID {pasid}", must,
            lambda: self.registrar.unregister(device, pasid),
        )  # fmt: skip

    def _submit(self, trial: Trial) -> None:
        device, pasid, _ = self._named()
        listed = [(each, may) for each in self.owner for may in self._file(each).pasids]
        if listed and self._random.random() < 0.6:
            device, pasid = self._random.choice(listed)
        choose, opcode = self._random.choice, self._random.choice((COPY, COPY, FILL, COMPARE))
        length = choose((5, 200, PAGE + 3))
        offsets = (0, 5, SLOT // 2, SLOT - PAGE - 200, SLOT - 100)
        src, dst = IOVA + choose(offsets), IOVA + choose(offsets)
        work = {"opcode": opcode, "pasid": pasid, "length": length, "src": src, "dst": dst}
        must = self._model.step("submit", {"fd": device, "flags": NAMED, **work})
        self._told.append(f"{device}: {work}: {must.outcome}")
        status = str(must.values[1])
        with self.witnesses.around(trial, **self._seen(status, work)):
            done = self.submit(trial, self.owner[device], device, work, status)
            found = tuple(done[name] for name in ("addr", "done"))
            trial.require(found == must.values[4:6], f"{self._where()}: {done}, not {must.values}")

    def _seen(self, status: str, work: dict[str, int]) -> dict[str, Any]:
        """What `Witnesses.around` must be told of it: the pages that the model has changed."""
        pages = self._model.memory.changed()
        spans: dict[str, Any] = {}
        if status in ("DONE", "FAULT", "DIFFERENT"):
            low, high = min(work["src"], work["dst"]), max(work["src"], work["dst"])
            if work["opcode"] == COPY:
                spans["reads"] = work["src"], work["length"]
            if work["opcode"] == COMPARE:
                spans["reads"] = low, high + work["length"] - low
            else:
                spans["writes"] = work["dst"], work["length"]
        if pages:
            number, offset = divmod(min(pages) * PAGE, SLOTS * SLOT)
            data = b"".join(pages[page] for page in sorted(pages))
            spans["target"] = self._guests[number].name
            if status == "DONE":
                spans["expect"] = {"offset": offset + SLOT, "hex": data.hex(), "length": len(data)}
            else:
                spans["within"] = offset + SLOT, len(data)
        return spans

    # --- what comes of them ---------------------------------------------------------------

    def _file(self, device: str) -> File:
        found = self._model.slots[device]
        assert isinstance(found, File)
        return found

    def _where(self) -> str:
        return f"step {len(self._told)} of seed {self._seed}, {self._told[-1]}"

    def _call(self, trial: Trial, what: str, must: Answer, call: Callable[[], None]) -> None:
        self._told.append(what)
        wanted, found = must.outcome.split(":")[0], "0"
        try:
            call()
        except CallFailed as error:
            found = error.name
        trial.require(found == wanted, f"{self._where()}: {found}, not {must.outcome}")

    def _lists(self, trial: Trial) -> None:
        must = self._model.kernel()
        seen: dict[str, Any] = {
            device: set(self.registrar.kernel_list(device)) for device in self.owner
        }
        seen["table"] = set(self.registrar.kernel_table())
        for name, found in seen.items():
            trial.require(found == set(must[name]), f"{self._where()}: {name} has {found}")
