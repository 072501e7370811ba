# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``ioasid.*`` settings, and what they and a variant's parameters make of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from avocado.core.nrunner.runnable import Runnable
from avocado.core.plugin_interfaces import CLI, Init
from avocado.core.settings import settings

from qemu_ioasid import kernel
from qemu_ioasid.avocado import reference
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.session import Options
from qemu_ioasid.standby import Start

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
_MATRIX = "run.cit.parameter_file"
#: What Avocado passes on to the runners, on whichever host they run.
USED = [*(f"{SECTION}.{key}" for key in (*PARAMETERS, *OTHERS, "cold", "strict")), _MATRIX]


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


def parameters(runnable: Runnable) -> dict[str, str]:
    """A runnable's variant as names and values."""
    variant = runnable.variant or {}
    return {
        str(name): str(value) for _, found in variant.get("variant", []) for _, name, value in found
    }


def options(runnable: Runnable) -> Options:
    """The run that a runnable of ours stands for, its report aside.

    A parameter with a dot in its name is a key of the rig file. Raises
    ConfigurationError for one that is neither that nor a setting.
    """
    varied = parameters(runnable)
    if runnable.config.get(_MATRIX) and not varied:
        # Avocado then goes on without; the varianter fails on a few small matrices.
        raise ConfigurationError(f"{runnable.config[_MATRIX]}: made no variants, see above")
    changes = {name: value for name, value in varied.items() if "." in name}
    for name in varied:
        if name not in PARAMETERS and name not in changes:
            raise ConfigurationError(
                f"parameter {name}: unknown; known are {', '.join(PARAMETERS)}, "
                "and the keys of the rig file, host.viommu.fsts for example"
            )
    value = {
        key: varied.get(key) or runnable.config.get(f"{SECTION}.{key}") or default
        for key, (default, _) in (PARAMETERS | OTHERS).items()
    }
    spec = kernel.Spec(profile=value["profile"]).naming(value["kernel"], value["series"])
    found = reference.read(runnable.uri, value["scenario"]) if runnable.uri else None
    return Options(
        rig=found.rig if found else Options.rig,
        scenario=found.scenario if found else value["scenario"],
        checks=found.checks if found else (),
        accelerator=value["accel"],
        qemu=value["qemu"],
        changes=changes,
        kernel=spec,
        append=value["append"],
        start=Start(cold=bool(runnable.config.get(f"{SECTION}.cold"))),
    )
