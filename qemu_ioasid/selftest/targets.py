# SPDX-License-Identifier: GPL-2.0-or-later
"""What the targets of tools/testing/selftests need of the VM that they run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qemu_ioasid import config
from qemu_ioasid.config import HostConfig, Size
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.viommu import Viommu

#: How the virtual intel-iommu translates, by what it offers. Legacy mode has no PASIDs, and so no
#: rig has it: `config.load` refuses it.
MODES: Mapping[str, Viommu] = {
    "legacy": Viommu(scalable_mode=False),
    "second-stage": Viommu(),
    "first-stage": Viommu(fsts=True),
}

#: An emulated function with MSI, MSI-X, memory that can be mapped, a reset, and functions that it
#: makes (SR-IOV); the kernels here have no driver for it. No firmware: the image has none.
_IGB = "igb,romfile="
#: Hands all of these to vfio-pci, and says where they are.
_BIND = """
for device in /sys/bus/pci/devices/*; do
	read -r vendor <"$device/vendor"
	read -r id <"$device/device"
	[ "$vendor:$id" = 0x8086:0x10c9 ] || continue
	echo vfio-pci >"$device/driver_override"
	echo "${device##*/}" >/sys/bus/pci/drivers_probe
	[ -e "$device/vfio-dev" ] || exit 1
	echo "${device##*/}"
done
"""
_HUGE_PAGES = "echo 96 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


@dataclass(frozen=True)
class Target:
    """A target's VM, one for each of its *modes*.

    *setup* is a script; the words that it says go to each program, as many as `arguments` takes.
    """

    name: str
    modes: Sequence[str] = ("second-stage",)
    #: Whether the names of its tests tell the mode.
    by_mode: bool = False
    #: Programs that are the same in every mode: run in the first, and their names tell none.
    once: Sequence[str] = ()
    memory: int = 1024
    devices: tuple[str, ...] = ()
    #: Added to the kernel's command line.
    append: str = ""
    setup: str = ""
    #: Programs that take all of the words; the others take the first.
    takes_all: Sequence[str] = ()

    def host(self, mode: str) -> HostConfig:
        """Its VM in that mode."""
        return HostConfig(memory=Size(self.memory * config.MIB), viommu=MODES[mode])

    def runs(self, program: str, mode: str) -> bool:
        """Whether *program* is run in that mode."""
        return program not in self.once or mode == self.modes[0]

    def tells_mode(self, program: str) -> bool:
        """Whether the names of *program*'s tests tell the mode."""
        return self.by_mode and program not in self.once

    def arguments(self, program: str, words: Sequence[str]) -> Sequence[str]:
        """What *program* is called with."""
        return words if program in self.takes_all else words[:1]


_KNOWN = (
    Target("iommu", setup=_HUGE_PAGES),
    Target(
        "vfio",
        modes=tuple(MODES),
        by_mode=True,
        # its devices are emulated: no DMA of theirs comes to the IOMMU
        once=("vfio_pdma_pasid_test",),
        # a gigabyte in one piece lies above the hole below 4 GiB
        memory=4096,
        devices=(_IGB, _IGB),
        append="hugepagesz=1G hugepages=1 vfio_pci.enable_sriov=1",
        setup=f"{_HUGE_PAGES}\n{_BIND}",
        takes_all=("vfio_pci_device_init_perf_test",),
    ),
)
NAMES = tuple(target.name for target in _KNOWN)


def find(names: Sequence[str], modes: Sequence[str]) -> list[Target]:
    """The targets of these names, in these *modes* where any are given.

    One that we know nothing of wants nothing. Raises ConfigurationError for what is no name.
    """
    for name in names:
        parts = name.replace("-", "_").split("/")
        if not all(part.isidentifier() for part in parts):
            raise ConfigurationError(f"selftest {name}: not a folder of tools/testing/selftests")
    known = {target.name: target for target in _KNOWN}
    found = [known.get(name, Target(name)) for name in dict.fromkeys(names or NAMES)]
    if not modes:
        return found
    return [replace(target, modes=[each for each in MODES if each in modes]) for target in found]
