# SPDX-License-Identifier: GPL-2.0-or-later
"""Bugs of Linux and QEMU as released, each with what shows whether a release has it.

docs/findings.md tells of each under the same name. A reproducer first makes sure
that it could tell (what must work does), then does what the bug spoils.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from qemu_ioasid import config, guestvm, vtd
from qemu_ioasid.config import RigConfig
from qemu_ioasid.deadline import Deadline, calibration
from qemu_ioasid.errors import CallFailed, ConnectionLost, DeadlineExceeded, InfrastructureError
from qemu_ioasid.guestvm import Place
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Completion, Guest, Rig, copy
from qemu_ioasid.scenarios.acts import HALF, OWN_IOVA, SLOT
from qemu_ioasid.scenarios.checks import Checks, Trial, told
from qemu_ioasid.scenarios.table import Row

PREFIX = "finding-"
PAGE = 4096
#: A host VM with mdev a and no guest; and with a guest that has it.
HOST = config.DEFAULT.with_name("host-only.toml")
GUEST = config.DEFAULT.with_name("one-guest.toml")

#: Makes sure that it could tell, then says whether the bug is there, and on the trial, what shows
#: it. What ends otherwise than either is an answer of neither kind: the trial fails.
Observe = Callable[[Rig, Trial], bool]


class Finding(NamedTuple):
    """A bug as released: what is tried on which rig, and which patch of our series mends it.

    *whose* is Linux (the kernel under test), or QEMU (the guests', or the host VM's).
    """

    name: str
    whose: str
    tried: str
    observe: Observe
    rig: Path = HOST
    #: A shell glob of the patch's file name; "" when the series has none.
    fix: str = ""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Patches of our series that would hide it."""
        return (self.fix,) if self.fix else ()

    def rows(self, _: RigConfig) -> list[Row]:
        """The one check there is."""
        return [Row(self.whose, PREFIX + self.name, self.tried, self.judge)]

    def run(self, rig: Rig, report: Report, rows: Sequence[Row], series: bool = False) -> None:
        """Make the check; *series* says that the user named one. A rig that broke is raised."""
        checks = Checks(rig, report)
        for row in rows:
            with report.phase(row.phase), checks.check(row.name, row.tried) as trial:
                row.act(rig, trial, series)

    def judge(self, rig: Rig, trial: Trial, series: bool) -> None:
        """Observe, and compare with the page: it is there, unless a series is to mend it."""
        mended = series and bool(self.fix)
        there = self.observe(rig, trial)
        trial.answered.insert(0, "PRESENT" if there else "GONE")
        if mended:
            trial.require(not there, "the series that was given does not mend it")
        else:
            trial.require(there, "docs/findings.md knows of no release without it")


def _errno(call: Callable[[], object]) -> str:
    """The errno that *call* ends with; "0" for none."""
    try:
        call()
    except CallFailed as error:
        return error.name
    return "0"


# Linux


def _copy_out(rig: Rig, trial: Trial) -> bool:
    """vfio_df_ioctl_attach_pt() undoes another attach than the one that it could not report."""
    host = rig.host.agent
    opened = host.call("device_open", name="a")
    ioas, pasid = opened["ioas"], rig.registrar.alloc(opened["iommufd"])
    handle = host.call(
        "slow_create", iommufd=opened["iommufd"], ioas=ioas, iova=OWN_IOVA, length=2 * PAGE
    )["handle"]
    # Ordinary memory from here on: something for work to be done on.
    host.call("slow_release", handle=handle)

    def work(pasid: int | None) -> str:
        descriptor = copy(pasid, OWN_IOVA, OWN_IOVA + PAGE, PAGE)
        seconds = 20 * calibration()
        (done,) = host.call("device_submit", name="a", descriptors=[descriptor], seconds=seconds)
        return str(done["status"])

    before = work(None), work(pasid)
    trial.require(before == ("DONE", "REFUSED"), f"before, work ends as {before}")
    answer = _errno(
        lambda: host.call("raw_attach", device="a", ioas=ioas, pasid=pasid, readonly=True)
    )
    listed = rig.registrar.kernel_list("a")
    own, named = work(None), work(pasid)
    host.call("device_close", name="a")
    trial.answer(f"attach of PASID {pasid} whose answer cannot be written: {answer}")
    trial.saw(f"the list then: {listed}; work without a PASID: {own}, with it: {named}")
    trial.require(answer == "EFAULT", "the attach must answer EFAULT")
    if (listed, own, named) == ([], "DONE", "REFUSED"):
        return False
    trial.require((listed, own, named) == ([pasid], "FAULT", "DONE"), "neither undone nor kept")
    return True


