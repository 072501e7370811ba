"""include/uapi/linux/mman.h, as far as Python's mmap module lacks it."""

PROT_NONE = 0x0

MAP_HUGETLB = 0x040000
