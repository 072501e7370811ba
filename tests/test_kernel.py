# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel build, on a package that holds a kernel of two files; the real one where it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_ioasid import cache, cli, kernel
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, ProcessFailed, RequirementError
from qemu_ioasid.kernel import make, options, series, source, tree
from tests.conftest import Command

_MAKEFILE = """\
.RECIPEPREFIX = >
allnoconfig:
>grep -v IMPOSSIBLE $(KCONFIG_ALLCONFIG) >$(O)/.config
vmlinux: $(O)/driver.o $(O)/core.o
>cat $^ >$(O)/vmlinux
>touch $(O)/System.map
>mkdir -p $(O)/include/config && echo 7.2.99 >$(O)/include/config/kernel.release
$(O)/%.o: drivers/%.c
>echo "  CC      $*.o"
>while test -e $(O)/slow; do sleep 0.05; done
>gcc -c -o $@ $<
>echo "$@ built" >$(dir $@).$(notdir $@).cmd
headers:
>mkdir -p $(O)/usr/include/linux && touch $(O)/usr/include/linux/some.h
"""
_PATCH = """\
--- a/drivers/driver.c
+++ b/drivers/driver.c
@@ -1 +1 @@
-int driver = 1;
+int driver = {value};
--- /dev/null
+++ b/drivers/new.c
@@ -0,0 +1 @@
+int added;
"""

BUILD = """\
import sys
from pathlib import Path
from qemu_ioasid import kernel
from qemu_ioasid.deadline import Deadline
spec = kernel.Spec(series=sys.argv[1], fragments=Path(sys.argv[2]))
progress = lambda line: print(line, flush=True)
print(kernel.build(spec, deadline=Deadline(60, "build"), progress=progress).cached)
"""


class Small:
    """A cache that holds the small package as if it had been downloaded, and a recipe for it."""

    def __init__(self, folder: Path) -> None:
        self.series = folder / "7.2"
        self.fragments = folder / "config"
        self.lines: list[str] = []
        for made in (self.series, self.fragments):
            made.mkdir()
        (self.fragments / "some.config").write_text("# why\nCONFIG_SOME=y\n")
        self.patch("2")
        self._package(folder / "package")

    def _package(self, folder: Path) -> None:
        src = folder / "linux-source-7.2/drivers"
        src.mkdir(parents=True)
        (src.parent / "Makefile").write_text(_MAKEFILE)
        (src / "driver.c").write_text("int driver = 1;\n")
        (src / "core.c").write_text("int core;\n")
        held = folder / "deb/usr/src"
        held.mkdir(parents=True)
        (folder / "deb/DEBIAN").mkdir()
        (folder / "deb/DEBIAN/control").write_text(
            "Package: linux-source-7.2\nVersion: 7.2.99\nArchitecture: all\n"
            "Maintainer: nobody\nDescription: none\n"
        )
        tarball = held / "linux-source-7.2.tar.xz"
        subprocess.run(["tar", "-cJf", tarball, "-C", folder, "linux-source-7.2"], check=True)
        there = source.Source("linux-source-7.2", "7.2.99", "nowhere")
        entry = cache.entry("kernel-source", there.key)
        entry.mkdir(parents=True)
        deb = ["dpkg-deb", "--build", str(folder / "deb"), str(entry / "source.deb")]
        subprocess.run(deb, check=True, stdout=subprocess.DEVNULL)
        (entry / "sha256").write_text("0" * 64)
        source.remember("7.2", there)

    def patch(self, value: str) -> None:
        """Have the series set the driver's number to *value*."""
        (self.series / "0001-driver.patch").write_text(_PATCH.format(value=value))
        (self.series / "series").write_text("0001-driver.patch # the driver\n")

    def build(self) -> kernel.Kernel:
        """Build it in this process."""
        spec = kernel.Spec(series=str(self.series), fragments=self.fragments)
        return kernel.build(spec, deadline=Deadline(60, "build"), progress=self.lines.append)

    def child(self) -> subprocess.Popen[str]:
        """Build it in a process of its own."""
        argv = [sys.executable, "-c", BUILD, str(self.series), str(self.fragments)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    @property
    def tree(self) -> Path:
        """The unpacked source and the build folder."""
        return cache.entry("kernel-tree", "linux-source-7.2_7.2.99")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path / "cache"))
    return Small(tmp_path)


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = Deadline(20, what)
    while not condition():
        deadline.remaining()
        time.sleep(0.02)


