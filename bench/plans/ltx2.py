"""Plans LTX-2 (19B, video and sound) at true size, for 24 and 16 GB. It is not trained here.

    python -m bench.plans.ltx2               # writes the table of docs/fit.md

A family of generators for plans alone (``lowmem_drf.models.family.Family``), with diffusers' own modules: the whole
transformer, its video tokens as LTX-Video's, the sound of the clip as a constant latent beside them, through which the
gradient flows from block to block; the VAE of the video in the segments of LTX-Video's; Gemma 3 12B, streamed, and
the connectors. Configurations are those of ``scripts/convert_ltx2_to_diffusers.py`` of diffusers; Gemma's is from its
published ``config.json``, written down from memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.plans.fit import OTHERS_MARKS, PAGE
from lowmem_drf.config import load_config
from lowmem_drf.memory.streaming import HostEmbedding, Streamed
from lowmem_drf.method.schedule import TRAIN_TIMESTEPS
from lowmem_drf.models import generators
from lowmem_drf.models.blocks import AS_IN_DIFFUSERS, Activations, set_blocks
from lowmem_drf.models.family import GeneratorConfig, GeneratorSizes, KnownGenerator
from lowmem_drf.models.ltx.decoder import LTXDecoder
from lowmem_drf.models.weights.quant import Quant, lay_out, require_library
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan, new_fakes
from lowmem_drf.planner.stages import STAGES

ID, NAME, BLOCKS = "Lightricks/LTX-2", "LTX-2", "transformer_blocks"
KINDS = {
    "transformer": "LTX2VideoTransformer3DModel", "vae": "AutoencoderKLLTX2Video", "text_encoder": "gemma3_text",
}  # fmt: skip
_TEXT = {
    "model_type": KINDS["text_encoder"], "num_layers": 48, "hidden_size": 3840, "intermediate_size": 15360,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
}  # fmt: skip
_VAE = {
    "_class_name": KINDS["vae"], "decoder_causal": False, "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8, "timestep_conditioning": False,
}  # fmt: skip
_TRANSFORMER = {"_class_name": KINDS["transformer"], "num_layers": 48, "rope_type": "split"}
CONFIG = GeneratorConfig(_TRANSFORMER, _VAE, _TEXT)
KNOWN = {ID: KnownGenerator(CONFIG, {})}

SOUND = 25
"""Latents a second: 16000 samples, in hops of 160, four to a latent."""
_INPUTS = (
    *("encoder_hidden_states", "audio_encoder_hidden_states", "temb", "temb_audio"),
    *("temb_ca_scale_shift", "temb_ca_audio_scale_shift", "temb_ca_gate", "temb_ca_audio_gate"),
    *("video_rotary_emb", "audio_rotary_emb", "ca_video_rotary_emb", "ca_audio_rotary_emb"),
    *("encoder_attention_mask", "audio_encoder_attention_mask"),
)
"""What blocks share, in the order of diffusers' checkpointed calls, without what is not used."""

LEVELS = [1000.0, 993.75, 987.5, 981.25, 975.0, 909.375, 725.0, 421.875]
"""``DISTILLED_SIGMA_VALUES`` of diffusers' ``pipelines/ltx2/utils.py``."""
TOKENS = 1024
"""Of a prompt, as in ``LTX2Pipeline``; more than ``model.text_tokens`` may be."""
TARGETS = [*(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))]
SETTINGS = (
    f"model.id={ID}", "sampler.steps=8", f"sampler.timesteps={LEVELS}",
    f"lora.targets={TARGETS}",
)  # fmt: skip
"""Over preset rtx4090-ltx13b."""


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> GeneratorSizes:
    return GeneratorSizes(
        channels=128, spatial=32, temporal=8, patch=(1, 1, 1), positions=1024, heads=32, head_dim=128, hidden=16384,
        text_dim=3840, vae_widths=(128, 256, 512), vae_patch=4,
    )  # fmt: skip


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in empty_transformer(config).named_parameters()}


