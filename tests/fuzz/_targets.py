"""Readers of what a user gives, each with damaged files to read, and what no reader may do with any (``finding``).

``test_fuzz.py`` tries a fixed few of the files, ``python -m bench.fuzz`` others for as long as one likes. A reader
joins by a line in ``TARGETS``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from _loras import loras, read_as_every_door, valid_lora
from _mutations import RAW, Bytes, changed, damaged, dumped, encoded, files_of, mp4, safetensors
from hypothesis import strategies as st

from lowmem_drf import video
from lowmem_drf.config import change, known_keys, load_config, to_toml
from lowmem_drf.errors import explain
from lowmem_drf.preset_files import preset_card, preset_path
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.questions.file import load_questions, require_same_prompts, to_json

if TYPE_CHECKING:
    import torch

MOST_LINES, MOST_LETTERS = 6, 2000
MOST_SECONDS, MOST_BYTES = 5.0, 200 * 2**20
CURE = re.compile(
    r"\b(give|take|save|write|rename|check|use|set|get|export|keep|add|remove|make|copy|convert|try|look|see|play|change|"
    r"name|correct|restore|lower|raise|put|delete|start a new run|leave|let|pull|did you mean|nearest|is to be|"
    r"should be|must|at least|at most)\b",
    re.IGNORECASE,
)
"""A message says what to do."""


@dataclass(frozen=True)
class Target:
    """A reader."""

    files: Callable[[], Bytes]
    """Contents to try."""
    name: str
    """Of the file; readers go by its ending."""
    read: Callable[[Path], object]
    valid: Callable[[], bytes]
    """One that is read. It is read first, because imports take seconds and hundreds of MiB."""

    def warm(self, folder: Path) -> None:
        (folder / self.name).write_bytes(self.valid())
        self.read(folder / self.name)


def finding(target: Target, content: bytes, folder: Path) -> str:
    """What the reader did with this content that it may not do; "" if it read it, or refused it well."""
    path = folder / target.name
    path.write_bytes(content)
    before, start = _resident(reset=True), time.monotonic()
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
    except Exception as error:
        message, code = explain(error)
        said = _wrong_with(message.replace(str(folder), ""), code)
    took, used = time.monotonic() - start, _resident() - before
    if took > MOST_SECONDS:
        said += f" It took {took:.1f} s."
    if used > MOST_BYTES:
        said += f" It took {used / 2**20:.0f} MiB."
    return said


def _wrong_with(message: str, code: int) -> str:
    shown = f"{message[:400]!r}"
    if code != 2:
        return f"exit code {code}: {shown}"
    if message.count("\n") >= MOST_LINES or len(message) > MOST_LETTERS:
        return f"{message.count(chr(10)) + 1} lines, {len(message)} letters: {shown}"
    return "" if CURE.search(message) else f"no cure: {shown}"


def _resident(reset: bool = False) -> int:
    """The process's most resident bytes since the last reset; 0 where the system does not tell."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    return 0


# the readers


def _read_preset(path: Path) -> None:
    preset_card(path)
    to_toml(load_config(path))


def _read_overrides(path: Path) -> None:
    """Two line ends between overrides, as bytes of a command line."""
    change(load_config("toy"), path.read_bytes().decode("utf-8", "surrogateescape").split("\n\n"))


def _read_prompt_argument(path: Path) -> None:
    as_prompts([path.read_bytes().decode("utf-8", "surrogateescape")])


def _read_questions(path: Path) -> None:
    given = load_questions(path)
    to_json(given).encode()
    require_same_prompts(path, given, as_prompts(["a cat sits", "a dog"]))


def _read_metrics(path: Path) -> None:
    from lowmem_drf.training.metrics import read_metrics

    read_metrics(path.parent)


def _read_report(path: Path) -> None:
    """Both files of a run that have curves, with the same content."""
    from lowmem_drf.reporting.page import write_report
    from lowmem_drf.reporting.read import read_record

    path.with_name("config.toml").write_bytes(preset_path("toy").read_bytes())
    path.with_name("metrics.jsonl").write_bytes(path.read_bytes())
    write_report(read_record(path.parent), path.with_name("report.html"))


def _read_model(path: Path) -> None:
    from lowmem_drf.models.generators import generator_config
    from lowmem_drf.models.wan.single_file import load_single_file

    load_single_file(path, generator_config(_generator()).transformer, _generator())


CHECKPOINT_FILES = ("manifest.json", "lora.safetensors", "state.safetensors", "cursor.json")


