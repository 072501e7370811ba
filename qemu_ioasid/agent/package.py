"""The agent's own package, compiled by the Python that runs it.

Compiling the sources at import is two thirds of an agent's start under TCG. The orchestrator sends
sources once, asks for them compiled, and keeps that by the hash of the sources and the version of
the VM's Python, which its own Python need not be.
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import zipfile

# a pyc that is never checked against a source: PEP 552
_UNCHECKED = (1).to_bytes(4, "little") + bytes(8)


def running_from() -> str:
    """The path of the zip this agent was imported from. Raises LookupError: it was not."""
    loader = __spec__.loader if __spec__ else None
    archive = getattr(loader, "archive", None)
    if not isinstance(archive, str):
        raise LookupError("the agent does not run from a zip")
    return archive


def compiled(path: str) -> bytes:
    """The zip at path with every .py replaced by its .pyc; uncompressed, like what is sent.

    Raises OSError, zipfile.BadZipFile, SyntaxError.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(path) as sources, zipfile.ZipFile(result, "w") as package:
        for name in sources.namelist():
            data = sources.read(name)
            if name.endswith(".py"):
                code = compile(data, name, "exec", dont_inherit=True)
                data = importlib.util.MAGIC_NUMBER + _UNCHECKED + marshal.dumps(code)
                name += "c"
            # no date: the same sources give the same bytes
            package.writestr(zipfile.ZipInfo(name), data)
    return result.getvalue()
