"""What the tests of the relay share: gradients of one step, their relative difference, and a meter of saved
activations."""

from contextlib import contextmanager

import torch

from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import StepSpec
from lowmem_drf.types import Question

LIMIT = 1e-10  # relative difference of LoRA gradients in fp64 that the method promises

STEPS = 6
KEPT = (0, 3, 5, 8)  # of 9 pixel frames; every chunk of the 3 has one
QUESTIONS = (
    Question("TA", "is the circle red ?", "yes", name="color"),
    Question("Phy", "does it jump ?", "no", name="jump"),
    Question("VQ", "describe the video", "sharp motion", kind="dense", name="picture"),
)


def plan_of(graded, **changes):
    return StepSpec(flow_sigmas(STEPS, 3.0), tuple(graded), **{"kept": KEPT, **changes})


def lora_gradients(step, parts, *args, **kwargs):
    """All LoRA gradients of one step as one vector, and its statistics. The ``.grad`` fields are left empty."""
    for parameter in parts.lora:
        parameter.grad = None
    stats = step(parts, *args, **kwargs)
    gradient = torch.cat([parameter.grad.flatten() for parameter in parts.lora])
    for parameter in parts.lora:
        parameter.grad = None
    return gradient, stats


def relative_difference(actual, expected):
    """|actual - expected| / |expected|. A zero expectation would make any test of it void."""
    assert expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()


class SavedBytes:
    """Bytes that autograd holds for backward: live now, and the peak of each stage.

    Counts what passes ``saved_tensors_hooks``: every tensor a node saves, for as long as the node keeps it.
    """

    def __init__(self):
        self.live = 0
        self.peak = {}
        self.name = "outside"

    @contextmanager
    def stage(self, name):
        self.name = name
        self.peak.setdefault(name, 0)
        yield
        self.name = "outside"

    @contextmanager
    def watch(self):
        meter = self

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor.detach()  # the output itself would hold the node that saved it: a cycle
                meter.live += tensor.nbytes
                meter.peak[meter.name] = max(meter.peak.get(meter.name, 0), meter.live)

            def __del__(self):
                meter.live -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            yield self


def saved_bytes(function):
    """The most bytes that the graph of one call of ``function`` holds."""
    meter = SavedBytes()
    with torch.enable_grad(), meter.watch():
        result = function()
    del result
    assert meter.live == 0
    return meter.peak["outside"]
