# SPDX-License-Identifier: GPL-2.0-or-later
"""Avocado's remote spawner, made to outlive its hosts.

As shipped (113) it runs a whole task inside ``spawn_task``. So a task on a host
that dies has no result and is told as skipped, the dead host's slot is free and
takes all further tasks, a host that cannot be reached at the start ends the job
with a traceback, and a timeout or Ctrl-C waits for ever for a task to enter a
queue that it never enters. Here a task runs beside the job's loop, what a
runner could not tell is told for it, and a dead host gets nothing more. Logins,
slots, the setup hook and the settings ``spawner.remote.*`` are Avocado's.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from aexpect import remote
from avocado.core.task.runtime import RuntimeTask, RuntimeTaskStatus
from avocado.core.utils import messages
from avocado_spawner_remote import LOG, RemoteSpawner

from qemu_ioasid import process, reaper

#: Avocado itself tells these.
_TERMINATED = (RuntimeTaskStatus.INTERRUPTED, RuntimeTaskStatus.TIMEOUT)


class HostSpawner(RemoteSpawner):
    """Runs each task on the next free host of ``spawner.remote.slots``."""

    description = "Remote hosts (spawner.remote.*), any of which may die"

    def __init__(self, config: Any = None, job: Any = None) -> None:
        super().__init__(config, job)
        self._hosts: list[Any] | None = None
        self._changed = asyncio.Condition()
        self._running: dict[str, asyncio.Task[None]] = {}

    def _log_in(self) -> list[Any]:
        """A session for each slot's host; one that cannot be reached is logged, and left out."""
        # aexpect's helpers, and the ssh of each, outlive Avocado: our keeper finds and ends them.
        os.environ[reaper.TOKEN] = process.current_run().token
        atexit.register(process.close_run)
        sessions = []
        # A terminal's Ctrl-C is ours to pass on, to the task, and not to end their ssh by.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for file in self.config.get("spawner.remote.slots"):
                try:
                    with open(file, encoding="utf-8") as stream:
                        sessions.append(remote.remote_login(**json.load(stream)))
                except (OSError, ValueError, TypeError, remote.RemoteError) as error:
                    LOG.error("%s: no login: %s", file, error)
                else:
                    process.current_run().dies_with_us(Path(sessions[-1].status_filename).parent)
                    atexit.register(sessions[-1].close)
        finally:
            signal.signal(signal.SIGINT, handler)
        return sessions

    async def spawn_task(self, runtime_task: RuntimeTask) -> bool:
        """Have a task run as soon as a host is free; with no host left it ends as an error."""
        name = str(runtime_task.task.identifier)
        self._running[name] = asyncio.ensure_future(self._run(runtime_task))
        return True

    def _free(self) -> Any:
        assert self._hosts is not None
        return next((each for each in self._hosts if not self.slots_cache.get(each)), None)

    async def _run(self, runtime_task: RuntimeTask) -> None:
        if self._hosts is None:
            self._hosts = self._log_in()
        hosts = self._hosts
        async with self._changed:
            await self._changed.wait_for(lambda: self._free() is not None or not hosts)
            session, started = self._free(), time.monotonic()
            if session is None:
                self._tell(runtime_task, "no host is left to run it on", started)
                return
            runtime_task.spawner_handle = session
            self.slots_cache[session] = True
        try:
            ended_well = await super().spawn_task(runtime_task)
        except Exception as error:
            LOG.error("%s: %s", session.host, error)
            ended_well = False
        alive = session.is_alive()
        if not ended_well and runtime_task.status not in _TERMINATED:
            why = "its runner failed there, see job.log" if alive else "the host was lost"
            self._tell(runtime_task, f"on {session.host}: {why}", started)
        async with self._changed:
            if not alive:
                hosts.remove(session)
            self._changed.notify_all()

    def _tell(self, runtime_task: RuntimeTask, reason: str, started: float) -> None:
        """End a task as its runner should have, unless it has, by the clock of its start."""
        task = runtime_task.task
        runners = [suite.runner for suite in self._job.test_suites]
        # Suites run one after another, and each has a repository from its start on.
        status = [each.status_repo for each in runners if hasattr(each, "status_repo")][-1]
        if status.get_task_status(str(task.identifier)) == "finished":
            return
        message = messages.FinishedMessage.get("error", fail_reason=reason)
        begun = task.metadata.get("time_start", started)
        message["time"] = begun + time.monotonic() - started
        message.update(id=str(task.identifier), job_id=task.job_id)
        status.process_message(message)

    def is_task_alive(self, runtime_task: RuntimeTask) -> bool:
        """Whether its command still runs, as far as can be seen from here."""
        running = self._running.get(str(runtime_task.task.identifier))
        return running is not None and not running.done()

    async def wait_task(self, runtime_task: RuntimeTask) -> None:
        """Return when it has ended, and what its runner did not tell has been told."""
        await asyncio.shield(self._running[str(runtime_task.task.identifier)])

    async def terminate_task(self, runtime_task: RuntimeTask) -> bool:
        """Ctrl-C, on the host; a host that does not react is given up."""
        session = runtime_task.spawner_handle
        if session is None:
            return self._running[str(runtime_task.task.identifier)].cancel()
        session.sendcontrol("c")
        grace = self.config.get("runner.task.interval.from_soft_to_hard_termination")
        try:
            await asyncio.wait_for(self.wait_task(runtime_task), grace)
        except TimeoutError:
            session.close()
            return False
        return True
