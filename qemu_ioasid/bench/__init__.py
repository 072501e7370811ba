# SPDX-License-Identifier: GPL-2.0-or-later
"""What things cost, here and now. `start` and `registration` have what is measured."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from qemu_ioasid import config, kernel, session, standby
from qemu_ioasid.bench import cloop, registration, start, table
from qemu_ioasid.bench.table import text
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.report import Report
from qemu_ioasid.session import Options, Output

__all__ = ["restores", "run", "text"]

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
    document = {
        "schema": SCHEMA,
        "results": rows,
        "rounds": rounds,
        "machine": _machine(),
        "load": load,
        "accelerator": report.accelerator,
        "versions": report.versions,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "report": str(folder),
    }
    (folder / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


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
        document = {
            "schema": SCHEMA,
            "results": [found.row()],
            "machine": _machine(),
            "report": str(folder),
        }
        (folder / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpus": os.cpu_count(), "model": model[0] if model else ""}
