"""``train --init-lora``: training goes on from the LoRA of a file."""

import shutil
from dataclasses import replace

import pytest
import torch
from _tiny import randomise_lora
from _trainer import Keeping
from safetensors.torch import load_file, save_file

from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.commands.train import train_command
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.adapter import load_lora_state, lora_layers, lora_state, named_lora
from lowmem_drf.models.lora.changes import LoraChanges, Pair
from lowmem_drf.models.lora.formats import FORMATS, adapter_metadata, to_format
from lowmem_drf.models.lora.init import _nearest, as_trained, init_lora
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.wan import family as wan
from lowmem_drf.training.run_folder import run_config
from lowmem_drf.training.trainer import SingleTrainer
from lowmem_drf.training.update import update

ALPHA = 3.0
"""Over the rank of 2 it is no power of two, so that folding it rounds."""


@pytest.fixture
def given(ready):
    """(what ``ready`` makes, a LoRA that is not the fresh one)."""
    made = ready(f"lora.alpha={ALPHA}")
    transformer = made[1].transformer
    fresh = lora_state(transformer)
    randomise_lora(transformer)
    state = lora_state(transformer)
    load_lora_state(transformer, fresh)
    return made, state


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_update_is_that_of_the_run(given, form, tmp_path) -> None:
    """The same prompts, noise and LoRA give the same gradient, and the optimizer moves the same numbers: alpha that the
    format folds into A is taken out again."""
    (config, models, parts, prompts, questions), state = given
    lora, file = LoraChanges.from_state(state, ALPHA), tmp_path / "x.safetensors"
    header = {"lowmem_drf.alpha": str(ALPHA)} | (adapter_metadata(lora) if form == "diffusers" else {})
    save_file(to_format(lora, form, torch.float32, wan), file, metadata=header)
    fresh, found = lora_state(models.transformer), {}
    for name in ("run", "file"):
        load_lora_state(models.transformer, state if name == "run" else fresh)
        if name == "file":
            assert "its values are kept" in init_lora(models.transformer, as_trained(read_lora(file)))
        keeping, trainer = Keeping(config, models.transformer), SingleTrainer(config, named_lora(models.transformer))
        update(config, models, parts, keeping, 0, prompts, questions, None)
        update(config, models, parts, trainer, 0, prompts, questions, None)
        found[name] = (torch.cat([part.flatten() for part in keeping.gradients[-1]]), lora_state(models.transformer))
    (gradient, after), (again, there) = found["run"], found["file"]
    if form != "comfyui":
        assert torch.equal(gradient, again) and all(torch.equal(after[name], there[name]) for name in after)
        return
    # A is rounded twice (folded, unfolded); the gradient follows to first order, through about a thousand fp32 sums
    assert (again - gradient).norm() <= 1000 * 2**-24 * gradient.norm()
    assert all((there[name] - state[name]).abs().max() <= config.optim.lr * (1 + 1e-3) + 2**-22 for name in after)


