# SPDX-License-Identifier: GPL-2.0-or-later
"""A rig that is left running, and the commands that people play with it by.

`lab up` starts a *keeper* (`keeper`, a process of its own), which holds the rig
(`life`) and answers the other commands (`command`) on a unix socket in its run
folder (`place`, `wire`). The lab ends with its keeper, whatever ends that: what
is true of any orchestrator's run folder is true of a lab (`qemu_ioasid.reaper`).
"""