def test_build_then_cached(small: Small) -> None:
    first = small.build()
    assert not first.cached
    assert (first.release, first.source) == ("7.2.99", "linux-source-7.2 7.2.99")
    assert (small.tree / "src/drivers/driver.c").read_text() == "int driver = 2;\n"
    assert (first.headers / "include/linux/some.h").exists()
    assert first.disk.stat().st_size
    started = time.monotonic()
    again = small.build()
    assert time.monotonic() - started < 1
    assert (again.cached, again.hash) == (True, first.hash)
    assert [found.hash for found in kernel.cached()] == [first.hash]
    assert json.loads(first.provenance.read_text())["series"] == ["0001-driver.patch"]


def test_a_changed_patch_rebuilds_its_file_alone(small: Small) -> None:
    first = small.build()
    core = (small.tree / "build-default/core.o").stat().st_mtime_ns
    small.patch("3")
    second = small.build()
    assert second.hash != first.hash
    assert (small.tree / "src/drivers/driver.c").read_text() == "int driver = 3;\n"
    assert (small.tree / "build-default/core.o").stat().st_mtime_ns == core
    (small.series / "series").write_text("")
    small.build()
    assert (small.tree / "src/drivers/driver.c").read_text() == "int driver = 1;\n"
    assert not (small.tree / "src/drivers/new.c").exists()


def test_a_patch_that_does_not_apply_is_named(small: Small) -> None:
    small.build()
    patch = small.series / "0001-driver.patch"
    patch.write_text(_PATCH.format(value="9").replace("driver = 1;", "driver = 5;"))
    with pytest.raises(ConfigurationError, match=r"0001-driver\.patch: does not apply"):
        small.build()
    assert (small.tree / "src/drivers/driver.c").read_text() == "int driver = 2;\n"
    patch.write_text("--- a/../../outside\n+++ b/../../outside\n@@ -0,0 +1 @@\n+x\n")
    with pytest.raises(ConfigurationError, match="leads out of the tree"):
        small.build()
    patch.write_text(_PATCH.format(value="9").replace("drivers/driver.c", "./drivers/driver.c"))
    with pytest.raises(ConfigurationError, match=r"must be drivers/driver\.c"):
        small.build()
    patch.unlink()
    with pytest.raises(ConfigurationError, match="no such patch"):
        small.build()


def test_an_option_that_cannot_be_set_is_named(small: Small) -> None:
    (small.fragments / "more.config").write_text("# why\nCONFIG_IMPOSSIBLE=y\n")
    with pytest.raises(ConfigurationError, match=r"more\.config: CONFIG_IMPOSSIBLE=y"):
        small.build()
    (small.fragments / "more.config").write_text("# CONFIG_SOME is not set\n")
    with pytest.raises(ConfigurationError, match=r"some\.config: CONFIG_SOME=y, but more\.config"):
        small.build()
    (small.fragments / "more.config").write_text("CONFIG_LIKE y\n")
    with pytest.raises(ConfigurationError, match=r"more\.config: not a config line"):
        small.build()


def test_a_compiler_error_is_told(small: Small) -> None:
    small.patch("nonsense")
    with pytest.raises(ProcessFailed, match=r"^make ended with exit code 2: .*driver\.c.*error"):
        small.build()
    small.patch("4")
    assert not small.build().cached


def test_warnings_stay_while_their_object_does(small: Small) -> None:
    """Whichever build has compiled it, and whatever became of that."""
    small.patch("2;\n+#warning one\n+int more")
    patch = small.series / "0001-driver.patch"
    patch.write_text(patch.read_text().replace("+1 @@", "+1,3 @@", 1))
    told = ["drivers/driver.c: warning: #warning one [-Wcpp]"]
    assert small.build().warnings == told
    patch.write_text("Said otherwise.\n" + patch.read_text())
    assert small.build().warnings == told
    small.patch("3")
    assert small.build().warnings == []


