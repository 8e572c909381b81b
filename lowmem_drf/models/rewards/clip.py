"""CLIP as a scalar reward: how well the frames of a clip fit its prompt, the mean over frames of ``logits_per_image``.

PickScore (arXiv 2305.01569) is a CLIP-H of the same class and formula that was trained on what people prefer: the
cosine of the two projections, times the model's own ``logit_scale`` (about 100 in the published models). Text beyond
the 77 tokens of CLIP is cut off, as in ``CLIPProcessor(truncation=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.downloads import Say, hub_file
from lowmem_drf.models.weights.finite import refuse_model
from lowmem_drf.models.weights.sources import complete, loading
from lowmem_drf.texts import parse_json

Encode = Callable[[str], list[int]]
"""A prompt -> token ids with begin and end, at most the model's positions."""

TOKENIZER = "openai/clip-vit-large-patch14", "tokenizer.json"
"""For folders without one: all published CLIPs share it."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's image processor."""


@dataclass(frozen=True)
class _Known:
    """Sizes of a published model, which plans use without a download."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    width: int
    """Of the projections."""

    @property
    def config(self) -> dict[str, Any]:
        return {"vision_config": dict(self.vision), "text_config": dict(self.text), "projection_dim": self.width}


def _tower(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width} | more


KNOWN = {
    "openai/clip-vit-base-patch32": _Known(_tower(12, 768, 12, patch_size=32), _tower(12, 512, 8), 512),
    "openai/clip-vit-large-patch14": _Known(_tower(24, 1024, 16, patch_size=14), _tower(12, 768, 12), 768),
    "yuvalkirstain/PickScore_v1": _Known(
        _tower(32, 1280, 16, patch_size=14, hidden_act="gelu"), _tower(24, 1024, 16, hidden_act="gelu"), 1024
    ),
}


class ClipReward(nn.Module):
    """``types.ScalarReward`` on a ``CLIPModel``. Frames are scaled to the model's size by their shorter side, bicubic
    and antialiased, and cropped around the centre, as by CLIP's image processor (without its rounding to 8 bit).

    Args:
        encode: see ``Encode``.
        recompute: the graph keeps only the frames, and each frame is computed again in the backward: the activations of
            one frame of all clips are alive at a time.
        scale: of the cosine. ``None``: the model's ``logit_scale``, which bf16 would round by a percent.
    """

    def __init__(
        self,
        model: Any,
        encode: Encode,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        recompute: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self._encode, self._mean, self._std, self._recompute = model, encode, mean, std, recompute
        self._scale = scale

    def forward(self, frames_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,), in fp32, or fp64 for an fp64 model."""
        text_BD = self.embed_text(prompts, frames_BTCHW.device)
        return torch.stack([self._scored(frame_BCHW, text_BD) for frame_BCHW in frames_BTCHW.unbind(1)]).mean(0)

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """The projections of prompts, of length 1. One by one: without padding there is nothing to mask."""
        model = self.model
        ids = (torch.tensor([self._encode(prompt)], device=device) for prompt in prompts)
        pooled_BD = torch.cat([model.text_model(input_ids=row).pooler_output for row in ids])
        return _unit(model.text_projection(pooled_BD))

    def pixels(self, frames_BCHW: Tensor) -> Tensor:
        """``pixel_values``: frames in [0, 1] -> (B, 3, S, S), normalised. Differentiable."""
        side = self.model.config.vision_config.image_size
        height, width = frames_BCHW.shape[-2:]
        size = [int(side * length / min(height, width)) for length in (height, width)]
        x = F.interpolate(frames_BCHW, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        x = x[..., top : top + side, left : left + side]
        return (x - x.new_tensor(self._mean)[:, None, None]) / x.new_tensor(self._std)[:, None, None]

    def _scored(self, frame_BCHW: Tensor, text_BD: Tensor) -> Tensor:
        if not (self._recompute and torch.is_grad_enabled()):
            return self._score(frame_BCHW, text_BD)
        from torch.utils.checkpoint import checkpoint

        scores: Tensor = checkpoint(self._score, frame_BCHW, text_BD, use_reentrant=False, preserve_rng_state=False)
        return scores

    def _score(self, frame_BCHW: Tensor, text_BD: Tensor) -> Tensor:
        model = self.model
        pooled_BD = model.vision_model(pixel_values=self.pixels(frame_BCHW).to(model.dtype)).pooler_output
        image_BD = _unit(model.visual_projection(pooled_BD))
        scale = model.logit_scale.to(text_BD.dtype).exp() if self._scale is None else self._scale
        return (image_BD * text_BD).sum(-1) * scale


def _unit(x_BD: Tensor) -> Tensor:
    return F.normalize(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), dim=-1)


def load_clip(folder: Path, dtype: torch.dtype, device: torch.device, recompute: bool, say: Say) -> ClipReward:
    """From a complete transformers folder (``downloads.prepare``). Frozen, eval.

    Raises BadInputError: it is no CLIP, or cannot be loaded.
    """
    from transformers import AutoConfig, CLIPModel

    with loading("the reward", str(folder)):
        config: Any = AutoConfig.from_pretrained(folder)
        if config.model_type != "clip":
            known = " or ".join(KNOWN)
            raise ValueError(f"it is a {config.model_type!r} model, and a scalar reward is a CLIP, like {known}")
        load = CLIPModel.from_pretrained
        model = complete(load(folder, config=config, dtype=torch.float32, output_loading_info=True))
        encode = _encoder(folder, config.text_config.max_position_embeddings, say)
    refuse_model(model, f"the reward {folder}")
    scale, model = model.logit_scale.exp().item(), model.to(device, dtype).eval().requires_grad_(False)
    return ClipReward(model, encode, *_normalised(folder), recompute, scale)


def empty_clip(folder_or_id: str) -> tuple[Any, Encode]:
    """(``CLIPModel`` on ``meta`` with its buffers on the CPU, a stand-in that makes as many tokens as there may be).

    Raises BadInputError: neither one of ``KNOWN`` nor a folder.
    """
    from transformers import CLIPConfig, CLIPModel

    if folder_or_id in KNOWN:
        config = CLIPConfig(**KNOWN[folder_or_id].config)
    else:
        with loading("the reward", folder_or_id):
            config = CLIPConfig.from_pretrained(folder_or_id)
    with torch.device("meta"):
        model = CLIPModel(config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name != "position_ids":
                raise ValueError(f"a buffer of CLIP that is not known: {name}")
            setattr(module, name, torch.arange(buffer.shape[-1]).expand(1, -1))
    positions = config.text_config.max_position_embeddings
    end = config.text_config.vocab_size - 1
    return model.eval().requires_grad_(False), lambda prompt: [0] * (positions - 1) + [end]


def _encoder(folder: Path, positions: int, say: Say) -> Encode:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if own:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(hub_file(*TOKENIZER, say)))
    return lambda prompt: list(tokenizer(prompt, truncation=True, max_length=positions)["input_ids"])


def _normalised(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of its image processor."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return MEAN, STD
    try:
        settings = parse_json(file.read_bytes())
        mean, std = (tuple(map(float, settings[key])) for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file} has no image_mean and image_std that can be read. Get it anew.") from error
    return mean, std
