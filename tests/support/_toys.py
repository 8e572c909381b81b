"""A transformer with LoRA, a causal decoder and a critic in a few lines each, in fp64: what the relay needs of its
models, and no more."""

import torch
from torch import nn
from torch.nn import functional as F

from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import StepSpec
from lowmem_drf.types import Answer, Parts, Question

STEPS = 6
CHANNELS, LATENT_FRAMES, SIDE = 2, 3, 4
TEMPORAL_FACTOR = 2
KEPT = (1, 2, 4)
QUESTIONS = (
    Question("TA", "is it red?", "yes", name="color"),
    Question("TA", "is it a circle?", "no", weight=0.5, name="shape"),
    Question("Phy", "does it jump?", "no", name="jump"),
    Question("VQ", "how is the picture?", "it is clean", kind="dense", name="picture"),
)


class ToyTransformer(nn.Module):
    """A non-linear velocity with LoRA factors; the condition is a vector per clip."""

    def __init__(self, width=6, rank=2):
        super().__init__()
        features = CHANNELS * LATENT_FRAMES * SIDE * SIDE
        self.into = nn.Linear(features + 4, width).requires_grad_(False)
        self.out = nn.Linear(width, features).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, width) * 0.5)
        self.lora_b = nn.Parameter(torch.randn(width, rank) * 0.5)

    def forward(self, x, sigma, cond):
        hidden = torch.tanh(self.into(torch.cat([x.flatten(1), cond, x.new_full((len(x), 1), sigma)], dim=1)))
        hidden = torch.tanh(hidden + F.linear(F.linear(hidden, self.lora_a), self.lora_b))
        return self.out(hidden).view_as(x)


def whole_chunk_backward(decoder, latents_BC1hw, caches, local, d_made_BtCHW, d_handed, hands_back):
    """``Decoder.chunk_backward`` as one graph of the whole ``chunk``, for decoders that store caches as tensors."""
    z = latents_BC1hw.detach().requires_grad_()
    entering = tuple(
        cache.detach().requires_grad_(hands_back) if isinstance(cache, torch.Tensor) else cache for cache in caches
    )
    with torch.enable_grad():
        made, handed = decoder.chunk(z, entering)
    pairs = [(made[:, list(local)], d_made_BtCHW)] if len(local) else []
    if d_handed:
        pairs += [(out, d) for out, d in zip(handed, d_handed, strict=True) if d is not None and out.requires_grad]
    if not pairs:  # a decoder without caches: no later chunk depends on this one
        return torch.zeros_like(z), ()
    leaves = [cache for cache in entering if isinstance(cache, torch.Tensor) and cache.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    d_z, *d_leaves = torch.autograd.grad(outputs, [z, *leaves], cotangents, materialize_grads=True)
    if not hands_back:
        return d_z, ()
    d_caches = iter(d_leaves)
    return d_z, tuple(next(d_caches) if isinstance(cache, torch.Tensor) else None for cache in entering)


class ToyDecoder(nn.Module):
    """Two convolutions that are causal in time, a cache for each, and a clamp at the end."""

    temporal_factor, causal, group = TEMPORAL_FACTOR, True, 1

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(CHANNELS, 4, (2, 3, 3), padding=(0, 1, 1))
        self.second = nn.Conv3d(4, 3 * TEMPORAL_FACTOR, (2, 1, 1))
        self.requires_grad_(False)

    def start(self, batch):
        return (None, None)

    def recorded_chunk(self, latents_BC1hw, caches):
        return *self.chunk(latents_BC1hw, caches), tuple(caches)

    def advance(self, latents_BC1hw, caches, keep):
        """A trace is the entering caches."""
        trace = None if keep == "nothing" else tuple(caches)
        return self.chunk(latents_BC1hw, caches)[1], trace

    def chunk(self, latents_BC1hw, caches):
        x, handed = latents_BC1hw, []
        for conv, cache in zip((self.first, self.second), caches, strict=True):
            handed.append(x)
            x = torch.tanh(conv(torch.cat([torch.zeros_like(x) if cache is None else cache, x], dim=2)))
        frames = self._pixels(x)
        return frames[:, :1] if caches[0] is None else frames, tuple(handed)

    def store(self, caches):
        return caches

    def chunk_backward(self, *args):
        return whole_chunk_backward(self, *args)

    def decode(self, latents_BCFhw):
        x = latents_BCFhw
        for conv in (self.first, self.second):
            x = torch.tanh(conv(F.pad(x, (0, 0, 0, 0, 1, 0))))
        frames = self._pixels(x)
        return torch.cat([frames[:, :1], frames[:, TEMPORAL_FACTOR:]], dim=1)

    @staticmethod
    def _pixels(x_BCFhw):
        frames = x_BCFhw.unflatten(1, (TEMPORAL_FACTOR, 3)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
        return (frames * 0.9 + 0.5).clamp(0, 1)


class ToyCritic(nn.Module):
    """Logits of a vocabulary of 7 from all frames it sees, different for each question."""

    def __init__(self):
        super().__init__()
        self.look = nn.Linear(len(KEPT) * 3 * SIDE * SIDE, 8)
        self.speak = nn.Linear(8, len(QUESTIONS) * 3 * 7)
        self.requires_grad_(False)

    def forward(self, frames_BTCHW, questions):
        said = self.speak(torch.tanh(self.look(frames_BTCHW.flatten(1)))).unflatten(1, (len(QUESTIONS), 3, 7))
        return [
            [
                Answer(clip[i], torch.tensor([5, 0, 6]))
                if q.kind == "dense"
                else Answer(clip[i, :1], torch.tensor([1]), (1, 2), (3, 4))
                for i, q in enumerate(asked)
            ]
            for clip, asked in zip(said, questions, strict=True)
        ]


def toy_parts(seed=0):
    torch.manual_seed(seed)
    transformer, decoder, critic = (module().double() for module in (ToyTransformer, ToyDecoder, ToyCritic))
    return Parts(transformer, decoder, critic, [transformer.lora_a, transformer.lora_b])


def batch_of(size):
    """(noise, cond, uncond, questions). A clip is the same in every batch."""
    noise = draw_noise((CHANNELS, LATENT_FRAMES, SIDE, SIDE), range(size)).double()
    cond, uncond = draw_noise((3,), range(100, 100 + size)).double(), draw_noise((3,), [200] * size).double()
    return noise, cond, uncond, [QUESTIONS] * size


def plan_of(graded, **changes):
    return StepSpec(flow_sigmas(STEPS, 3.0), tuple(graded), KEPT, **changes)
