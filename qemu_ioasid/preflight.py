# SPDX-License-Identifier: GPL-2.0-or-later
"""What this machine lacks to be a host itself, found without changing anything."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from qemu_ioasid.config import RigConfig

MIB = 1 << 20
#: A guest's QEMU without its RAM, and the agent; measured 70 MB and 30 MB.
_QEMU_MEMORY, _AGENT_MEMORY = 128 * MIB, 64 * MIB

_TRACEFS = "/sys/kernel/tracing"
_DEBUGFS = "/sys/kernel/debug"
_PARENT = "/sys/class/mdev_bus/pdma"


def lacking(config: RigConfig) -> list[str]:
    """What is missing for the rig *config*, each with what gives it; empty when nothing is.

    Without root's rights much cannot be seen: what can is told.
    """
    found = []
    root = os.geteuid() == 0
    if not root:
        found.append("root's rights (sudo)")
    if platform.machine() != "x86_64":
        found.append(f"an x86-64 processor (this is {platform.machine()})")
    found += _iommu()
    if config.mdevs:
        found += _pdma()
    if root:
        found += _kernel()
    found += _memory(config)
    return found


def _iommu() -> list[str]:
    found = []
    if not os.path.exists("/dev/iommu"):
        found.append("/dev/iommu (CONFIG_IOMMUFD; modprobe iommufd)")
    devices = Path("/proc/devices").read_text().split()
    if "vfio-dev" not in devices:
        found.append("/dev/vfio/devices (CONFIG_VFIO_DEVICE_CDEV; modprobe vfio)")
    return found


def _pdma() -> list[str]:
    if not os.path.isdir(_PARENT):
        return ["the mdev parent pdma (CONFIG_VFIO_PDMA of kernel-patches/; modprobe vfio_pdma)"]
    # An mdev is a folder below its parent, and by its name among all mdevs.
    others = [
        name
        for name in sorted(os.listdir(_PARENT))
        if os.path.exists(f"/sys/bus/mdev/devices/{name}")
    ]
    if others:
        return [
            f"the mdev parent pdma for itself (it has {', '.join(others)}, whose work would be "
            "taken for the guests'; another run, or write 1 to their remove)"
        ]
    return []


def _kernel() -> list[str]:
    found = []
    for name, folder, option in (
        ("debugfs", _DEBUGFS, "CONFIG_DEBUG_FS"),
        ("tracefs", _TRACEFS, "CONFIG_FTRACE"),
    ):
        if not os.path.ismount(folder):
            found.append(f"{folder} ({option}; mount -t {name} {name} {folder})")
    if os.path.ismount(_TRACEFS) and not os.path.exists(f"{_TRACEFS}/kprobe_events"):
        found.append("probes in the kernel (CONFIG_KPROBE_EVENTS)")
    if not os.path.exists("/dev/userfaultfd"):
        found.append("/dev/userfaultfd (CONFIG_USERFAULTFD)")
    with contextlib.suppress(OSError):
        if Path("/proc/sys/kernel/printk_devkmsg").read_text().strip() == "off":
            found.append("a kernel log that may be written to (sysctl kernel.printk_devkmsg=on)")
    return found


def _memory(config: RigConfig) -> list[str]:
    guests = config.guests.values()
    need = _AGENT_MEMORY + sum(guest.memory + _QEMU_MEMORY for guest in guests)
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            there = int(rest.split()[0]) << 10
            if there < need:
                return [f"memory: {need // MIB} MiB for these guests ({there // MIB} are free)"]
    return []
