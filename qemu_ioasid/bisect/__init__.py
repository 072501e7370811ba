# SPDX-License-Identifier: GPL-2.0-or-later
"""The commit that broke a kernel, by ``git bisect run`` in a repository of our own.

That borrows the user's objects and checks nothing out; each step builds the
commit that is asked for as ``--kernel tree:PATH@COMMIT`` is built, and tries it
by ``qemu-ioasid run``. What every commit has answered is kept, so that a bisect
that was interrupted goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qemu_ioasid import cache, git, process, runs
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError, ProcessFailed
from qemu_ioasid.kernel.gittree import GitTree
from qemu_ioasid.runs import Found
from qemu_ioasid.session import Output

#: A bisect ends by itself; this is for git alone, in seconds of the reference machine.
_GIT_SECONDS = 600.0
_WHOLE_SECONDS = 7 * 24 * 3600.0
#: What `git bisect run` takes exit codes for: 125 cannot be tested, from 128 on it stops.
GOOD, BAD, SKIP, STOP = 0, 1, 125, 128
_STATE = "bisect.json"
_HEX = set("0123456789abcdef")
#: What git runs for each commit; the state's folder comes behind it.
STEP = (sys.executable, "-m", "qemu_ioasid.cli", "bisect-step")
#: How a step tells its bisect what to show.
SAY, PROGRESS = "qemu-ioasid: ", "qemu-ioasid progress: "

#: *flaky*: it failed, and held on a fresh VM. *unknown*: the rig failed.
Verdict = Literal["good", "bad", "skip", "flaky", "unknown"]
CODES: dict[str, int] = {"good": GOOD, "bad": BAD, "skip": SKIP}
_STOPPED = {"flaky": "FLAKY", "unknown": "not judged, the rig failed"}


@dataclass
class Answer:
    """What a commit answered; *boots* counts runs that got as far as a VM."""

    commit: str
    subject: str
    verdict: Verdict
    why: str = ""
    boots: int = 0
    seconds: float = 0.0


@dataclass
class State:
    """A bisect under way; it is kept in its *folder*."""

    folder: Path
    repository: Path
    good: str
    bad: str
    words: list[str]
    answers: list[Answer] = field(default_factory=list)

    @property
    def git(self) -> Path:
        """The repository of ours that has the bisect's refs."""
        return self.folder / "git"

    def save(self) -> None:
        """Write it, whole or not at all."""
        told = {**dataclasses.asdict(self), "folder": "", "repository": str(self.repository)}
        temporary = self.folder / f"{_STATE}.new"
        temporary.write_text(json.dumps(told, indent=1) + "\n")
        temporary.replace(self.folder / _STATE)


def load(folder: Path) -> State:
    """The state in *folder*."""
    told: dict[str, Any] = json.loads((folder / _STATE).read_text())
    told["answers"] = [Answer(**each) for each in told["answers"]]
    return State(**{**told, "folder": folder, "repository": Path(told["repository"])})


def _git(where: Path, *words: str) -> str:
    return git.run(where, *words, deadline=Deadline(_GIT_SECONDS, "git")).strip()


def begin(tree: Path, good: str, bad: str, words: Sequence[str]) -> tuple[State, bool]:
    """A bisect of *tree*, and whether it goes on with one that was interrupted.

    *words* are what ``qemu-ioasid run`` is told besides the kernel. Raises ConfigurationError for
    what is no kernel's repository, no commit of it, or a *good* that is no ancestor of *bad*.
    """
    found = [GitTree(tree, name, Deadline(_GIT_SECONDS, "git")) for name in (good, bad)]
    repository, ends = found[0].repository, [each.commit for each in found]
    key = cache.digest(str(repository), *ends, *words)
    folder = cache.entry("bisect", key)
    if (folder / _STATE).is_file() and (folder / "git/BISECT_START").is_file():
        return load(folder), True
    shutil.rmtree(folder, ignore_errors=True)
    state = State(folder, repository, ends[0], ends[1], list(words))
    folder.mkdir(parents=True)
    _git(folder, "clone", "-q", "--bare", "--shared", str(repository), str(state.git))
    try:
        _git(state.git, "bisect", "start", "--no-checkout", ends[1], ends[0])
    except ProcessFailed as failed:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigurationError(f"{good} and {bad}: {failed.said}") from None
    state.save()
    return state, False


