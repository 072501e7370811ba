"""include/uapi/linux/mman.h, as far as Python's mmap module lacks it."""

MAP_HUGETLB = 0x040000
