"""Every struct, field and constant of uapi/ against the kernel's headers, by a compiled probe."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

# the header of each module, and spellings that differ from C: nested or anonymous in the header
HEADERS = {
    "iommufd": "linux/iommufd.h",
    "vfio": "linux/vfio.h",
    "pdma": "linux/pdma.h",
    "userfaultfd": "linux/userfaultfd.h",
    "mman": "linux/mman.h",
    "prctl": "linux/prctl.h",
    "random": "linux/random.h",
}
TYPES = {
    "uffd_msg_arg": "__typeof__(((struct uffd_msg *)0)->arg)",
    "uffd_msg_pagefault": "__typeof__(((struct uffd_msg *)0)->arg.pagefault)",
    "uffd_msg_reserved": "__typeof__(((struct uffd_msg *)0)->arg.reserved)",
}
FIELDS = {("uffd_msg_pagefault", "ptid"): "feat.ptid"}
PADDING = {("uffd_msg_pagefault", "_pad")}


def structs(module: ModuleType) -> dict[str, type[ctypes.Structure | ctypes.Union]]:
    """The struct classes a uapi module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure | ctypes.Union)
        and value.__module__ == module.__name__
    }


def constants(module: ModuleType) -> dict[str, int]:
    """The constants a uapi module defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and name.isupper() and not name.startswith("_")
    }


def claims(module: ModuleType) -> dict[str, tuple[str, int]]:
    """What a module says: key to (C expression, value)."""
    said: dict[str, tuple[str, int]] = {}
    for name, value in constants(module).items():
        said[name] = (name, value)
    for name, struct in structs(module).items():
        c_type = TYPES.get(name, f"struct {name}")
        said[f"sizeof {name}"] = (f"sizeof({c_type})", ctypes.sizeof(struct))
        for field, field_type, *_ in struct._fields_:
            if (name, field) in PADDING:
                continue
            member = FIELDS.get((name, field), field)
            offset = getattr(struct, field).offset
            said[f"{name}.{field}"] = (f"offsetof({c_type}, {member})", offset)
            size = f"sizeof((({c_type} *)0)->{member})"
            said[f"sizeof {name}.{field}"] = (size, ctypes.sizeof(field_type))
    return said


def probe(header: str, expressions: list[str], headers: Path, folder: Path) -> list[int]:
    """The values a C program gives these expressions. Fails when one does not compile."""
    included = ("stddef.h", "stdio.h", "linux/ioctl.h", header)
    lines = [*(f"#include <{name}>" for name in included), "int main(void) {"]
    lines += [f'printf("%llu\\n", (unsigned long long)({text}));' for text in expressions]
    lines.append("return 0;}")
    source = folder / "probe.c"
    source.write_text("\n".join(lines))
    binary = folder / "probe"
    command = ["gcc", "-Wall", "-Werror", "-isystem", str(headers), "-o", str(binary), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    output = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    return [int(line) for line in output.split()]


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_uapi_is_the_kernels(name: str, uapi_headers: Path, tmp_path: Path) -> None:
    said = claims(importlib.import_module(f"qemu_ioasid.agent.uapi.{name}"))
    assert said
    found = probe(HEADERS[name], [text for text, _ in said.values()], uapi_headers, tmp_path)
    wrong = {
        key: {"uapi": value, "kernel": truth}
        for (key, (_, value)), truth in zip(said.items(), found, strict=True)
        if value != truth
    }
    assert not wrong


def test_every_module_is_probed() -> None:
    folder = Path(importlib.import_module("qemu_ioasid.agent.uapi").__path__[0])
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "ioctl"}
    assert modules == set(HEADERS)


def test_the_probe_sees_a_wrong_claim(uapi_headers: Path, tmp_path: Path) -> None:
    from qemu_ioasid.agent.uapi import iommufd

    class iommu_destroy(ctypes.Structure):  # noqa: N801
        _fields_ = (("id", ctypes.c_uint32), ("size", ctypes.c_uint32))

    broken = ModuleType(iommu_destroy.__module__)
    vars(broken)["iommu_destroy"] = iommu_destroy
    said = claims(broken)
    found = probe(HEADERS["iommufd"], [text for text, _ in said.values()], uapi_headers, tmp_path)
    values = [value for _, value in said.values()]
    assert values != found
    assert claims(iommufd)["sizeof iommu_destroy"][1] == found[0]
