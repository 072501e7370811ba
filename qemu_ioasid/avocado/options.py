# SPDX-License-Identifier: GPL-2.0-or-later
"""What a runnable asks for: the settings and its variant's parameters, as options of a run."""

from __future__ import annotations

from avocado.core.nrunner.runnable import Runnable

from qemu_ioasid import kernel
from qemu_ioasid.avocado import reference
from qemu_ioasid.avocado.settings import MATRIX, OTHERS, PARAMETERS, SECTION
from qemu_ioasid.errors import ConfigurationError
from qemu_ioasid.session import Options
from qemu_ioasid.standby import Start


def parameters(runnable: Runnable) -> dict[str, str]:
    """A runnable's variant as names and values."""
    variant = runnable.variant or {}
    return {
        str(name): str(value) for _, found in variant.get("variant", []) for _, name, value in found
    }


def asked(runnable: Runnable) -> Options:
    """The run that a runnable of ours stands for, its report aside.

    A parameter with a dot in its name is a key of the rig file. Raises
    ConfigurationError for one that is neither that nor a setting.
    """
    varied = parameters(runnable)
    if runnable.config.get(MATRIX) and not varied:
        # Avocado then goes on without; the varianter fails on a few small matrices.
        raise ConfigurationError(f"{runnable.config[MATRIX]}: made no variants, see above")
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
