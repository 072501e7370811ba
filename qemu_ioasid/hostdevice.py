# SPDX-License-Identifier: GPL-2.0-or-later
"""An mdev of the host VM that no guest has: opened by the agent there, driven from here."""

from __future__ import annotations

import contextlib
import uuid
from typing import Self

from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import CallFailed, InfrastructureError
from qemu_ioasid.rig import Completion, Descriptor, Rig


class HostDevice:
    """A context manager: the mdev is made and opened at its start, closed and removed at its end.

    *iommufd* is the name that the registrar knows its iommufd by, *ioas* the
    address space for work without a PASID.
    """

    def __init__(self, rig: Rig, name: str) -> None:
        self.name = name
        self.iommufd = ""
        self.ioas = 0
        self._agent = rig.host.agent

    def __enter__(self) -> Self:
        self._agent.call("mdev_create", name=self.name, uuid=str(uuid.uuid4()))
        try:
            opened = self._agent.call("device_open", name=self.name)
        except BaseException:
            self._remove()
            raise
        self.iommufd, self.ioas = opened["iommufd"], opened["ioas"]
        return self

    def __exit__(self, *exc: object) -> None:
        # The test may have closed it, or have reset the rig; a host VM that is gone has no mdev.
        with contextlib.suppress(CallFailed, InfrastructureError):
            self._agent.call("device_close", name=self.name)
        self._remove()

    def _remove(self) -> None:
        if not self._agent.lost:
            self._agent.call("mdev_remove", name=self.name)

    def submit(self, *work: Descriptor, seconds: float = 20) -> list[Completion]:
        """Have the device do *work*; the completion records in order, refusals included."""
        done: list[Completion] = self._agent.call(
            "device_submit",
            deadline=Deadline(seconds + 5, f"completions of {self.name}"),
            name=self.name,
            descriptors=list(work),
            seconds=seconds * calibration(),
        )
        return done

    def reset(self) -> None:
        """Reset the device: its work is cancelled, its list stays."""
        self._agent.call("device_reset", name=self.name)
