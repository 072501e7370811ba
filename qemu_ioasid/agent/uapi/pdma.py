"""include/uapi/linux/pdma.h (kernel-patches/), whole."""

from __future__ import annotations

from ctypes import LittleEndianStructure, c_uint32, c_uint64

PDMA_PCI_VENDOR_ID = 0x1234
PDMA_PCI_DEVICE_ID = 0x70D1
PDMA_PCI_REVISION = 1
PDMA_PCI_CLASS = 0x088000

PDMA_REGS_BAR = 0
PDMA_REGS_SIZE = 0x1000
PDMA_RING_BAR = 2
PDMA_RING_SIZE = 0x10000
PDMA_MSIX_BAR = 4
PDMA_MSIX_SIZE = 0x1000
PDMA_MSIX_TABLE_OFFSET = 0x000
PDMA_MSIX_PBA_OFFSET = 0x800

PDMA_MAGIC = 0x414D4450
PDMA_VERSION = 2
PDMA_RING_ENTRIES = 1024
PDMA_MAX_LENGTH = 1048576
PDMA_PASID_BITS = 20
PDMA_FAULT_ENTRIES = 64

PDMA_REG_MAGIC = 0x00
PDMA_REG_VERSION = 0x04
PDMA_REG_RING_ENTRIES = 0x08
PDMA_REG_MAX_LENGTH = 0x0C
PDMA_REG_PASID_BITS = 0x10
PDMA_REG_OPCODES = 0x14
PDMA_REG_FAULT_ENTRIES = 0x18
PDMA_REG_TAIL = 0x20
PDMA_REG_HEAD = 0x24
PDMA_REG_STATUS = 0x28
PDMA_REG_FAULT_COUNT = 0x2C

PDMA_STATUS_BUSY = 1 << 0
PDMA_STATUS_OVERRUN = 1 << 1

PDMA_DESC_OFFSET = 0x0
PDMA_COMPLETION_OFFSET = 0x8000
PDMA_FAULT_OFFSET = 0x800

PDMA_VECTOR_COMPLETION = 0
PDMA_VECTOR_FAULT = 1
PDMA_NUM_VECTORS = 2

PDMA_OP_NOP = 0
PDMA_OP_COPY = 1
PDMA_OP_FILL = 2
PDMA_OP_COMPARE = 3

PDMA_DESC_PASID = 1 << 0
PDMA_DESC_INTERRUPT = 1 << 1

PDMA_COMPLETION_DONE = 1
PDMA_COMPLETION_REFUSED = 2
PDMA_COMPLETION_FAULT = 3
PDMA_COMPLETION_INVALID = 4
PDMA_COMPLETION_DIFFERENT = 5

PDMA_FAULT_OPCODE = 1
PDMA_FAULT_FLAGS = 2
PDMA_FAULT_NO_PASID = 3
PDMA_FAULT_LENGTH = 4
PDMA_FAULT_WRAP = 5
PDMA_FAULT_NOT_LISTED = 6
PDMA_FAULT_UNMAPPED = 7
PDMA_FAULT_NO_RIGHT = 8
PDMA_FAULT_GONE = 9
PDMA_FAULT_ENDED = 10
PDMA_FAULT_OTHER = 11

PDMA_ACCESS_NONE = 0
PDMA_ACCESS_READ = 1
PDMA_ACCESS_WRITE = 2


class pdma_desc(LittleEndianStructure):
    _fields_ = [
        ("opcode", c_uint32),
        ("flags", c_uint32),
        ("pasid", c_uint32),
        ("length", c_uint32),
        ("src", c_uint64),
        ("dst", c_uint64),
    ]


class pdma_completion(LittleEndianStructure):
    _fields_ = [
        ("seq", c_uint32),
        ("status", c_uint32),
        ("pasid", c_uint32),
        ("error", c_uint32),
        ("addr", c_uint64),
        ("done", c_uint64),
    ]


class pdma_fault(LittleEndianStructure):
    _fields_ = [
        ("seq", c_uint32),
        ("reason", c_uint32),
        ("count", c_uint32),
        ("pasid", c_uint32),
        ("error", c_uint32),
        ("access", c_uint32),
        ("addr", c_uint64),
    ]
