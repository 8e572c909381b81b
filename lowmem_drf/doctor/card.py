"""Child process of ``doctor``: everything that needs torch. PyTorch, the card, and what computes and copies there."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lowmem_drf.doctor.checks import Check, Steps, failed, say, tell
from lowmem_drf.doctor.machine import GIB, driver_cuda
from lowmem_drf.libraries import cure
from lowmem_drf.shortage import wsl2

if TYPE_CHECKING:
    from torch import Tensor

FULL = "--full" in sys.argv
COPIED = 256 * 1024**2
"""Bytes per measured copy, long enough for a link's full rate."""
PIN_GIB = 32
"""Most host memory that ``--full`` tries to pin: nearly every preset parks less."""
NAIVE = "-s kernels.ops=naive -s kernels.attention=sdpa runs without the kernels, slower and with more memory"


def torch_and_card() -> Iterator[Check]:
    """PyTorch, whether it sees the card, and the card."""
    import torch

    driver, cuda = driver_cuda(), torch.version.cuda
    detail = f"{torch.__version__}, for {f'CUDA {cuda}' if cuda else 'the CPU'}"
    if torch.cuda.is_available():
        yield Check("torch", "ok", detail)
        yield from _card()
    elif not driver:
        yield Check("torch", "ok", detail)
    elif cuda:
        newer = "Install a newer driver (nvidia.com/drivers), or a PyTorch for its CUDA (pytorch.org), and restart."
        try:
            torch.cuda.init()
            reason = ""
        except RuntimeError as error:
            reason = f": {error}"
        yield Check("torch", "failure", f"{detail}, does not see the card; the driver has {driver}{reason}", newer)
    else:
        index = f"--index-url https://download.pytorch.org/whl/{'cu130' if driver >= '13' else 'cu128'}"
        yield Check("torch", "failure", f"{detail}, but there is a card", f"{cure('torch')} {index}")


def _card() -> Iterator[Check]:
    import torch

    from lowmem_drf.planner.cards import free_of

    card, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(0)
    say(fact={"card": card.name, "total": total})
    name = f"{card.name}, compute capability {card.major}.{card.minor}"
    name += f"; the first of {count} cards" if count > 1 else ""
    if card.major < 8:
        yield Check("card", "failure", f"{name}: bf16 and the kernels need 8.0", "Take an RTX 30, 40 or 50.")
    else:
        yield Check("card", "ok", name)
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free now"
    if free / GIB >= free_of(total / GIB):
        yield Check("card's memory", "ok", detail)
    else:
        mend = "Close browsers, games and other programs on this card (nvidia-smi lists them). Else train fits itself "
        mend += "into what is free, as far as that costs time only."
        yield Check("card's memory", "warning", f"{detail}; presets count on {free_of(total / GIB):.1f}", mend)


def bf16() -> Iterator[Check]:
    """A matrix product, compared with the CPU's."""
    x = _on_card(64, 64)
    error = (x @ x).float().cpu().sub(x.float().cpu() @ x.float().cpu()).abs().max().item()
    if error < 0.5:  # sums of 64 products of at most 1, rounded to 8 bits: half of it at most
        yield Check("bf16", "ok", "a matrix product is right")
    else:
        yield Check("bf16", "failure", f"a matrix product is wrong by {error:.2f}", "Clock the card lower; test it.")


def _on_card(*shape: int) -> Tensor:
    """bf16 values between -1 and 1."""
    import torch

    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to("cuda", torch.bfloat16)


def cudnn() -> Iterator[Check]:
    """Whether cuDNN computes bf16 conv3d, as the VAE needs: some versions of PyTorch and cuDNN fall back to a
    convolution that takes several times the memory."""
    import torch

    from lowmem_drf.assembly.cudnn import conv3d_backend, cudnn_cure, cudnn_version

    x, weight = _on_card(1, 16, 3, 8, 8), _on_card(16, 16, 3, 3, 3)
    torch.nn.functional.conv3d(x, weight)
    used, version = conv3d_backend(), cudnn_version()
    if "udnn" not in used:
        detail = f"{version or 'no version'}; bf16 conv3d runs without it ({used}), far slower and in far more memory"
        yield Check("cuDNN", "failure", detail, cudnn_cure())
        return
    try:
        torch.backends.cudnn.version()
        yield Check("cuDNN", "ok", f"{version}; bf16 conv3d uses it")
    except RuntimeError as error:  # another version is found than PyTorch's own
        reason = " ".join(str(error).split(". ")[0].split()).removeprefix("cuDNN version incompatibility: ")
        yield Check("cuDNN", "warning", f"{version}; bf16 conv3d uses it, but {reason}", cudnn_cure())


def triton() -> Iterator[Check]:
    """Triton by itself, on any machine that has it."""
    if importlib.util.find_spec("triton"):
        import triton

        yield Check("triton", "ok", triton.__version__)