def test_the_users_environment_steers_nothing(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MAKEFLAGS", "KCONFIG_CONFIG", "GNUMAKEFLAGS"):
        monkeypatch.setenv(name, "-n" if "FLAGS" in name else "nonesuch")
    assert small.build().vmlinux.stat().st_size


def test_two_at_once(small: Small) -> None:
    small.build()
    slow = small.tree / "build-default/slow"
    slow.touch()
    small.patch("6")
    with small.child() as first, small.child() as second:
        assert first.stdout is not None
        assert second.stdout is not None
        told: list[str] = []
        readers = [
            threading.Thread(target=lambda stream=child.stdout: told.extend(stream), daemon=True)
            for child in (first, second)
        ]
        for reader in readers:
            reader.start()
        _wait(lambda: any("waiting for another build of the same" in x for x in told), "a waiter")
        slow.unlink()
        for reader in readers:
            reader.join(30)
    assert sorted(line for line in told if line in ("True\n", "False\n")) == ["False\n", "True\n"]


def test_sigkill_in_mid_build(small: Small) -> None:
    small.build()
    out = small.tree / "build-default"
    # As tools/ makes them, without a record of the command.
    library = out / "libsubcmd.a"
    library.write_bytes(b"whole")
    (out / "slow").touch()
    small.patch("7")
    child = small.child()
    _wait(lambda: (out / "unfinished").exists(), "start of make")
    child.kill()
    child.communicate()
    _wait(lambda: not list((cache.root() / "kernel").glob(".*-*")), "removal by the keeper")
    (out / "slow").unlink()
    # What a kill may leave: an object newer than its sources and than its command's record.
    (out / "driver.o").write_bytes(b"half")
    os.utime(out / "driver.o", (time.time() + 60, time.time() + 60))
    torn = out / "torn.a"
    torn.write_bytes(b"half")
    built = small.build()
    assert b"half" not in built.vmlinux.read_bytes()
    assert library.exists() and not torn.exists()


def test_nothing_to_be_had(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.root() / "kernel-source/7.2.json").unlink()

    def newest(pattern: str, suite: str, *, deadline: Deadline) -> dict[str, str]:
        raise RequirementError(f"cannot fetch the list of {suite}: no network")

    monkeypatch.setattr("qemu_ioasid.archive.newest", newest)
    with pytest.raises(RequirementError, match=r"no source of Linux 7\.2.*sid: no network"):
        small.build()


def test_the_nearest_newer_source(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"sid": {"linux-source-7.4": "7.4.1", "linux-source-7.1": "7.1.9"}}
    lists["forky"] = {"linux-source-7.3": "7.3.5"}
    monkeypatch.setattr(
        "qemu_ioasid.archive.newest", lambda pattern, suite, *, deadline: lists.get(suite, {})
    )
    found = [str(offer) for offer in source.offered("7.2", Deadline(9, "offers"), True)]
    assert found == ["linux-source-7.3 7.3.5", "linux-source-7.4 7.4.1"]
    # Who names one means that one.
    with pytest.raises(RequirementError, match=r"no source of Linux 7\.2 to be had: "):
        list(source.offered("7.2", Deadline(9, "offers"), False))


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "flex" else f"/{tool}")
    with pytest.raises(RequirementError, match=r"install flex"):
        make.compiler(Deadline(9, "compiler"))


def test_every_fragment_says_why() -> None:
    for fragment in (kernel.PATCHES / "config").glob("*.config"):
        assert fragment.read_text().startswith("# "), fragment
        assert options.read([fragment]), fragment


def test_the_options_of_coverage_can_all_be_set(tmp_path: Path) -> None:
    """The other profiles are built for other tests."""
    deadline = Deadline(600, "config")

    def configure(recipe: kernel._Recipe) -> None:
        # Whichever series the tree had last, and with nobody else at work in it.
        with recipe._worked_in(deadline, print) as built:
            make.Build(built.src, tmp_path, 2).configure(recipe.options, deadline)

    kernel._of_source(kernel.Spec(profile=kernel.COVERAGE), configure, deadline, print)


def test_a_profiles_own_fragment(tmp_path: Path) -> None:
    """It is nobody else's, and has the last word where it differs."""
    (tmp_path / "some.config").write_text("# CONFIG_GROUP is not set\nCONFIG_SOME=y\n")
    (tmp_path / "selftest.config").write_text("CONFIG_GROUP=y\n")
    (tmp_path / "debug.config").write_text("CONFIG_DEBUG=y\n")
    wanted = {
        "default": {"CONFIG_GROUP": "n", "CONFIG_SOME": "y"},
        "debug": {"CONFIG_GROUP": "n", "CONFIG_SOME": "y", "CONFIG_DEBUG": "y"},
        "selftest": {"CONFIG_GROUP": "y", "CONFIG_SOME": "y"},
    }
    for profile, values in wanted.items():
        _, asked = kernel._asked(tmp_path, profile, True)
        assert {option.name: option.value for option in asked} == values
    (tmp_path / "other.config").write_text("CONFIG_SOME=m\n")
    with pytest.raises(ConfigurationError, match="CONFIG_SOME"):
        kernel._asked(tmp_path, "selftest", True)


