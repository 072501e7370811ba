/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Included first in every file that counts (gcov.py).
 *
 * Of "if (x) return -EINVAL;" gcc leaves a branch to where the function returns before it counts,
 * and the line has no counter. With a statement in it that it may not remove, it stays a block.
 * for, since an if around it would take an else that follows.
 */
#define return for (({ __asm__ volatile (""); });;) return
