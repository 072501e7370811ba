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


def target(name: str) -> str | None:
    """The target of the kernel's own tests that is named; None: it is a scenario."""
    return name.removeprefix(SELFTEST) if name.startswith(SELFTEST) else None


def find(name: str) -> None:
    """Raises ConfigurationError for what names neither."""
    named = target(name)
    if named is None:
        scenarios.find(name)
    else:
        targets.find([named], [])


def words(name: str, spec: Spec) -> list[str]:
    """What ``qemu-ioasid`` is told, for `runs.run`. The kernel's own tests have their profile."""
    named = target(name)
    if named is None:
        return ["run", name, "--cold", *spec.words]
    return ["selftest", named, *replace(spec, profile="selftest").words]
