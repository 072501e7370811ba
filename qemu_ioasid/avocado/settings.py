# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``ioasid.*`` settings. Every process of Avocado's loads this, whatever it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from avocado.core.plugin_interfaces import CLI, Init
from avocado.core.settings import settings

from qemu_ioasid import kernel

SECTION = "ioasid"
#: What a job may set, by configuration file, on the command line, or as a variant's parameter.
PARAMETERS = {
    "qemu": ("auto", "the host VM's QEMU: auto, private (11.1), 10.0 or a program"),
    "accel": ("auto", "auto, kvm or tcg"),
    "profile": ("default", f"the kernel's config profile: {', '.join(kernel.PROFILES)}"),
    "kernel": ("", f"which kernel: {kernel.FORMS}"),
    "series": ("", f"what is laid over it: {kernel.SERIES_FORMS}"),
    "append": ("", "more for the host VM's kernel command line"),
}
#: What it may set beside them.
OTHERS = {
    "scenario": ("isolation", "what is tried on a rig file"),
    "report": ("", "folder for the checks' reports (default: each test's own folder)"),
}
#: Where Avocado's varianter finds the matrix.
MATRIX = "run.cit.parameter_file"
#: What Avocado passes on to the runners, on whichever host they run.
USED = [*(f"{SECTION}.{key}" for key in (*PARAMETERS, *OTHERS, "cold", "strict")), MATRIX]


class Settings(Init):
    """Makes the settings known."""

    name = SECTION
    description = "Settings of qemu-ioasid"

    def initialize(self) -> None:
        """Register each under its section."""
        for key, (default, text) in (PARAMETERS | OTHERS).items():
            settings.register_option(section=SECTION, key=key, default=default, help_msg=text)
        settings.register_option(
            section=SECTION,
            key="cold",
            key_type=bool,
            default=False,
            help_msg="boot every rig, whether it was saved before or not",
        )
        settings.register_option(
            section=SECTION,
            key="strict",
            key_type=bool,
            default=os.environ.get("CI", "").lower() not in ("", "0", "false"),
            help_msg="a missing requirement is an error, not a cancelled test (default: in CI)",
        )


class CommandLine(CLI):
    """Offers the settings as options of ``avocado run``."""

    name = SECTION
    description = "Options of qemu-ioasid for run"

    def configure(self, parser: Any) -> None:
        """Add ``--ioasid-KEY`` for each."""
        run = parser.subcommands.choices.get("run")
        if run is None:
            return
        group = run.add_argument_group("qemu-ioasid options")
        for key in (*PARAMETERS, *OTHERS):
            settings.add_argparser_to_option(
                namespace=f"{SECTION}.{key}",
                parser=group,
                long_arg=f"--ioasid-{key}",
                metavar=key.upper(),
            )
        settings.add_argparser_to_option(
            namespace=f"{SECTION}.cold",
            parser=group,
            long_arg="--ioasid-cold",
            action="store_true",
        )

    def run(self, config: Mapping[str, Any]) -> None:
        """Nothing to do: the settings are read where they are used."""
