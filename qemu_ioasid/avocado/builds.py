# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel and the images as what checks depend on: Avocado builds them once, before them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from avocado.core.nrunner.runnable import Runnable
from avocado.core.plugin_interfaces import PreTest

from qemu_ioasid.avocado import options
from qemu_ioasid.errors import ConfigurationError

#: Avocado remembers by name, across jobs, what is fulfilled, and waits for ever for what a job
#: that was killed had begun. Our own cache knows better, so no other job has the name.
_JOB = secrets.token_hex(4)


class Builds(PreTest):
    """Has the builds made before a check, where checks run on this machine."""

    name = "ioasid"
    description = "Kernel and images of qemu-ioasid, before its checks"
    is_cacheable = True

    @staticmethod
    def pre_test_runnables(
        test_runnable: Runnable, suite_config: Mapping[str, Any] | None = None
    ) -> list[Runnable]:
        """A runnable for the kernel and one for the images; on other hosts the check builds.

        They *attempt* it only: Avocado would skip the check without a word about the reason,
        where the check itself fails for the same one and says so.
        """
        spawner = (suite_config or {}).get("run.spawner", "process")
        if test_runnable.kind != "ioasid" or spawner != "process":
            return []
        try:
            wanted = options.asked(test_runnable)
        except ConfigurationError:
            return []
        spec = wanted.kernel
        kernel = "-".join(filter(None, [spec.source, spec.series, spec.profile]))
        names = {"ioasid-kernel": kernel, "ioasid-image": wanted.qemu}
        return [
            Runnable(
                kind,
                None,
                config=test_runnable.config,
                variant=test_runnable.variant,
                name=f"{name.replace('/', '_')}-{_JOB}",
                attempt=True,
            )
            for kind, name in names.items()
        ]