def kernels() -> Iterator[Check]:
    """Compiles one kernel and launches it; ``--full``: all of them, and compares them with the naive forms."""
    import torch

    from lowmem_drf.ops import RowOps, fused_ops, naive_ops, why_no_triton

    if reason := why_no_triton(torch.device("cuda")):
        yield Check("kernels", "failure", reason, NAIVE)
        return
    x, row, angle = _on_card(1, 64, 256), torch.ones(1, 1, 256, device="cuda"), torch.ones(1, 64, 1, 64, device="cuda")
    weight = row[0, 0].bfloat16()
    calls: dict[str, Callable[[RowOps], Any]] = {"gate_residual": lambda ops: ops.gate_residual(x, x, row)}
    if FULL:
        calls |= {
            "norm_modulate": lambda ops: ops.norm_modulate(x, row, row, 1e-6),
            "rms_norm": lambda ops: ops.rms_norm(x, weight, 1e-6),
            "rope_qk": lambda ops: ops.rope_qk(x, x, weight, weight, angle, angle, 4, 1e-6)[0],
        }
    started, fused = time.perf_counter(), fused_ops()
    for name, call in calls.items():
        try:
            out, wanted = call(fused), call(naive_ops())
            wrong = FULL and not (out - wanted).float().abs().max().item() < 0.1
        except Exception as error:
            compiler = "It needs a C compiler and Python's headers: sudo apt install gcc python3-dev"
            yield failed(f"kernel {name}", error, f"{compiler}; or {NAIVE}")
            return
        if wrong:
            yield Check(f"kernel {name}", "failure", "its values are wrong", NAIVE)
    made = f"{', '.join(calls)} compiled and launched in {time.perf_counter() - started:.1f} s"
    yield Check("kernels", "ok", made)


def attention() -> Iterator[Check]:
    """The back ends of kernels.attention: each computes a small attention with gradient. Ours, which is compiled for
    it, only under ``--full``."""
    import torch

    from lowmem_drf.models.attention import NAMES, absent, refusal, why_not

    works, missing, device = [], [], torch.device("cuda", torch.cuda.current_device())
    for name in NAMES:
        if absent(name):
            missing.append(name)
            continue
        tried = name != "triton" or FULL
        reason = refusal(name, device, torch.bfloat16, 128) if tried else why_not(name, device)
        if reason:
            yield Check(f"attention {name}", "failure" if name == "sdpa" else "warning", "cannot run", reason)
        else:
            works.append(name)
    more = f"; not installed, and not needed: {', '.join(missing)}" if missing else ""
    timed = "kernels.attention=auto times them and takes the fastest"
    yield Check("attention", "ok", f"{', '.join(works)} can run; {timed}{more}")


def bitsandbytes() -> Iterator[Check]:
    """NF4 there and back."""
    from bitsandbytes import functional

    values = _on_card(64, 64)
    packed, state = functional.quantize_4bit(values, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - values).float().abs().max().item()
    if error < 0.2:  # half of NF4's widest step is 0.15
        yield Check("bitsandbytes", "ok", "NF4 works on the card")
    else:
        mend = f"{cure('bitsandbytes')}, or -s critic.quant=none"
        yield Check("bitsandbytes", "failure", f"NF4 is wrong by {error:.2f} on this card", mend)


def pinned() -> Iterator[Check]:
    """Pinned memory; under ``--full`` how much of it there is, and the rate of copies in both directions."""
    import torch

    from lowmem_drf.models.weights.downloads import available_host_bytes
    from lowmem_drf.planner.cards import card_named

    wanted = min(PIN_GIB * GIB, (available_host_bytes() or 8 * GIB) // 2) if FULL else COPIED
    mend = "memory= in .wslconfig" if wsl2() else "in a container: ulimit -l unlimited"
    mend = f"More can be pinned with {mend}; less waits on the host with memory.checkpoint=true, model.quant=int8"
    held: list[Tensor] = []
    try:
        while len(held) * COPIED < wanted:
            held.append(torch.empty(COPIED, dtype=torch.uint8, pin_memory=True))
        limit = "half of what is free" if FULL else "no more was tried"
        yield Check("pinned memory", "ok", f"{wanted / GIB:.2f} GiB were pinned ({limit})")
    except RuntimeError:
        detail = f"no more than {len(held) * COPIED / GIB:.2f} GiB can be pinned; copies of the rest are half as fast"
        yield Check("pinned memory", "warning", detail, mend)
    if not FULL or not held:
        return
    card, planned = torch.empty_like(held[0], device="cuda"), card_named(torch.cuda.get_device_name()).link
    up = _rate(lambda: card.copy_(held[0], non_blocking=True))
    down = _rate(lambda: held[0].copy_(card, non_blocking=True))
    detail = f"{up:.1f} GB/s to the card, {down:.1f} GB/s from it; a plan counts on {planned:.0f}"
    if min(up, down) > 0.6 * planned:
        yield Check("copies", "ok", detail)
    else:
        yield Check("copies", "warning", detail, "Put the card into a slot with 16 lanes; else updates take longer.")


def _rate(copy: Callable[[], Any]) -> float:
    """GB/s of the fastest of some copies."""
    import torch

    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return COPIED / min(seconds) / 1e9


def steps() -> Steps:
    """What can be looked at here."""
    first: Steps = {"torch": torch_and_card}
    say(begins="torch")
    try:
        import torch

        on_card = torch.cuda.is_available()
    except BaseException:  # looked at again by the first step, which says why
        return first
    more: Steps = {"bf16": bf16, "cuDNN": cudnn, "kernels": kernels, "attention": attention}
    more |= {"bitsandbytes": bitsandbytes, "pinned memory": pinned}
    return {**first, "triton": triton, **(more if on_card else {})}


if __name__ == "__main__":
    tell(steps())