def _read_checkpoint(path: Path) -> None:
    """The first byte says which file of a checkpoint the others are."""
    import shutil

    from lowmem_drf.errors import BadInputError, LowmemError
    from lowmem_drf.training.checkpoint import checkpoint_folder, last_manifest, load_checkpoint
    from lowmem_drf.training.manifest import require_settings

    run, content = path.parent / "run", path.read_bytes()
    shutil.rmtree(run, ignore_errors=True)
    folder = run / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    name = CHECKPOINT_FILES[content[0] % 4] if content else CHECKPOINT_FILES[0]
    files = {**_checkpoint(), name: content[1:]}
    for file, data in files.items():
        if name != "cursor.json" or file != "manifest.json":
            (folder / file).write_bytes(data)
    try:
        load_checkpoint(checkpoint_folder(run))
        require_settings(run, load_config("toy"), last_manifest(run))
    except BadInputError:
        raise
    except LowmemError as error:  # of exit code 1: no user made it
        raise BadInputError(str(error)) from error


@cache
def _checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint."""
    import tempfile

    import torch

    from lowmem_drf.prompts import Cursor
    from lowmem_drf.training.checkpoint import Checkpoint, save_checkpoint
    from lowmem_drf.training.manifest import fixed_settings

    tensors, spread = {"a.lora_A.weight": torch.ones(2, 3)}, {"red": (3, 0.5, 1.25)}
    settings = fixed_settings(load_config("toy"))
    with tempfile.TemporaryDirectory() as run:
        saved = Checkpoint(1, tensors, {"a.exp_avg": torch.ones(3)}, Cursor(2, 5), "hash", spread, 0, settings)
        folder = save_checkpoint(Path(run), saved, 1.0, 1)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _read_scores(path: Path) -> None:
    """The first byte says which file of a folder with VBench's scores the others are."""
    from rich.console import Console

    from lowmem_drf.scoring.table import print_table
    from lowmem_drf.scoring.vbench import with_scores

    folder, content = path.parent / "clips", path.read_bytes()
    for place, (name, row) in enumerate(SCORED.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        mine = bool(content) and content[0] % len(SCORED) == place
        (folder / name).write_bytes(content[1:] if mine else json.dumps(row).encode())
    print_table(with_scores(folder), Console(quiet=True))


def _read_video(path: Path) -> None:
    most, video.MAX_READ_PIXELS = video.MAX_READ_PIXELS, 2**22
    try:
        video.is_own_mp4(path)
        video.read_video(path, frames=4)
        video.read_video(path, frames=3, fps=2.0)
        video.read_video(path, fps=5.0)
    finally:
        video.MAX_READ_PIXELS = most


@cache
def _transformer(layers: int = 1):
    from _tiny import tiny_transformer

    return tiny_transformer(layers=layers)


@cache
def _shapes(layers: int = 1) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in _transformer(layers).named_parameters()}


@cache
def _generator() -> str:
    import atexit
    import tempfile

    from _tiny import save_tiny_generator

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return str(save_tiny_generator(Path(folder.name)))


# their files

QUESTION = {"aspect": "TA", "kind": "yesno", "text": "Is it red?", "answer": "yes", "weight": 1.0, "name": "color"}
ROW = {"prompt": "a cat sits", "id": "cat", "questions": [QUESTION, QUESTION | {"kind": "dense", "answer": "a cat"}]}
MEANS = dict.fromkeys(
    ("freeze", "flicker", "ti", "si", "blur", "blocking", "noise", "saturation", "heldout_reward"), 0.5
)
SIDE = MEANS | {"reward": -1.0, "reward_by_aspect": {"TA": None}, "diversity": 0.1, "velocity_norm": 1.2, "motion": 0.1}
WON = {"mean": 0.5, "low": None, "high": None, "prompts": 1}
COMPARED = {
    **{"prompts": 1, "seeds": 1, "base": SIDE, "tuned": SIDE, "change": {}, "wins": {"reward": WON}},
    "by_prompt": [{"id": "a", "prompt": "a", "base": {"reward": -1.0}, "tuned": {"reward": -1.0}}],
}
SCORES = {"imaging_quality": [0.5, [{"video_path": "clips/base/a-0.mp4", "video_results": 50}]]}
SCORED = {
    "eval.json": COMPARED,
    "prompts.json": {"a-0.mp4": "a"},
    **{f"{side}-scores/1_eval_results.json": SCORES for side in ("base", "tuned")},
}
METRICS = {"step": 3, "reward": 0.5, "stage_s": {"decode": 1.5}, "prompts": ["a"], "skipped": "reward"}

WATCHED = {"step": 3, "reward": 0.5, "measures": {"blur": 1.5}, "bands": {"blur": [1.2, None]}, "outside": ["blur"]}


