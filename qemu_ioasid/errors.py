# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error the rig raises, and who is to blame for it.

::

    RigError                    never raised itself
     ├─ ConfigurationError      2  what the user wrote is wrong
     ├─ RequirementError        3  this machine lacks something
     │   └─ KernelLacks            the kernel under test does
     ├─ InfrastructureError     4  the rig failed
     │   ├─ ProcessFailed          a child of ours ended badly
     │   ├─ DeadlineExceeded       a wait ran out of time
     │   ├─ ConnectionLost         QMP, SSH or the agent's channel ended
     │   └─ AgentError             an agent's own fault (no errno)
     ├─ KernelError             5  the kernel under test
     │   ├─ BootError              did not come up
     │   └─ KernelBroke            reported an oops, a warning, a lockup
     └─ CallFailed                 an agent's system call answered an errno
         └─ BatchFailed            one of many did, in the middle

The number is the exit code. ``CallFailed`` has none of its own: an errno is
an answer, and only the caller knows whether it was the expected one; left
uncaught it is a failure of the rig. 1 (a check failed) is a verdict, not an
error.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Sequence


class RigError(Exception):
    """Base of all errors; *evidence* is text worth keeping (last console lines, stderr)."""

    exit_code = 4

    def __init__(self, message: str, *, evidence: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence


class ConfigurationError(RigError):
    """What the user wrote cannot be: the message names file, key and reason."""

    exit_code = 2


class RequirementError(RigError):
    """This machine lacks something the rig needs: the message says what to do."""

    exit_code = 3


class KernelLacks(RequirementError):
    """The kernel under test came up, and has not what is asked of it."""


class InfrastructureError(RigError):
    """The rig itself failed; nothing is said about the kernel under test."""

    exit_code = 4


class ProcessFailed(InfrastructureError):
    """A child ended with an exit status that was not expected."""

    def __init__(self, argv: Sequence[str], returncode: int, output: str) -> None:
        how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        tail = output.strip().splitlines()
        #: Its last line, or how it ended.
        self.said = tail[-1].strip() if tail else how
        last = f": {self.said}" if tail else ""
        super().__init__(f"{argv[0]} ended with {how}{last}", evidence=output)
        self.argv = list(argv)
        self.returncode = returncode


class DeadlineExceeded(InfrastructureError):
    """A wait ran out of its time budget; the message names what was waited for."""


class ConnectionLost(InfrastructureError):
    """The other end of a channel went away."""


class AgentError(InfrastructureError):
    """An agent raised something that is not a system call's answer; evidence is its traceback."""


class KernelError(RigError):
    """The kernel under test is to blame; evidence is the console excerpt."""

    exit_code = 5


class BootError(KernelError):
    """A VM did not reach its first agent reply."""


class KernelBroke(KernelError):
    """The kernel reported a panic, oops, BUG, WARNING, sanitizer or lockup."""


class CallFailed(RigError):
    """A system call made by an agent failed with *errno*: the kernel's answer to it."""

    def __init__(self, message: str, errno: int, *, evidence: str = "") -> None:
        super().__init__(message, evidence=evidence)
        self.errno = errno

    @property
    def name(self) -> str:
        """The errno's symbol, ``EBUSY`` for example."""
        return errno_module.errorcode.get(self.errno, str(self.errno))


class BatchFailed(CallFailed):
    """A batch ended at an item that failed with *errno*; the *done* items before it stay done."""

    def __init__(self, message: str, errno: int, *, done: int) -> None:
        super().__init__(message, errno)
        self.done = done