def empty_transformer(config: Mapping[str, Any], layers: int | None = None, quant: Quant = "none") -> Any:
    from diffusers import LTX2VideoTransformer3DModel

    require_library(quant, "model.quant", ("none", "nf4", "int8"))
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel.from_config(dict(config))
    lay_out(model, quant, lambda name: name.startswith(f"{BLOCKS}."))
    return model


def empty_vae(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKLLTX2Video

    with torch.device("meta"):
        model = AutoencoderKLLTX2Video.from_config(dict(config))
    model.latents_mean, model.latents_std = torch.zeros(128), torch.ones(128)
    return model


class _Text(nn.Module):
    """Gemma's hidden states of all layers, through the connectors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
        from transformers import Gemma3TextConfig, Gemma3TextModel

        super().__init__()
        rest = {key: value for key, value in config.items() if key not in ("num_layers", "model_type")}
        self.model = Gemma3TextModel(Gemma3TextConfig(num_hidden_layers=config["num_layers"], **rest))
        self.connectors = LTX2TextConnectors(text_proj_in_factor=config["num_layers"] + 1, rope_type="split")

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Any:
        states = self.model(ids_BL, attention_mask=mask_BL, output_hidden_states=True).hidden_states
        return self.connectors(torch.stack(states, dim=-1).flatten(2, 3), mask_BL)


def empty_text(config: Mapping[str, Any], layers: int | None = None) -> Any:
    with torch.device("meta"):
        model = _Text(config)
    for module in model.modules():  # rotary tables: a plan takes buffers with any values, but none on meta
        module._buffers.update({name: torch.ones_like(x, device="cpu") for name, x in module._buffers.items()})
    return model


def stream_text(model: Any, device: torch.device, store: Any) -> None:
    gemma = model.model
    gemma.set_input_embeddings(HostEmbedding(gemma.get_input_embeddings(), device, store))
    streamed = Streamed(list(gemma.layers), device, store)
    for place, layer in enumerate(gemma.layers):
        layer.forward = streamed.forward(place, layer.forward)


class _Both:
    """Video tokens (B, N, 4096) and those of the sound (B, M, 2048) as one tensor, which a block keeps and hands on."""

    def __init__(self) -> None:
        self._shapes: list[torch.Size] = []

    def pack(self, video: Tensor, sound: Tensor) -> Tensor:
        self._shapes = [video.shape, sound.shape]
        return torch.cat([video.flatten(1), sound.flatten(1)], dim=1)

    def unpack(self, both: Tensor) -> tuple[Tensor, Tensor]:
        video, sound = both.split([shape[1:].numel() for shape in self._shapes], dim=1)
        return video.view(self._shapes[0]), sound.view(self._shapes[1])


class _Forward:
    def __init__(self, block: Any, both: _Both) -> None:
        self._run, self._both = type(block).forward.__get__(block), both

    def __call__(self, both: Tensor, *rest: Any, kept_attention: None = None, recorded: bool = False) -> Tensor:
        inputs = dict(zip(_INPUTS, rest, strict=True))
        return self._both.pack(*self._run(*self._both.unpack(both), **inputs))

    unread = __call__


def set_activations(transformer: Any, how: Activations = AS_IN_DIFFUSERS) -> None:
    """See ``Family.set_activations``. Kernels and kept attentions are not brought."""
    both, blocks = _Both(), list(transformer.transformer_blocks)
    how = replace(how, keep_attention="none")
    set_blocks(transformer, blocks, lambda block, weights: _Forward(block, both), how)
    for block in blocks:
        block.register_forward_pre_hook(partial(_enter, both), with_kwargs=True)
    policy = transformer._gradient_checkpointing_func

    def checkpointed(block: Any, video: Tensor, sound: Tensor, *rest: Any) -> Any:
        used = [value for value in rest if isinstance(value, Tensor | tuple)]
        return both.unpack(policy(block, both.pack(video, sound), *used))

    transformer._gradient_checkpointing_func = checkpointed
    for block in blocks:
        block.register_forward_hook(partial(_leave, both))


def _enter(both: _Both, block: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """diffusers names the arguments of a block, unless it checkpoints."""
    block.is_named = "hidden_states" in named
    if not block.is_named:
        return given, named
    rest = (named[name] for name in _INPUTS)
    return (both.pack(named["hidden_states"], named["audio_hidden_states"]), *rest), {}


def _leave(both: _Both, block: Any, given: Any, made: Tensor) -> Any:
    return both.unpack(made) if block.is_named else made


def as_velocity(transformer: Any, recorder: Any = None, call: Any = None, fps: float = 24.0) -> Any:
    from contextlib import nullcontext

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        dtype, (frames, height, width) = transformer.proj_in.weight.dtype, x_BCFhw.shape[2:]
        sounds = round(((frames - 1) * 8 + 1) / fps * SOUND)
        sound = x_BCFhw.new_zeros(len(x_BCFhw), sounds, 128, dtype=dtype)
        time_B = torch.full((len(x_BCFhw),), sigma * TRAIN_TIMESTEPS)
        text, mask = cond.to(dtype), (cond != 0).any(dim=2)
        with nullcontext() if recorder is None else recorder.during(cond):
            v_BND, _ = (call or transformer)(
                x_BCFhw.to(dtype).flatten(2).transpose(1, 2), sound, text, text, time_B, encoder_attention_mask=mask,
                audio_encoder_attention_mask=mask, num_frames=frames, height=height, width=width, fps=fps,
                audio_num_frames=sounds, return_dict=False,
            )  # fmt: skip
        return v_BND.transpose(1, 2).unflatten(2, (frames, height, width)).to(x_BCFhw.dtype)

    return velocity


def decoder(vae: Any, **options: Any) -> LTXDecoder:
    """LTX-Video's segments: the convolutions look ahead, the norm is over channels."""
    for module in vae.decoder.modules():
        if type(module).__name__ == "LTX2VideoCausalConv3d":
            module.is_causal = False
            module.forward = partial(_looking_ahead, module.forward)
    vae.decoder.norm_out.channel_dim = -1
    return LTXDecoder(vae, **options)


def _looking_ahead(run: Any, x: Tensor, causal: bool = False) -> Any:
    return run(x, causal=False)


def drop_encoder(vae: Any) -> None:
    vae.encoder = None


def table() -> str:
    """Markdown, for cards of 24 and 16 GB."""
    columns = ["model", "card", *STAGES, "peak, of", "host", "an update"]
    lines, fakes = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], new_fakes()
    config = load_config("rtx4090-ltx13b", SETTINGS)
    config = config.model_copy(update={"model": config.model.model_copy(update={"text_tokens": TOKENS})})
    for name in ("RTX 4090", "RTX 4080"):
        card = card_named(name)
        plan = make_plan(config, card, card.gib, fakes=fakes)
        peaks = [f"{plan.stages[stage].peak_gib:.1f}" for stage in STAGES]
        figures = f"{plan.peak_gib:.1f}, {plan.usable_gib:.1f} | {plan.host_gib:.1f} | {plan.update_s:,.0f} s"
        lines.append(f"| {NAME} | {card.name} | {' | '.join(peaks)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    generators.FAMILIES.append(sys.modules[__name__])  # type: ignore[arg-type]  # of the Protocol what a plan asks
    generators.KNOWN_GENERATORS.update(KNOWN)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(OTHERS_MARKS[0])
    made, after = table() + "\n", rest.partition(OTHERS_MARKS[1])[2]
    PAGE.write_text(before + OTHERS_MARKS[0] + made + OTHERS_MARKS[1] + after, encoding="utf-8")
    print(made, end="")


if __name__ == "__main__":
    main()
