# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel's own test programs write, and what is read out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_ioasid.selftest.ktap import Parser, Result

#: As kselftest_harness.h writes it.
HARNESS = """\
TAP version 13
1..4
# Starting 4 tests from 3 test cases.
#  RUN           iommufd.simple_close ...
#            OK  iommufd.simple_close
ok 1 iommufd.simple_close
#  RUN           iommufd_viommu.no_viommu.vdevice_alloc ...
#      SKIP      Skipping test for variant no_viommu
#            OK  iommufd_viommu.no_viommu.vdevice_alloc
ok 2 iommufd_viommu.no_viommu.vdevice_alloc # SKIP Skipping test for variant no_viommu
#  RUN           iommufd.cmd_fail ...
# iommufd.c:73:cmd_fail:Expected 0 (0) == rc (-1)
# cmd_fail: Test terminated by assertion
#          FAIL  iommufd.cmd_fail
not ok 3 iommufd.cmd_fail
#  RUN           iommufd.known ...
#            OK  iommufd.known
ok 4 iommufd.known # XFAIL unknown
# FAILED: 3 / 4 tests passed.
# Totals: pass:1 fail:1 xfail:1 xpass:0 skip:1 error:0
"""

#: The example of Documentation/dev-tools/ktap.rst, with a failure in it.
KTAP = """\
KTAP version 1
1..2
  KTAP version 1
  1..1
    KTAP version 1
    1..2
    # Subtest: inner
    ok 1 test_1
    not ok 2 - test_2
  # example failed
  not ok 1 example
not ok 1 main_test
  KTAP version 1
  1..2
  # more of it
  ok 1 test_1
  ok 2 test_2 # SKIP no such device
ok 2 other_test
"""

#: A program's output as kselftest/runner.sh passes it on.
RUNNER = """\
TAP version 13
1..3
# timeout set to 45
# selftests: vfio: vfio_pci_device_test
# TAP version 13
# 1..2
# #  RUN           vfio_pci_device_test.reset ...
# #            OK  vfio_pci_device_test.reset
# ok 1 vfio_pci_device_test.reset
# # it says: ok 7 is a number
# not ok 2 vfio_pci_device_test.validate_bars
# # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0
not ok 1 selftests: vfio: vfio_pci_device_test # exit=1
ok 2 selftests: vfio: vfio_pci_driver_test # SKIP
not ok 3 selftests: vfio: slow # TIMEOUT 45 seconds
"""


#: Captured from programs that were built with 7.2.12's kselftest headers, the last one's by its
#: runner.sh.
CAPTURED = Path(__file__).parent / "programs"


def parsed(text: str) -> tuple[Parser, list[Result]]:
    parser = Parser()
    return parser, [result for line in text.splitlines() for result in parser.feed(line)]


def told(results: list[Result]) -> list[tuple[str, str, str]]:
    return [(result.name, result.outcome, result.reason) for result in results]


def test_the_harness() -> None:
    parser, results = parsed(HARNESS)
    assert told(results) == [
        ("iommufd.simple_close", "ok", ""),
        (
            "iommufd_viommu.no_viommu.vdevice_alloc",
            "skip",
            "Skipping test for variant no_viommu",
        ),
        ("iommufd.cmd_fail", "not ok", ""),
        ("iommufd.known", "xfail", "unknown"),
    ]
    assert results[2].diagnostics == [
        "iommufd.c:73:cmd_fail:Expected 0 (0) == rc (-1)",
        "cmd_fail: Test terminated by assertion",
    ]
    assert (parser.plan, parser.made, parser.running) == (4, 4, "")


def test_subtests() -> None:
    """A parent is told by its subtests, each with a whole name."""
    _, results = parsed(KTAP)
    assert told(results) == [
        ("main_test/example/test_1", "ok", ""),
        ("main_test/example/test_2", "not ok", ""),
        ("other_test/test_1", "ok", ""),
        ("other_test/test_2", "skip", "no such device"),
    ]


