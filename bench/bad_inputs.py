"""Gives every command bad input, and checks each refusal: exit code 2, at most 6 lines, no traceback, the cure, and
no new file.

    python -m bench.bad_inputs

Needs no network and no card. A row is a command line and words that its message must contain: the cure. It is run in
an empty folder with the files of ``_files``. Exit code 1 if a row is not as it should be.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

MOST_LINES = 6
MOST_S = 20
LONG, DIGITS, BRACKETS = "n" * 300, "1" * 5000, "[" * 3000
TOY = "a red circle moves left on a gray background"
HERE = f'--prompt "{TOY}"'

ROWS: tuple[tuple[str, str], ...] = (
    # commands and options
    ("trian", "--help"),
    ("train --stepz 3", "--steps"),
    ("train extra", "--help"),
    ("train --steps three", "--steps"),
    ("train --num-processes 0", "--num-processes"),
    ("train --vram lots", "for example --vram 24GB"),
    ("train --preset", "--preset"),
    ("train --preset=", "--preset is empty"),
    ("train --output ''", "--output is empty"),
    ("export-lora --merge ''", "--merge is empty"),
    ("eval ''", "is empty"),
    ("sample --seed -1", "--seed"),
    ("plan --json --vram", "--vram"),
    ("presets list toy", "--help"),
    ("doctor --fast", "--help"),
    # presets
    ("train --preset toi", "Did you mean toy?"),
    ("train --preset nothing-like-it", "Presets:"),
    ("train --preset none.toml", "presets list"),
    ("train --preset .", "Presets:"),
    ("train --preset a-folder/", "presets list"),
    ("train --preset clip.mp4", "TOML file"),
    ("train --preset ./broken.toml", "TOML file"),
    ("train --preset ./latin.toml", "Save the file as UTF-8"),
    ("train --preset ./utf16.toml", "Save the file as UTF-8"),
    ("train --preset ./binary.toml", "Save the file as UTF-8"),
    ("train --preset ./digits.toml", "TOML file"),
    ("train --preset ./brackets.toml", "TOML file"),
    ("train --preset ./unknown.toml", "Did you mean optim.lr?"),
    ("train --preset ./circle.toml", "Take the line out"),
    ("train --preset ./no-base.toml", "Did you mean toy?"),
    ("train --preset ./extends-number.toml", "give one preset"),
    ("train --preset ./section.toml", "optim"),
    ("train --preset ./twice.toml", "TOML file"),
    ("plan --preset toi", "Did you mean toy?"),
    ("bench --preset toi", "Did you mean toy?"),
    ("questions --preset toi x", "Did you mean toy?"),
    ("presets show toi", "Did you mean toy?"),
    ("presets show a-folder/", "presets list"),
    ("presets copy toi", "Did you mean toy?"),
    ("presets copy toy mine.toml", "--force"),
    ("presets copy toy /proc/none/x.toml", "Give another"),
    (f"presets copy toy {LONG}", "Give"),
    # keys and values
    ("train -s optim.lrr=1", "Did you mean optim.lr?"),
    ("train -s zzz=1", "train --dry-run"),
    ("train -s optim.lr", "key=value"),
    ("train -s =1", "key=value"),
    ("train -s optim=1", "its keys:"),
    ("train -s optim.lr=fast", "number"),
    ("train -s optim.lr=nan", "at most"),
    ("train -s critic.hinge=nan", "at most"),
    ("train -s optim.lr=-1", "at least"),
    ("train -s optim.eps=0", "at least"),
    ("train -s batch=1.5", "integer"),
    ("train -s batch=true", "integer"),
    ("train -s batch=0", "greater than or equal to 1"),
    ("train -s steps=9223372036854775808", "valid integer"),
    (f"train -s steps={DIGITS}", "valid integer"),
    (f"train -s critic.weights={BRACKETS}", "critic.weights"),
    ("train -s optim.lr=1e300", "at most"),
    ("train -s optim.eps=1e-300", "at least"),
    ("train -s sampler.guidance=inf", "at most"),
    ("train -s sampler.shift=0", "at least"),
    ("train -s lora.alpha=0", "at least"),
    ("train -s sampler.steps=1000000000", "less than or equal to"),
    ("train -s batch=1000000000", "less than or equal to"),
    ("train -s kernels.attention=fast", "'sdpa'"),
    ("train -s dtype=fp8", "'bf16'"),
    ("train -s memory.on_oom=pray", "'adapt'"),
    ("train -s engine=zero3 -s memory.on_oom=adapt", 'set "stop"'),
    ("train -s critic.id=toyworld-rader", "Did you mean toyworld-reader?"),
    ("train -s 'skip_prompts=[\"9999\"]'", "line numbers"),
    ("train -s seed=-1", "greater than or equal to 0"),
    ("train -s model.text_tokens=1000000000", "less than or equal to 512"),
    ("train -s lora.rank=1000000000", "less than or equal to 1024"),
    ("train -s lora.targets=[]", "nothing would be trained"),
    ("train -s 'lora.targets=[\"to_z\"]'", "It has: attn1.to_"),
    ("train -s video.width=30", "nearest: 32"),
    ("train -s video.width=1000000", "At most: -s video.width=512"),
    ("train -s video.frames=10", "nearest: 9 or 13"),
    ("train -s video.frames=1", "lower it"),
    ("train -s video.frames=401", "At most: -s video.frames=253"),
    (
        "train -s batch=1000 -s micro_batch=1000 -s video.width=512 -s video.height=512 -s video.frames=253",
        "Lower micro_batch",
    ),
    ("train -s micro_batch=9", "-s micro_batch=8"),
    ("train -s sampler.graded_steps=11", "sampler.steps = 10"),
    ("train -s sampler.graded=[12]", "from 0 to 9"),
    ("train -s sampler.lv_samples=1", 'graded = "last"'),
    ("train -s critic.frames=10", "lower it"),
    ("train -s critic.frames=fps:99", "no higher"),
    ("train -s critic.frames=many", 'for example "fps:2"'),
    ("train -s memory.vae_backward=half", 'for example "window:3"'),
    ("train -s critic.mode=loud", "'dense'"),
    ("train -s critic.questions=templates", 'use "phrases"'),
    ("train -s critic.mode=vanilla -s critic.weights.TA=0", "none of its questions has a weight above 0"),
    ("train -s engine=zero9", "'zero3'"),
    ("train -s processes=2", 'engine = "zero1"'),
    ("train -s device=cuda", "device=cpu"),
    ("train -s memory.park=critic", "list"),
    ("train -s 'memory.stream=[\"critic\"]'", "checkpoint = true"),
    ("train -s a=1 -s b=2 -s c=3 -s optim.lr=x -s batch=0 -s steps=0 -s seed=-1", "more"),
    ("train --dry-run -s optim.lrr=1", "Did you mean optim.lr?"),
    ("bench --preset toy -s batch=0", "greater than or equal to 1"),
    ("bench --preset toy -s video.width=1000000", "At most: -s video.width=512"),
    ("plan --preset rtx4090 --vram lots", "for example --vram 24GB"),
    ("plan --preset rtx4090 --vram 0", "for example --vram 24GB"),
    ("plan --preset rtx4090 --vram=-1", "for example --vram 24GB"),
    ("plan --preset rtx4090 -s video.width=1000000", "At most: -s video.width=16384"),
    ("plan --preset rtx4090 -s video.width=16384 -s video.height=16384", "Lower micro_batch"),
    ("plan --preset rtx4090 -s model.id=nobody/nothing", "hf download"),
    # prompt files
    ("train --prompts none.txt", "none.txt does not exist"),
    ("train --prompts empty.txt", "holds no prompt"),
    ("train --prompts latin.txt", "not UTF-8"),
    ("train --prompts a-folder", "a-folder"),
    ("train --prompts table.csv", "txt"),
    ("train --prompts broken.jsonl", "broken.jsonl:1"),
    ("train --prompts list.jsonl", "list.jsonl:1"),
    ("train --prompts utf16.txt", "Save the file as UTF-8"),
    ("train --prompts json.txt", "Rename the file"),
    ("train --prompts twice.jsonl", "Give each prompt its own"),
    ("train --prompts key.jsonl", "use one of"),
    ("train --prompts reference.jsonl", "relative to the prompt file"),
    ("train --prompts aspect.jsonl", "is to be one of"),
    ("train --prompts weight.jsonl", "1e-6 to 1e6"),
    ("train --prompts digits.jsonl", "digits.jsonl:1"),
    ("train --prompts brackets.jsonl", "brackets.jsonl:1"),
    ("train --prompts surrogate.jsonl", "surrogate.jsonl:1"),
    (f"train --prompts {LONG}", "Give a shorter one"),
    ("train --prompts other.txt", "Example:"),
    ("questions --prompts none.txt", "none.txt does not exist"),
    ("sample --run run --prompts empty.txt", "holds no prompt"),
    ("eval run --prompts empty.txt", "holds no prompt"),
    # question files
    ("train -s critic.questions=none.json", "none.json"),
    ("train -s critic.questions=broken.json", "broken.json"),
    ("train -s critic.questions=list.json", "list.json"),
    ("questions --check broken.json", "broken.json"),
    ("questions --check aspect.json", "is to be one of"),
    ("questions", "Example:"),
    (f'questions "{TOY}" --prompts prompts.txt', "Example:"),
    (f'questions "{TOY}" --write --preset toy', "-s critic.id="),
    (f'questions "{TOY}" --output mine.toml', "--force"),
    (f'questions "{TOY}" --output run/config.toml', "--output"),
    (f'questions "{TOY}" --output a-folder', "--output"),
    # outputs and resuming
    ("train --output empty.txt/run", "Give another folder"),
    ("train --output empty.txt", "Give another folder"),
    ("train --output /proc/none/run", "Give another folder"),
    ("train --output /dev/null", "Give another folder"),
    (f"train --output {LONG}", "Give"),
    ("train --output run", "--resume --output run"),
    ("train --resume", "lowmem-drf train"),
    ("train --resume --output none", "lowmem-drf train"),
    ("train --resume --output run", "--steps"),
    ("train --resume --output run --preset toy", "Leave it out"),
    ("train --resume --output run --seed 5", "change only"),
    ("train --resume --output run-toml --steps 9", "TOML file"),
    ("train --resume --output run-edited --steps 9", "Put the old values back"),
    ("train --resume --output run-locked --steps 9", "Wait until it has ended"),
    ("train --resume --output run --steps 9 -s lora.rank=3", "change only"),
    ("train --output .", "Move it elsewhere"),
    ("sample --run run-edited", "Put the old values back"),
    ("export-lora run-edited", "Put the old values back"),
    # models
    ("train -s model.id=nobody/nothing", "hf download"),
    ("train -s model.id=./a-folder", "complete folder"),
    ("train -s model.id=clip.mp4", "folder"),
    ("train -s critic.id=nobody/nothing", "hf download"),
    ("train -s critic.id=./a-folder", "complete folder"),
    ("train -s model.transformer=none.safetensors", "none.safetensors"),
    ("train -s model.transformer=text.safetensors", "text.safetensors"),
    ("train -s model.transformer=a-folder", "is a folder"),
    ("train -s model.transformer=model.pth", "pickles can run code"),
    ("train -s model.transformer=other.safetensors", "Give it to model.base_lora"),
    ("train -s model.transformer=text.gguf", "does not begin with the header of a GGUF file. Get it anew"),
    ("train -s model.transformer=int8.safetensors", "Give the model in 16 bits, in fp8 or as GGUF"),
    ("train -s model.transformer=vae.safetensors", "is a VAE"),
    ("train -s model.base_lora=text.safetensors", "text.safetensors"),
    # runs and LoRA files
    ("sample", "lowmem-drf sample --preset"),
    ("sample --preset toi", "Did you mean toy?"),
    ("sample --preset toy --run run", "Leave one out"),
    ("sample --preset toy --compare", "--lora FILE"),
    ("sample --preset toy --lora-scale 0.5", "--lora FILE"),
    ("sample --preset rtx4090", "--prompt"),
    ("eval --preset toy", "--lora FILE"),
    ("eval run --preset toy", "Leave one out"),
    ("eval --preset toy --lora other.safetensors", "model"),
    ("eval run -s optim.lrr=1", "Did you mean optim.lr?"),
    ("sample --preset toy -s video.width=30", "nearest: 32"),
    ("sample --preset toy --lora none.safetensors", "none.safetensors"),
    ("sample --preset toy --lora other.safetensors", "model"),
    (f"sample --preset toy {HERE} --output run/config.toml", "ends in .mp4"),
    ("sample --run run -s lora.rank=3", "trained with"),
    ("sample --run none", "lowmem-drf train"),
    ("sample --run empty.txt", "lowmem-drf train"),
    (f"sample --run {LONG}", "Give a shorter one"),
    ("sample --run run-empty", "--resume --output run-empty"),
    ("sample --run run-toml", "TOML file"),
    ("sample --run run --prompt ' '", "Give it some words"),
    ("sample --run run --lora none.safetensors", "none.safetensors"),
    ("sample --run run --lora text.safetensors", "safetensors"),
    ("sample --run run --lora header.safetensors", "safetensors"),
    ("sample --run run --lora a-folder", "a-folder"),
    ("sample --run run --lora cut.safetensors", "Give"),
    ("sample --run run --lora nothing.safetensors", "LoRA"),
    ("sample --run run --lora other.safetensors", "model"),
    ("sample --run run --lora half.safetensors", "half.safetensors"),
    ("sample --run run --lora nan.safetensors", "NaN"),
    ("sample --run run --lora alpha.safetensors", "alpha"),
    ("sample --run run --lora integers.safetensors", "'I32'"),
    ("sample --run run --lora complex.safetensors", "'C64'"),
    ("sample --run run --lora-scale nan", "1 is the tuned model"),
    (f"sample --run run {HERE} --output a.gif", "ends in .mp4"),
    (f"sample --run run {HERE} --output clip.mp4", "--force"),
    (f"sample --run run {HERE} --output /dev/null", "Give another folder"),
    (f"sample --run run {HERE} --prompt again --output one.mp4", "Give a folder"),
    (f"sample --preset rtx4090 {HERE} --lora good.safetensors", "inspect-lora"),
    ("inspect-lora none.safetensors", "none.safetensors"),
    ("inspect-lora text.safetensors", "safetensors"),
    ("inspect-lora a-folder", "holds no adapter"),
    ("inspect-lora model.safetensors", "Give it as model.transformer"),
    ("inspect-lora model.gguf", "GGUF"),
    ("inspect-lora model.pt", "pickle"),
    ("inspect-lora flux.safetensors", "Flux"),
    ("inspect-lora text-encoder.safetensors", "text encoder"),
    ("inspect-lora nan.safetensors --json", "NaN"),
    ("export-lora", "lowmem-drf train"),
    ("export-lora none", "lowmem-drf train"),
    ("export-lora run --step 9", "Steps: 1"),
    ("export-lora run --format zip", "comfyui, diffusers, kohya"),
    ("export-lora run --dtype int3", "bf16, fp16, fp32"),
    ("export-lora run --output x.bin", ".safetensors"),
    ("export-lora run --output text.safetensors", "--force"),
    ("export-lora run --output run/checkpoints/step-000001/lora.safetensors", "--output"),
    ("export-lora run --merge run", "--merge"),
    ("report none", "lowmem-drf train"),
    ("report run --output page.txt", ".html"),
    ("report run --output run", ".html"),
    ("eval none", "lowmem-drf train"),
    ("eval run-empty", "--resume --output run-empty"),
    # videos
    (f"score none.mp4 {HERE}", "none.mp4"),
    (f"score empty.txt {HERE}", "empty.txt"),
    (f"score cut.mp4 {HERE}", "cut.mp4"),
    (f"score clip.mp4 {HERE}", "clip.mp4"),
    (f"score a-folder {HERE}", "a-folder"),
    ("score clip.mp4", "--prompt"),
    ("score clip.mp4 --prompt ' '", "Say what"),
    ("score clip.mp4 --prompt 'a corgi surfs'", "--critic"),
    (f"score good.mp4 {HERE} --frames none", "fps:2"),
    (f"score good.mp4 {HERE} --frames -1", "fps:2"),
    (f"score good.mp4 {HERE} --mode loud", "'dense'"),
    (f"score good.mp4 {HERE} --quant int2", "'nf4'"),
    (f"score good.mp4 {HERE} --critic nobody/nothing", "hf download"),
    (f"score good.mp4 {HERE} --saliency heat.gif", "ends in .mp4"),
    (f"score good.mp4 {HERE} --saliency good.mp4", "--force"),
)

OTHERS: tuple[tuple[str, int, str], ...] = (
    # not the user's input: a disk or a killed copy damaged what the program wrote
    ("sample --run run-lora", 1, "Start a new run"),
    ("export-lora run-lora", 1, "Start a new run"),
)
"""Rows with another exit code. They do not count among the bad inputs."""


def _files() -> None:
    """What the rows name, in the current folder: wrong files, a run of one update, and damaged copies of it."""
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
    _run(main, ["train", "--preset", "toy", "--output", "run", "--steps", "1", *settings])
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


def _run(main: object, arguments: Sequence[str]) -> tuple[int, str]:
    """(exit code, what was printed on stderr, or on stdout if nothing was)."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    before = signal.signal(signal.SIGALRM, _too_slow)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            signal.alarm(MOST_S)
            main(list(arguments))  # type: ignore[operator]
        except SystemExit as error:
            code = error.code
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return code if isinstance(code, int) else 0 if code is None else 1, err.getvalue() or out.getvalue()


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError(f"nothing was said within {MOST_S} s")


