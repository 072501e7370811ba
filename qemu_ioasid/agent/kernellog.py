"""What this VM's kernel says, read where it is cheap: a serial console takes a trap a character.

Records: Documentation/ABI/testing/dev-kmsg.
"""

from __future__ import annotations

import errno
import os

KMSG = "/dev/kmsg"
_WARNING = 4
_LINES = 200


class KernelLog:
    """The kernel's messages from now on, of level warning and worse. Without /dev/kmsg: none."""

    def __init__(self) -> None:
        self._fd: int | None = None
        try:
            self._fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EPERM, errno.EACCES):
                raise

    def news(self) -> list[str]:
        """The lines since the last call, the first _LINES of them; "lost" where some were lost."""
        lines: list[str] = []
        while self._fd is not None:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                lines.append("lost")
                continue
            head, _, text = record.partition(b";")
            if int(head.split(b",")[0]) & 7 <= _WARNING:
                lines.append(text.split(b"\n")[0].decode(errors="replace"))
        return lines[:_LINES]

    def close(self) -> None:
        """Stops reading."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
