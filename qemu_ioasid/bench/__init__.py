# SPDX-License-Identifier: GPL-2.0-or-later
"""What things cost, here and now. `start` and `registration` have what is measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu_ioasid import config, kernel, session, standby
from qemu_ioasid.bench import cloop, edit, registration, start, table
from qemu_ioasid.bench.table import text
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.report import Report
from qemu_ioasid.session import Options, Output

__all__ = ["edits", "restores", "run", "text"]

#: Raised by one when a key of the document changes its meaning.
SCHEMA = 1


def run(options: Options, rounds: int, output: Output) -> dict[str, Any]:
    """Boot, measure, and return the document; it is in the report's folder too, as bench.json.

    Raises what booting a rig raises.
    """
    configuration = config.parse(registration.RIG, "the benchmark's rig")
    folder = session.report_folder(options.report, "bench")
    report = Report(folder, "bench", output.say, rig=configuration.text, begins=output.begins)
    parts = session.build(options, configuration, output, report)
    built = kernel.build(options.kernel, deadline=Deadline(60, "kernel"), progress=output.progress)
    program = cloop.build(built, Deadline(60, "C loop"))
    load = [os.getloadavg()[0]]
    rigs = start.Rigs(parts)
    with report.phase(f"measure rigs, {rounds} rounds"):
        rows = table.measure(rounds, start.measurements(rigs), start.RATIOS, output.progress)
    with report.phase("measure how many at once"):
        rows.append(table.row("rigs side by side", "rigs", [start.side_by_side(rigs)]))
    with standby.start(
        configuration, parts, options.start, report.phase, output.say, folder
    ) as running:
        with report.phase("warm up"):
            stage = registration.stage(running, program)
        with report.phase(f"measure registrations, {rounds} rounds"):
            rows += table.measure(
                rounds, registration.measurements(stage), registration.RATIOS, output.progress
            )
        load.append(os.getloadavg()[0])
    told = {
        "rounds": rounds,
        "load": load,
        "accelerator": report.accelerator,
        "versions": report.versions,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return _kept(folder, {"results": rows, **told})


def restores(options: Options, count: int, output: Output) -> dict[str, Any]:
    """Restore the default rig *count* times in a row; raises what building its parts raises.

    Interrupted, it has said and written what it found so far.
    """
    folder = session.report_folder(options.report, "restores")
    report = Report(folder, "restores", output.say)
    rigs = start.Rigs(session.build(options, config.load(config.DEFAULT), output, report))
    found = start.Restores(rigs)
    try:
        with report.phase(f"restore it {count} times"):
            for _ in range(count):
                found.once_more()
                output.progress(str(found))
    finally:
        output.say(str(found))
        document = _kept(folder, {"results": [found.row()]})
    return document


def edits(options: Options, names: Sequence[str], rounds: int, output: Output) -> dict[str, Any]:
    """Edit each of the kernel's files *names* *rounds* times; raises what `edit.Edits` does."""
    folder = session.report_folder(options.report, "edits")
    report = Report(folder, "edits", output.say, begins=output.begins)
    words = ["--accel", options.accelerator, "--qemu", options.qemu, f"--append={options.append}"]
    with report.phase("kernel"):
        edited = edit.Edits(options.kernel, words, names, folder, output)
    with report.phase(f"measure edits, {rounds} rounds"):
        rows = table.measure(rounds, edited.measurements(), (), output.progress)
    return _kept(folder, {"results": rows, "rounds": rounds})


def _kept(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The document of what was *found*, which is written to *folder*, too."""
    document = {"schema": SCHEMA, **found, "machine": _machine(), "report": str(folder)}
    (folder / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpus": os.cpu_count(), "model": model[0] if model else ""}
