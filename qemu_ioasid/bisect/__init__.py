# SPDX-License-Identifier: GPL-2.0-or-later
"""The commit that broke a kernel, by ``git bisect run`` in a repository of our own.

That borrows the user's objects and checks nothing out; each step builds the
commit that is asked for as ``--kernel tree:PATH@COMMIT`` is built, and tries it
by ``qemu-ioasid run``. What every commit has answered is kept, so that a bisect
that was interrupted goes on where it ended, while what is laid over them is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qemu_ioasid import cache, git, kernel, process, runs, tried
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.errors import ConfigurationError, InfrastructureError, ProcessFailed
from qemu_ioasid.kernel import Spec, series
from qemu_ioasid.kernel.gittree import GitTree
from qemu_ioasid.runs import Found
from qemu_ioasid.session import Output

#: A bisect ends by itself; this is for git alone, in seconds of the reference machine.
_GIT_SECONDS = 600.0
_WHOLE_SECONDS = 7 * 24 * 3600.0
#: What a step ends with. For *bad* none that an interpreter which dies may end with: 1, 2, 120 and
#: from 126 on; `git bisect run` would blame the commit for the first three.
GOOD, BAD, SKIP, STOP = 0, 77, 125, 128
#: The same in codes as git has them: 1 is bad, 125 cannot be tested, at 128 it stops.
_TAKEN = f"case $? in {GOOD}) exit 0;; {BAD}) exit 1;; {SKIP}) exit 125;; *) exit 128;; esac"
_POSSIBLE = re.compile(r"^# possible first bad commit: \[([0-9a-f]+)\]", re.MULTILINE)
_STATE = "bisect.json"
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
    #: What ``qemu-ioasid`` is told at each stage besides the commit.
    stages: dict[str, list[str]]
    #: What `inputs` gave when it began.
    inputs: str
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


def inputs(spec: Spec, repository: Path) -> str:
    """A key of the content of all that is laid over a commit of *repository*.

    Raises ConfigurationError for what is no series.
    """
    if spec.series:
        patches = series.patches(spec.series, Deadline(_GIT_SECONDS, "series"), repository)
    else:
        # Which of ours a commit takes is a matter of its version.
        ours = sorted(kernel.PATCHES.glob("*/series"))
        patches = [patch for each in ours for patch in series.listed(each.parent)]
    files = [*patches, *sorted(spec.fragments.glob("*.config")), *spec.config]
    files += [spec.mutant] if spec.mutant else []
    return cache.digest(*(file.read_bytes() for file in files))


@contextlib.contextmanager
def begin(
    tree: Path,
    ends: tuple[str, str],
    spec: Spec,
    words: Sequence[str],
    say: Callable[[str], None],
    *,
    anew: bool = False,
) -> Iterator[State]:
    """A bisect of *tree* from the good one of *ends* to the bad one; nobody else drives it.

    Kernels are as *spec* has them but for the source, *words* are what ``qemu-ioasid`` is told to
    try them. One that was interrupted goes on, which *say* is told; not *anew*, nor where `inputs`
    have changed. Raises ConfigurationError for what is no kernel's repository, no commit of it, a
    good end that is no ancestor of the bad one, or a bisect that another process drives.
    """
    found = [GitTree(tree, name, Deadline(_GIT_SECONDS, "git")) for name in ends]
    repository, commits = found[0].repository, [each.commit for each in found]
    # What does not come up by itself, or breaks then, is found without guests.
    stages = {"bare": tried.bare(spec), "whole": list(words)}
    key = cache.digest(str(repository), *commits, json.dumps(stages))
    folder = cache.entry("bisect", key)

    def refuse() -> None:
        raise ConfigurationError("this very bisect is under way in another process")

    lock = folder.parent / f".{key}.lock"
    with cache.locked(lock, Deadline(_GIT_SECONDS, "bisect"), refuse):
        state = State(folder, repository, commits[0], commits[1], stages, inputs(spec, repository))
        kept = None if anew else _interrupted(state, say)
        if kept is None:
            _start(state, ends)
        yield kept or state


def _interrupted(wanted: State, say: Callable[[str], None]) -> State | None:
    """The bisect in the folder of the *wanted* one, if that may go on with it."""
    folder = wanted.folder
    if not ((folder / _STATE).is_file() and (folder / "git/BISECT_START").is_file()):
        return None
    kept = load(folder)
    if kept.inputs != wanted.inputs:
        say("the series or the config has changed: the bisect that was interrupted begins anew")
        return None
    say(f"going on with the bisect that was interrupted: {len(kept.answers)} known")
    for answer in kept.answers:
        say(line(answer))
    return kept


def _start(state: State, ends: tuple[str, str]) -> None:
    """Begin *state*, with nothing left of one before; *ends* is how the user named them."""
    reset(state)
    state.folder.mkdir(parents=True)
    _git(state.folder, "clone", "-q", "--bare", "--shared", str(state.repository), str(state.git))
    try:
        _git(state.git, "bisect", "start", "--no-checkout", state.bad, state.good)
    except ProcessFailed as failed:
        reset(state)
        raise ConfigurationError(f"{' and '.join(ends)}: {failed.said}") from None
    state.save()


def drive(state: State, output: Output, step: Sequence[str] = STEP) -> tuple[str, list[str]]:
    """Let git ask for one commit after another; the first bad one, or which it may be.

    Raises InfrastructureError where git or a step failed, or naming the commit at which the rig
    failed, or that is flaky: that one is asked again the next time.
    """
    state.answers = [each for each in state.answers if each.verdict in CODES]
    state.save()

    def told(line: str) -> None:
        if line.startswith(SAY):
            output.say(line.removeprefix(SAY))
        elif line.startswith(PROGRESS):
            output.progress(line.removeprefix(PROGRESS))

    failed: ProcessFailed | None = None
    whole = f"{shlex.join([*step, str(state.folder)])}; {_TAKEN}"
    argv = git.command(["-C", str(state.git), "bisect", "run", "sh", "-c", whole])
    # A step's current folder is not ours.
    env = git.environment({"QEMU_IOASID_CACHE": str(cache.root())})
    try:
        process.run(argv, deadline=Deadline(_WHOLE_SECONDS, "bisect"), env=env, on_line=told)
    except ProcessFailed as error:
        failed = error
    state.answers = load(state.folder).answers
    last = state.answers[-1] if state.answers else None
    if last is not None and last.verdict in ("flaky", "unknown"):
        raise InfrastructureError(
            f"{last.commit[:12]} ({last.subject}) is {_STOPPED[last.verdict]}: {last.why}; "
            "the same command goes on from here"
        )
    if failed is None:
        return _blamed(state), []
    # What git has said may be longer than the end of it that an error has.
    left = _POSSIBLE.findall(_git(state.git, "bisect", "log"))
    if not left:
        raise InfrastructureError("git bisect run failed", evidence=failed.evidence)
    return "", list(dict.fromkeys(left))


def _blamed(state: State) -> str:
    """The first bad commit as git has it; raises InfrastructureError unless that answered so."""
    first = _git(state.git, "rev-parse", "refs/bisect/bad")
    # The bad end need not be asked.
    verdicts = {state.bad: "bad", **{each.commit: each.verdict for each in state.answers}}
    if verdicts.get(first) != "bad":
        answered = verdicts.get(first, "nothing")
        raise InfrastructureError(
            f"git blames {first[:12]}, which has answered {answered}; --anew begins again"
        )
    return first


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
    asked = ["--kernel", f"tree:{state.repository}@{commit}", "--first"]
    started, boots = time.monotonic(), 0
    verdict: Verdict = "good"
    why = ""
    for name, words in state.stages.items():
        places = [state.folder / f"runs/{commit[:12]}-{name}-{at}" for at in (1, 2)]
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        found = runs.run([*words, *asked], places[0], progress)
        boots += found.verdict != "unbuildable"
        if found.verdict == "held":
            continue
        verdict, why = _judged(found), found.why
        if verdict == "bad":
            # Once more, on a fresh VM.
            boots += 1
            verdict, why = _confirmed(found, runs.run([*words, *asked], places[1], progress))
        break
    return Answer(commit, subject, verdict, why, boots, round(time.monotonic() - started, 1))


def _judged(found: Found) -> Verdict:
    verdicts: dict[str, Verdict] = {
        **dict.fromkeys(("failed", "broke"), "bad"),
        **dict.fromkeys(("unbuildable", "lacking"), "skip"),
    }
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
