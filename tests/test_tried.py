# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel is tried with, as words for the command."""

from __future__ import annotations

import pytest

from qemu_ioasid import tried
from qemu_ioasid.cli import _parser
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import Spec

SPEC = Spec(source="debian:7.3", series="none")


def test_a_scenario() -> None:
    tried.find("attacks")
    found = _parser().parse_args(tried.words("attacks", SPEC))
    assert (found.scenario, found.cold, found.profile) == ("attacks", True, "default")
    assert (found.kernel, found.series) == ("debian:7.3", "none")


def test_the_kernels_own_tests() -> None:
    tried.find("selftest:iommu")
    found = _parser().parse_args(tried.words("selftest:iommu", SPEC))
    assert (found.targets, found.profile, found.kernel) == (["iommu"], "selftest", "debian:7.3")


@pytest.mark.parametrize("name", ["nonesuch", "selftest:", "selftest:../x", "selftest"])
def test_neither(name: str) -> None:
    with pytest.raises(ConfigurationError):
        tried.find(name)
