"""include/uapi/linux/userfaultfd.h, as far as the agent uses it."""

from __future__ import annotations

from ctypes import Structure, Union, c_uint8, c_uint16, c_uint32, c_uint64, sizeof

from qemu_ioasid.agent.uapi.ioctl import _IO, _IOR, _IOWR

USERFAULTFD_IOC = 0xAA
UFFDIO = 0xAA
UFFD_API = 0xAA

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0

UFFDIO_REGISTER_MODE_MISSING = 1 << 0


class uffd_msg_pagefault(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("flags", c_uint64), ("address", c_uint64), ("ptid", c_uint32), ("_pad", c_uint32)]


class uffd_msg_reserved(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("reserved1", c_uint64), ("reserved2", c_uint64), ("reserved3", c_uint64)]


class uffd_msg_arg(Union):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("pagefault", uffd_msg_pagefault), ("reserved", uffd_msg_reserved)]


class uffd_msg(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("event", c_uint8),
        ("reserved1", c_uint8),
        ("reserved2", c_uint16),
        ("reserved3", c_uint32),
        ("arg", uffd_msg_arg),
    ]


class uffdio_api(Structure):
    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class uffdio_range(Structure):
    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class uffdio_register(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64)]


USERFAULTFD_IOC_NEW = _IO(USERFAULTFD_IOC, 0x00)
UFFDIO_API = _IOWR(UFFDIO, 0x3F, sizeof(uffdio_api))
UFFDIO_REGISTER = _IOWR(UFFDIO, 0x00, sizeof(uffdio_register))
UFFDIO_UNREGISTER = _IOR(UFFDIO, 0x01, sizeof(uffdio_range))
