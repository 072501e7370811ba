"""include/uapi/linux/random.h."""

from __future__ import annotations

import ctypes

from qemu_ioasid.agent.uapi.ioctl import _IO, _IOW


class rand_pool_info(ctypes.Structure):
    """The head; buf_size bytes follow it."""

    _fields_ = (("entropy_count", ctypes.c_int), ("buf_size", ctypes.c_int))


RNDADDENTROPY = _IOW(ord("R"), 0x03, 8)
RNDRESEEDCRNG = _IO(ord("R"), 0x07)
