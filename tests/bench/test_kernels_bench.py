"""The bench of the kernels without a card: its list of ops, its arithmetic, and when it refuses."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.kernels import speed as kernels
from bench.kernels.ops import OPS, build
from bench.kernels.resources import kernel_files

BY_NAME = {op.name: op for op in OPS}


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_public_op_is_in_the_list():
    modules = {file: importlib.import_module(f"lowmem_drf.kernels.{file}") for file in kernel_files()}
    public = {
        (file, name.removesuffix("_naive"))
        for file, module in modules.items()
        for name in vars(module)
        if name.endswith("_naive") and name[0] != "_"
    }
    assert {(op.file, op.name) for op in OPS} == public
    assert len(BY_NAME) == len(OPS) > 0 and all(op.sizes for op in OPS)
    assert all((kernels.TESTS / op.test_file).exists() for op in OPS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_inputs_run_and_rivals_agree(op, device):
    arguments = build(op, op.tiny, torch.float16, device)
    (_, fused), (_, naive), *_ = kernels.rivals(op, arguments)
    for one, other in zip(kernels._tensors(fused(**arguments)), kernels._tensors(naive(**arguments)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == torch.float16
        assert torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), 0) > 0.99
    ran = {name: run() for name, run in kernels.passes(fused, arguments)}
    leaves = [tensor for tensor in arguments.values() if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    assert list(ran) == (["forward", "backward", "both"] if leaves else ["forward"])
    if leaves:
        assert [gradient.shape for gradient in ran["both"]] == [leaf.shape for leaf in leaves]
        assert all(torch.equal(one, other) for one, other in zip(ran["backward"], ran["both"], strict=True))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_inputs_of_true_size_fit_the_op(op):
    """As fake tensors: nothing is launched and nothing allocated but rotary tables and ranges."""
    given = replace(op, inputs={name: spec for name, spec in op.inputs.items() if spec.make})
    drawn = replace(op, inputs={name: spec for name, spec in op.inputs.items() if not spec.make})
    for sizes in op.sizes.values():
        values = build(given, sizes, op.dtypes[0], torch.device("cpu"))
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in values.items()}
            outs = kernels._tensors(op.fused(**build(drawn, sizes, op.dtypes[0], torch.device("cpu")), **fakes))
        assert outs and all(out.numel() > 2**22 and out.dtype == op.dtypes[0] for out in outs)


def test_moved_bytes(device):
    B, L, D = 2, 10, 32
    sequence, row = 2 * B * L * D, 4 * B * D
    tables = 2 * 2 * D + 2 * 4 * L * 16  # two weights; cos and sin once for q and k
    for name, forward, backward in (
        ("norm_modulate", 2 * sequence + 2 * row, 3 * sequence + row + 8 * B * L),
        ("gate_residual", 3 * sequence + row, 2 * sequence + row),  # dx is the upstream gradient
        ("rope_qk", 4 * sequence + tables, 6 * sequence + 2 * 4 * B * L + tables),
        ("rms_norm", 2 * sequence + 2 * D, 3 * sequence + 4 * B * L + 2 * D),
    ):
        op = BY_NAME[name]
        moved = kernels.moved_bytes(op.fused, build(op, op.tiny, torch.float16, device))
        assert moved == {"forward": forward, "backward": backward, "both": forward + backward}, name


def test_pairs_that_are_attended_to(device):
    ranges = torch.tensor([[[2, 1, 4], [0, 0, 0], [0, 3, 9], [5, 0, 5]]], dtype=torch.int32, device=device)
    mask = kernels.seen(ranges, 5)
    assert mask.int().tolist() == [[[1, 1, 1, 1, 0], [0] * 5, [0, 0, 0, 1, 1], [1] * 5]]
    q, k = torch.zeros(3, 4, 6, 16, device=device), torch.zeros(3, 5, 2, 16, device=device)
    assert kernels.forward_flops({"q": q, "k": k, "ranges": ranges}) == 4 * 3 * 6 * 16 * 11
    assert kernels.forward_flops({"q": q, "k": k, "ranges": None}) == 4 * 3 * 6 * 16 * 20


def test_rivals_of_attention_compute_the_same(device):
    from torch.nn.attention import SDPBackend

    op = BY_NAME["attention"]
    arguments = build(op, op.tiny, torch.float32, device)
    names = [name for name, _ in kernels.rivals(op, arguments)]
    assert names == ["triton", "naive", kernels.DETERMINISTIC, "SDPA flash", "SDPA cuDNN", "SDPA efficient"]
    mask = kernels.seen(arguments["ranges"], 10)[:, None]
    torch.testing.assert_close(kernels._sdpa(SDPBackend.MATH, mask, **arguments), op.naive(**arguments))


@pytest.fixture
def timed(monkeypatch):
    """Runs everything once and takes 2 ms for it; a copy takes 1."""
    monkeypatch.setattr(kernels, "median_ms", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(kernels, "peak_bytes", lambda run: 3 * kernels.MIB)
    monkeypatch.setattr(kernels, "copy_ms", lambda moved: 1.0)


def test_rows(timed, monkeypatch, device):
    ops = (BY_NAME["gate_residual"], BY_NAME["attention"])
    gate, attention = (replace(op, sizes={"tiny": op.tiny}) for op in ops)
    rows = kernels.measure(gate, "tiny", torch.float16, str(device))
    assert [(row["by"], row["pass"]) for row in rows] == [
        (by, which) for by in ("triton", "naive") for which in ("forward", "backward", "both")
    ]
    forward = kernels.moved_bytes(gate.fused, build(gate, gate.tiny, torch.float16, device))["forward"]
    figures = {"ms": 2.0, "peak_mib": 3.0, "gb_per_s": pytest.approx(forward / 2e-3 / 1e9), "of_copy": 0.5}
    names = {"op": "gate_residual", "sizes": "tiny", "dtype": "float16", "by": "triton", "pass": "forward"}
    assert rows[0] == names | figures

    def broken(*_, **__):
        raise RuntimeError("No available kernel.\nAnd more.")

    monkeypatch.setattr(kernels, "_sdpa", broken)
    rows = kernels.measure(attention, "tiny", torch.float16, str(device))
    assert [row["by"] for row in rows if "cannot" in row] == ["SDPA flash", "SDPA cuDNN", "SDPA efficient"]
    assert {row["cannot"] for row in rows if "cannot" in row} == {"No available kernel."}
    flops = kernels.forward_flops(build(attention, attention.tiny, torch.float16, device))
    assert [row["tflops"] for row in rows[:3]] == pytest.approx([n * flops / 2e-3 / 1e12 for n in (1, 2.5, 3.5)])
    kernels.table(rows)

    def wrong(**_):
        raise RuntimeError("ours")

    monkeypatch.setattr(kernels, "rivals", lambda op, arguments: iter([("triton", wrong)]))
    with pytest.raises(RuntimeError, match="ours"):
        kernels.measure(attention, "tiny", torch.float16, str(device))


def test_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_measured_where_a_test_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(kernels, "TESTS", tmp_path)
    (tmp_path / "test_modulate.py").write_text("def test_wrong():\n    assert 'off by' == 1\n")
    assert kernels.main(["--ops", "gate_residual"]) == 1
    assert "off by" in (err := capsys.readouterr().err) and "tests fail" in err


def test_result_says_whether_it_was_gated(monkeypatch, tmp_path, capsys):
    row = {"op": "gate_residual", "sizes": "some", "dtype": "bfloat16"}
    found = [
        row | {"by": "triton", "pass": "forward", "ms": 0.5, "peak_mib": 3.0, "gb_per_s": 1234.0, "of_copy": 0.9},
        row | {"by": "naive", "cannot": "memory"},
    ]
    saved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "measure", lambda op, label, dtype: found)
    monkeypatch.setattr(kernels, "_save", lambda path, rows, gated: saved.append((len(rows), gated)))
    monkeypatch.setattr(kernels, "TESTS", tmp_path)
    (tmp_path / "test_modulate.py").write_text("def test_right():\n    pass\n")
    assert kernels.main(["--ops", "gate_residual", "--quick", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert "not gated" not in out and all(words in out for words in ("1,234", "90%", "cannot: memory"))
    assert kernels.main(["--ops", "gate_residual", "--no-tests", "--json", str(tmp_path / "x.json")]) == 0
    assert "not gated" in capsys.readouterr().out
    assert saved == [(2, True), *((2 * n, False) for n in range(1, 1 + len(BY_NAME["gate_residual"].sizes)))]
