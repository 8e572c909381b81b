"""What can be said of this machine without torch: Python, versions of packages, driver, host memory, disks, models."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem_drf.doctor.checks import Check, Status, Steps
from lowmem_drf.libraries import Package, cure, installed, requirements
from lowmem_drf.shortage import GIB, wsl2

CACHE_GB, RUN_GB = 40, 2
"""Free space below which a disk is warned of: the models of a preset for Wan2.1-1.3B, and a run with its clips."""


def python() -> Iterator[Check]:
    wanted, version = requirements()[0], platform.python_version()
    detail = f"{version} on {platform.system()} {platform.machine()}"
    if Package("python", wanted, False).accepts(version):
        yield Check("Python", "ok", detail)
    else:
        yield Check("Python", "failure", f"{detail}; {wanted} is needed", "Make a venv with it: uv venv -p 3.12")


def packages() -> Iterator[Check]:
    """Versions against the ranges. Nothing is imported."""
    good = []
    for package in requirements()[1]:
        version, name = installed(package), package.distribution
        if version is None or importlib.util.find_spec(package.module) is None:
            if not package.optional:
                yield Check(name, "failure", "is not installed", cure(package.module))
        elif not package.accepts(version):
            status: Status = "warning" if package.optional else "failure"
            detail, wanted = f"{version} is installed, {package.range} is needed", f"{name}{package.range}"
            yield Check(name, status, detail, f'pip install "{wanted}"')
        else:
            good.append(f"{name} {version}")
    shown = [text for text in good if text.startswith(("diffusers", "transformers", "peft", "bitsandbytes"))]
    yield Check("packages", "ok", f"{len(good)} in their ranges, among them {', '.join(shown)}")


def driver_cuda() -> str:
    """The newest CUDA that the driver supports (``13.0``), asked of the driver itself; empty without a driver."""
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        failed = library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return ""
    return "" if failed or not number.value else f"{number.value // 1000}.{number.value % 1000 // 10}"


def driver() -> Iterator[Check]:
    if cuda := driver_cuda():
        try:
            text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        except OSError:
            text = ""  # WSL2, Windows
        number = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", text)
        yield Check("driver", "ok", f"{number[1] + ', ' if number else ''}up to CUDA {cuda}")
    else:
        card = "With an NVIDIA card: install its driver (nvidia.com/drivers)" + (", on Windows" if wsl2() else "")
        yield Check("driver", "warning", "no NVIDIA driver: only ToyWorld trains here, on the CPU", card)


def host() -> Iterator[Check]:
    from lowmem_drf.models.weights.downloads import available_host_bytes

    free = available_host_bytes()
    if free is None:
        yield Check("host memory", "ok", "this system does not say how much is free")
    elif free < 16 * GIB:
        detail = f"{free / GIB:.1f} GiB free, swap counted; presets plan 12 GiB and more"
        yield Check("host memory", "warning", detail, "Enough for ToyWorld. Else close other programs, or add swap.")
    else:
        yield Check("host memory", "ok", f"{free / GIB:.1f} GiB free, swap counted")
    spills = "a full card spills into host memory in silence"
    fallback = "In NVIDIA's control panel: CUDA sysmem fallback policy, prefer no sysmem fallback"
    if sys.platform == "win32":
        yield Check("Windows", "warning", f"{spills}, updates then take many times longer", fallback)
    if wsl2():
        limits = f"Linux gets half of Windows' memory, of which less can be pinned (--full tries); {spills}"
        yield Check("WSL2", "warning", limits, f"memory=48GB under [wsl2] in .wslconfig. {fallback}")
        if re.match(r"/mnt/\w(/|$)", str(Path.cwd())):
            yield Check("WSL2's disk", "warning", f"{Path.cwd()} is slow: Windows' disk", "Work below ~, on Linux's.")


def disks() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = "Let HF_HOME name a folder on another disk, or make room: hf cache prune"
    places = {
        "model cache": (Path(HF_HUB_CACHE), CACHE_GB, cache),
        "run folder": (Path("runs").absolute(), RUN_GB, "Train elsewhere: --output FOLDER"),
    }
    for name, (folder, needed, mend) in places.items():
        there = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if there is None:  # a drive of Windows that is not plugged in
            yield Check(name, "failure", f"{folder} is on no disk that is here", mend)
            continue
        free = shutil.disk_usage(there).free / 1e9
        if free < needed:
            yield Check(name, "warning", f"{free:.0f} GB free at {folder}, {needed} are better", mend)
        else:
            yield Check(name, "ok", f"{free:.0f} GB free at {folder}")


def models() -> Iterator[Check]:
    """Which models of the presets are in the hub's cache."""
    from lowmem_drf.config import load_config
    from lowmem_drf.models.weights.downloads import cached
    from lowmem_drf.preset_files import presets

    roles: dict[str, Any] = {}
    for config in map(load_config, presets()):
        roles |= {config.model.id: "generator", config.critic.id: "critic"}
        roles |= {lora: "file" for lora, _ in config.model.base_loras()}
    state = {model: cached(model, role) for model, role in roles.items() if "/" in model}
    here = [model for model, said in state.items() if said == "here"]
    for model, said in state.items():
        if said not in ("here", "missing"):
            yield Check("models", "warning", f"{model} is not complete: {said}", "train downloads the rest.")
    detail = f"{len(here)} of the presets' {len(state)} are in the cache{': ' if here else ''}{', '.join(here)}"
    yield Check("models", "ok", detail + ("; train downloads what it needs" if len(here) < len(state) else ""))


def fitting(card: str, total: int) -> Iterator[Check]:
    """The presets that fit a card and this host, from their headers alone. ``total``: bytes of the card; 0: none."""
    from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes
    from lowmem_drf.preset_files import default_preset, preset_gb, presets

    takes = default_preset(total / 1e9 if total else None, card)
    free = available_host_bytes()
    fit, poor = list[str](), list[str]()
    for name, path in presets().items():
        if (gb := preset_gb(path)) is None or gb > total / 1e9:
            continue
        line = r"^# Plan: .*?([\d.]+) GiB of host memory(?: \(([\d.]+) without records)?"
        planned = re.search(line, path.read_text(encoding="utf-8"), re.MULTILINE)
        host_bytes = float(planned[2] or planned[1]) * GIB + HOST_MARGIN if planned else 0  # train leaves them out
        (poor if free is not None and host_bytes > free else fit).append(name)
    fit = sorted([*fit, "toy-fast", "toy"], key=lambda name: name != takes)
    default = " (train's default)" if takes in fit else ""
    yield Check("presets", "ok", f"fit here: {fit[0]}{default}{''.join(f', {name}' for name in fit[1:])}")
    if poor:
        detail = f"the card has room, the host has not ({(free or 0) / GIB:.0f} GiB free): {', '.join(poor)}"
        yield Check("presets", "warning", detail, "Close other programs, or add memory or swap.")


SOFTWARE: Steps = {"Python": python, "packages": packages}
HARDWARE: Steps = {"driver": driver}
REST: Steps = {"host memory": host, "disks": disks, "models": models}
