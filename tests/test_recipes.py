# SPDX-License-Identifier: GPL-2.0-or-later
"""The recipes for other people's CI: valid by the schemas of GitHub and GitLab, their steps run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*(ROOT / "ci").glob("[!.]*"), ROOT / ".ci/run"]
SCRIPTS = [path for path in SCRIPTS if path.suffix in ("", ".sh") and path.is_file()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("github.yml", ["--builtin-schema", "vendor.github-workflows"]),
        ("gitlab.yml", ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
    ],
)
def test_a_recipe_is_valid(name: str, words: list[str], tmp_path: Path) -> None:
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "check_jsonschema", *words, str(path)]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    ended = check(ROOT / "ci" / name)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    wrong = tmp_path / name
    text = (ROOT / "ci" / name).read_text()
    wrong.write_text(re.sub(r"^( +)(run|script):", r"\1nonesuch:", text, flags=re.MULTILINE))
    assert check(wrong).returncode == 1


def test_shell_scripts() -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "ci/test installs it"
        pytest.skip("no shellcheck on this machine")
    assert len(SCRIPTS) >= 7
    argv = ["shellcheck", "-x", "--source-path", str(ROOT / "ci"), *map(str, SCRIPTS)]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_the_step_of_both(tmp_path: Path) -> None:
    """The plain script that the recipes run, on a kernel that holds and on a word that is none."""
    for name in ("github.yml", "gitlab.yml"):
        assert 'ci/gate "$KERNEL"' in (ROOT / "ci" / name).read_text()
    env = {**os.environ, "SCENARIOS": "flight", "REPORTS": "kept"}
    argv = [str(ROOT / "ci/gate"), "debian:7.2", "nonesuch:x"]
    ended = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "gate: flight on debian:7.2, QEMU auto: exit code 0" in ended.stdout, (
        ended.stdout + ended.stderr
    )
    assert "gate: flight on nonesuch:x, QEMU auto: exit code 2" in ended.stdout
    (folder,) = (tmp_path / "kept").iterdir()
    assert (folder / "junit-flight-debian-7.2-auto.xml").is_file()
    assert (folder / "flight-debian-7.2-auto/report.html").is_file()
    usage = subprocess.run([argv[0]], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "ci/gate KERNEL..." in usage.stderr