def _lines(row: dict[str, object]) -> Bytes:
    changes = st.lists(st.just(row) | changed(row), min_size=1, max_size=3)
    return encoded(changes.map(lambda rows: "\n".join(map(dumped, rows))))


def _prompts() -> Bytes:
    return files_of(_lines(ROW), damaged([json.dumps(ROW).encode()]), encoded(st.sampled_from(RAW) | st.text()))


def _question_files() -> Bytes:
    rows = [{key: ROW[key] for key in ("prompt", "questions")}, {"prompt": "a dog", "questions": [QUESTION]}]
    valid = json.dumps(rows).encode()
    return files_of(encoded(changed(rows).map(dumped)), damaged([valid]), encoded(st.sampled_from(RAW)))


def _values() -> st.SearchStrategy[str]:
    return st.sampled_from(RAW) | st.floats().map(str) | st.integers(-(2**66), 2**66).map(str) | st.text(max_size=9)


def _toml() -> Bytes:
    presets = [preset_path(name).read_text(encoding="utf-8") for name in ("toy", "rtx4090")]

    @st.composite
    def text(draw: st.DrawFn) -> str:
        lines = draw(st.sampled_from([*presets, *(to_toml(load_config("toy")),)])).splitlines()
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(lines) - 1))
            key = lines[at].partition("=")[0].strip() or "extends"
            new = f"{draw(st.just(key) | st.sampled_from([*known_keys(), 'extends']))} = {draw(_values())}"
            others = [
                lines[at],
                "[video]",
                "[[video]]",
                "[" * 40,
                'extends = "preset.toml"',
                'extends = "./preset.toml"',
            ]
            lines[at : at + draw(st.integers(0, 1))] = [draw(st.just(new) | st.sampled_from(others))]
        return "\n".join(lines)

    return files_of(encoded(text()), damaged([preset.encode() for preset in presets]))


def _overrides() -> Bytes:
    keys = st.sampled_from([*known_keys(), "video", "optim", "extends", "a." * 5000 + "b", "", "x y"])
    one = st.tuples(
        keys, st.sampled_from([*"=======", " = ", "", "=="]), _values() | st.sampled_from(["1\nseed=2", "{a=1}"])
    )
    return encoded(st.lists(one.map("".join), min_size=1, max_size=8).map("\n\n".join)) | st.binary(max_size=64).map(
        lambda raw: b"model.id=" + raw
    )