#: q35's own SATA controller: a function without a PASID capability that no driver has.
_FUNCTION = "0000:00:1f.2"
#: IOMMU_HWPT_ALLOC_PASID, include/uapi/linux/iommufd.h.
_FOR_PASIDS = 1 << 3
#: In range; the first past the table; the first that 20 bits do not hold.
_NO_PASIDS = (5, 1 << 19, 1 << 20)


def _no_pasid_capability(rig: Rig, trial: Trial) -> bool:
    """iommu_attach_device_pasid() says that it has done what no device in the group can."""
    host = rig.host.agent
    iommufd = host.call("device_open", name="a")["iommufd"]
    host.call("file_open", name="sata", device=_FUNCTION)
    devid = host.call("raw_bind", device="sata", iommufd=iommufd)["devid"]
    ioas = rig.registrar.ioas(iommufd)
    hwpt = host.call("hwpt_alloc", iommufd=iommufd, devid=devid, ioas=ioas, flags=_FOR_PASIDS)[
        "hwpt"
    ]
    host.call("raw_attach", device="sata", ioas=hwpt)
    read, root = vtd.reader(rig.host.qmp), vtd.stage(rig.host.qmp).root
    own = vtd.pasid_entry(read, root, _FUNCTION)
    trial.saw(f"work without a PASID: a {vtd.PGTT_NAMES[own.pgtt]} entry")
    answers = set()
    for pasid in _NO_PASIDS:
        attach = functools.partial(host.call, "raw_attach", device="sata", ioas=hwpt, pasid=pasid)
        answer = _errno(attach)
        answers.add(answer)
        try:
            vtd.pasid_entry(read, root, _FUNCTION, pasid)
            entry = "an entry"
        except vtd.NotPresent as missing:
            entry = f"no {missing}"
        trial.answer(f"attach of PASID {pasid:#x}: {answer}, {entry}")
        trial.require(entry != "an entry", f"the IOMMU has an entry for PASID {pasid:#x}")
    host.call("file_close", name="sata")
    host.call("device_close", name="a")
    trial.require(len(answers) == 1, "some PASIDs are attached and some are not")
    return answers == {"0"}


#: How long a killed process may take to die, in seconds: below the hung task detector's.
_DYING = 3.0


def _unkillable_map(rig: Rig, trial: Trial) -> bool:
    """An access sleeps in somebody's memory with the lock that each mapping takes."""
    host = rig.host.agent
    opened = host.call("device_open", name="a")
    space = {"iommufd": opened["iommufd"], "ioas": opened["ioas"]}
    handle = host.call("slow_create", **space, iova=OWN_IOVA, length=2 * PAGE)["handle"]
    seconds = 20 * calibration()

    def killed(number: int) -> tuple[bool, bool]:
        iova = OWN_IOVA + (2 + number) * PAGE
        answer = host.call("map_killed", **space, iova=iova, seconds=_DYING * calibration())
        return answer["waits"], answer["ended"]

    free = killed(0)
    work = copy(None, OWN_IOVA, OWN_IOVA + PAGE, 64)
    under_way = host.start("device_submit", name="a", descriptors=[work], seconds=3 * seconds)
    host.call("slow_wait", handle=handle, seconds=seconds)
    held = killed(1)
    host.call("slow_release", handle=handle)
    (done,) = under_way.result(Deadline(60, "end of the work that slept"))
    host.call("slow_close", handle=handle)
    host.call("device_close", name="a")
    trial.answer(f"a process that maps has to wait, and ends: {free} without an access, {held}")
    trial.saw(f"the access that slept ended then: {done['status']}")
    trial.require(free == (False, True), "it must not wait where nobody sleeps")
    trial.require(done["status"] == "DONE", "the access must end when its memory is there")
    return held == (True, False)


