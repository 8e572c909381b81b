"""Gives every command bad input, and checks each refusal: exit code 2, at most 6 lines, no traceback, the cure, and
no new file.

    python -m bench.bad_inputs

Needs no network and no card. A row is a command line and words that its message must contain: the cure. It is run in
an empty folder with the files of ``_files``. Exit code 1 if a row is not as it should be.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

MOST_LINES = 6
LONG = "n" * 300
TOY = "a red circle moves left on a gray background"
HERE = f'--prompt "{TOY}"'

ROWS: tuple[tuple[str, str], ...] = (
    # commands and options
    ("trian", "--help"),
    ("train --stepz 3", "--steps"),
    ("train extra", "--help"),
    ("train --steps three", "--steps"),
    ("train --num-processes 0", "--num-processes"),
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
    ("train --preset ./latin.toml", "TOML file"),
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
    ("train -s steps=9223372036854775808", "less than or equal to"),
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
    # models
    ("train -s model.id=nobody/nothing", "hf download"),
    ("train -s model.id=./a-folder", "complete folder"),
    ("train -s model.id=clip.mp4", "folder"),
    ("train -s critic.id=nobody/nothing", "hf download"),
    ("train -s critic.id=./a-folder", "complete folder"),
    ("train -s model.transformer=none.safetensors", "none.safetensors"),
    ("train -s model.transformer=text.safetensors", "text.safetensors"),
    ("train -s model.base_lora=text.safetensors", "text.safetensors"),
    # runs and LoRA files
    ("sample", "lowmem-drf train"),
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
    ("sample --run run --lora-scale nan", "1 is the tuned model"),
    (f"sample --run run {HERE} --output a.gif", "ends in .mp4"),
    (f"sample --run run {HERE} --output clip.mp4", "--force"),
    (f"sample --run run {HERE} --output /dev/null", "Give another folder"),
    (f"sample --run run {HERE} --prompt again --output one.mp4", "Give a folder"),
    ("export-lora", "lowmem-drf train"),
    ("export-lora none", "lowmem-drf train"),
    ("export-lora run --step 9", "Steps: 1"),
    ("export-lora run --format zip", "comfyui, diffusers, kohya"),
    ("export-lora run --dtype int3", "bf16, fp16, fp32"),
    ("export-lora run --output x.bin", ".safetensors"),
    ("export-lora run --output text.safetensors", "--force"),
    ("export-lora run --output run/checkpoints/step-000001/lora.safetensors", "--output"),
    ("export-lora run --merge run", "--merge"),
    ("export-lora run-lora", "lora.safetensors"),
    ("eval none", "lowmem-drf train"),
    ("eval run-empty", "--resume --output run-empty"),
    # videos
    (f"score none.mp4 {HERE}", "none.mp4"),
    (f"score empty.txt {HERE}", "empty.txt"),
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
    ("sample --run run-lora", 1, "Delete the folder"),
)
"""Rows with another exit code. They do not count among the bad inputs."""


def _files() -> None:
    """What the rows name, in the current folder: wrong files, a run of one update, and damaged copies of it."""
    import torch

    from lowmem_drf.cli import main
    from lowmem_drf.video import write_mp4

    Path("a-folder").mkdir()
    texts = {
        "empty.txt": "", "clip.mp4": "no film", "text.safetensors": "no tensors", "mine.toml": "# edited\nsteps = 3\n",
        "broken.toml": "steps = = 3", "circle.toml": 'extends = "./circle.toml"', "no-base.toml": 'extends = "toi"',
        "extends-number.toml": "extends = 3", "section.toml": "optim = 3", "twice.toml": "steps = 1\nsteps = 2\n",
        "table.csv": f"id,prompt\n1,{TOY}\n", "broken.jsonl": "{", "list.jsonl": "[1]", "broken.json": "{",
        "list.json": "[1, 2]", "prompts.txt": TOY, "other.txt": "a corgi surfs\n",
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
    for name in ("latin.txt", "latin.toml"):
        Path(name).write_bytes("# Mädchen".encode("latin-1"))
    Path("header.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    write_mp4(Path("good.mp4"), torch.zeros(9, 3, 32, 32, dtype=torch.uint8), 8)
    brief = ["batch=1", "micro_batch=1", "log.eval_prompts=0", "log.sample_every=0"]
    settings = [word for text in brief for word in ("-s", text)]
    _run(main, ["train", "--preset", "toy", "--output", "run", "--steps", "1", *settings])
    shutil.copytree("run", "run-toml")
    Path("run-toml/config.toml").write_text("steps = = 3", encoding="utf-8")
    shutil.copytree("run", "run-empty")
    shutil.rmtree("run-empty/checkpoints")
    shutil.copytree("run", "run-lora")
    Path("run-lora/checkpoints/step-000001/lora.safetensors").write_bytes(b"no tensors")


def _run(main: object, arguments: Sequence[str]) -> tuple[int, str]:
    """(exit code, what was printed on stderr, or on stdout if nothing was)."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments))  # type: ignore[operator]
        except SystemExit as error:
            code = error.code
    return code if isinstance(code, int) else 0 if code is None else 1, err.getvalue() or out.getvalue()


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


def main(arguments: list[str] | None = None) -> int:
    """Prints a line a row; given words choose the rows that contain all of them."""
    words = sys.argv[1:] if arguments is None else arguments
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    from lowmem_drf.cli import main as cli

    rows = [(command, 2, cure) for command, cure in ROWS] + list(OTHERS)
    rows = [row for row in rows if all(word in row[0] for word in words)]
    wrong, start, before = 0, time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _files()
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
                    f"{verdict}: lowmem-drf {command.replace(LONG, 'n…n')}\n    exit code {code}, {len(lines)} lines, "
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
