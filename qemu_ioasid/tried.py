# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel is tried with, by a name: a scenario, or ``selftest:TARGET``."""

from __future__ import annotations

from dataclasses import replace

from qemu_ioasid import scenarios
from qemu_ioasid.kernel import Spec
from qemu_ioasid.selftest import targets

#: Before the name of a target of the kernel's own tests.
SELFTEST = "selftest:"
#: How such a name is written, for a command line's help.
FORMS = f"a scenario, or {SELFTEST}TARGET"


def find(name: str) -> None:
    """Raises ConfigurationError for what names neither."""
    target = name.removeprefix(SELFTEST)
    if target != name:
        targets.find([target], [])
    else:
        scenarios.find(name)


def words(name: str, spec: Spec) -> list[str]:
    """What ``qemu-ioasid`` is told, for `runs.run`. The kernel's own tests have their profile."""
    target = name.removeprefix(SELFTEST)
    if target != name:
        return ["selftest", target, *replace(spec, profile="selftest").words]
    return ["run", name, "--cold", *spec.words]
