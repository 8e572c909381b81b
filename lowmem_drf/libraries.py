"""The packages that lowmem-drf needs: their ranges, and the pip command that mends one that is missing or broken.

Ranges come from ``pyproject.toml`` in a checkout, else from the installed package's metadata. Only ``import_all``
imports them, so the rest works on a machine where none of them can be imported.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import platform
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import lowmem_drf

IMPORT_NAMES = {"pillow": "PIL", "triton-windows": "triton"}
"""Distributions whose module has another name; else ``-`` becomes ``_``."""


WITHOUT = ("bitsandbytes", "triton")
"""Packages that a run on the CPU without quantised models can do without."""
REPORT = ("jinja2", "matplotlib")
"""Packages that only ``report`` needs: no run waits for their import, or fails by it."""


class Package(NamedTuple):
    """A requirement."""

    distribution: str
    range: str
    """For example ``>=2.11,<2.14``; empty: any version."""
    optional: bool
    """Belongs to an extra."""

    @property
    def module(self) -> str:
        return IMPORT_NAMES.get(self.distribution, self.distribution.replace("-", "_"))

    def accepts(self, version: str) -> bool:
        """True if the version is in the range. Suffixes (``+cu130``, ``rc1``) are not compared."""
        bounds = [(bound[:2], _numbers(bound)) for bound in self.range.split(",") if bound]
        return all(_numbers(version) >= n if sign == ">=" else _numbers(version) < n for sign, n in bounds)


def _numbers(text: str) -> tuple[int, ...]:
    found = re.search(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def requirements() -> tuple[str, list[Package]]:
    """The range of Python, and the packages of this platform. Of the extras: what users install, not what developers
    do."""
    root = Path(lowmem_drf.__file__).parents[1]
    pyproject = root / "pyproject.toml"
    if pyproject.is_file() and (root / "cli.py").is_file():  # a checkout, as in lowmem_drf/__init__.py
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        lines = [*project["dependencies"], *(f"{line}; extra" for x in extras if x != "dev" for line in extras[x])]
        return project["requires-python"], list(_here(lines))
    try:
        about = metadata.metadata("lowmem-drf")
    except metadata.PackageNotFoundError:
        return "", []
    lines = [line for line in about.get_all("Requires-Dist") or () if not re.search(r"extra == .dev", line)]
    return about["Requires-Python"] or "", list(_here(lines))


def _here(lines: list[str]) -> Iterator[Package]:
    for line in lines:
        requirement, _, marker = line.partition(";")
        wanted = {name: value for name, value in re.findall(r"(sys_platform|platform_machine) == ['\"](\w+)", marker)}
        here = {"sys_platform": sys.platform, "platform_machine": platform.machine()}
        found = re.match(r"\s*([\w.-]+)(?:\[.*\])?\s*\(?([^)]*)", requirement)
        if found and all(here[name] == value for name, value in wanted.items()):
            yield Package(found[1].lower(), found[2].replace(" ", ""), "extra" in marker)


def import_all() -> None:
    """Imports what loading a model needs, so that a broken package is named (``broken``) before anything is downloaded
    or written. Those that some runs do without may be missing."""
    for package in requirements()[1]:
        if not package.optional and package.module not in REPORT:
            try:
                importlib.import_module(package.module)
            except ModuleNotFoundError as error:
                if error.name not in WITHOUT:
                    raise
    # its lazy import brings whatever diffusers finds installed: attention libraries, quantizers, torchvision
    importlib.import_module("diffusers.models.transformers")


def hush() -> None:
    """Keeps what the model libraries tell their developers from users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about accelerators that are not used here
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's own garbage collections: they walk all that the model libraries' imports made, again and
    again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def cure(module: str) -> str:
    """The pip command that installs a module's package anew in the range that is needed."""
    known = {package.module: package for package in requirements()[1]}
    package = known.get(module, Package(module.replace("_", "-"), "", True))
    if not installed(package):
        return f'pip install "{package.distribution}{package.range}"'
    alone = "" if module == "torch" else "--no-deps "  # torch's CUDA libraries are packages, and break like it
    anew = f'pip install --force-reinstall {alone}"{package.distribution}{package.range}"'
    return f"pip uninstall {package.distribution} (a run can do without it), or {anew}" if package.optional else anew


def installed(package: Package) -> str | None:
    """The installed version."""
    return version_of(package.distribution)


def version_of(distribution: str) -> str | None:
    """The installed version."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def broken(error: BaseException) -> str | None:
    """If the error comes from the import of a third-party package: the message that names the package, the reason and
    the cure. Follows the ``raise … from`` of transformers' and diffusers' lazy imports to the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    modules, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":
            modules.append(str(trace.tb_frame.f_globals.get("__name__")).split(".")[0])
        trace = trace.tb_next
    at_fault = [modules[-1]] if modules else []
    if isinstance(error, SyntaxError) and error.filename and (found := _package_of(error.filename)):
        at_fault = [found]  # a damaged file: no frame of it exists
    elif isinstance(error, ImportError) and error.name:
        top = error.name.split(".")[0]
        at_fault = [top] if isinstance(error, ModuleNotFoundError) else [*at_fault, top]
    names = [name for name in dict.fromkeys(at_fault) if name not in ("lowmem_drf", "__main__", *_STANDARD)]
    if not names:
        return None
    reason = " ".join(str(error).split())[:300]
    absent = isinstance(error, ModuleNotFoundError) and error.name in names
    what = f"{' and '.join(names)} cannot be imported ({type(error).__name__}: {reason})."
    what = f"{names[0]} is not installed." if absent else what
    return f"{what}\nMend it with: {'; '.join(map(cure, names))}\nThen see what else is wrong: lowmem-drf doctor"


_STANDARD = sys.stdlib_module_names


def _package_of(file: str) -> str | None:
    """The top package of a file of site-packages."""
    found = re.search(r"(?:site|dist)-packages[/\\](\w+)", file)
    return found[1] if found else None
