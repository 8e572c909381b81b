"""Tiny random models of the real classes: no download, and the code paths of the real ones.

Every function takes a seed and leaves the global generator unchanged. Weights are larger than the libraries' defaults,
so that a wrong mask, position or cache changes an output visibly.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Z_DIM, TEXT_DIM = 4, 16
SPATIAL, TEMPORAL = 4, 4
PATCH, MERGE, TEMPORAL_PATCH = 4, 2, 2

PROMPT_WORDS = str.split(
    "a red green blue yellow circle square triangle moves left right up down stays still on gray black white "
    "background the is not in and video of shape color object"
)
QUESTION_WORDS = str.split(
    "yes Yes YES no No NO ? . , : is the a in this video red green blue circle square moving moves left right up down "
    "does it jump flicker vanish sharp what describe motion object stays whole clip answer or system user assistant "
    "You are helpful < > seconds 0 1 2 3 4 5 6 7 8 9"
)
CHAT_TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}\
{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in c %}{{ c['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def _spread(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Matrices to gain/sqrt(fan-in), vectors (biases, norms) jittered: nothing stays at an uninformative 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim >= 2 and min(parameter.shape) > 1:
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def tiny_transformer(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2, **config: Any) -> Any:
    """WanTransformer3DModel: latents (B, 4, F, h, w) with even h and w, text (B, L, 16). Frozen, eval."""
    from diffusers import WanTransformer3DModel

    with _seeded(seed) as generator:
        settings = dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=Z_DIM, out_channels=Z_DIM,
            text_dim=TEXT_DIM, freq_dim=16, ffn_dim=32, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=32,
        )  # fmt: skip
        model = WanTransformer3DModel(**(settings | config))
        _spread(model, 0.8, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_vae(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """AutoencoderKLWan of factors 4 (space) and 4 (time): latents (B, 4, F, h, w) <-> frames (B, 3, 4F - 3, 4h, 4w).
    Frozen, eval."""
    from diffusers import AutoencoderKLWan

    with _seeded(seed) as generator:
        settings = dict(
            base_dim=4, z_dim=Z_DIM, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 2.0],
            scale_factor_spatial=SPATIAL, scale_factor_temporal=TEMPORAL,
        )  # fmt: skip
        model = AutoencoderKLWan(**(settings | config))
        _spread(model, 1.0, generator)
        # Most pixels inside [-1, 1] and some outside, so that both sides of the clamp are exercised.
        with torch.no_grad():
            model.decoder.conv_out.weight.mul_(0.9)
    return model.to(dtype).eval().requires_grad_(False)


def tae_weights(sizes: Any, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a tiny decoder of these ``Sizes`` as TAEHV's files hold them, beside the encoder's. Some pixels leave
    [0, 1]."""
    generator, made = torch.Generator().manual_seed(seed), {"encoder.0.weight": torch.zeros(2, 3)}
    for name, shape in sizes.shapes().items():
        scale = 0.1 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
        made[f"decoder.{name}"] = torch.randn(shape, generator=generator) * scale
    made["decoder.22.bias"] += 0.5
    made["decoder.22.weight"] *= 4
    return made


def tiny_t5(seed: int = 0) -> Any:
    """T5EncoderModel of width 16, for ``tiny_prompt_tokenizer``. Frozen, eval."""
    from transformers import T5Config, T5EncoderModel

    with _seeded(seed) as generator:
        words, rest = len(tiny_prompt_tokenizer()), {"num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        model = T5EncoderModel(T5Config(vocab_size=words, d_model=TEXT_DIM, d_kv=8, d_ff=32, **rest))
        _spread(model, 1.0, generator)
    return model.eval().requires_grad_(False)


def tiny_prompt_tokenizer() -> Any:
    """Word-level tokenizer that appends ``</s>`` and pads with ``<pad>``, as UMT5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *PROMPT_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_text(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any]:
    """(UMT5EncoderModel of width 16, its tokenizer). Frozen, eval."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_prompt_tokenizer()
    with _seeded(seed) as generator:
        config = UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
        )
        model = UMT5EncoderModel(config)
        _spread(model, 1.0, generator)
    return model.to(dtype).eval().requires_grad_(False), tokenizer


