"""The guest role: the arena, the devices this guest was given, the work. JSON in, JSON out."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

from qemu_ioasid.agent.arena import SIZE, Arena
from qemu_ioasid.agent.common import Common, with_several
from qemu_ioasid.agent.hello import machine
from qemu_ioasid.agent.iommufd import IOMMU
from qemu_ioasid.agent.opendevice import OwnDevices
from qemu_ioasid.agent.pci import DRIVER, eject, give_to_vfio, switch_off, wait_for_driver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from qemu_ioasid.agent.watch import Watch

    Json = dict[str, Any]

BIND_BASE = 1 << 32
EJECT_SECONDS = 30.0

# fmt: off
OPERATIONS = (
    "hello", "arena", "nonce", "fill", "write", "read", "watch", "changes",
    "device_open", "device_close", "device_eject", "ioas_map", "ioas_unmap", "bind_request",
    "bound", "unbound", "bindings", "reset",
)
# fmt: on


class Guest:
    """What runs in a guest. The methods named in OPERATIONS are the protocol's.

    A guest registers nothing: bind_request says what it wants, the orchestrator carries that to the
    registrar, and bound tells the guest what it was given.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = OwnDevices()
        self._arena: Arena | None = None
        self._watch: Watch | None = None
        self._bindings: dict[tuple[str, int], Json] = {}
        self._common = Common()
        self.operations: Mapping[str, Callable[..., Any]] = {
            **{name: getattr(self, name) for name in OPERATIONS},
            **self._common.operations,
            **self._own.operations,
            "submit": self._own.submit,
            "submit_start": self._own.submit_start,
            "submit_wait": self._own.submit_wait,
            "submit_rewrite": self._own.submit_rewrite,
            "device_doorbell": self._own.doorbell,
            "device_reset": self._own.reset,
            "device_registers": self._own.registers,
            "device_touch": self._own.touch,
            "device_resume": self._own.resume,
        }
        self.operations = with_several(self.operations)

    def close(self) -> None:
        """Closes the devices and frees the arena."""
        with ExitStack() as stack:
            if self._arena:
                stack.callback(self._arena.close)
            stack.callback(self._own.close)
            stack.callback(self._common.close)

    def hello(self) -> Json:
        """The machine, and the features the agent needs of its kernel."""
        kernel = {
            "iommu": os.path.exists(IOMMU),
            "vfio_pci": os.path.exists(f"/sys/bus/pci/drivers/{DRIVER}"),
            "hugetlb": os.path.exists("/sys/kernel/mm/hugepages/hugepages-2048kB"),
        }
        return machine("guest", kernel)

    # --- the arena ----------------------------------------------------------------------

    def _memory(self) -> Arena:
        with self._lock:
            if self._arena is None:
                self._arena = Arena()
            return self._arena

    def arena(self) -> Json:
        """Where the arena is in guest-physical memory; the first call allocates it."""
        # A rig that is restored has what is needed to watch it, too.
        self._watched()
        return {"gpa": self._memory().gpa, "size": SIZE}

    def nonce(self) -> Json:
        """Fresh random bytes at offset 0."""
        return {"hex": self._memory().nonce().hex()}

    def fill(self) -> None:
        """Random bytes all over the arena: none equals what a copy may put in its place."""
        self._memory().write(0, os.urandom(SIZE))

    def write(self, offset: int, hex: str) -> None:
        """Writes bytes to the arena."""
        self._memory().write(offset, bytes.fromhex(hex))

    def read(self, offset: int, length: int) -> Json:
        """Bytes of the arena."""
        return {"hex": self._memory().read(offset, length).hex()}

    def _watched(self) -> Watch:
        from qemu_ioasid.agent.watch import Watch

        memory = self._memory().memory
        with self._lock:
            if self._watch is None:
                self._watch = Watch(memory, 0, SIZE)
            return self._watch

    def watch(self) -> Json:
        """Writes a fresh nonce and takes a snapshot of the arena."""
        nonce = self._memory().nonce()
        self._watched().take()
        return {"nonce": nonce.hex()}

    def changes(self, expect: list[Json] | None = None) -> Json:
        """What changed in the arena since the last snapshot, or since it was allocated."""
        return self._watched().changes(expect or ())

    # --- devices, and work without a PASID ----------------------------------------------

    def device_open(self, name: str, bdf: str, seconds: float = 0) -> Json:
        """Takes a PCI function for this agent and opens it; one that comes within seconds."""
        if seconds:
            wait_for_driver(bdf, seconds)
        opened = self._own.open(name, give_to_vfio(bdf), f"agent:{name}")
        registers = opened.ring.registers()
        return {"name": name, "bdf": bdf, "ioas": opened.ioas, "registers": registers}

    def device_close(self, name: str) -> None:
        """Closes a device; its mappings are gone."""
        self._own.close_one(name)

    def device_eject(self, name: str, bdf: str, seconds: float = EJECT_SECONDS) -> None:
        """Turns a function's slot off, and lets go of the device when the kernel asks for it."""
        if name not in [opened.device.name for opened in self._own.all()]:
            switch_off(bdf)
            return
        device = self._own.get(name).device
        eject(bdf, device, lambda: self._own.close_one(name), seconds)

    def ioas_map(
        self, name: str, iova: int, offset: int, length: int, writeable: bool = True
    ) -> Json:
        """Maps a range of the arena into the device's own address space."""
        opened = self._own.get(name)
        address = self._memory().va(offset, length)
        return {"iova": opened.iommufd.ioas_map(opened.ioas, address, length, iova, writeable)}

    def ioas_unmap(self, name: str, iova: int, length: int) -> Json:
        """Unmaps a range of the device's own address space."""
        opened = self._own.get(name)
        return {"length": opened.iommufd.ioas_unmap(opened.ioas, iova, length)}

    # --- what the guest asks for, what it was given -------------------------------------

    def bind_request(self, name: str, offset: int, length: int, iova: int | None = None) -> Json:
        """What this guest would like bound to a PASID on a device."""
        self._own.get(name)
        arena = self._memory()
        arena.va(offset, length)
        return {
            "device": name,
            "iova": BIND_BASE + offset if iova is None else iova,
            "gpa": arena.gpa + offset,
            "length": length,
        }

    def bound(self, name: str, pasid: int, iova: int, offset: int, length: int) -> None:
        """Tells the guest what it was given."""
        with self._lock:
            self._bindings[name, pasid] = {"iova": iova, "offset": offset, "length": length}

    def unbound(self, name: str, pasid: int) -> None:
        """Tells the guest what was taken away."""
        with self._lock:
            if self._bindings.pop((name, pasid), None) is None:
                raise KeyError(f"PASID {pasid} is not bound on {name!r}")

    def reset(self) -> Json:
        """Nothing is mapped, nothing bound, as when the devices were opened; the kernel's news."""
        for opened in self._own.all():
            opened.irq_stop()
            opened.unmap_all()
        with self._lock:
            self._bindings.clear()
        return self._common.news()

    def bindings(self) -> list[Json]:
        """What this guest holds."""
        with self._lock:
            return [
                {"device": name, "pasid": pasid, **binding}
                for (name, pasid), binding in self._bindings.items()
            ]
