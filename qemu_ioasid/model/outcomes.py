# SPDX-License-Identifier: GPL-2.0-or-later
"""What can come of each step, as `rules` words it: a run that has not met all has not tried all."""

from __future__ import annotations

NOT_BOUND = "EINVAL: not bound"
NO_IOAS = "ENOENT: no IOAS of this iommufd"

#: By operation. EBADF, which a slot without a fd answers, is not asked for.
OUTCOMES: dict[str, tuple[str, ...]] = {
    "iommufd": ("0",),
    "open": ("0",),
    "dup": ("0",),
    "mmap": ("0", NOT_BOUND),
    "close": ("0: others are left", "0: the last one", "0: the last one, with a list"),
    "ioas_alloc": ("0",),
    "destroy": ("0", "EBUSY: a driver's access", "EBUSY: attached", "ENOENT"),
    "map": (
        "0",
        "EOVERFLOW: 2^64 - 1",
        "EINVAL: neither read nor write",
        NO_IOAS,
        "EINVAL: length 0",
        "EINVAL: not whole pages",
        "EOVERFLOW: past the end",
        "EEXIST",
    ),
    "unmap": (
        "0",
        NO_IOAS,
        "EOVERFLOW",
        "EINVAL: length 0",
        "ENOENT: a mapping sticks out",
        "ENOENT: nothing there",
    ),
    "bind": (
        "0",
        "EINVAL: bound",
        "EBADF: no fd",
        "EBADFD: no iommufd",
        "EINVAL: another file is bound",
    ),
    "attach": (
        "0: attached",
        "0: replaced",
        "0: the same IOAS",
        NOT_BOUND,
        NO_IOAS,
        "EADDRINUSE: a mapping is not of whole pages",
    ),
    "detach": ("0", "0: there was none", NOT_BOUND),
    "attach_pasid": (
        "0: attached",
        "0: shared",
        "0: replaced",
        "0: the same IOAS",
        NOT_BOUND,
        "EINVAL: PASID 0",
        "EINVAL: too large",
        "ENOSPC: the list is full",
        "EBUSY: another iommufd's",
        "EBUSY: another IOAS",
        "EBUSY: another device shares it",
        NO_IOAS,
    ),
    "attach_pasid_unwritten": (
        "EFAULT: attached",
        "EFAULT: shared",
        "EFAULT: replaced",
        "EFAULT: the same IOAS",
    ),
    "detach_pasid": ("0: the last user", "0: shared", "0: not in the list", NOT_BOUND),
    "reset": ("0", "0: with a list", NOT_BOUND),
    "doorbell": ("0", "0: overrun", NOT_BOUND),
    "submit": (
        NOT_BOUND,
        "INVALID: opcode",
        "INVALID: flag",
        "INVALID: PASID without the flag",
        "INVALID: too long",
        "INVALID: nothing to do",
        "INVALID: past 2^64",
        "REFUSED: no PASID",
        "REFUSED: another device's",
        "REFUSED: nobody's",
        "DONE: NOP",
        "DONE: COPY",
        "DONE: FILL",
        "DONE: COMPARE",
        "DIFFERENT",
        "FAULT: ENOENT, read",
        "FAULT: ENOENT, read, later",
        "FAULT: ENOENT, write",
        "FAULT: ENOENT, write, later",
        "FAULT: EPERM, read",
        "FAULT: EPERM, write",
        "FAULT: EFAULT, read",
        "FAULT: EFAULT, write",
    ),
}

ALL = [(operation, outcome) for operation, seen in OUTCOMES.items() for outcome in seen]