def _checkpoints() -> Bytes:
    from lowmem_drf.training.manifest import _sealed

    saved = _checkpoint()
    row = {key: value for key, value in json.loads(saved["manifest.json"]).items() if key != "digest"}
    old = {key: row[key] for key in ("step", "epoch", "index", "prompts", "spread")}

    def sealed(text: str) -> bytes:
        """With the hash that belongs to it, as no damage has."""
        try:
            return b"\0" + _sealed(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return b"\0" + text.encode("utf-8", "replace")

    some = [bytes([CHECKPOINT_FILES.index(name)]) + data for name, data in saved.items()]
    return files_of(
        changed(row).map(dumped).map(sealed),
        changed(old).map(dumped).map(lambda text: b"\3" + text.encode("utf-8", "replace")),
        damaged([*some, b"\3" + json.dumps(old).encode()]),
    )


def _models() -> Bytes:
    scales = {"blocks.0.attn1.to_q.scale_weight": (1,), "blocks.1.attn1.to_q.weight_scale": (), "scaled_fp8": (2,)}
    marked = scales | {"blocks.0.attn1.to_q.comfy_quant": (30,), "freqs": (2,), "vae.conv1.weight": (2,)}
    return files_of(safetensors(_shapes(2), {"format": "pt"}), safetensors(_shapes(2) | marked, {}))


def _gguf_files() -> Bytes:
    """Damage is in the header more often than the header's share of the file."""
    whole, end = _gguf()
    return files_of(damaged([whole[:end]]).map(lambda head: head + whole[end:]), damaged([whole]))


@cache
def _gguf() -> tuple[bytes, int]:
    """(file, bytes of its header)."""
    import tempfile

    import gguf
    from gguf.quants import quantize

    with tempfile.TemporaryDirectory() as folder:
        writer, kinds = gguf.GGUFWriter(f"{folder}/wan.gguf", "wan"), gguf.GGMLQuantizationType
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [24, 4, 1, 2, 2])
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        for name, value in _transformer(2).state_dict().items():
            kind = kinds.Q8_0 if value.shape[-1] % 32 == 0 else kinds.F16 if value.ndim == 2 else kinds.F32
            stored = value.reshape(24, -1) if name == "patch_embedding.weight" else value
            writer.add_tensor(name, quantize(stored.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(f"{folder}/wan.gguf").read_bytes(), gguf.GGUFReader(f"{folder}/wan.gguf").data_offset


def _tensors(state: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(state)


@cache
def _clips() -> tuple[bytes, ...]:
    """Tiny videos in several containers."""
    import io

    import av
    import numpy as np

    made = []
    for form, codec, pixels in (
        *(
            ("mp4", "libx264", "yuv420p"),
            ("mov", "mpeg4", "yuv420p"),
            ("matroska", "libx264", "yuv444p"),
            ("gif", "gif", "rgb8"),
        ),
        *(("webm", "libvpx-vp9", "yuv420p"), ("avi", "mjpeg", "yuvj422p"), ("mpegts", "mpeg2video", "yuv420p")),
    ):
        file = io.BytesIO()
        with av.open(file, "w", format=form) as container:
            container.metadata["comment"] = "lowmem-drf clip"
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 48, pixels
            for i in range(6):
                picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * i, np.uint8), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        made.append(file.getvalue())
    return tuple(made)


def _scores() -> Bytes:
    parts = [
        changed(row).map(dumped).map(lambda text, i=i: bytes([i]) + text.encode("utf-8", "replace"))
        for i, row in enumerate(SCORED.values())
    ]
    return files_of(*parts, damaged([bytes([i]) + json.dumps(row).encode() for i, row in enumerate(SCORED.values())]))


@cache
def _pictures() -> tuple[bytes, ...]:
    """Noise, as a JPEG that is turned, an animated GIF and WebP, and PNGs of 8 and of 16 bits."""
    import io

    import numpy as np
    from PIL import Image

    made = []
    rows = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    picture, turned = Image.fromarray(rows), Image.Exif()
    turned[0x112] = 6
    deep = Image.fromarray(rows[..., 0].astype(np.uint16) * 257)
    more = {"save_all": True, "append_images": [picture.rotate(90)]}
    kinds = [("JPEG", {"exif": turned}), ("GIF", more), ("WEBP", more), ("PNG", {})]
    for image, form, settings in (*((picture, *kind) for kind in kinds), (deep, "PNG", {})):
        file = io.BytesIO()
        image.save(file, form, **settings)
        made.append(file.getvalue())
    return tuple(made)


def _read_image(path: Path) -> None:
    assert video.read_image(path, 16, 16).size == (16, 16)


def _videos() -> Bytes:
    playlists = [b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/dev/zero\n", b"ffconcat version 1.0\nfile clip.mp4\n"]
    return files_of(damaged(_clips()), mp4(_clips()[0]), mp4(_clips()[1]), damaged(playlists))


_ROWS = [{"prompt": text, "questions": [QUESTION]} for text in ("a cat sits", "a dog")]
TARGETS = {
    "prompts": Target(_prompts, "prompts.jsonl", load_prompts, lambda: json.dumps(ROW).encode()),
    "text prompts": Target(_prompts, "prompts.txt", load_prompts, lambda: b"a cat sits"),
    "prompt argument": Target(
        lambda: files_of(encoded(st.text())), "argument", _read_prompt_argument, lambda: b"a cat"
    ),
    "questions": Target(_question_files, "questions.json", _read_questions, lambda: json.dumps(_ROWS).encode()),
    "metrics": Target(
        lambda: files_of(_lines(METRICS)), "metrics.jsonl", _read_metrics, lambda: json.dumps(METRICS).encode()
    ),
    "report": Target(
        lambda: files_of(_lines(WATCHED)), "watch.jsonl", _read_report, lambda: json.dumps(WATCHED).encode()
    ),
    "preset": Target(_toml, "preset.toml", _read_preset, preset_path("toy").read_bytes),
    "overrides": Target(_overrides, "overrides", _read_overrides, lambda: b"optim.lr=1e-4\n\nsteps=3"),
    "lora": Target(loras, "lora.safetensors", read_as_every_door, valid_lora),
    "model": Target(
        _models, "model.safetensors", _read_model, lambda: _tensors(dict(_transformer(2).named_parameters()))
    ),
    "checkpoint": Target(_checkpoints, "checkpoint", _read_checkpoint, lambda: b"\0" + _checkpoint()["manifest.json"]),
    "scores": Target(_scores, "scores", _read_scores, lambda: b""),
    "image": Target(lambda: files_of(damaged(_pictures())), "first.png", _read_image, lambda: _pictures()[0]),
    "video": Target(_videos, "clip.mp4", _read_video, lambda: _clips()[0]),
}
"""The readers by name."""
if importlib.util.find_spec("gguf"):
    TARGETS["GGUF model"] = Target(_gguf_files, "model.gguf", _read_model, lambda: _gguf()[0])
