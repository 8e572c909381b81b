"""Loading a critic from a folder, and every way in which that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _critic import DENSE, FAMILIES, SHORT, clips, questions
from _tiny import save_tiny_critic, save_tiny_generator, tiny_critic, tiny_critic_tokenizer, tiny_video_settings

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic, video_geometry
from lowmem_drf.models.qwen_vl.packed_questions import Conversation
from lowmem_drf.types import Question


@pytest.mark.parametrize("family", FAMILIES)
def test_load_critic(family: str, tmp_path) -> None:
    critic = load_critic(str(save_tiny_critic(tmp_path, family=family)))
    frames, asked = clips(2, dtype=torch.float32), [questions(3), questions(2)]
    for got, wanted in zip(critic(frames, asked), tiny_critic(family=family)(frames, asked), strict=True):
        assert all(torch.equal(a.logits_AV, b.logits_AV) for a, b in zip(got, wanted, strict=True))
    assert critic.fps == 2.0 and load_critic(str(tmp_path), fps=8.0).fps == 8.0
    assert critic.geometry.bounds == {"qwen2_5_vl": "frame", "qwen3_vl": "clip"}[family]
    assert not any(p.requires_grad for p in critic.model.parameters())


def test_load_critic_from_the_files_of_older_models(tmp_path) -> None:
    """Qwen2.5-VL's own repository: pixels in preprocessor_config.json, the template in chat_template.json."""
    folder = save_tiny_critic(tmp_path)
    settings = tiny_video_settings() | {"min_pixels": 256, "max_pixels": 1024}
    del settings["size"], settings["fps"]
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").rename(tmp_path / "template")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": (tmp_path / "template").read_text()}))
    critic = load_critic(str(folder))
    assert (critic.geometry.min_pixels, critic.geometry.max_pixels, critic.fps) == (256, 1024, 2.0)
    assert critic.conversation.yes


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Changes keys of a JSON file; ``key__inner`` means one level down."""
    content = json.loads((folder / name).read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        (content[outer[0]] if outer else content)[last] = value
    (folder / name).write_text(json.dumps(content))


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def grow_the_tokenizer(folder: Path) -> None:
    tokenizer = tiny_critic_tokenizer()
    tokenizer.add_tokens(["onomatopoeia"])
    tokenizer.save_pretrained(folder)


def take_another_architecture(folder: Path) -> None:
    (save_tiny_generator(folder / "g") / "text_encoder/config.json").replace(folder / "config.json")


SETTINGS = "video_preprocessor_config.json"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "Cannot load the critic"),
    "another model": (
        take_another_architecture,
        "'umt5' model, and the critic must be a 'qwen2_5_vl' .Qwen2.5-VL., 'qwen3_vl' .Qwen3-VL. or 'smolvlm'",
    ),
    "no preprocessor": (lambda folder: (folder / SETTINGS).unlink(), "preprocessor_config.json"),
    "half a preprocessor": (lambda folder: (folder / SETTINGS).write_text('{"patch_size": 4}'), "lack"),
    "broken weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"not weights"),
        "Cannot load the critic",
    ),
    "missing weights": (lose_a_tensor, r"lack 1 tensors .*language_model.layers.1.mlp.up_proj.weight"),
    "no template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        "no chat template. Use an instruction-tuned model",
    ),
    "patch": (
        lambda folder: edit(folder, SETTINGS, patch_size=8),
        "do not belong together: patch_size is 8 .* and 4 in the model",
    ),
    "merge": (lambda folder: edit(folder, SETTINGS, merge_size=1), "do not belong together: merge_size is 1"),
    "temporal patch": (
        lambda folder: edit(folder, SETTINGS, temporal_patch_size=1),
        "do not belong together: temporal_patch_size is 1",
    ),
    "video token": (
        lambda folder: edit(folder, "config.json", video_token_id=7),
        "do not belong together: the model's video token is 7 .* is 6 in the",
    ),
    "longer tokenizer": (
        grow_the_tokenizer,
        "do not belong together: token 'onomatopoeia' has id 69, and the model embeds 69",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_folders_are_refused(spoil, reason: str, tmp_path) -> None:
    folder = save_tiny_critic(tmp_path)
    spoil(folder)
    with pytest.raises(BadInputError, match=reason):
        load_critic(str(folder))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("<|video_pad|>no text here", "exactly once"),
        ("{{ messages[0]['content'][1]['text'] }}", "exactly one video token"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, reason: str) -> None:
    tokenizer = tiny_critic_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadInputError, match=reason):
        Conversation(tokenizer, tokenizer.convert_tokens_to_ids("<|video_pad|>"))


def test_a_vocabulary_without_yes() -> None:
    tokenizer = tiny_critic_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {
        token: index for token, index in content["model"]["vocab"].items() if token.lower() != "yes"
    }
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    with pytest.raises(BadInputError, match="no single token for 'yes'"):
        Conversation(tokenizer, tokenizer.convert_tokens_to_ids("<|video_pad|>"))


def test_a_dense_question_needs_a_reference() -> None:
    with pytest.raises(BadInputError, match="no reference answer"):
        tiny_critic().conversation.tokens(Question("TA", "what is it?", " ", kind="dense"))


@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_than_the_model_was_made_for(family: str) -> None:
    """The limit applies to the prefix plus one question, since every question's positions start after the prefix."""
    critic = tiny_critic(family=family)
    frames = clips(1, frames=4, size=(16, 16), dtype=torch.float32)
    longest = len(critic.prefix(critic.embed_video(frames)[1]).ids_P) + len(critic.conversation.tokens(DENSE).ids)
    config = critic.model.config.text_config
    config.max_position_embeddings = longest
    critic(frames, [[DENSE] * 5])
    config.max_position_embeddings = longest - 1
    critic(frames, [[SHORT] * 5])
    with pytest.raises(
        BadInputError, match=rf"would read {longest} tokens, 8 of them the video's, .* {longest - 1} .*critic.frames"
    ):
        critic(frames, [[SHORT], [DENSE]][1:])
    with pytest.raises(BadInputError, match="critic.frames"):
        critic.generate("red?", frames[0], 200)


def test_clips_of_different_sizes() -> None:
    critic = tiny_critic()
    features, grid = critic.embed_video(clips(2, dtype=torch.float32))
    grid[1, 0] += 1
    with pytest.raises(BadInputError, match="same size and number of frames"):
        critic.answer_from_features(features, grid, [[SHORT]] * 2)


def test_a_critic_put_together_by_hand_is_checked_too() -> None:
    critic = tiny_critic()
    with pytest.raises(BadInputError, match="patch_size"):
        VLMCritic(critic.model, critic.tokenizer, video_geometry(tiny_video_settings() | {"patch_size": 14}))
