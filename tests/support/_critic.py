"""What the tests of the critic share: questions, clips, and transformers' own way to the same answers, one conversation
at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from lowmem_drf.method.preprocess import video_patches
from lowmem_drf.models.qwen_vl.critic import VLMCritic
from lowmem_drf.types import Question

FAMILIES = ("qwen2_5_vl", "qwen3_vl")

SHORT = Question("TA", "red?", "yes")
LONG = Question("Phy", "in this video, does the red circle moving left jump or does it flicker or vanish?", "no")
DENSE = Question("VQ", "describe the motion.", "the red circle moves left the whole clip.", kind="dense")
WORD = Question("VQ", "what color is it?", "red", kind="dense")


def questions(count: int) -> list[Question]:
    """Both kinds, answers and questions of several lengths."""
    return [(DENSE, SHORT, LONG, WORD)[i % 4] for i in range(count)]


def clips(batch: int, frames: int = 5, size: tuple[int, int] = (24, 40), dtype: torch.dtype = torch.float64) -> Tensor:
    """24x40 pixels are 3x5 tokens, which the 2x2 windows do not divide: windows of four lengths. 5 frames are filled up
    to 6."""
    return (
        torch.rand(batch, frames, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def expanded(text: str, grid: list[int], frames: int, fps: float, family: str) -> str:
    """A rendered chat with the video token replaced as the family's processor does it: Qwen3-VL's by its own code."""
    tokens = "<|video_pad|>" * (grid[1] * grid[2] // 4)
    if family == "qwen2_5_vl":
        return text.replace("<|video_pad|>", tokens * grid[0])
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor.video_token, processor.vision_start_token, processor.vision_end_token = (
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    metadata = SimpleNamespace(fps=fps, frames_indices=np.arange(frames))
    replacement = processor.replace_video_token(
        {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}, video_idx=0
    )
    holder = SimpleNamespace(all_special_multimodal_tokens=["<|video_pad|>"], video_token="<|video_pad|>")
    (whole,), _ = ProcessorMixin.get_text_with_replacements(holder, [text], videos_replacements=[replacement])
    return whole


def inputs(critic: VLMCritic, frames_1TCHW: Tensor, text: str, answer: str = "") -> dict[str, Any]:
    """Arguments of ``…ForConditionalGeneration.forward`` and ``generate`` for a user's text about a clip, ``answer``'s
    tokens but the last behind it."""
    family, config, tokenizer = critic.family.MODEL_TYPE, critic.model.config, critic.tokenizer
    pixels, grid = video_patches(frames_1TCHW, critic.geometry)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
    chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    chat = expanded(chat, grid[0].tolist(), frames_1TCHW.shape[1], critic.fps, family)
    ids = torch.tensor([tokenizer(chat)["input_ids"] + (tokenizer(answer)["input_ids"][:-1] if answer else [])])
    arguments = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=pixels,
        video_grid_thw=grid,
        mm_token_type_ids=2 * (ids == config.video_token_id).int(),
    )
    if family == "qwen2_5_vl":
        arguments["second_per_grid_ts"] = torch.tensor([2.0 / critic.fps])
    return arguments


def separately(critic: VLMCritic, frames_1TCHW: Tensor, question: Question) -> Tensor:
    """The scored logits by transformers' own forward, with its own positions and masks. ``critic.model`` must not be
    the adapter's: that one's vision tower is not transformers' any more."""
    dense = question.kind == "dense"
    arguments = inputs(critic, frames_1TCHW, question.text, question.answer if dense else "")
    rows = len(critic.tokenizer(question.answer)["input_ids"]) if dense else 1
    return critic.model(**arguments).logits[0, -rows:]


def untouched(critic: VLMCritic, model: Any) -> Any:
    """What ``separately`` needs of a critic, with a model as transformers made it."""
    return SimpleNamespace(
        family=critic.family, model=model, tokenizer=critic.tokenizer, geometry=critic.geometry, fps=critic.fps
    )


def rotate_in_fp64(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = modeling_qwen2_5_vl.rotate_half
    cos, sin = cos.double().unsqueeze(-2), sin.double().unsqueeze(-2)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def lift_rotations(monkeypatch: Any) -> None:
    """transformers rotates in fp32, whose backward would round the oracle's gradient to 1e-7 (as _tiny says of the
    norms)."""
    for module in (modeling_qwen2_5_vl, modeling_qwen3_vl):
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate_in_fp64)