def test_what_is_configured_already(tmp_path: Path) -> None:
    """It costs as much as compiling a driver, and is done again when anything it reads changed."""
    src, fragments = tmp_path / "src", tmp_path / "fragments"
    for folder in (src, fragments, tmp_path / "out/include/config"):
        folder.mkdir(parents=True)
    (src / "Kconfig").touch()
    (src / "Makefile").write_text(
        "allnoconfig:\n\tcp $(KCONFIG_ALLCONFIG) $(O)/.config; echo >>$(O)/times\n"
    )
    built = make.Build(src, tmp_path / "out", 2)

    def times(text: str) -> int:
        (fragments / "x.config").write_text(text)
        built.configure(options.read([fragments / "x.config"]), Deadline(60, "config"))
        return len((tmp_path / "out/times").read_text().splitlines())

    assert [times("CONFIG_A=y\n"), times("CONFIG_A=y\n")] == [1, 2], "nothing says what it reads"
    (tmp_path / "out/include/config/auto.conf.cmd").write_text("deps_config := \\\n\tKconfig \\\n")
    assert [times("CONFIG_A=y\n"), times("CONFIG_A=y\n")] == [2, 2]
    assert [times("CONFIG_A=m\n"), times("CONFIG_A=m\n")] == [3, 3]
    (src / "Kconfig").touch()
    assert times("CONFIG_A=m\n") == 4


def test_the_real_kernel(built_kernel: kernel.Kernel) -> None:
    assert built_kernel.vmlinux.read_bytes()[:4] == b"\x7fELF"
    assert "CONFIG_IOMMUFD=y" in built_kernel.config.read_text()
    assert (built_kernel.headers / "include/linux/iommufd.h").exists()
    assert (built_kernel.headers / "include/linux/pdma.h").exists()
    started = time.monotonic()
    again = kernel.build(kernel.Spec(), deadline=Deadline(60, "kernel"), progress=print)
    assert again.cached
    assert time.monotonic() - started < 1


def _edit_folder(tmp_path: Path) -> Path:
    """A folder as ``ci/series edit`` leaves them."""
    folder = tmp_path / "pdma"
    (folder / "drivers").mkdir(parents=True)
    (folder / "drivers/one.c").write_text("one\n")
    (folder / "drivers/two.c").write_text("two\n")
    script = (
        "git init -q && git config qemu-ioasid.kernel 7.2 && git config user.name x && "
        "git config user.email x@localhost && git add -A && git commit -qm base && git tag base"
    )
    subprocess.run(["sh", "-c", script], cwd=folder, check=True)
    return folder


def test_a_folder_of_series_edit_counts_as_it_stands(tmp_path: Path) -> None:
    folder = _edit_folder(tmp_path)
    (folder / "drivers/one.c").write_text("committed\n")
    subprocess.run(["git", "commit", "-qam", "one"], cwd=folder, check=True)
    (folder / "drivers/two.c").write_text("edited\n")
    (folder / "drivers/new.c").write_text("new\n")
    deadline = Deadline(30, "git")
    assert series.base(str(folder), deadline) == series.base(str(kernel.SERIES), deadline) == "7.2"
    (patch,) = series.patches(str(folder), deadline)
    status = subprocess.run(
        ["git", "status", "--short"], cwd=folder, capture_output=True, text=True
    ).stdout
    assert status == " M drivers/two.c\n?? drivers/new.c\n"
    tree.Tree(_pristine(tmp_path)).apply([patch], deadline)
    made = tmp_path / "tree/src/drivers"
    assert {path.name: path.read_text() for path in made.iterdir()} == {
        "one.c": "committed\n",
        "two.c": "edited\n",
        "new.c": "new\n",
    }


def _pristine(tmp_path: Path) -> Path:
    src = tmp_path / "tree/src/drivers"
    src.mkdir(parents=True)
    (src / "one.c").write_text("one\n")
    (src / "two.c").write_text("two\n")
    return tmp_path / "tree"