def test_subtests_behind_a_comments_sign() -> None:
    _, results = parsed(RUNNER)
    assert told(results) == [
        ("selftests: vfio: vfio_pci_device_test/vfio_pci_device_test.reset", "ok", ""),
        ("selftests: vfio: vfio_pci_device_test/vfio_pci_device_test.validate_bars", "not ok", ""),
        ("selftests: vfio: vfio_pci_driver_test", "skip", ""),
        ("selftests: vfio: slow", "not ok", "TIMEOUT 45 seconds"),
    ]
    assert results[1].diagnostics == ["# it says: ok 7 is a number"]


def test_a_parent_that_fails_by_itself() -> None:
    _, results = parsed("1..1\n  1..1\n  ok 1 a\nnot ok 1 all # leaks memory\n")
    assert told(results) == [("all/a", "ok", ""), ("all", "not ok", "leaks memory")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ok 3 # SKIP no huge pages", ("no huge pages", "skip", "no huge pages")),
        ("ok 3", ("test 3", "ok", "")),
        ("ok", ("test None", "ok", "")),
        ("not ok 1 - a name # TODO not written", ("a name", "skip", "not written")),
        ("ok 1 a#b", ("a#b", "ok", "")),
        ("ok 1 passes # XPASS surprise", ("passes", "xpass", "surprise")),
        ("not ok 2 # error cannot open", ("error cannot open", "not ok", "error cannot open")),
        ("ok 1 a # skip lower", ("a", "skip", "lower")),
    ],
)
def test_directives(line: str, found: tuple[str, str, str]) -> None:
    _, results = parsed(line)
    assert told(results) == [found]


@pytest.mark.parametrize("line", ["okay 1 a", "  ok 1 indented, with no header", "# ok 1 said"])
def test_what_is_no_result(line: str) -> None:
    parser, results = parsed(line)
    assert not results and not parser.made


def test_output_that_ends_in_the_middle() -> None:
    for end in range(len(HARNESS)):
        parser, results = parsed(HARNESS[:end])
        assert len(results) == parser.made <= 4
    parser, _ = parsed(HARNESS[: HARNESS.index("# iommufd.c:73")])
    assert (parser.running, parser.made) == ("iommufd.cmd_fail", 2)
    parser, results = parsed(KTAP[: KTAP.index("  # example failed")])
    assert not results
    assert told(parser.rest()) == [("inner/test_1", "ok", ""), ("inner/test_2", "not ok", "")]


def test_what_the_harness_wrote() -> None:
    parser, results = parsed((CAPTURED / "harness.tap").read_text())
    assert told(results) == [
        ("global.passes", "ok", ""),
        ("global.asserts", "not ok", ""),
        ("global.segfaults", "not ok", ""),
        ("global.killer", "ok", ""),
        ("space.small.map", "ok", ""),
        ("space.huge.map", "skip", "no huge pages"),
        ("slow.hangs", "not ok", ""),
        ("known.bug.fails", "xfail", "unknown"),
        ("known.bug.passes", "xpass", "unknown"),
    ]
    last = {result.name: result.diagnostics[-1:] for result in results}
    assert last["global.segfaults"] == ["segfaults: Test terminated unexpectedly by signal 11"]
    assert last["slow.hangs"] == ["hangs: Test terminated by timeout"]
    assert (parser.plan, parser.made) == (9, 9)


def test_what_the_runner_wrote() -> None:
    parser, results = parsed((CAPTURED / "runner.tap").read_text())
    plain = "selftests: demo: plain"
    assert told(results)[:4] == [
        (f"{plain}/first", "ok", ""),
        (f"{plain}/second: no device", "skip", "second: no device"),
        (f"{plain}/third", "xfail", "third"),
        (f"{plain}/fourth is 4", "not ok", ""),
    ]
    assert results[4].name == "selftests: demo: sample/global.passes"
    assert [result.outcome for result in results[4:]].count("not ok") == 3
    assert len(results) == 13 and not parser.rest()
    assert parser.bail is None, "a subtest's is not the program's"


def test_diagnostics_have_an_end() -> None:
    parser, results = parsed("\n".join([*["# noise"] * 5000, "not ok 1 a"]))
    assert len(results[0].diagnostics) == 200 and parser.made == 1
