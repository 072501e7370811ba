# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels and series by name: what each word stands for, and that nobody's tree is changed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qemu_ioasid import cache
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.kernel import origin, series, tree

MAKEFILE = "VERSION = 7\nPATCHLEVEL = 2\nSUBLEVEL = 1\n"
DRIVER = "".join(f"int line{number};\n" for number in range(9))


def git(folder: Path, *words: str) -> str:
    """What git says in *folder*."""
    who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    argv = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def deadline() -> Deadline:
    return Deadline(60, "origin")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_IOASID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """A git repository that looks like a kernel's, of three commits."""
    folder = tmp_path / "linux"
    (folder / "drivers").mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "other.c").write_text("int other;\n")
    (folder / ".gitignore").write_text("*.o\n")
    (folder / "drivers/driver.c").write_text(DRIVER)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "base")
    for number in (1, 2):
        text = (folder / "drivers/driver.c").read_text()
        (folder / "drivers/driver.c").write_text(text.replace(f"line{number};", f"made{number};"))
        git(folder, "commit", "-qam", f"Make {number}")
    return folder


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below *folder*, with its time; git gives objects that it meets again new ones."""
    return {
        (name := str(path.relative_to(folder))): (
            path.read_bytes(),
            0 if name.startswith(".git/objects/") else path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def laid_out(found: origin.Origin, deadline: Deadline) -> tree.Tree:
    kept = origin.laid_out(found, deadline, lambda line: None)
    found.renew(kept, deadline)
    return kept


def named(word: str, deadline: Deadline) -> origin.Origin:
    (found,) = origin.find(word, False, deadline, lambda line: None)
    return found


def test_a_work_tree_as_it_stands_and_untouched(linux: Path, deadline: Deadline) -> None:
    clean = named(f"tree:{linux}", deadline)
    assert (
        not str(clean).endswith("dirty")
        and clean.base == "7.2"
        and str(clean).startswith(f"{linux} ")
    )
    (linux / "drivers/driver.c").write_text("int edited;\n")
    (linux / "drivers/new.c").write_text("int new;\n")
    (linux / "drivers/driver.o").write_text("object\n")
    git(linux, "add", "drivers/new.c")
    (linux / "other.c").unlink()
    before = everything(linux)
    found = named(f"tree:{linux}/drivers", deadline)
    kept = laid_out(found, deadline)
    assert everything(linux) == before
    assert str(found).endswith(", dirty") and found.content != clean.content
    assert found.key == clean.key
    assert (kept.src / "drivers/driver.c").read_text() == "int edited;\n"
    assert sorted(path.name for path in kept.src.rglob("*.*")) == [
        ".gitignore",
        "driver.c",
        "new.c",
    ]


def test_another_commit_writes_what_differs(linux: Path, deadline: Deadline) -> None:
    kept = laid_out(named(f"tree:{linux}@HEAD~2", deadline), deadline)
    assert (kept.src / "drivers/driver.c").read_text() == DRIVER
    before = everything(kept.src)
    patch = series.patches("HEAD~2..HEAD~1", deadline, linux)
    kept.apply(patch, deadline)
    assert "made1" in (kept.src / "drivers/driver.c").read_text()
    again = laid_out(named(f"tree:{linux}@HEAD", deadline), deadline)
    assert again.folder == kept.folder
    assert "made2" in (kept.src / "drivers/driver.c").read_text()
    after = everything(kept.src)
    changed = [name for name in after if after[name] != before[name]]
    assert changed == ["drivers/driver.c"]
    # Back to where a series was laid over it: nothing of that is left.
    laid_out(named(f"tree:{linux}@HEAD~2", deadline), deadline)
    assert (kept.src / "drivers/driver.c").read_text() == DRIVER


def test_a_git_that_was_killed_is_no_hindrance(linux: Path, deadline: Deadline) -> None:
    kept = laid_out(named(f"tree:{linux}@HEAD~2", deadline), deadline)
    (kept.folder / "git.index.lock").touch()
    laid_out(named(f"tree:{linux}", deadline), deadline)
    assert "made2" in (kept.src / "drivers/driver.c").read_text()


def test_somebody_elses_repository(
    linux: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(ConfigurationError, match=r"no git repository .*dubious ownership"):
        named(f"tree:{linux}", deadline)


def test_a_file_that_a_series_takes_away_comes_back_as_it_was(
    linux: Path, tmp_path: Path, deadline: Deadline
) -> None:
    (linux / "other.c").chmod(0o755)
    git(linux, "commit", "-qam", "It can be run")
    kept = laid_out(named(f"tree:{linux}", deadline), deadline)
    patch = tmp_path / "gone.patch"
    patch.write_text("--- a/other.c\n+++ /dev/null\n@@ -1 +0,0 @@\n-int other;\n")
    kept.apply([patch], deadline)
    assert not (kept.src / "other.c").exists()
    kept.apply([], deadline)
    assert (kept.src / "other.c").stat().st_mode & 0o777 == 0o755


def test_a_tree_that_has_it(linux: Path, deadline: Deadline) -> None:
    found = named(f"tree:{linux}", deadline)
    assert found.has("drivers/driver.c") and not found.has("drivers/vfio/pdma/Makefile")


def test_a_tarball(linux: Path, tmp_path: Path, deadline: Deadline) -> None:
    path = tmp_path / "linux.tar.gz"
    subprocess.run(["tar", "-czf", path, "-C", linux.parent, "linux"], check=True)
    found = named(f"tarball:{path}", deadline)
    assert (found.base, str(found)) == ("7.2", "linux.tar.gz")
    assert found.has("other.c") and not found.has("none.c")
    assert (laid_out(found, deadline).src / "other.c").is_file()
    path.write_bytes(b"no tar")
    with pytest.raises(ConfigurationError, match=r"tarball:.*linux.tar.gz: "):
        named(f"tarball:{path}", deadline)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("7.2", "must be one of debian:7.2"),
        ("debian:seven", "must be one of"),
        ("tree:", "must be one of"),
        ("tree:{tmp}/none", "tree:.*/none: no such folder"),
        ("tree:{linux}@nonesuch", "no commit nonesuch"),
        ("tree:{tmp}", "no git repository"),
        ("tree:{tmp}/other", "holds no kernel source|no kernel: no Makefile"),
        ("tarball:{tmp}/none", "tarball:.*/none: No such file"),
    ],
)
def test_words_that_name_nothing(
    word: str, message: str, linux: Path, tmp_path: Path, deadline: Deadline
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "none")
    with pytest.raises(ConfigurationError, match=message):
        named(word.format(linux=linux, tmp=tmp_path), deadline)


def test_series_in_each_form(linux: Path, tmp_path: Path, deadline: Deadline) -> None:
    """All of them come to the same tree."""
    whole = git(linux, "show", "HEAD:drivers/driver.c")
    mails = tmp_path / "mails"
    git(linux, "format-patch", "-q", "--cover-letter", "-o", str(mails), "HEAD~2")
    box = tmp_path / "box"
    box.write_text("".join(path.read_text() for path in sorted(mails.iterdir())))
    (mails / "series").write_text("0001-Make-1.patch\n0002-Make-2.patch\n")
    plain = tmp_path / "plain.patch"
    plain.write_text(git(linux, "diff", "HEAD~2") + "\n")
    forms = {
        str(mails): 2,
        str(box): 2,
        str(plain): 1,
        f"{linux}:HEAD~2..HEAD": 2,
        "HEAD~2..": 2,
    }
    for word, count in forms.items():
        patches = series.patches(word, deadline, linux)
        assert len(patches) == count, word
        kept = laid_out(named(f"tree:{linux}@HEAD~2", deadline), deadline)
        kept.apply(patches, deadline)
        assert (kept.src / "drivers/driver.c").read_text().strip() == whole, word
    assert [path.name for path in series.patches(str(box), deadline)] == [
        "0002-Make-1.patch",
        "0003-Make-2.patch",
    ]


def test_what_users_set_for_their_own_patches(
    linux: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("format.coverLetter=true", "diff.noprefix=true", "format.suffix=.txt")
    for setting in (*settings, "format.attach=x", "color.ui=always"):
        git(linux, "config", *setting.split("="))
    patches = series.patches("HEAD~2..HEAD", deadline, linux)
    assert [path.name for path in patches] == ["0001-Make-1.patch", "0002-Make-2.patch"]
    kept = laid_out(named(f"tree:{linux}@HEAD~2", deadline), deadline)
    kept.apply(patches, deadline)
    assert "made2" in (kept.src / "drivers/driver.c").read_text()


def test_a_mail_in_base64(linux: Path, tmp_path: Path, deadline: Deadline) -> None:
    import base64

    text = git(linux, "diff", "HEAD~1") + "\n"
    mail = tmp_path / "mail"
    mail.write_text(
        "From: somebody <x@localhost>\nSubject: [PATCH] Ünd noch eins\nMIME-Version: 1.0\n"
        "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\n"
        + base64.encodebytes(f"Why.\n---\n{text}".encode()).decode()
    )
    (patch,) = series.patches(str(mail), deadline)
    assert text in patch.read_text() and "Why." in patch.read_text()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nonesuch", "must be one of none"),
        ("../typo.mbox", "../typo.mbox: no such file"),
        ("HEAD..HEAD", "needs a git repository"),
        ("{linux}:HEAD..HEAD", "has no commit in it"),
        ("{linux}:a..b", "series .*linux: "),
        ("{tmp}", "series: No such file"),
        ("{tmp}/letter", "no mail in it has a patch"),
    ],
)
def test_series_that_are_none(
    word: str, message: str, linux: Path, tmp_path: Path, deadline: Deadline
) -> None:
    (tmp_path / "letter").write_text("From: x\nSubject: hello\n\nNo patch.\n")
    with pytest.raises(ConfigurationError, match=message):
        series.patches(word.format(linux=linux, tmp=tmp_path), deadline)


def test_a_patch_that_does_not_apply_is_named_with_its_hunk(
    linux: Path, tmp_path: Path, deadline: Deadline
) -> None:
    patch = tmp_path / "0001-x.patch"
    patch.write_text(git(linux, "diff", "HEAD~1") + "\n")
    kept = laid_out(named(f"tree:{linux}", deadline), deadline)
    with pytest.raises(tree.PatchRefused, match=r"0001-x\.patch: does not apply: .*Hunk #1"):
        kept.apply([patch], deadline)


def test_paths_are_made_absolute(
    linux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert origin.anchored("tree:~/linux@v7.2", tmp_path) == "tree:/home/x/linux@v7.2"
    assert series.anchored("~/linux:a..b", tmp_path) == "/home/x/linux:a..b"
    assert (
        origin.anchored("image:a,modules=b", tmp_path) == f"image:{tmp_path}/a,modules={tmp_path}/b"
    )
    assert origin.anchored("tree:linux@HEAD", tmp_path) == f"tree:{linux}@HEAD"
    assert origin.anchored("debian:7.2", tmp_path) == "debian:7.2"
    assert origin.anchored("", tmp_path) == series.anchored("", tmp_path) == ""
    assert series.anchored("linux:a..b", tmp_path) == f"{linux}:a..b"
    assert series.anchored("a..b", tmp_path) == "a..b"
    assert series.anchored("linux", tmp_path) == str(linux)


def test_the_cache_has_it_all(linux: Path, deadline: Deadline) -> None:
    laid_out(named(f"tree:{linux}", deadline), deadline)
    assert sorted(os.listdir(cache.root())) == ["kernel-git", "kernel-tree"]


def test_in_a_hook_of_another_repository(
    linux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: Deadline
) -> None:
    """What git tells its hooks, and `git bisect run` what it runs, is not about the user's tree."""
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "none")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    found = named(f"tree:{linux}", deadline)
    assert (
        not str(found).endswith("dirty") and (laid_out(found, deadline).src / "other.c").is_file()
    )
    assert len(series.patches("HEAD~2..HEAD", deadline, linux)) == 2
