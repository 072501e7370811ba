# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that holds a lab's rig, from `lab up` to `lab down`."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from qemu_ioasid import cache, config, process, rig, session, standby
from qemu_ioasid.errors import RigError
from qemu_ioasid.lab import place, reopen
from qemu_ioasid.lab.audience import Audience
from qemu_ioasid.lab.life import Kept, Life
from qemu_ioasid.lab.order import Order
from qemu_ioasid.lab.service import Service
from qemu_ioasid.lab.wire import Wire, described
from qemu_ioasid.report import Report
from qemu_ioasid.session import Terminated

#: What the rig of a report is called among the snapshots of the lab that opened it.
OPENED = "opened"


class _Keeper:
    def __init__(self, order: Order, wire: Wire) -> None:
        self.order = order
        self.wire = wire
        self.audience = Audience()
        self.up = False

    def watch_starter(self) -> None:
        """End with whoever started us, as long as the lab is not up."""
        while self.wire.receive() is not None:
            pass
        if not self.up:
            os.kill(os.getpid(), signal.SIGTERM)

    def keep(self) -> None:
        """Start the lab, and have it to its end. Raises what keeps it from coming up."""
        order, output = self.order, self.audience.output
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.audience.told(self.wire))
            sock = stack.enter_context(place.listening())
            given = order.options.rig if order.opened is None else order.opened
            entry = place.claim(order.name, str(given))
            folder = session.report_folder(order.options.report, f"lab-{order.name}")
            entry = replace(entry, report=str(folder))
            place.write(entry)
            _leave_home(folder)
            report = Report(folder, "lab", output.say, begins=output.begins)
            report.progress = output.progress
            service = Service(entry, order.options.kernel, report.phase, self.audience)
            stack.enter_context(service.serving(sock))
            threading.Thread(target=_end_with_folder, daemon=True).start()
            try:
                life = stack.enter_context(self._started(report, folder))
                service.life = life
                self.up = True
                self.wire.tell(ok=service.status())
                self.wire.end()
                service.ended.wait()
            except RigError as error:
                report.fail(error.exit_code, error.message, error.evidence)
                raise
            except Terminated:
                if not self.up:
                    report.fail(143, "ended while it came up", "")
                    raise
            finally:
                if self.up and service.life is not None:
                    _judge(service.life, report)
                with cache.explained(folder):
                    report.write()

    @contextlib.contextmanager
    def _started(self, report: Report, folder: Path) -> Iterator[Life]:
        """The rig that was ordered; it ends with the block, at the latest."""
        options, output = self.order.options, self.audience.output
        with contextlib.ExitStack() as stack:
            states = stack.enter_context(cache.scratch("lab"))
            if self.order.opened is None:
                configuration = config.load(options.rig, options.changes)
                report.rig = configuration.text
                parts = session.build(options, configuration, output, report)
                life = Life(self.order.name, configuration, parts, folder, states)
                started = standby.start(
                    configuration, parts, options.start, report.phase, output.say, folder
                )
            else:
                saved = stack.enter_context(reopen.found(self.order.opened))
                with report.phase("find what the kept rig was made of"):
                    configuration, parts = reopen.parts(saved)
                life = Life(self.order.name, configuration, parts, folder, states)
                life.kept[OPENED] = Kept(saved.folder, parts.disks["modules"], 0.0)
                started = rig.restore(configuration, parts, saved, report.phase, folder)
            report.vms = session.vms(configuration, parts)
            stack.callback(life.end)
            life.begin(started, parts.disks["modules"])
            yield life


def _end_with_folder() -> None:
    place.wait_removed()
    os.kill(os.getpid(), signal.SIGTERM)


def _judge(life: Life, report: Report) -> None:
    report.exit_code = 0
    for vm, reports in life.reports().items():
        for each in reports:
            report.fail(5, f"{vm}: {each['kind']}: {each['text']}", each["excerpt"])
            return


def _leave_home(folder: Path) -> None:
    """Nothing of ours is left at the terminal, or holds the folder we were started in."""
    os.chdir("/")
    log = os.open(folder / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> NoReturn:
    """Keep the lab whose order comes on the socket that the first argument numbers."""
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        frame = wire.receive()
        if frame is not None:
            keeper = _Keeper(pickle.loads(frame[1]), wire)
            threading.Thread(target=keeper.watch_starter, daemon=True).start()
            keeper.keep()
    except RigError as error:
        code = error.exit_code
        with contextlib.suppress(OSError):
            wire.tell(error=described(error))
    except Terminated:
        code = 143
        told = RigError("ended while it came up")
        with contextlib.suppress(OSError):
            wire.tell(error={**described(told), "exit_code": code})
    except Exception as error:
        code = 4
        traceback.print_exc()
        told = RigError(f"bug in the rig: {error!r}", evidence=traceback.format_exc())
        with contextlib.suppress(OSError):
            wire.tell(error=described(told))
    finally:
        # We have come to it: the folder that goes now is no reason to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The end of our connections tells whoever waits that nothing is left.
        process.close_run()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
