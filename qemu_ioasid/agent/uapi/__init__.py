"""ioctl numbers, structs and constants of the kernel's user API, in C spelling.

One module a header. ``tests/agent/test_uapi.py`` compares every struct, field and constant with
the kernel's own headers through a compiled probe.
"""
