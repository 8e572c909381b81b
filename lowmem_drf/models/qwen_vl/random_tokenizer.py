"""A tokenizer for critics with random weights: bytes, the answer words, and the special tokens at the ids that the
model expects. It gives a question about four times as many tokens as the real one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = ("yes", "Yes", "YES", "no", "No", "NO")


def byte_tokenizer(config: Mapping[str, Any]) -> Any:
    """A byte-level BPE tokenizer with a chat template of Qwen's form, for a model of this ``config.json`` with a
    vocabulary of at least 300 tokens. SmolVLM2's template comes with its family."""
    from transformers import PreTrainedTokenizerFast

    if config["model_type"] == "smolvlm":
        end, frame = "<end_of_utterance>", ["<fake_token_around_image>", "<global-img>"]
        special = {"<image>": config["image_token_id"]}
    else:
        end, frame = "<|im_end|>", list[str]()
        names = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
        names |= {f"<|{name}|>": name for name in ("vision_start", "vision_end")}
        special = {token: config[f"{name}_token_id"] for token, name in names.items()}
    special[end] = config["text_config"]["eos_token_id"]
    parts = [word[:end] for word in WORDS for end in range(2, len(word) + 1)]
    ordinary = dict.fromkeys([*_byte_letters(), *parts, "<|im_start|>", "<|endoftext|>", *frame])
    free = (index for index in range(len(ordinary) + len(special)) if index not in special.values())
    vocabulary = dict(zip(ordinary, free, strict=False)) | special
    added = [
        {"id": index, "content": token, "special": True}
        for token, index in vocabulary.items()
        if token.startswith("<") and token.endswith(">") and len(token) > 2
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    merges = [f"{part[:-1]} {part[-1]}" for part in dict.fromkeys(parts)]
    content = {
        "version": "1.0",
        "added_tokens": [token | flags for token in added],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=end, pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _byte_letters() -> list[str]:
    """GPT-2's 256 letters for bytes in a byte-level vocabulary."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    return [chr(byte) for byte in sorted(printable)] + [chr(256 + i) for i in range(256 - len(printable))]