def test_a_run_begins_with_the_export_of_another(tiny_run, tiny_preset, tmp_path, capsys) -> None:
    file = export_run(tiny_run, output=tmp_path / "ein schöner 😀.safetensors").paths[0]
    run, before = tmp_path / "run", load_file(tiny_run / "checkpoints/step-000004/lora.safetensors")
    train_command(
        str(tiny_preset), None, run, 1, None, False, ["optim.lr=1e-12", "lora.alpha=64", "log.eval_prompts=0"], False,
        init_lora=file,
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "rank 2: its values are kept" in said
    lora, config = load_file(run / "checkpoints/step-000001/lora.safetensors"), run_config(run).lora
    assert config.init == str(file) and config.rank == run_config(tiny_run).lora.rank
    assert config.alpha == 64 and config.targets == sorted(run_config(tiny_run).lora.targets)
    scale = run_config(tiny_run).lora.alpha / 64  # the user's alpha is kept, and so is the change
    wanted = {name: value * scale if "lora_B" in name else value for name, value in before.items()}
    torch.testing.assert_close(lora, wanted, rtol=2**-22, atol=1e-11)
    shutil.rmtree(run / "checkpoints")  # as if it had been stopped during its first update
    train_command(None, None, run, None, None, True, [], False)
    again = load_file(run / "checkpoints/step-000001/lora.safetensors")
    torch.testing.assert_close(again, wanted, rtol=2**-22, atol=1e-11)
    with pytest.raises(BadInputError, match="does not go with --resume"):
        train_command(None, None, run, 2, None, True, [], False, init_lora=file)


def test_other_ranks_are_filled_up_or_cut(given) -> None:
    (_, models, *_), state = given
    transformer, lora = models.transformer, LoraChanges.from_state(state, ALPHA)
    module, other, *_ = lora.pairs
    layer, pair = lora_layers(transformer)[module], lora.pairs[module]

    def change() -> torch.Tensor:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return (layer.scaling["default"] * b.double() @ a.double()).detach()

    one = Pair(pair.a[:1], pair.b[:, :1], 1.0)
    said = init_lora(transformer, LoraChanges({module: one}))
    assert "rank 1: its values are kept" in said and "modules begin untrained" in said
    # B is divided by the run's scale and rounded to fp32; the rest is computed in fp64
    assert ((change() - one.b.double() @ one.a.double()).abs() <= 2**-23 * (one.b.abs() @ one.a.abs())).all()
    assert not layer.lora_B["default"].weight[:, 1:].any() and layer.lora_A["default"].weight[1:].any()

    noise = torch.randn(pair.a.shape, generator=torch.Generator().manual_seed(0))
    three = Pair(torch.cat([pair.a, noise[:1]]), torch.cat([pair.b, 0.1 * pair.b[:, :1].roll(1)], 1), 3.0)
    said = init_lora(transformer, LoraChanges({module: three}))
    whole = three.b.double() @ three.a.double()
    values = torch.linalg.svdvals(whole)
    share = float(values[2:].norm() / values.norm())
    assert f"1 are cut to the run's rank by singular values, and {100 * share:.2g}% of the change is lost" in said
    # no product of rank 2 is nearer (Eckart and Young)
    torch.testing.assert_close((change() - whole).norm(), values[2:].norm(), rtol=1e-4, atol=1e-6)
    kept = replace(lora.pairs[other], alpha=9.0)  # what is lost is a share of the file's change, not of this module's
    said = init_lora(transformer, LoraChanges({module: three, other: kept}))
    size = torch.stack([values.norm(), LoraChanges({other: kept}).delta(other).norm()]).norm()
    assert f"1 are cut to the run's rank by singular values, and {100 * values[2:].norm() / size:.2g}% of" in said


def test_what_no_lora_can_go_on_from_is_refused(given) -> None:
    from lowmem_drf.models.lora.changes import Difference

    (_, models, *_), state = given
    for name in ("blocks.0.norm2.weight", "blocks.0.attn1.to_q.bias", "patch_embedding.weight"):
        lora = LoraChanges(LoraChanges.from_state(state, ALPHA).pairs, {name: [Difference(torch.zeros(24))]})
        with pytest.raises(BadInputError, match=rf"difference.*{name}.*model\.base_lora=FILE"):
            init_lora(models.transformer, lora)
    outside = Pair(torch.zeros(2, 24), torch.zeros(16, 2), 2.0)
    with pytest.raises(BadInputError, match=r"lora\.targets does not train \(proj_out\)"):
        init_lora(models.transformer, LoraChanges({"proj_out": outside}))


def test_a_large_matrix_is_cut_nearly_as_well_as_can_be() -> None:
    """The spectrum falls as those of trained models do; the exact one is that of Eckart and Young."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q for _ in range(2))
    values = 1 / torch.arange(1.0, 301)
    made = _nearest(u * values @ v, 8)
    lost = float(values[8:].square().sum())
    # no product loses less, but for rounding; the line that is printed has two figures of the root
    assert made.a.shape == (8, 300) and lost * (1 - 300 * 2**-24) <= made.lost <= 1.01 * lost
    again = _nearest(u * values @ v, 8)
    assert torch.equal(made.a, again.a), "all processes begin with the same"
