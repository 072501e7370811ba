# SPDX-License-Identifier: GPL-2.0-or-later
"""The mutants: each fits the series and is in the table, and the suite tells them from the control.

That every one is killed is what `qemu-ioasid mutants` shows, in half an hour.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_ioasid import cache, kernel, mutants
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import Kernel, mutant, series, source, tree
from qemu_ioasid.mutants import table
from tests.conftest import Command

MUTANTS = mutant.every()


def test_each_says_what_it_breaks() -> None:
    assert MUTANTS[0].control and not any(each.control for each in MUTANTS[1:])
    assert len({each.breaks for each in MUTANTS}) == len(MUTANTS) > 25
    for each in MUTANTS:
        assert each.breaks.endswith(".") and len(each.breaks) <= 88, each.name
        assert "|" not in each.breaks, each.name


def test_each_is_in_the_table_and_was_killed() -> None:
    rows = table.rows(table.TABLE.read_text())
    assert {name: breaks for name, (breaks, _, _) in rows.items()} == {
        each.name: each.breaks for each in MUTANTS
    }
    for name, (_, by, _) in rows.items():
        assert (by == "survived") == (name == mutant.CONTROL), f"{name}: {by}"


def test_each_fits_the_series(tmp_path: Path, built_kernel: Kernel) -> None:
    deadline = Deadline(60, "patches")
    known = source.remembered(kernel.SERIES.name, True)
    assert known is not None
    kept = tree.Tree(cache.entry("kernel-tree", known.key))
    patches = series.listed(kernel.SERIES)
    touched = [each.patch for each in MUTANTS] + patches
    whole = tmp_path / "whole"
    kept.lay_out({name for patch in touched for name in tree.names(patch)}, whole)
    for patch in patches:
        tree.lay_over(patch, whole, deadline)
    for each in MUTANTS:
        folder = tmp_path / each.name
        for name in tree.names(each.patch):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((whole / name).read_bytes())
        tree.lay_over(each.patch, folder, deadline)


def test_one_of_your_own(tmp_path: Path) -> None:
    patch = tmp_path / "mine.patch"
    patch.write_text("Drops every check.\n\n--- a/x\n+++ b/x\n")
    assert mutant.find(str(patch)) == ("mine", "Drops every check.", patch)
    patch.write_text("From 0\nSubject: [PATCH] Drops one.\n\n--- a/x\n+++ b/x\n")
    assert mutant.find(str(patch)).breaks == "Drops one."
    with pytest.raises(
        ConfigurationError, match=r"no patch file, and none of .*/mutants: there are"
    ):
        mutant.find("nonesuch")


def test_the_table_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "mutants.md"
    page.write_text(table.TABLE.read_text())
    monkeypatch.setattr(table, "TABLE", page)
    before = table.rows(page.read_text())
    one, other = MUTANTS[1], MUTANTS[0]
    table.write([mutants.Result(one.name, one.breaks, False, "killed", "x: y", 1.4)], MUTANTS)
    table.write([mutants.Result(other.name, other.breaks, True, seconds=70)], MUTANTS)
    after = table.rows(page.read_text())
    assert after == {
        **before,
        other.name: (other.breaks, "survived", 70),
        one.name: (one.breaks, "x: y", 1),
    }
    assert (
        page.read_text().partition("| mutant")[0]
        == table.TABLE.read_text().partition("| mutant")[0]
    )


def test_what_decides() -> None:
    killed = mutants.Result("a", "A.", False, "killed", code=5)
    survived = mutants.Result("b", "B.", False)
    control = mutants.Result("c", "C.", True)
    unclear = mutants.Result("d", "D.", False, "unclear", code=4)
    assert mutants.exit_code([killed, control]) == 0
    assert mutants.exit_code([killed, survived]) == 1
    assert mutants.exit_code([mutants.Result("c", "C.", True, "killed", code=1)]) == 1
    assert mutants.exit_code([unclear, survived, killed]) == 4


def test_what_killed_it_the_last_time_is_tried_first() -> None:
    suite = list(mutants.SUITE)
    assert mutants.first(suite, "") == suite
    assert mutants.first(suite, "nonesuch: x") == suite
    one, *others = mutants.first(suite, "isolation: intra-vm")
    assert (one.name, one.check) == ("isolation", "intra-vm")
    assert others == [one._replace(check=""), *(each for each in suite if each.name != one.name)]
    one, *others = mutants.first(suite, "stress-debug: host: BUG: KASAN: slab-use-after-free")
    assert one == suite[-1] and others == suite[:-1]


def test_the_suite_tells_a_mutant_from_the_control(command: Command) -> None:
    """One is killed by a check, one by what the kernel says, and the control is not."""
    ended = command(
        *("mutants", "--json", "--report", "report", "--stage", "flight"),
        *("harmless", "no-list-check", "bug-in-submit"),
    )
    assert ended.code == 0, ended.err
    found = {each["name"]: each for each in ended.json()["mutants"]}
    assert found["harmless"]["verdict"] == "survived"
    assert found["no-list-check"]["verdict"] == "killed"
    assert found["no-list-check"]["by"] == "flight: detach"
    assert found["bug-in-submit"]["verdict"] == "killed"
    assert "kernel BUG at" in found["bug-in-submit"]["by"]
    assert found["bug-in-submit"]["code"] == 5
