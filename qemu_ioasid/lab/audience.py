# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a keeper tells how far its work is: whoever asked for it, while they listen."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from qemu_ioasid.lab.wire import Wire
from qemu_ioasid.session import Output


class Audience:
    """Each thread works for one command, or for nobody."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self.output = Output(
            lambda line: self._tell(say=line),
            lambda line: self._tell(progress=line),
            lambda step: self._tell(begins=step),
        )

    @contextlib.contextmanager
    def told(self, wire: Wire) -> Iterator[None]:
        """Tell *wire* of what this thread does in the block."""
        self._mine.wire = wire
        try:
            yield
        finally:
            self._mine.wire = None

    def _tell(self, **message: Any) -> None:
        wire: Wire | None = getattr(self._mine, "wire", None)
        if wire is not None:
            # Work goes on when nobody listens any more.
            with contextlib.suppress(OSError):
                wire.tell(**message)