def faults(code: int, text: str, cure: str, wanted: int = 2) -> list[str]:
    """What is wrong with a refusal."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = {
        f"exit code {code}": code != wanted,
        f"{len(lines)} lines": len(lines) > MOST_LINES,
        "a traceback": "Traceback" in text,
        "unexpected": "Error: unexpected" in text,
        f"no {cure!r}": cure not in " ".join(text.split()),
    }
    return [fault for fault, there in found.items() if there]


def _short(command: str) -> str:
    for long in (LONG, DIGITS, BRACKETS):
        command = command.replace(long, f"{long[0]}…{long[0]}")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Prints a line a row; given words choose the rows that contain all of them."""
    words = sys.argv[1:] if arguments is None else arguments
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    from lowmem_drf.cli import main as cli
    from lowmem_drf.training.run_lock import locked

    rows = [(command, 2, cure) for command, cure in ROWS] + list(OTHERS)
    rows = [row for row in rows if all(word in row[0] for word in words)]
    wrong, start, before = 0, time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.chdir(folder)
        try:
            _files()
            stack.enter_context(locked(Path("run-locked"), print))
            for command, wanted, cure in rows:
                began = time.perf_counter()
                there = set(os.listdir())
                code, text = _run(cli, shlex.split(command))
                found, seconds = faults(code, text, cure, wanted), time.perf_counter() - began
                found += [f"left {name}" for name in set(os.listdir()) - there]
                wrong += bool(found)
                lines = [line for line in text.splitlines() if line.strip()]
                verdict = f"WRONG ({', '.join(found)})" if found else "ok"
                print(
                    f"{verdict}: lowmem-drf {_short(command)}\n    exit code {code}, {len(lines)} lines, "
                    f"{seconds:.1f} s: {' / '.join(lines)[:300]}",
                    flush=True,
                )
        finally:
            os.chdir(before)
    seconds = time.perf_counter() - start
    print(f"{len(rows) - wrong} of {len(rows)} bad inputs were refused as they should be, in {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
