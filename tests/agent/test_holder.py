# SPDX-License-Identifier: GPL-2.0-or-later
"""Holders as processes, and ioctls on memory that may only be read. What the kernel's devices
answer them is tried in the VMs.

Devices here are /dev/null: the kernel refuses every VFIO ioctl on it (ENOTTY), for real.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import termios
from collections.abc import Iterator

import pytest

from qemu_ioasid.agent.descriptor import Descriptor
from qemu_ioasid.agent.holder import Holders
from qemu_ioasid.agent.iommufd import Iommufd
from qemu_ioasid.agent.spawn import Spawner
from qemu_ioasid.agent.uapi.iommufd import iommu_destroy
from qemu_ioasid.agent.vfio import VfioDevice


@pytest.fixture
def holders() -> Iterator[Holders]:
    device = VfioDevice(Descriptor.open(os.devnull, name="a"), "vfio0")
    iommufd = Iommufd(Descriptor.open(os.devnull, name="g1"))
    spawner = Spawner()
    made = Holders(lambda name: device, lambda name: iommufd, lambda: spawner)
    yield made
    made.close()
    device.close()
    iommufd.close()


def test_a_holder_has_the_files_it_is_given_and_no_others(holders: Holders) -> None:
    ours = os.open(os.devnull, os.O_RDONLY)
    pid = holders.start("h", "a", "g1")["pid"]
    with pytest.raises(OSError, match="ioctl") as refused:
        holders.call("h", "detach", {"pasid": 1})
    assert refused.value.errno == errno.ENOTTY
    held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    os.close(ours)
    assert sorted(
        path.partition(":")[0] for path in held if path != os.readlink("/proc/self/fd/2")
    ) == [
        os.devnull,
        os.devnull,
        "pipe",
        "pipe",
    ]


def test_a_killed_holder_is_gone_when_that_answers(holders: Holders) -> None:
    pid = holders.start("h", "a", "g1")["pid"]
    holders.kill("h")
    assert not os.path.exists(f"/proc/{pid}")


def test_the_kernel_cannot_write_into_the_argument() -> None:
    """FIONREAD on a pipe writes an int, and gets EFAULT; a writable one gets the number."""
    reading, writing = os.pipe()
    os.write(writing, b"1234")
    with Descriptor(reading, "pipe") as pipe:
        with pytest.raises(OSError) as refused:
            pipe.ioctl_on_readonly(termios.FIONREAD, iommu_destroy())
        assert refused.value.errno == errno.EFAULT
        answer = array.array("i", [0])
        fcntl.ioctl(reading, termios.FIONREAD, answer)
        assert answer[0] == 4
    os.close(writing)
