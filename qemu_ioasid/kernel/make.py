# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own make, in a build folder that is kept between builds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qemu_ioasid import process
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed, RequirementError
from qemu_ioasid.kernel import options

#: Program and the Debian package that has it.
TOOLS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "patch": "patch",
    "xz": "xz-utils",
}
# The same inputs give the same bytes, whoever builds, wherever, whenever, for the nth time.
_FIXED = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan 1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "qemu-ioasid",
    "KBUILD_BUILD_HOST": "qemu-ioasid",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
    # ccache then asks the compiler for the dependencies: a miss costs no second preprocessing.
    "CCACHE_DEPEND": "1",
}
# What make gets of the environment; whatever else stands there may steer it: KCFLAGS, ARCH, W.
_KEPT = ("PATH", "HOME", "TMPDIR")
_KEPT_PREFIXES = ("CCACHE_", "XDG_")
_MADE = re.compile(r"^  [A-Z]\w*(?: \[M\])? +(\S+)$")
_WARNING = re.compile(r"^(\S+?)(?::\d+)*: (warning: .*)$")
_STEP = re.compile(r"^  (CC|AS|LD|AR|HOSTCC)\s")
#: Steps a whole build of the default profile takes, for a first build's percentage.
_USUAL_STEPS = 1700

Progress = Callable[[str], None]


def compiler(deadline: Deadline) -> str:
    """Compiler and linker with their versions; raises RequirementError naming what is missing."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not _has_libelf():
        # objtool, which every x86-64 build runs, is compiled against it.
        missing.append("libelf-dev")
    if missing:
        raise RequirementError(f"building the kernel needs: install {' '.join(missing)}")
    said = [process.run([tool, "--version"], deadline=deadline) for tool in ("gcc", "ld")]
    return "; ".join(text.splitlines()[0] for text in said)


def _has_libelf() -> bool:
    return any(Path(folder, "gelf.h").exists() for folder in ("/usr/include", "/usr/local/include"))


def _make_in(
    folder: Path,
    words: Sequence[str],
    deadline: Deadline,
    on_line: Progress | None = None,
    log: Path | None = None,
) -> str:
    """What make says in *folder*; nothing in the user's environment steers it."""
    foreign = [
        name for name in os.environ if name not in _KEPT and not name.startswith(_KEPT_PREFIXES)
    ]
    env: dict[str, str | None] = {**dict.fromkeys(foreign), **_FIXED}
    # A rustc that PATH or HOME has in one shell and not in the next changes the config.
    steady = ["--no-print-directory", "RUSTC=false"]
    argv = ["make", "-C", str(folder), *steady, *words]
    return process.run(argv, env=env, deadline=deadline, on_line=on_line, log=log)


