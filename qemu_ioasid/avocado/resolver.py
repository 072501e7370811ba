# SPDX-License-Identifier: GPL-2.0-or-later
"""Rig files and scenario files as what ``avocado run`` takes."""

from __future__ import annotations

from avocado.core.nrunner.runnable import Runnable
from avocado.core.plugin_interfaces import Resolver
from avocado.core.resolver import ReferenceResolution, ReferenceResolutionResult

from qemu_ioasid.avocado import reference
from qemu_ioasid.errors import ConfigurationError


class RigResolver(Resolver):
    """Gives one runnable a check."""

    name = "ioasid"
    description = "Rig files (*.toml) and scenario files (*.ioasid) of qemu-ioasid"

    def resolve(self, text: str) -> ReferenceResolution:
        """A file that is ours but wrong is told as corrupt, with the reason."""
        try:
            found = reference.read(text, self.config.get("ioasid.scenario") or "isolation")
        except ConfigurationError as error:
            return ReferenceResolution(text, ReferenceResolutionResult.CORRUPT, info=error.message)
        if found is None:
            return ReferenceResolution(
                text,
                ReferenceResolutionResult.NOTFOUND,
                info="neither a rig file (*.toml with host, guest or mdev) nor a *.ioasid file",
            )
        # A runner on another host starts in another folder.
        whole = found.file.absolute()
        return ReferenceResolution(
            text,
            ReferenceResolutionResult.SUCCESS,
            [
                Runnable("ioasid", f"{whole}:{check}", identifier=f"{found.file}:{check}")
                for check in found.checks
            ],
        )