def test_another_git_folder_is_no_series(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with pytest.raises(ConfigurationError, match="neither a series of patches nor a folder"):
        series.base(str(tmp_path), Deadline(30, "git"))


def test_gc_keeps_what_was_used_last(small: Small, command: Command) -> None:
    first = small.build()
    small.patch("3")
    second = small.build()
    os.utime(second.folder, (1, 1))
    rows = command("kernel", "list", "--json").json()
    assert [row["hash"] for row in rows] == [first.hash, second.hash]
    assert all(row["bytes"] > 0 for row in rows)
    assert second.hash in command("kernel", "gc", "--keep", "1").out
    assert first.folder.is_dir() and not second.folder.exists()
    kept = cache.entry("kernel-tree", "linux-source-7.2_7.2.99")
    assert kept.is_dir()
    told = command("kernel", "gc", "--keep", "0", "--json").json()
    assert told["bytes"] > 0 and not kept.exists() and not first.folder.exists()


def test_an_option_that_was_renamed(tmp_path: Path) -> None:
    """It is asked for by both names, and granted by that of the kernel."""
    fragment = tmp_path / "some.config"
    fragment.write_text("CONFIG_SYSCTL=y\n")
    asked = options.read([fragment])
    assert {option.name for option in asked} == {"CONFIG_SYSCTL", "CONFIG_PROC_SYSCTL"}
    for granted in ("CONFIG_SYSCTL=y\nCONFIG_PROC_SYSCTL=y\n", "CONFIG_SYSCTL=y\n"):
        options.check(asked, granted)
    with pytest.raises(options.NotGranted):
        options.check(asked, "CONFIG_SYSCTL=y\n# CONFIG_PROC_SYSCTL is not set\n")


def test_what_an_option_lacks_is_named(tmp_path: Path) -> None:
    kconfig = tmp_path / "Kconfig"
    kconfig.write_text(
        'config ONE\n\tbool "one"\n\tdepends on TWO && \\\n\t\t!THREE\n\tdepends on FOUR\n\n'
        "menuconfig FOUR\n\tbool\n"
    )
    fragment = tmp_path / "some.config"

    def refused(asked: str, granted: str) -> str:
        fragment.write_text(asked)
        with pytest.raises(options.NotGranted) as error:
            options.check(options.read([fragment]), granted, [kconfig])
        return error.value.message

    assert "depends on TWO && !THREE: TWO is not set, THREE is set)" in refused(
        "CONFIG_ONE=y\n", "CONFIG_THREE=y\nCONFIG_FOUR=y\n"
    )
    assert "depends on FOUR: FOUR is not set)" in refused("CONFIG_ONE=y\n", "CONFIG_TWO=y\n")
    assert "no such option" in refused("CONFIG_NONE=y\n", "")
    assert "another option selects or limits it" in refused("CONFIG_FOUR=y\n", "")


def test_a_fragment_of_yours_counts_more(small: Small, tmp_path: Path) -> None:
    own = tmp_path / "own.config"
    own.write_text("CONFIG_SOME=m\n")
    spec = kernel.Spec(series=str(small.series), fragments=small.fragments, config=(own,))
    built = kernel.build(spec, deadline=Deadline(60, "build"), progress=small.lines.append)
    assert built.hash != small.build().hash
    assert "CONFIG_SOME=m" in built.config.read_text()


def test_a_run_is_told_of_the_same_kernel(tmp_path: Path) -> None:
    """Whatever a spec can be told on a command line, another command line has back."""
    own = tmp_path / "own.config"
    patch = tmp_path / "sabotage.patch"
    patch.write_text("Breaks it.\n")
    spec = kernel.Spec(profile="debug", mutant=patch, config=(own, own.with_name("more")))
    for told in (kernel.Spec(), spec.naming("debian:7.3", str(tmp_path))):
        arguments = cli._parser().parse_args(["run", *told.words])
        assert cli._spec(arguments) == told


def test_a_debug_kernel_gets_more_time(built_kernel: kernel.Kernel, tmp_path: Path) -> None:
    assert kernel.slowness(built_kernel.config) == 1.0
    asked = options.read([kernel.PATCHES / "config/debug.config"])
    debug = tmp_path / "config"
    debug.write_text("".join(f"{option.name}={option.value}\n" for option in asked))
    assert kernel.slowness(debug) > 1.0
