# SPDX-License-Identifier: GPL-2.0-or-later
"""What a console is recognised by, with lines as kernels print them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qemu_ioasid import console, logfile
from qemu_ioasid.errors import KernelBroke

STAMP = "[   12.345678] "


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)", "panic"),
        ("BUG: kernel NULL pointer dereference, address: 0000000000000008", "BUG"),
        ("BUG: unable to handle page fault for address: ffffc90000a1f000", "BUG"),
        ("kernel BUG at drivers/vfio/pdma/queue.c:42!", "BUG"),
        ("BUG: sleeping function called from invalid context at mm/slub.c:1", "BUG"),
        ("BUG: spinlock bad magic on CPU#0, swapper/0/1", "BUG"),
        ("Oops: invalid opcode: 0000 [#1] SMP PTI", "oops"),
        ("Oops: general protection fault, probably for non-canonical address", "oops"),
        ("WARNING: CPU: 1 PID: 88 at drivers/iommu/iommufd/device.c:1 foo+0x1/0x2", "WARNING"),
        ("WARNING: drivers/vfio/vfio_main.c:270 at vfio_f+0x1/0x2, CPU#0: python3/44", "WARNING"),
        ("BUG: KASAN: slab-use-after-free in pdma_work+0x10/0x20", "KASAN"),
        ("UBSAN: array-index-out-of-bounds in drivers/x.c:1:2", "UBSAN"),
        ("WARNING: possible circular locking dependency detected", "lockdep"),
        ("WARNING: possible recursive locking detected", "lockdep"),
        ("WARNING: suspicious RCU usage", "lockdep"),
        ("WARNING: inconsistent lock state", "lockdep"),
        ("INFO: task python3:77 blocked for more than 122 seconds.", "hung task"),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [kworker/0:1:11]", "lockup"),
        ("rcu: INFO: rcu_preempt self-detected stall on CPU", "rcu stall"),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "rcu stall"),
        ("WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected", "lockdep"),
        ("WARNING: Nested lock was not taken", "lockdep"),
        ("WARNING: something nobody has seen yet", "WARNING"),
    ],
)
def test_recognised(line: str, kind: str) -> None:
    assert console.classify(STAMP + line) == kind


@pytest.mark.parametrize(
    "line",
    [
        "Linux version 7.2.12 (gcc) #1 SMP PREEMPT",
        "kvm_intel: VMX not supported by CPU 0",
        "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on",
        "debug: turning on the debugger",
        "** NOTICE NOTICE NOTICE **",
        "DMAR: [Firmware Bug]: nothing",
        "rcu: Hierarchical RCU implementation.",
    ],
)
def test_not_a_report(line: str) -> None:
    assert console.classify(STAMP + line) is None


def test_kept_and_excerpted(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with console.attach(ours, "host", tmp_path / "console.log") as log:
        theirs.sendall(b"one\r\ntwo\r\nkernel BUG at a.c:1!\r\n\x1b[0mCall Tr")
        assert log.broken.wait(5)
        theirs.sendall(b"ace:\r\nlast words")
        theirs.close()
        assert log.wait_end(5)
        with pytest.raises(KernelBroke) as caught:
            log.check()
        assert caught.value.message == "host: BUG: kernel BUG at a.c:1!"
        assert caught.value.evidence.splitlines() == [
            "one",
            "two",
            "kernel BUG at a.c:1!",
            "Call Trace:",
            "last words",
        ]
        log.check(seen=1)
        assert log.tail(1) == "last words"
    assert b"last words" in (tmp_path / "console.log").read_bytes()


@pytest.mark.parametrize("said", [b"A", b"\n", b"\x1b[2J\x00\xff\r", b"BUG: again\n"])
def test_a_flood_is_a_report_and_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """Neither memory nor disk grows with it, and the VM never blocks."""
    monkeypatch.setattr(logfile, "LIMIT", 1 << 18)
    monkeypatch.setattr(console, "MOST_LINES", 1 << 14)
    monkeypatch.setattr(console, "LINES", 1 << 10)
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    with console.attach(ours, "g1", tmp_path / "log") as log:
        data = said * ((1 << 20) // len(said))
        for _ in range(50):
            theirs.sendall(data)
        theirs.sendall(b"Kernel panic - not syncing: nobody reads it\n")
        theirs.close()
        assert log.wait_end(10)
        assert len(log._lines) <= console.LINES
        assert max(map(len, log._lines)) <= 4 * console.LINE
        assert len(log.reports) <= console.REPORTS_KEPT
        assert log.broken.is_set()
        with pytest.raises(KernelBroke) as caught:
            log.check()
        kind = "BUG" if b"BUG" in said else "flood"
        assert caught.value.message.startswith(f"g1: {kind}: ")
        assert len(caught.value.evidence) < 1 << 20
        assert all(line.isprintable() for line in log.tail(1000).split("\n"))
    assert (tmp_path / "log").stat().st_size < (1 << 18) + 200
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_the_last_lines_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINES", 10)
    ours, theirs = socket.socketpair()
    with console.attach(ours, "g1", tmp_path / "log") as log:
        theirs.sendall(b"".join(b"line %d\n" % number for number in range(95)))
        theirs.sendall(b"BUG: here\nafter\n" + b"long" * 2000 + b"\n")
        theirs.close()
        assert log.wait_end(5)
        assert log.length == 95 + 2 + 2
        assert log.since(93).split("\n")[:3] == ["line 93", "line 94", "BUG: here"]
        assert log.since(0).split("\n")[0] == "line 89"
        (report,) = log.reports
        assert report.line == 95
        assert log.excerpt(report).split("\n")[:4] == ["line 92", "line 93", "line 94", "BUG: here"]
        assert log.excerpt(console.Report("BUG", 2, "")) == ""
