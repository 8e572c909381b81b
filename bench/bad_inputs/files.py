"""What the rows name: wrong files, a run of one update, and damaged copies of it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

from bench.bad_inputs.refusals import run
from bench.bad_inputs.rows import BRACKETS, DIGITS, TOY


def make_files() -> None:
    """Makes them in the current folder."""
    import torch

    from lowmem_drf.cli import main
    from lowmem_drf.video import write_mp4

    Path("a-folder").mkdir()
    texts = {
        "empty.txt": "", "clip.mp4": "no film", "text.safetensors": "no tensors", "text.gguf": "no tensors",
        "model.pth": "no tensors", "mine.toml": "# edited\nsteps = 3\n",
        "broken.toml": "steps = = 3", "circle.toml": 'extends = "./circle.toml"', "no-base.toml": 'extends = "toi"',
        "extends-number.toml": "extends = 3", "section.toml": "optim = 3", "twice.toml": "steps = 1\nsteps = 2\n",
        "table.csv": f"id,prompt\n1,{TOY}\n", "broken.jsonl": "{", "list.jsonl": "[1]", "broken.json": "{",
        "list.json": "[1, 2]", "prompts.txt": TOY, "other.txt": "a corgi surfs\n",
        "digits.toml": f"steps = {DIGITS}", "brackets.toml": f"steps = {BRACKETS}", "unknown.toml": "[optim]\nlrr = 1",
        "twice.jsonl": '{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": "1"}\n', "questions.json": "mine",
        "digits.jsonl": f'{{"prompt": "a", "id": {DIGITS}}}', "brackets.jsonl": f'{{"prompt": {BRACKETS}',
        "surrogate.jsonl": '{"prompt": "a \\ud800 ball"}',
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
    asked = {"aspect": "XX", "text": "is it red ?", "answer": "yes"}
    rows: dict[str, object] = {
        "json.txt": {"prompt": TOY}, "key.jsonl": {"prompt": TOY, "text": "x"},
        "reference.jsonl": {"prompt": TOY, "reference_video": "none.mp4"},
        "aspect.jsonl": {"prompt": TOY, "questions": [asked]},
        "weight.jsonl": {"prompt": TOY, "questions": [asked | {"aspect": "TA", "weight": -1}]},
        "aspect.json": [{"prompt": TOY, "questions": [asked]}],
    }  # fmt: skip
    for name, row in rows.items():
        Path(name).write_text(json.dumps(row), encoding="utf-8")
    for name in ("utf16.txt", "utf16.toml"):
        Path(name).write_bytes("steps = 1".encode("utf-16"))
    Path("binary.toml").write_bytes(bytes(range(256)))
    for name in ("latin.txt", "latin.toml"):
        Path(name).write_bytes("# Mädchen".encode("latin-1"))
    Path("header.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    write_mp4(Path("good.mp4"), torch.zeros(9, 3, 32, 32, dtype=torch.uint8), 8)
    brief = ["batch=1", "micro_batch=1", "log.eval_prompts=0", "log.sample_every=0"]
    settings = [word for text in brief for word in ("-s", text)]
    code, said = run(main, ["train", "--preset", "toy", "--output", "run", "--steps", "1", *settings], most_s=0)
    if code:
        raise RuntimeError(said)
    whole = Path("good.mp4").read_bytes()
    Path("cut.mp4").write_bytes(whole[: len(whole) // 3])
    _loras(Path("run/checkpoints/step-000001/lora.safetensors"))
    for name in ("run-edited", "run-locked"):
        shutil.copytree("run", name)
    text = Path("run/config.toml").read_text(encoding="utf-8")
    Path("run-edited/config.toml").write_text(text.replace("alpha = ", "alpha = 1", 1), encoding="utf-8")
    shutil.copytree("run", "run-toml")
    Path("run-toml/config.toml").write_text("steps = = 3", encoding="utf-8")
    shutil.copytree("run", "run-empty")
    shutil.rmtree("run-empty/checkpoints")
    shutil.copytree("run", "run-lora")
    Path("run-lora/checkpoints/step-000001/lora.safetensors").write_bytes(b"no tensors")


def _loras(good: Path) -> None:
    """Damaged and odd copies of a LoRA."""
    import torch
    from safetensors.torch import load_file, save, save_file

    tensors, data = load_file(good), good.read_bytes()
    (first, tensor), rest = next(iter(tensors.items())), dict(list(tensors.items())[1:])
    Path("cut.safetensors").write_bytes(data[: len(data) // 2])
    Path("nothing.safetensors").write_bytes(save({}))
    save_file({name.replace("blocks.0", "blocks.77"): value for name, value in tensors.items()}, "other.safetensors")
    save_file(rest, "half.safetensors")
    save_file(tensors, "good.safetensors")
    save_file({"blocks.0.self_attn.q.weight": tensor}, "model.safetensors")
    Path("model.gguf").write_bytes(b"GGUF" + bytes(60))
    Path("model.pt").write_bytes(b"PK\x03\x04" + bytes(60))
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": tensor}, "flux.safetensors")
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": tensor}, "text-encoder.safetensors")
    save_file(rest | {first: torch.full_like(tensor, torch.nan)}, "nan.safetensors")
    save_file(tensors, "alpha.safetensors", metadata={"alpha": "much"})
    save_file(rest | {first: tensor.to(torch.int32)}, "integers.safetensors")
    save_file({"blocks.0.self_attn.q.weight": torch.ones(2, 2).to(torch.int8)}, "int8.safetensors")
    save_file({"decoder.conv1.weight": torch.ones(2)}, "vae.safetensors")
    save_file(rest | {first: tensor.to(torch.complex64)}, "complex.safetensors")
