# SPDX-License-Identifier: GPL-2.0-or-later
"""Rigs for tests: fresh ones, and one that is kept and reset from test to test."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_ioasid import session, standby
from qemu_ioasid.config import RigConfig
from qemu_ioasid.errors import RigError
from qemu_ioasid.hostvm import HostParts
from qemu_ioasid.process import current_run
from qemu_ioasid.report import Report
from qemu_ioasid.rig import Rig
from qemu_ioasid.session import Options, Output


@dataclass(frozen=True)
class Used:
    """A running rig, what it is made of, and the folder that its consoles and logs are in."""

    rig: Rig
    config: RigConfig
    parts: HostParts
    versions: dict[str, Any]
    accelerator: str
    logs: Path

    def keep(self, folder: Path, name: str, *, snapshot: bool) -> None:
        """Copy the logs to *folder*, and, if asked, save the rig as it stands beside them.

        What cannot be saved is said in a file there: the failure at hand is not hidden by it.
        """
        shutil.copytree(self.logs, folder, dirs_exist_ok=True)
        report = Report(folder, name, lambda line: None, rig=self.config.text)
        report.accelerator, report.exit_code = self.accelerator, 1
        report.versions, report.vms = self.versions, session.vms(self.config, self.parts)
        report.write()
        if snapshot:
            target = folder / "snapshot"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(mode=0o700)
            try:
                self.rig.save(target, standby.identity(self.config, self.parts))
            except (RigError, OSError) as error:
                shutil.rmtree(target, ignore_errors=True)
                (folder / "no-snapshot.txt").write_text(f"{error}\n")


class Pool:
    """Starts rigs; kernel, images and QEMU are looked up once for all of the same options.

    What their kernels count (profile ``coverage``) goes below *counts*.
    """

    def __init__(self, output: Output, counts: Path = Path("reports/coverage")) -> None:
        self._output = output
        self._counts = counts
        self._started = 0
        self._built: dict[tuple[object, ...], tuple[HostParts, Report]] = {}
        self._shared: Used | None = None
        self._life = contextlib.ExitStack()

    def _parts(self, config: RigConfig, options: Options) -> tuple[HostParts, Report]:
        key = (options.kernel, options.qemu, options.accelerator, options.append)
        if key not in self._built:
            report = Report(Path(os.devnull), "", lambda line: None)
            parts = session.build(options, config, self._output, report)
            self._built[key] = parts, report
        parts, report = self._built[key]
        session.check(config, parts.qemu, parts.accelerator)
        return parts, report

    def parts(self, config: RigConfig, options: Options) -> HostParts:
        """What rigs of these *options* are made of, built if need be."""
        return self._parts(config, options)[0]

    @contextlib.contextmanager
    def fresh(self, config: RigConfig, options: Options) -> Iterator[Used]:
        """A rig for one user, restored; it and its logs end with the block."""
        parts, report = self._parts(config, options)
        with contextlib.ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=current_run().folder)))
            running = stack.enter_context(
                standby.start(config, parts, options.start, report.phase, self._output.say, logs)
            )
            self._started += 1
            counts = self._counts / f"{current_run().token}-{self._started}"
            stack.enter_context(session.counted(running, counts, self._output.say))
            yield Used(running, config, parts, report.versions, report.accelerator, logs)

    def shared(self, config: RigConfig, options: Options) -> Used:
        """The kept rig, when it is of this *config* and *options*; else another, kept now."""
        parts, _ = self._parts(config, options)
        if self._shared is None or (self._shared.config, self._shared.parts) != (config, parts):
            self.discard()
            with contextlib.ExitStack() as life:
                self._shared = life.enter_context(self.fresh(config, options))
                self._life = life.pop_all()
        assert self._shared is not None
        return self._shared

    def discard(self) -> None:
        """End the kept rig: the next one is another. Its consoles were judged by its users."""
        self._shared = None
        life, self._life = self._life, contextlib.ExitStack()
        with contextlib.suppress(RigError):
            life.close()

    def close(self) -> None:
        """End what is kept."""
        self.discard()