def _map_copy_out(rig: Rig, trial: Trial) -> bool:
    """iommufd_ioas_map() leaves what it mapped when it cannot say where."""
    host = rig.host.agent
    opened = host.call("device_open", name="a")
    space = {"iommufd": opened["iommufd"], "ioas": opened["ioas"], "iova": OWN_IOVA}
    answer = _errno(functools.partial(host.call, "map_unreported", **space))
    left = _errno(functools.partial(host.call, "ioas_unmap", **space, length=PAGE))
    host.call("device_close", name="a")
    trial.answer(f"map whose answer cannot be written: {answer}, unmap then: {left}")
    trial.require(answer == "EFAULT", "the map must answer EFAULT")
    trial.require(left in ("0", "ENOENT"), "the unmap must find it or not")
    return left == "0"


def _unmap_part(rig: Rig, trial: Trial) -> bool:
    """iopt_unmap_iova_range() has removed what comes before the mapping that it refuses."""
    host = rig.host.agent
    opened = host.call("device_open", name="a")
    space = {"iommufd": opened["iommufd"], "ioas": opened["ioas"]}
    whole, reaching = OWN_IOVA, OWN_IOVA + PAGE
    host.call("slow_create", **space, iova=whole, length=PAGE)
    host.call("slow_create", **space, iova=reaching, length=2 * PAGE)

    def unmap(iova: int, length: int) -> str:
        return _errno(functools.partial(host.call, "ioas_unmap", **space, iova=iova, length=length))

    answer = unmap(whole, 2 * PAGE)
    lower, upper = unmap(whole, PAGE), unmap(reaching, 2 * PAGE)
    host.call("reset")
    trial.answer(f"unmap of one and a half mappings: {answer}; then of each: {lower}, {upper}")
    trial.require((answer, upper) == ("ENOENT", "0"), "what reaches out must stay, and be refused")
    trial.require(lower in ("0", "ENOENT"), "the unmap must find the other or not")
    return lower == "ENOENT"


#: How often a register is read: an interrupt in between, and the event is no longer the last.
_READS = 50


def _stale_event(rig: Rig, trial: Trial) -> bool:
    """svm_check_emulate_instruction() heeds the type of an event that is not valid."""
    guest = rig.guests["g1"]
    deadline = Deadline(60, f"{_READS} reads of a register, or end of the guest")
    for number in range(1, _READS + 1):
        reading = guest.agent.start("device_touch", name="a")
        status = "running"
        while not reading.ends_within(0.1) and status == "running":
            status = guest.machine.qmp.execute("query-status", deadline)["status"]
        if status != "running":
            trial.answer(f"read {number} of a register, after a page fault: {status}")
            trial.require(status == "internal-error", "it must go on, or KVM must give it up")
            return True
        reading.result(deadline)
    trial.answer(f"{_READS} reads of a register, each after a page fault, were answered")
    return False


# QEMU