def drive(state: State, output: Output, step: Sequence[str] = STEP) -> tuple[str, list[str]]:
    """Let git ask for one commit after another; the first bad one, or which it may be.

    Raises InfrastructureError naming the commit at which the rig failed, or that is flaky: that
    one is asked again the next time.
    """
    state.answers = [each for each in state.answers if each.verdict in CODES]
    state.save()

    def told(line: str) -> None:
        if line.startswith(SAY):
            output.say(line.removeprefix(SAY))
        elif line.startswith(PROGRESS):
            output.progress(line.removeprefix(PROGRESS))

    said = ""
    try:
        whole = shlex.join([*step, str(state.folder)])
        argv = git.command(["-C", str(state.git), "bisect", "run", "sh", "-c", whole])
        said = process.run(argv, deadline=Deadline(_WHOLE_SECONDS, "bisect"), on_line=told)
    except ProcessFailed as failed:
        said = failed.evidence
    state.answers = load(state.folder).answers
    last = state.answers[-1] if state.answers else None
    if last is not None and last.verdict in ("flaky", "unknown"):
        raise InfrastructureError(
            f"{last.commit[:12]} ({last.subject}) is {_STOPPED[last.verdict]}: {last.why}; "
            "the same command goes on from here"
        )
    if "is the first bad commit" in said:
        return _git(state.git, "rev-parse", "refs/bisect/bad"), []
    left = [word for word in said.split() if len(word) == 40 and not set(word) - _HEX]
    if "skip" not in said or not left:
        raise InfrastructureError("git bisect run failed", evidence=said)
    return "", list(dict.fromkeys(left))


def step(folder: Path, say: Callable[[str], None]) -> int:
    """Try the commit that git asks for; the exit code that git wants."""
    state = load(folder)
    commit = _git(state.git, "rev-parse", "BISECT_HEAD")
    known = next((each for each in state.answers if each.commit == commit), None)
    if known is None:
        known = _answer(state, commit, lambda line: say(f"{PROGRESS}{commit[:12]}: {line}"))
        state.answers.append(known)
        state.save()
        say(f"{SAY}{line(known)}")
    return CODES.get(known.verdict, STOP)


def _answer(state: State, commit: str, progress: Callable[[str], None]) -> Answer:
    subject = _git(state.git, "show", "-s", "--format=%s", commit)
    kernel = ["--kernel", f"tree:{state.repository}@{commit}", "--first"]
    started, boots = time.monotonic(), 0
    # What does not come up by itself, or breaks then, is found without guests.
    stages = {"bare": runs.BARE, "whole": tuple(state.words)}
    verdict: Verdict = "good"
    why = ""
    for name, words in stages.items():
        places = [state.folder / f"runs/{commit[:12]}-{name}-{at}" for at in (1, 2)]
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        found = runs.run([*words, *kernel], places[0], progress)
        boots += found.verdict != "unbuildable"
        if found.verdict == "held":
            continue
        verdict, why = _judged(found), found.why
        if verdict == "bad":
            # Once more, on a fresh VM.
            boots += 1
            verdict, why = _confirmed(found, runs.run([*words, *kernel], places[1], progress))
        break
    return Answer(commit, subject, verdict, why, boots, round(time.monotonic() - started, 1))


def _judged(found: Found) -> Verdict:
    verdicts: dict[str, Verdict] = {"failed": "bad", "broke": "bad", "unbuildable": "skip"}
    return verdicts.get(found.verdict, "unknown")


def _confirmed(first: Found, second: Found) -> tuple[Verdict, str]:
    if second.verdict == "held":
        return "flaky", f"first {first.why}, then it held; reports: {first.folder.parent}"
    return _judged(second), second.why if _judged(second) == "unknown" else first.why


def line(answer: Answer) -> str:
    """An answer in one line."""
    why = f" ({answer.why})" if answer.why else ""
    return f"{answer.seconds:7.1f} s  {answer.commit[:12]} {answer.verdict}{why}: {answer.subject}"


def reset(state: State) -> None:
    """Forget the bisect; its runs' reports go with it."""
    shutil.rmtree(state.folder, ignore_errors=True)