def tiny_critic_tokenizer() -> Any:
    """Word-level tokenizer with Qwen's special tokens and a chat template of Qwen's form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ("pad", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    special = [*(f"<|{name}|>" for name in names), "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *QUESTION_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_critic_config(
    family: str = "qwen2_5_vl",
    layers: int = 2,
    depth: int = 2,
    width: int = 24,
    dropout: float = 0.0,
    vision_width: int = 16,
) -> dict[str, Any]:
    """A configuration of the real class. Patch 4, merge 2, temporal patch 2, grouped queries; windowed vision blocks
    (Qwen2.5-VL), or a learned 4x4 position grid and DeepStack features of the first and last but one block
    (Qwen3-VL)."""
    tokenizer = tiny_critic_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "pad", "im_end")
    }
    vision = dict(
        depth=depth, hidden_size=vision_width, intermediate_size=24, num_heads=2, patch_size=PATCH,
        spatial_merge_size=MERGE, out_hidden_size=width,
    )  # fmt: skip
    vision |= {
        "qwen2_5_vl": dict(tokens_per_second=4, window_size=16, fullatt_block_indexes=[*range(1, depth, 2)]),
        "qwen3_vl": dict(num_position_embeddings=16, deepstack_visual_indexes=sorted({0, max(0, depth - 2)})),
    }[family]
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 4 // 3, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=width // 2, max_position_embeddings=1024,
        attention_dropout=dropout, bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=ids["pad"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [width // 12] * 3},
    )  # fmt: skip
    if family == "qwen2_5_vl":
        del text["head_dim"]
    tokens = {f"{name.replace('pad', 'token')}_id": ids[name] for name in ("image_pad", "video_pad")}
    tokens |= {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")}
    vision |= dict(temporal_patch_size=TEMPORAL_PATCH)
    return dict(model_type=family, vision_config=vision, text_config=text, tie_word_embeddings=False, **tokens)


def tiny_critic_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, family: str = "qwen2_5_vl", **config: Any
) -> tuple[Any, Any]:
    """(Qwen2_5_VLForConditionalGeneration or Qwen3VLForConditionalGeneration, its tokenizer). ``config``:
    ``tiny_critic_config``'s. Frozen, eval."""
    import transformers

    config_class, model_class = {
        "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    }[family]
    with _seeded(seed) as generator:
        settings = tiny_critic_config(family, **config)
        del settings["model_type"]
        model = model_class(config_class(**settings))
        _spread(model, 1.0, generator)
    model = model.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        lift_norms(model)
    return model, tiny_critic_tokenizer()


def lift_norms(model: nn.Module) -> None:
    """Qwen's RMSNorm computes in fp32 whatever the model's dtype. In an fp64 oracle its backward would round to fp32
    (1e-7), and hide what is tested."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ in ("Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm"):
            module.forward = MethodType(forward, module)


def tiny_video_settings() -> dict[str, Any]:
    """The tiny critic's ``video_preprocessor_config.json``: frames of 8x8 to 64x64 pixels, 2 frames a second."""
    return {
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": MERGE,
        "fps": 2,
        "size": {"shortest_edge": 64, "longest_edge": 4096},
        "image_mean": [0.5, 0.45, 0.4],
        "image_std": [0.3, 0.25, 0.27],
        "video_processor_type": "Qwen2VLVideoProcessor",
    }


def tiny_critic(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    fps: float | None = None,
    family: str = "qwen2_5_vl",
    **config: Any,
) -> Any:
    """``lowmem_drf.models.qwen_vl.critic.VLMCritic`` on the tiny model: a ``types.Critic``."""
    from lowmem_drf.models.qwen_vl.critic import VLMCritic, video_geometry

    model, tokenizer = tiny_critic_model(dtype, seed, family, **config)
    return VLMCritic(model, tokenizer, video_geometry(tiny_video_settings()), fps=fps or 2.0)


WAN22_VAE: dict[str, Any] = dict(
    decoder_base_dim=6, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True], is_residual=True,
    patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
)  # fmt: skip
"""Residual blocks, pixel patches, and a decoder of another width than the encoder."""

GENERATORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wan2.1-1.3b": ({}, {}),
    "wan2.1-14b": (
        dict(num_attention_heads=4, ffn_dim=48, layers=3),
        dict(dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True]),
    ),
    "wan2.2-5b": (
        dict(num_attention_heads=3, layers=3, in_channels=6, out_channels=6),
        WAN22_VAE
        | dict(z_dim=6, latents_mean=[0.1, -0.2, 0.3, 0.0, 0.2, -0.1], latents_std=[1.5, 0.8, 1.1, 2.0, 0.9, 1.2]),
    ),
    "wan2.2-a14b": (dict(num_attention_heads=4, ffn_dim=48, layers=3), {}),
}
"""Tiny versions of the published generators: (settings of the transformer, of the VAE). The last one has two
transformers."""
BOUNDARY = 0.875


