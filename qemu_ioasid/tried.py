# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel is tried with, by a name: a scenario, or ``selftest:TARGET``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qemu_ioasid import runs, scenarios
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


def chosen(names: Sequence[str]) -> list[str]:
    """Each of *names* once, in order; raises as `find`."""
    once = list(dict.fromkeys(names))
    for name in once:
        find(name)
    return once


def kernel(name: str, spec: Spec) -> Spec:
    """Which kernel is tried with *name*: the kernel's own tests have their profile."""
    return spec if target(name) is None else replace(spec, profile="selftest")


def words(name: str, spec: Spec) -> list[str]:
    """What ``qemu-ioasid`` is told, for `runs.run`, to try `kernel`."""
    named = target(name)
    tries = ["run", name, "--cold"] if named is None else ["selftest", named]
    return [*tries, *kernel(name, spec).words]


def bare(spec: Spec) -> list[str]:
    """The same, to boot a host VM alone, as any kernel can."""
    return [*runs.BARE, *spec.words]
