# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of QEMU's intel-iommu: which can be combined, and how each QEMU spells them.

The rig file uses QEMU 11.1's names. What QEMU refuses, and what it accepts and
dies of later, is in docs/facts.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

from qemu_ioasid.errors import ConfigurationError, RequirementError

#: QEMU 11.1's name of a property, and 10.0's where it differs (hw/i386/intel_iommu.c).
OLD_NAMES = {"scalable-mode": "x-scalable-mode", "fsts": "x-flts", "pasid-bits": "x-pasid-mode"}

#: VTD_PASID_ID_LEN, hw/i386/intel_iommu_internal.h.
MAX_PASID_BITS = 20


@dataclass(frozen=True)
class Viommu:
    """The options of one virtual intel-iommu, as the rig file gives them."""

    scalable_mode: bool = True
    fsts: bool = False
    pasid_bits: int = 0
    svm: bool = False
    device_iotlb: bool = False
    caching_mode: bool = False
    intremap: bool = True
    eim: bool = False
    aw_bits: int = 48
    snoop_control: bool = False
    dma_translation: bool = True
    stale_tm: bool = False
    fs1gp: bool = True

    def conflicts(self, *, assigned: bool) -> Iterator[tuple[str, str]]:
        """Each option that cannot be, with the reason; *assigned* if mdevs sit behind it."""
        if not self.scalable_mode:
            yield "scalable-mode", "must be true: the rig checks PASIDs, which legacy mode has not"
        if not self.dma_translation:
            yield "dma-translation", "must be true: nothing is translated without it"
        if not 0 <= self.pasid_bits <= MAX_PASID_BITS:
            yield "pasid-bits", f"{self.pasid_bits} is not from 0 to {MAX_PASID_BITS}"
        if self.aw_bits not in (39, 48):
            yield "aw-bits", f"{self.aw_bits} is neither 39 nor 48"
        elif self.fsts and self.aw_bits != 48:
            yield "aw-bits", f"must be 48 with fsts = true, is {self.aw_bits}"
        if self.svm:
            missing = [
                name
                for name, there in (
                    ("device-iotlb = true", self.device_iotlb),
                    ("fsts = true", self.fsts),
                    ("pasid-bits above 0", self.pasid_bits > 0),
                )
                if not there
            ]
            if missing:
                yield "svm", f"needs {', '.join(missing)}"
        if self.eim and not self.intremap:
            yield "eim", "needs intremap = true"
        if assigned and self.fsts:
            yield (
                "fsts",
                "must be false with mdevs behind the virtual IOMMU: QEMU does not shadow "
                "first-stage tables, so what the guest maps for them faults",
            )
        if assigned and not self.caching_mode:
            yield (
                "caching-mode",
                "must be true with mdevs behind the virtual IOMMU: QEMU aborts "
                "when the guest turns translation on",
            )

    def device(self, known: Collection[str]) -> str:
        """The ``-device`` argument for a QEMU whose intel-iommu has the properties *known*.

        Raises RequirementError when it cannot do what an option asks. An option
        at QEMU's own default needs no property.
        """
        parts = ["intel-iommu"]
        default = Viommu(scalable_mode=False)
        for field in fields(self):
            name = field.name.replace("_", "-")
            value = getattr(self, field.name)
            old = OLD_NAMES.get(name, name)
            if name not in known and old in known:
                name, value = old, bool(value)
            if name not in known:
                if value == getattr(default, field.name):
                    continue
                raise RequirementError(
                    f"viommu.{name} = {str(value).lower()}: this QEMU's intel-iommu has no such "
                    "property; take a newer QEMU (--qemu private) or leave the option out"
                )
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            parts.append(f"{name}={text}")
        return ",".join(parts)


def check(options: Viommu, where: str, *, assigned: bool) -> None:
    """Raise ConfigurationError for the first conflict; *where* is ``file: table``."""
    for name, reason in options.conflicts(assigned=assigned):
        raise ConfigurationError(f"{where}.{name}: {reason}")
