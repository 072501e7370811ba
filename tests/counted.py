# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel that is a program and counts what runs, built by kbuild's own words."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from qemu_ioasid import client, gcov, kernel
from qemu_ioasid.deadline import Deadline
from qemu_ioasid.gcov import Coverage

_MAKEFILE = """\
VERSION = 7
PATCHLEVEL = 2
.RECIPEPREFIX = >
CFLAGS_MODULE =
CFLAGS_KERNEL =
CFLAGS_GCOV := -fprofile-arcs -ftest-coverage
export CFLAGS_GCOV CFLAGS_KERNEL CFLAGS_MODULE
allnoconfig:
>cp $(KCONFIG_ALLCONFIG) $(O)/.config
headers:
>mkdir -p $(O)/usr/include/linux
vmlinux:
>$(MAKE) -C $(O) -f $(CURDIR)/Makefile.build srctree=$(CURDIR) obj=init init/main.o
>$(MAKE) -C $(O) -f $(CURDIR)/Makefile.build srctree=$(CURDIR) obj=drivers drivers/dma/main.o
>$(MAKE) -C $(O) -f $(CURDIR)/Makefile.build srctree=$(CURDIR) obj=drivers drivers/dma/late.o
>cd $(O) && gcc -o vmlinux init/main.o drivers/dma/main.o -lgcov && touch System.map
>mkdir -p $(O)/include/config && echo 7.2.99 >$(O)/include/config/kernel.release
"""
# The condition is that of scripts/Makefile.lib.
_BUILD = """\
include .config
target-stem = $(basename $(patsubst $(obj)/%,%,$@))
_c_flags = -O2
ifeq ($(CONFIG_GCOV_KERNEL),y)
_c_flags += $(if $(patsubst n%,, \\
		$(GCOV_PROFILE_$(target-stem).o)$(GCOV_PROFILE)\\
		$(if $(is-kernel-object),$(CONFIG_GCOV_PROFILE_ALL))), \\
		$(CFLAGS_GCOV))
endif
$(obj)/%.o: $(srctree)/$(obj)/%.c
	mkdir -p $(dir $@)
	gcc $(_c_flags) $(CFLAGS_KERNEL) -c -o $@ $<
"""
_INIT = """\
#include <stdlib.h>
int dma_copy(int length);
int main(int argc, char **argv)
{
	return dma_copy(atoi(argv[1]));
}
"""
_HEADER = """\
static inline int limit(int length)
{
	if (length > 1000)
		return 1000;
	return length;
}
"""
_DRIVER = """\
#include "dma.h"

int dma_copy(int length)
{
	return limit(length) < 0;
}
"""
_FIRST = """\
#include "dma.h"

static int dma_check(int length)
{
	if (length == 0)
		return 2;
	if (length < 0)
		return 3;
	return 0;
}

int dma_copy(int length)
{
	int ret;

	ret = dma_check(length);
	if (ret)
		goto err_out;
	return limit(length) < 0;

err_out:
	return ret;
}
"""
_SECOND = _FIRST.replace("length == 0", "length == 0 || length == 7").replace(
    "return 3;", "return 4;"
)

# The agent's own server and operation, on a folder as debugfs has it.
_AGENT = """\
import sys
from qemu_ioasid.agent import gcov, server
gcov.FOLDER = sys.argv[1]
class Role:
    operations = gcov.operations
    def close(self):
        pass
server._role = lambda name, emit: Role()
server.main("host")
"""


class Small:
    """A kernel's git tree with a series of two patches on top of the tag ``base``."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "linux"
        self.repository.mkdir()
        self._git("init", "-q")
        files = {"Makefile": _MAKEFILE, "Makefile.build": _BUILD, "init/main.c": _INIT}
        self.commit(
            "base",
            **files,
            **{"drivers/dma/main.c": _DRIVER, "drivers/dma/dma.h": _HEADER, "tools/a.c": ""},
            **{"drivers/dma/late.c": "int late;\n"},
        )
        self.commit(
            "first",
            **{
                "drivers/dma/main.c": _FIRST,
                "drivers/dma/dma.h": _HEADER.replace("return 1000", "return 999"),
                "tools/a.c": "int probe;\n",
            },
        )
        self.commit(
            "second",
            **{
                "drivers/dma/main.c": _SECOND,
                "drivers/dma/late.c": "int late(void)\n{\n\treturn 5;\n}\n",
                "drivers/dma/spare.c": "int spare(void)\n{\n\treturn 6;\n}\n",
            },
        )
        self.fragments = folder / "config"
        self.fragments.mkdir()
        (self.fragments / "coverage.config").write_text("# counts\nCONFIG_GCOV_KERNEL=y\n")
        self.runs = 0
        self.folder = folder

    def _git(self, *words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", self.repository, *who, *words], check=True)

    def commit(self, name: str, **files: str) -> None:
        """All that stands there, and *files*, as the tag *name*."""
        for path, text in files.items():
            (self.repository / path).parent.mkdir(parents=True, exist_ok=True)
            (self.repository / path).write_text(text)
        self._git("add", "-A")
        self._git("commit", "-q", "-m", name)
        self._git("tag", name)

    def build(self, series: str = "base..second", profile: str = "coverage") -> kernel.Kernel:
        """Its kernel, from the cache or built."""
        spec = kernel.Spec(
            source=f"tree:{self.repository}@base",
            series=series,
            profile=profile,
            fragments=self.fragments,
        )
        return kernel.build(spec, deadline=Deadline(60, "build"), progress=print)

    def run(self, built: kernel.Kernel, *lengths: int) -> Path:
        """Run it; what it has counted lies below the folder as it lies below debugfs."""
        self.runs += 1
        debugfs = self.folder / f"debugfs{self.runs}"
        debugfs.mkdir()
        for length in lengths:
            environment = {**os.environ, "GCOV_PREFIX": str(debugfs)}
            subprocess.run([built.vmlinux, str(length)], env=environment, check=False)
        return debugfs


@contextlib.contextmanager
def agent(debugfs: Path) -> Iterator[client.Agent]:
    """The agent of a VM with this *debugfs*."""
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-c", _AGENT, str(debugfs)]
    with (
        theirs,
        subprocess.Popen(argv, stdin=theirs.fileno(), stdout=theirs.fileno()) as process,
        client.attach(ours, "host", debugfs.with_suffix(".log")) as found,
    ):
        theirs.close()
        try:
            found.wait_ready(Deadline(20, "agent"))
            yield found
        finally:
            process.kill()


def collect(built: kernel.Kernel, debugfs: Path) -> Coverage:
    """What *built* has counted by its *debugfs*."""
    with agent(debugfs) as found:
        return gcov.collect(found, built)