class Build:
    """The build folder *out* of the source *src*; the caller holds the tree's lock."""

    def __init__(self, src: Path, out: Path, jobs: int) -> None:
        self.src = src
        self.out = out
        self.jobs = jobs
        #: More that make is told whatever it makes.
        self.words: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def _make(
        self, targets: Sequence[str], deadline: Deadline, on_line: Progress | None = None
    ) -> str:
        # What is said of an object comes behind its name, however many are compiled at once.
        words = [f"O={self.out}", f"-j{self.jobs}", "--output-sync=target", *self.words, *targets]
        if shutil.which("ccache"):
            words.append("CC=ccache gcc")
        return _make_in(self.src, words, deadline, on_line, self.out / "build.log")

    def configure(self, asked: Sequence[options.Option], deadline: Deadline) -> None:
        """A .config of *asked* and what that implies, everything else off.

        Raises ConfigurationError naming each option that did not come out as asked.
        """
        self.warnings()
        (self.out / "build.log").unlink(missing_ok=True)
        wanted, made = self.out / "asked.config", self.out / "configured"
        text = "".join(f"{option.name}={option.value}\n" for option in asked)
        if not self._configured(made, text):
            made.unlink(missing_ok=True)
            wanted.write_text(text)
            self._make([f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"], deadline)
            made.write_text(text)
        options.check(asked, (self.out / ".config").read_text(), self._kconfig_files())

    def _configured(self, made: Path, text: str) -> bool:
        """Whether *made* tells of this *text*, and no file that Kconfig read has changed since."""
        try:
            since = made.stat().st_mtime_ns
            return made.read_text() == text and all(
                (self.src / name).stat().st_mtime_ns < since for name in self._kconfigs()
            )
        except OSError:
            return False

    def _kconfigs(self) -> list[str]:
        """The files that Kconfig read for the last build; raises OSError before there was one."""
        told = (self.out / "include/config/auto.conf.cmd").read_text()
        return re.findall(r"^\t(\S*Kconfig\S*)", told, re.MULTILINE)

    def _kconfig_files(self) -> Iterator[Path]:
        try:
            yield from (self.src / name for name in self._kconfigs())
        except OSError:
            yield from self.src.rglob("Kconfig*")

    def compile(self, deadline: Deadline, progress: Progress) -> None:
        """vmlinux, the modules where the config has any, and the user-space headers.

        Raises ProcessFailed with the compiler's words as its message's end. A
        build that was interrupted, by SIGKILL even, is taken up where it ended.
        """
        whole = not (self.out / "vmlinux").exists()
        counter = _Counter(progress, _USUAL_STEPS if whole else 0)
        with self._marked_unfinished():
            try:
                self._make(self._targets(), deadline, counter.line)
            except ProcessFailed as failed:
                raise _explained(failed, self.out / "build.log") from None
            self._make(["headers"], deadline)

    @property
    def tests(self) -> Path:
        """Where the kernel's own tests are."""
        return self.src / "tools/testing/selftests"

    def selftests(
        self, targets: Sequence[str], flags: Sequence[str], deadline: Deadline
    ) -> dict[str, list[Path]]:
        """Compile tools/testing/selftests/TARGET of each; its tests by target, as its Makefile has.

        *flags* are for the compiler. Each test is one file without libraries; a script lies in
        the source. Raises ConfigurationError for a target that this kernel has not, ProcessFailed.
        """
        folder, out = self.tests, self.out / "kselftest"
        for target in targets:
            if not (folder / target / "Makefile").is_file():
                raise ConfigurationError(f"selftest {target}: no such target of {folder}")
        self._make(["headers"], deadline)
        # Their Makefiles know nothing of the headers that they include.
        shutil.rmtree(out, ignore_errors=True)
        words = [f"O={self.out}", f"TARGETS={' '.join(targets)}", "SKIP_TARGETS="]
        words += ["FORCE_TARGETS=1", "USERLDFLAGS=-static -s", f"-j{self.jobs}"]
        words += [f"USERCFLAGS={' '.join(flags)}"]
        log = self.out / "selftest.log"
        log.unlink(missing_ok=True)
        try:
            _make_in(folder, words, deadline, log=log)
        except ProcessFailed as failed:
            raise _explained(failed, log) from None
        found = {}
        for target in targets:
            places = [out / target, folder / target]
            words = ["-s", f"OUTPUT={places[0]}", f"COLLECTION={target}", "emit_tests"]
            said = _make_in(places[1], words, deadline)
            names = re.findall(rf"^{re.escape(target)}:(\S+)$", said, re.MULTILINE)
            files = [[place / name for place in places] for name in names]
            found[target] = [next(filter(Path.is_file, each), each[0]) for each in files]
        return found

    def _targets(self) -> list[str]:
        found = options.parse((self.out / ".config").read_text())
        return ["vmlinux", *(["modules"] if found.get("CONFIG_MODULES") == "y" else [])]

    def modules(self) -> list[Path]:
        """The modules, in an order in which they can be loaded: the link order of the kernel."""
        order = self.out / "modules.order"
        names = order.read_text().split() if "modules" in self._targets() else []
        return [(self.out / name).with_suffix(".ko") for name in names]

    def warnings(self) -> list[str]:
        """What compiler and linker had to warn of in the files there are, without line and column.

        Each once. A file's are kept as long as it is, whichever build has made it.
        """
        kept: dict[str, list[str]] = {}
        with contextlib.suppress(OSError):
            kept = json.loads((self.out / "warnings.json").read_text())
        name = ""
        with contextlib.suppress(OSError):
            for line in (self.out / "build.log").read_text(errors="replace").splitlines():
                if made := _MADE.match(line):
                    name = made[1]
                    kept[name] = []
                elif name and (warned := _WARNING.match(line)):
                    kept[name].append(f"{warned[1].removeprefix('../')}: {warned[2]}")
        kept = {name: said for name, said in kept.items() if said and (self.out / name).exists()}
        temporary = self.out / "warnings.new"
        temporary.write_text(json.dumps(kept, indent=1) + "\n")
        temporary.replace(self.out / "warnings.json")
        return list(dict.fromkeys(line for said in kept.values() for line in said))

    def release(self) -> str:
        """What ``uname -r`` will say."""
        return (self.out / "include/config/kernel.release").read_text().strip()

    @contextlib.contextmanager
    def _marked_unfinished(self) -> Iterator[None]:
        mark = self.out / "unfinished"
        if mark.exists():
            _remove_torn(self.out, mark.stat().st_mtime_ns)
        mark.touch()
        try:
            yield
        except ProcessFailed:
            # make ended by itself, so it has removed what it could not finish.
            mark.unlink()
            raise
        mark.unlink()


class _Counter:
    """Turns make's lines into one calm line now and then."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._steps = 0
        self._next = time.monotonic() + 2

    def line(self, line: str) -> None:
        if not _STEP.match(line):
            return
        self._steps += 1
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 5
            share = min(99, 100 * self._steps // self._total) if self._total else 0
            of = f" ({share} %)" if self._total else ""
            self._progress(f"compiling the kernel: {self._steps} files{of}")


def _remove_torn(out: Path, since: int) -> None:
    """Remove outputs written *since* whose command was not recorded after them.

    A kill may have cut them short. Of older ones some have no record and are whole: objtool is
    linked of such a library, and everything is compiled anew when objtool is.
    """
    for folder, _, names in os.walk(out):
        for name in names:
            if not name.endswith((".o", ".a", ".so", ".dbg", ".ko")) and "vmlinux" not in name:
                continue
            path = Path(folder, name)
            command = path.with_name(f".{name}.cmd")
            with contextlib.suppress(FileNotFoundError):
                written = path.stat().st_mtime_ns
                if written < since or (command.exists() and command.stat().st_mtime_ns >= written):
                    continue
                path.unlink()


def _explained(failed: ProcessFailed, log: Path) -> ProcessFailed:
    """The same failure, saying first what the compiler said rather than what make said."""
    lines = failed.evidence.splitlines()
    said = [line for line in lines if re.search(r"\b(error|undefined reference)\b", line)]
    first = said[0].strip() if said else "no compiler message"
    return ProcessFailed(failed.argv, failed.returncode, f"{failed.evidence}\n{first} (log: {log})")
