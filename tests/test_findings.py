# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/findings.md and its reproducers: the same ones, and they tell what is there."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from qemu_ioasid import kernel
from qemu_ioasid.kernel.series import listed
from qemu_ioasid.scenarios import SCENARIOS
from qemu_ioasid.scenarios.findings import FINDINGS, PREFIX
from tests.conftest import Command

PAGE = (Path(__file__).parents[1] / "docs/findings.md").read_text()


def test_the_page_and_the_table_name_the_same() -> None:
    names = [PREFIX + finding.name for finding in FINDINGS]
    assert re.findall(r"^## (finding-\S+)$", PAGE, re.MULTILINE) == names
    assert re.findall(r"^\| \[(finding-\S+)\]\(#\1\) \|", PAGE, re.MULTILINE) == names
    assert set(names) == {name for name in SCENARIOS if name.startswith(PREFIX)}


def test_each_says_where_it_is_what_it_does_and_how_to_mend_it() -> None:
    for part in PAGE.split("\n## finding-")[1:]:
        name, *paragraphs = part.split("\n\n")
        heads = [found[1] for text in paragraphs if (found := re.match(r"\*\*(\w+)\.\*\*", text))]
        assert heads == ["Where", "Observed", "Fix"], name


def test_a_patch_that_mends_one_is_in_the_series() -> None:
    patches = [path.name for path in listed(kernel.SERIES)]
    for finding in FINDINGS:
        if finding.fix:
            assert len(fnmatch.filter(patches, finding.fix)) == 1, finding.name


def test_the_cheapest_two_are_as_the_page_says(command: Command) -> None:
    for name in ("attach-copy-out", "pasid-without-capability"):
        ended = command("run", "--json", PREFIX + name)
        assert ended.code == 0, ended.err
        (check,) = ended.json()["checks"]
        assert check["answered"].startswith("PRESENT; "), check


def test_a_series_that_mends_one_is_told_from_one_that_does_not(command: Command) -> None:
    """With --series the kernel is that series whole; ours mends it, and the bug is gone."""
    ours = str(kernel.SERIES)
    ended = command("run", "--json", "finding-attach-copy-out", "--series", ours)
    assert ended.code == 0, ended.err
    assert ended.json()["checks"][0]["answered"].startswith("GONE; ")
