"""No file, override or prompt makes a reader end in anything but a result or a refusal with a cure: the same damaged
files each time. ``python -m bench.fuzz`` tries others."""

import pytest
import torch
from _targets import CURE, TARGETS, _clips, _resident, finding
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from lowmem_drf.config import load_config, to_toml
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.base import base_changes
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.lora.settings import ADAPTER_METADATA
from lowmem_drf.questions.file import to_json
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.types import Question
from lowmem_drf.video import read_video

TRIES = {"prompt argument": 50, "metrics": 100, "lora": 250, "model": 60, "GGUF model": 100, "video": 200, "report": 60}


class Content(bytes):
    """A report of a failure shows its size. The file itself is left in the test's folder."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused_with_a_cure(name, tmp_path):
    target = TARGETS[name]
    target.warm(tmp_path)

    @settings(
        max_examples=TRIES.get(name, 150),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.files().map(Content))
    def try_one(content):
        assert finding(target, content, tmp_path) == ""

    try_one()


def test_what_counts_as_a_finding(tmp_path):
    assert CURE.search("Give another file.") and not CURE.search("it is damaged")
    assert finding(TARGETS["prompts"], b'{"prompt": "a"}', tmp_path) == ""
    broken = TARGETS["prompts"].__class__(None, "x", lambda path: 1 / 0, None)
    assert "unexpected ZeroDivisionError" in finding(broken, b"", tmp_path)


DIGITS, BRACKETS = "1" * 5000, "[" * 3000 + "]" * 3000
JSON = [DIGITS, BRACKETS, r'"\ud800"', "NaN", '{"prompt": "a", "id": []}', '{"prompt": "a", "prompt": 1}']
TOML = [DIGITS, BRACKETS, "0x" + "f" * 5000, '"\\u0000"', "inf", "{a." + "a." * 3000 + "a=1}", "9" * 4000]
MET = [
    *(("prompts", text.encode(), ".") for text in JSON),
    *(("prompts", f'{{"prompt": "a", "questions": [{{"weight": {text}}}]}}'.encode(), ".") for text in JSON[:4]),
    *(("questions", f'[{{"prompt": {text}, "questions": []}}]'.encode(), "JSON|is to be") for text in JSON),
    ("questions", '[{"prompt": "a", "questions": []}]'.encode("utf-16"), "UTF-8"),
    *(("preset", f"steps = {text}".encode(), ".") for text in TOML),
    *(("preset", f'"{text}" = 1'.encode(), "no key|parts") for text in ("x" * 5000, '"."'.join("ab" * 200))),
    ("preset", b'extends = "preset.toml"', "circle"),
    ("preset", b'extends = "./preset.toml"', "circle"),
    ("preset", b'extends = "~nobody/x.toml"', "does not exist"),
    ("preset", "steps = 3".encode("utf-16"), "UTF-8"),
    ("preset", "".join(f"x{i} = 1\n" for i in range(999)).encode(), "and 995 more"),
    *(("overrides", f"steps={text}".encode(), "steps") for text in TOML),
    ("overrides", b"model.id=\xff", "model.id"),
    ("overrides", b"steps=1\nbatch=2", "steps"),
    ("prompt argument", b"a cat \xff", "not UTF-8"),
    ("video", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/dev/zero\n", "ffmpeg -i"),
    ("video", b"ffconcat version 1.0\nfile clip.mp4\n", "ffmpeg -i"),
]


@pytest.mark.parametrize(("name", "content", "said"), MET, ids=[f"{name} {i}" for i, (name, _, _) in enumerate(MET)])
def test_what_was_met_is_refused_with_a_cure(name, content, said, tmp_path):
    target = TARGETS[name]
    assert finding(target, content, tmp_path) == ""
    with pytest.raises(BadInputError, match=said):
        target.read(tmp_path / target.name)


PAIR = {f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
(FIRST, _), STEM = PAIR, "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("changes", "metadata", "said"),
    [
        *(
            ({f"{STEM}.alpha": torch.tensor(alpha)}, {}, "its alpha of .* from 1e-06|holds NaN")
            for alpha in (0.0, -1.0, float("nan"), 1e30)
        ),
        ({f"{STEM}.alpha": torch.ones(2)}, {}, "its alpha of .* holds 2 numbers"),
        ({f"{STEM}.alpha": torch.tensor(1j)}, {}, "C64"),
        ({FIRST: torch.tensor(1.0)}, {}, "no two matrices of one rank"),
        ({FIRST: torch.ones(0, 4)}, {}, "holds no numbers"),
        ({FIRST: torch.ones(4, 4, dtype=torch.int64)}, {}, "I64"),
        ({FIRST: torch.ones(4, 4, dtype=torch.complex64)}, {}, "C64"),
        *(({}, {"alpha": alpha}, "header|settings") for alpha in (DIGITS, "nan", "many", "0", "-1")),
        *(
            ({}, {ADAPTER_METADATA: f'{{"transformer.lora_alpha": {alpha}}}'}, "header")
            for alpha in (DIGITS, BRACKETS, "{}", "null", "NaN", "1" * 400)
        ),
        ({}, {ADAPTER_METADATA: "[]"}, "header is damaged"),
    ],
)
def test_an_odd_lora_is_refused_with_a_cure(changes, metadata, said, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({**PAIR, **changes}, file, metadata=metadata)
    with pytest.raises(BadInputError, match=f"(?s){said}.*Give"):
        read_lora(file)
    with pytest.raises(BadInputError, match="^model.base_lora, .*Give"):
        base_changes([(str(file), 1.0)], {"blocks.0.attn1.to_q.weight": (4, 4)}, print)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "__metadata__": {"a": {"b": "c"}}}',
        f'{{"a": {{"dtype": "F32", "shape": {BRACKETS}, "data_offsets": [0, 4]}}}}',
        f'{{"a": {{"dtype": "F32", "shape": [{DIGITS}], "data_offsets": [0, 4]}}}}',
        '{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}',
        '{"a": {"dtype": "%s", "shape": [1], "data_offsets": [0, 4]}}' % ("x" * 3000),
        '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": 1}',
        "[]",
    ],
)
def test_an_odd_header_is_refused_with_a_cure(header, tmp_path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(BadInputError, match="Give "):
        read_lora(file)
    file.write_bytes((2**63).to_bytes(8, "little") + header.encode())
    with pytest.raises(BadInputError, match="Give a LoRA"):
        read_lora(file)


def test_a_video_whose_texts_are_not_utf8_is_read(tmp_path):
    clip = _clips()[0].replace(b"lowmem-drf clip", b"lowmem-drf \xff\x80\xfe\xff")
    assert finding(TARGETS["video"], clip, tmp_path) == ""
    assert len(read_video(tmp_path / "clip.mp4")[0]) == 6


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    lines = ['{"step": 1}', "\0\0\0", DIGITS, BRACKETS, "[1]", '{"step": "x"}', '{"step": 2, "reward": NaN}', '{"st']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_control_characters_are_escaped_in_json_and_toml(tmp_path):
    text = to_json({"a\x9b31m\x7f": [Question("TA", "b\x85", "yes")]})
    assert text.isprintable() or not set(text) & {"\x9b", "\x7f", "\x85"}
    config = load_config("toy", ['sampler.negative_prompt="a\x9b31m"'])
    (tmp_path / "x.toml").write_text(to_toml(config), encoding="utf-8")
    assert "\x9b" not in to_toml(config) and load_config(tmp_path / "x.toml") == config


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_reading_a_lora_takes_at_most_three_times_its_size(dtype, tmp_path):
    file, size = tmp_path / "lora.safetensors", 2**25 // dtype.itemsize
    shapes = {"A": (4, size // 4), "B": (size // 4, 4)}
    values = {side: torch.ones(shape, dtype=dtype) for side, shape in shapes.items()}
    save_file({f"blocks.0.ffn.0.lora_{side}.weight": value for side, value in values.items()}, file)
    del values
    before = _resident(reset=True)
    lora = read_lora(file)
    if before:  # 0 where the system does not tell
        assert _resident() - before <= 3 * file.stat().st_size
    assert lora.nbytes == 2 * size * dtype.itemsize