def tiny_parts(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    rank: int = 2,
    b_std: float = 0.3,
    generator: str = "wan2.1-1.3b",
    expert: str = "low",
) -> Any:
    """``types.Parts`` of tiny models with a LoRA whose B is not zero (with B = 0 the gradient of A vanishes).

    ``generator``: a key of ``GENERATORS``; ``expert``: the transformer that has the LoRA, where there are two.
    """
    from lowmem_drf.models.experts import two_experts
    from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS, add_lora, lora_parameters
    from lowmem_drf.models.wan.denoiser import as_velocity
    from lowmem_drf.models.wan.vae.decoder import WanDecoder
    from lowmem_drf.types import Parts

    of_transformer, of_vae = GENERATORS[generator]
    transformer = tiny_transformer(dtype, seed, **of_transformer)
    add_lora(transformer, rank=rank, alpha=float(rank), targets=DEFAULT_TARGETS, seed=seed)
    randomise_lora(transformer, b_std, seed)
    velocity = as_velocity(transformer)
    if generator == "wan2.2-a14b":
        other = as_velocity(tiny_transformer(dtype, seed + 50, **of_transformer))
        velocity = two_experts(velocity, other, expert, BOUNDARY, lambda name: None)
    return Parts(
        velocity=velocity,
        decoder=WanDecoder(tiny_vae(dtype, seed, **of_vae)),
        critic=tiny_critic(dtype, seed),
        lora=lora_parameters(transformer),
    )


def randomise_lora(transformer: Any, std: float = 0.3, seed: int = 0) -> None:
    """Fills every LoRA B with noise: a stand-in for a trained adapter."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in sorted(transformer.named_parameters()):
            if ".lora_B." in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def tiny_condition(batch: int, dtype: torch.dtype = torch.float64, tokens: int = 6, seed: int = 0) -> Tensor:
    """Text embeddings (B, L, 16) as the tiny transformer takes them."""
    generator = torch.Generator().manual_seed(seed + 7)
    return torch.randn(batch, tokens, TEXT_DIM, generator=generator, dtype=torch.float64).to(dtype)


def tiny_latents(
    batch: int, frames: int = 3, size: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Latents (B, 4, F, size, size): pixel frames 4F - 3 of 4*size x 4*size."""
    generator = torch.Generator().manual_seed(seed + 11)
    return torch.randn(batch, Z_DIM, frames, size, size, generator=generator, dtype=torch.float64).to(dtype)


def save_tiny_generator(folder: Path, seed: int = 0, experts: bool = False) -> Path:
    """Writes a complete diffusers folder (model_index.json, transformer, vae, text_encoder, tokenizer, scheduler) and
    returns it. ``experts``: with a second transformer."""
    from diffusers import UniPCMultistepScheduler

    text, tokenizer = tiny_text(seed=seed)
    tiny_transformer(seed=seed).save_pretrained(folder / "transformer")
    tiny_vae(seed=seed).save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000,
        solver_order=1, disable_corrector=[0],
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if experts:
        tiny_transformer(seed=seed + 50).save_pretrained(folder / "transformer_2")
        index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": BOUNDARY}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def save_tiny_critic(folder: Path, seed: int = 0, family: str = "qwen2_5_vl", **config: Any) -> Path:
    """Writes a complete transformers folder of the tiny critic (config, weights, tokenizer, chat template, video
    preprocessor) and returns it."""
    model, tokenizer = tiny_critic_model(seed=seed, family=family, **config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(tiny_video_settings(), indent=2))
    return folder


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted, which must not be 0."""
    got, wanted = got.detach(), wanted.detach()
    scale = float(wanted.abs().max())
    assert scale > 0
    return float((got - wanted).abs().max()) / scale


class SavedBytes:
    """Context manager that counts the bytes autograd saves for backward: each storage once, without parameters and
    buffers."""

    def __init__(self, *models: nn.Module) -> None:
        self._skip = {
            t.untyped_storage().data_ptr() for model in models for t in (*model.parameters(), *model.buffers())
        }
        self._seen: dict[int, int] = {}
        self._keep: list[Tensor] = []

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._skip:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._keep.append(x.detach())  # or a freed address could be reused and counted once
        return x

    @property
    def total(self) -> int:
        return sum(self._seen.values())


def tiny_clip(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """CLIPModel of 8x8 pixels in patches of 4, and a vocabulary of 16. Frozen, eval."""
    from transformers import CLIPConfig, CLIPModel

    tower = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    text = tower | dict(vocab_size=16, max_position_embeddings=8, bos_token_id=14, eos_token_id=15, pad_token_id=15)
    vision = tower | dict(image_size=8, patch_size=4)
    with _seeded(seed) as generator:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        _spread(model, 1.0, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_clip_tokenizer() -> Any:
    """Word-level, with CLIP's begin and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*str.split("a red blue circle square moves left right up jumps"), *(f"<{i}>" for i in range(4))]
    vocab = {word: i for i, word in enumerate([*words, "<begin>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<begin>", 14), ("<end>", 15)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<0>")


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Writes a complete transformers folder of ``tiny_clip`` and returns it."""
    tiny_clip(seed=seed).save_pretrained(folder)
    tiny_clip_tokenizer().save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.45, 0.4], "image_std": [0.3, 0.25, 0.27]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