def _qemu(*more: str) -> list[str]:
    """A QEMU in the host VM that runs no code, with mdev a's fd to give to a device."""
    return [
        *Place.qemu,
        *("-machine", "q35", "-accel", "kvm", "-m", "16", "-S"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-object", "iommufd,id=iommufd0,fd={iommufd}", *more),
    ]


def _ended(rig: Rig, argv: list[str]) -> tuple[int, str]:
    """How a QEMU of those arguments ends in the host VM, and the last line that it wrote."""
    host = rig.host.agent
    seconds = 30 * calibration()
    host.call(
        "guest_start",
        name="probe",
        argv=argv,
        memory=2 << 20,
        devices={"a": rig.mdevs["a"]},
        sockets=[],
    )
    try:
        ended = host.call(
            "guest_wait",
            name="probe",
            seconds=seconds,
            deadline=Deadline(40, "end of QEMU in the host VM"),
        )
    finally:
        host.call("guest_stop", name="probe")
        host.call("guest_forget", name="probe")
    return ended["returncode"], (ended["stderr"].strip().splitlines() or ["nothing"])[-1]


def _fd_without_id(rig: Rig, trial: Trial) -> bool:
    """vfio_device_set_fd() takes the length of an id that is not there."""
    device = "vfio-pci,fd={device:a},iommufd=iommufd0"
    named = _ended(rig, _qemu("-device", f"{device},id=vf0"))
    trial.answer(f"with an id, QEMU ends with {named[0]}: {named[1]}")
    trial.require(named[0] == 1, "with an id QEMU must refuse the device, and say why")
    code, said = _ended(rig, _qemu("-device", device))
    trial.answer(f"without one with {code}: {said}")
    trial.require(code in (1, -11), "QEMU must refuse the device or die of SIGSEGV")
    return code == -11


@contextlib.contextmanager
def _booted(rig: Rig, place: type[Place] = Place, **changes: bool) -> Iterator[Guest]:
    """The guest anew, its virtual IOMMU changed as the rig file forbids; ends with the block."""
    parts = rig.host.parts
    assert parts is not None, "session.run gives findings a host VM"
    (name,) = rig.config.guests
    guestvm.stop(rig.host, name, rig.logs)
    del rig.guests[name]
    guest = rig.config.guests[name]
    guest = replace(guest, viommu=replace(guest.viommu, **changes))
    with guestvm.boot(
        rig.host,
        name,
        guest,
        place(parts.guest_viommu, parts.slowness),
        rig.mdevs,
        rig.host.guest_consoles[name],
        rig.host.guest_agents[name],
        rig.logs,
    ) as machine:
        try:
            yield Guest(machine, guest.mdevs)
        finally:
            guestvm.stop(rig.host, name, rig.logs)


def _caching_mode_off(rig: Rig, trial: Trial) -> bool:
    """Without caching mode VFIO learns of no mapping, until it meets one that does not fit."""
    try:
        with _booted(rig, caching_mode=False):
            trial.answer("the guest boots with its device")
            return False
    except InfrastructureError as error:
        wrong = [line for line in error.evidence.splitlines() if "hardware error" in line]
        trial.answer(f"{error.message.partition(': ')[2].partition(':')[0]}: {wrong}")
        trial.require("signal 6" in error.message and bool(wrong), error.message)
        return True


def _fsts(rig: Rig, trial: Trial) -> bool:
    """QEMU shadows the guest's second-stage tables for an assigned device, and no others."""

    def copied(guest: Guest) -> Completion:
        guest.agent.call("ioas_map", name="a", iova=OWN_IOVA, offset=SLOT, length=SLOT)
        return guest.submit("a", copy(None, OWN_IOVA, OWN_IOVA + HALF, HALF))[0]

    before = copied(rig.guests["g1"])
    trial.answer(f"work in memory that the guest mapped, fsts=off: {told(before)}")
    trial.require(before["status"] == "DONE", "it must be done with fsts=off")
    with _booted(rig, fsts=True) as guest:
        after = copied(guest)
    trial.answer(f"fsts=on: {told(after)}")
    faulted = (after["status"], after["error"]) == ("FAULT", errno.ENOENT)
    trial.require(faulted or after["status"] == "DONE", "it must be done or fault with ENOENT")
    return faulted


class _WithHpet(Place):
    hpet = "on"


#: How long a guest's QEMU is watched, in seconds, and how often a second it may wake up idle; a
#: timer of a kernel that has CONFIG_HZ=100 wakes it 100 times.
_WATCHED, _IDLE = 4, 50


def _hpet_keeps_ticking(rig: Rig, trial: Trial) -> bool:
    """hpet_ram_write() sets a timer anew whose interrupt the guest has just turned off."""
    switches = "grep -h ^voluntary /proc/$(pidof qemu-system-x86_64)/status"

    def wakeups() -> float:
        """Of the main loop, in a second."""
        deadline = Deadline(60, "a look at the guest's QEMU")
        said = rig.host.ssh.output(f"{switches}; sleep {_WATCHED}; {switches}", deadline)
        before, after = (int(line.split()[1]) for line in said.decode().splitlines())
        return (after - before) / _WATCHED

    without = wakeups()
    with _booted(rig, _WithHpet):
        having = wakeups()
    trial.answer(f"an idle guest's QEMU wakes up {without:.0f} times a second without an HPET")
    trial.answer(f"with one that its kernel has turned off {having:.0f} times")
    trial.require(without < _IDLE, "without an HPET it must be idle")
    return having - without > _IDLE


#: So often is the host VM stopped and continued; with the bug a guest is gone after a few hundred.
_KICKS, _ROUND = 4000, 100


def _injected_twice(rig: Rig, trial: Trial) -> bool:
    """TCG's VMRUN leaves the vector of an injected interrupt behind as an exception pending."""
    guest, console = rig.guests["g1"], rig.host.guest_consoles["g1"]
    # What it dies of is told here, and nothing that the kernel under test has done.
    console.excuse()
    deadline = Deadline(300, "kicks of the host VM")
    for kicks in range(_ROUND, _KICKS + 1, _ROUND):
        try:
            # A guest that is busy takes interrupts, from its timer and from the agent's port.
            asked = [guest.agent.start("fill")]
            for _ in range(_ROUND):
                asked.append(guest.agent.start("nonce"))
                rig.host.qmp.execute("stop", deadline)
                rig.host.qmp.execute("cont", deadline)
            for each in asked:
                each.result(Deadline(20, "any answer of the guest"))
        except (CallFailed, ConnectionLost, DeadlineExceeded):
            how = console.reports[0].text if console.reports else "without a word on its console"
            trial.answer(f"the guest was gone after {kicks} kicks at most: {how}")
            return True
    trial.answer(f"the guest answers after {_KICKS} kicks")
    return False


FINDINGS = (
    Finding(
        "attach-copy-out",
        "Linux",
        "attach a PASID with the ioctl's struct in memory that the kernel cannot write",
        _copy_out,
        fix="*-vfio-undo-the-attach-*.patch",
    ),
    Finding(
        "pasid-without-capability",
        "Linux",
        "attach PASIDs to a PCI function that has no PASID capability, and read the IOMMU's table",
        _no_pasid_capability,
    ),
    Finding(
        "unkillable-map",
        "Linux",
        "kill a process that maps memory while an access sleeps in the same address space",
        _unkillable_map,
    ),
    Finding(
        "map-copy-out",
        "Linux",
        "map memory with the ioctl's struct in memory that the kernel cannot write",
        _map_copy_out,
    ),
    Finding(
        "unmap-part",
        "Linux",
        "unmap a range that ends within a mapping, and then each mapping by itself",
        _unmap_part,
    ),
    Finding(
        "kvm-stale-event",
        "Linux",
        "read a register of a device anew, right after a page fault, nested in TCG",
        _stale_event,
        rig=GUEST,
        fix="*-KVM-SVM-only-a-valid-EXITINTINFO-*.patch",
    ),
    Finding(
        "vfio-fd-without-id",
        "QEMU of the guests",
        "give a vfio-pci device an fd and no id",
        _fd_without_id,
    ),
    Finding(
        "caching-mode-off",
        "QEMU of the guests",
        "boot a guest with an assigned device behind an intel-iommu with caching-mode=off",
        _caching_mode_off,
        rig=GUEST,
    ),
    Finding(
        "fsts-no-shadow",
        "QEMU of the guests",
        "have an assigned device work in memory that its guest mapped with fsts=on",
        _fsts,
        rig=GUEST,
    ),
    Finding(
        "hpet-keeps-ticking",
        "QEMU of the guests",
        "boot a guest with an HPET, which Linux turns off, and count how often its QEMU wakes up",
        _hpet_keeps_ticking,
        rig=GUEST,
    ),
    Finding(
        "svm-injected-twice",
        "QEMU of the host VM",
        "stop and continue the host VM over and over, while a guest runs in it under TCG",
        _injected_twice,
        rig=GUEST,
        fix="*-KVM-SVM-exit-right-after-*.patch",
    ),
)
