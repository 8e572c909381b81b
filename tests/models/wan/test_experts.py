"""Generators with two transformers: which one denoises, which is trained and on the card, and where a run's files
go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from _tiny import BOUNDARY, save_tiny_generator, tiny_condition, tiny_latents, tiny_text, tiny_transformer, tiny_vae
from _trainer import Keeping
from huggingface_hub import DryRunFileInfo
from rich.console import Console
from safetensors import safe_open

from lowmem_drf.assembly.generate import generate
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.commands.bench import measure
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.commands.sample import sample_command
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.experts import boundary_after, expert_at, require_expert, subfolders_of, two_experts
from lowmem_drf.models.generators import KNOWN_GENERATORS, generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.weights.downloads import check_host_memory, prepare
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.plan import ALLOCATOR_BLOCK, make_plan
from lowmem_drf.planner.stages import STAGES
from lowmem_drf.prompts import as_prompts
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.update import update

A14B = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
PROMPTS = ["a red circle moves left on a gray background", "a blue square moves up on a black background"]
LOW, HIGH = ('sampler.graded="tail"',), ("model.expert=high", "sampler.graded=[0]", "sampler.graded_steps=1")
"""The high-noise transformer denoises the first of the tiny preset's three steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_generator(tmp_path_factory.mktemp("a14b"), experts=True)


@pytest.fixture(scope="module")
def configured(tiny_preset, folder: Path):
    """The tiny preset on the two experts, with overrides."""
    return lambda *overrides: load_config(tiny_preset, [f'model.id="{folder.as_posix()}"', "batch=2", *overrides])


def loaded(config):
    """(models with a LoRA whose B is not zero, its tensors)."""
    models = load_models(config, as_prompts(PROMPTS))
    add_lora(models.transformer, config.lora.rank, config.lora.alpha, config.lora.targets, seed=0)
    lora = lora_parameters(models.transformer)
    with torch.no_grad():
        for place, tensor in enumerate(lora):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(place)) * 0.1)
    return models, lora


def gradients(config):
    """Of one update, as the optimizer sees them."""
    models, lora = loaded(config)
    prompts = as_prompts(PROMPTS)
    trainer = Keeping(config, models.transformer)
    update(config, models, models.parts(lora), trainer, 0, prompts, draft_questions(config, prompts), None)
    return trainer.gradients[0]


def test_the_rollout_is_wan_pipelines_with_two_transformers() -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from lowmem_drf.models.wan.text import TextEncoder

    model, tokenizer = tiny_text()
    high, low, noise = tiny_transformer(seed=3), tiny_transformer(seed=4), tiny_latents(1, dtype=torch.float32)
    settings = dict(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=list(range(6)),
    )
    pipe = WanPipeline(
        tokenizer, model, tiny_vae(), UniPCMultistepScheduler(**settings), high, low, boundary_ratio=BOUNDARY
    )
    pipe.set_progress_bar_config(disable=True)
    call = dict(
        height=16,
        width=16,
        num_frames=9,
        num_inference_steps=6,
        max_sequence_length=12,
        output_type="latent",
        guidance_scale=3.0,
    )
    wanted = pipe(PROMPTS[0], "red", latents=noise.clone(), **call).frames
    sigmas = flow_sigmas(6, 3.0)
    assert [expert_at(sigma, BOUNDARY) for sigma in sigmas[:-1].tolist()] == ["high"] * 2 + ["low"] * 4

    encoder, turns = TextEncoder(model, tokenizer), []
    velocity = two_experts(as_velocity(low), as_velocity(high), "low", BOUNDARY, turns.append)
    got, _ = rollout(velocity, sigmas, noise, encoder.encode([PROMPTS[0]], 12), encoder.encode(["red"], 12), 3.0)
    assert (got - wanted).abs().max() < 6 * 16 * 3 * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert turns == ["expert"] * 4 + ["transformer"] * 8


def test_the_boundary_itself_is_the_high_noise_transformers() -> None:
    assert [expert_at(sigma, 0.875) for sigma in (0.8751, 0.875, 0.8749)] == ["high", "high", "low"]
    sigmas = flow_sigmas(5, 3.0).tolist()
    for steps in range(6):
        turns = [expert_at(sigma, boundary_after(sigmas, steps)) for sigma in sigmas[:-1]]
        assert turns == ["high"] * steps + ["low"] * (5 - steps)


@pytest.mark.parametrize("expert", ["low", "high"])
def test_no_gradient_reaches_the_frozen_one(expert: str) -> None:
    """A step of the frozen expert with gradient is refused; without gradient it leaves no graph."""
    trained, frozen = tiny_transformer(torch.float64, 1), tiny_transformer(torch.float64, 2)
    velocity = two_experts(as_velocity(trained), as_velocity(frozen), expert, BOUNDARY, lambda name: None)
    x, text = tiny_latents(1).requires_grad_(), tiny_condition(1)
    own, others = (0.5, 0.95) if expert == "low" else (0.95, 0.5)
    assert velocity(x, own, text).requires_grad
    with pytest.raises(ValueError, match="not that of the trained expert"):
        velocity(x, others, text)
    with torch.no_grad():
        assert torch.equal(velocity(x, others, text), as_velocity(frozen)(x, others, text))
        assert torch.equal(velocity(x, own, text), as_velocity(trained)(x, own, text))


def test_what_a_folder_says(folder: Path, tmp_path) -> None:
    config = generator_config(str(folder))
    assert config.boundary == BOUNDARY and config.transformer_2 == json.loads(
        (folder / "transformer_2/config.json").read_text()
    )
    assert subfolders_of(config, "low") == ("transformer_2", "transformer")
    assert subfolders_of(config, "high") == ("transformer", "transformer_2")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    for change, message in (
        ({"boundary_ratio": 1.5}, "between 0 and 1"),
        ({"transformer_2": [None, None]}, "beside a transformer_2"),
    ):
        (copy / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(BadInputError, match=message):
            generator_config(str(copy))
    (copy / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    one = generator_config(str(copy))  # diffusers would never call the second
    assert (one.boundary, one.transformer_2, subfolders_of(one, "low")) == (None, None, ("transformer", None))
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(BadInputError, match="cannot be read"):
        generator_config(str(copy))


def test_an_image_to_video_model_is_refused(folder: Path, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
    with pytest.raises(BadInputError, match="image-to-video"):
        generator_config(str(copy))


def test_both_are_looked_for(folder: Path, tmp_path, monkeypatch) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert prepare(str(copy), "generator", print) == copy
    counted = []
    monkeypatch.setattr(
        "lowmem_drf.models.weights.downloads.weight_count", lambda place: counted.append(place.name) or 0
    )
    check_host_memory(copy, "generator", 2)
    assert counted == ["transformer", "vae", "text_encoder", "transformer_2"]
    (copy / "transformer_2/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"transformer_2/\*\.safetensors are missing"):
        prepare(str(copy), "generator", print)
    shutil.rmtree(copy / "transformer_2")
    with pytest.raises(BadInputError, match=r"transformer_2/config\.json is missing"):
        prepare(str(copy), "generator", print)
    (copy / "model_index.json").unlink()
    with pytest.raises(BadInputError, match=r"model_index\.json is missing"):
        prepare(str(copy), "generator", print)


REFUSED = [
    (
        ("model.expert=high",),
        ("steps 0 to 6", "steps 7 to 19", "Graded are 17, 18, 19", "sampler.graded=[4, 5, 6]'", "model.expert=low"),
    ),
    (
        ("sampler.shift=12", "sampler.graded_steps=8"),
        ("steps 13 to 19", "'sampler.graded=[13, 14, 15, 16, 17, 18, 19]' -s sampler.graded_steps=7"),
    ),
    (("sampler.graded=[0, 18]", "sampler.graded_steps=2"), ("'sampler.graded=[18, 19]'",)),
    (("sampler.graded=[0, 1]", "sampler.graded_steps=2"), ("'sampler.graded=[18, 19]', or -s model.expert=high",)),
    (
        ("sampler.steps=1", "sampler.graded_steps=1"),
        ("denoises step 0,", "the low-noise one no step", "Set -s model.expert=high."),
    ),
    (('sampler.graded="random"',), ('sampler.graded to "tail"',)),
    (("model.transformer=some.safetensors",), ("model.transformer", "has two")),
    (("model.base_lora=some.safetensors",), ("model.base_lora", "has two")),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=lambda value: value[0])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(overrides, said) -> None:
    config = load_config("rtx4090-20step", [f'model.id="{A14B}"', "sampler.shift=3", *overrides])
    with pytest.raises(BadInputError) as caught:
        make_plan(config, card_named("RTX 4090"))
    assert all(words in str(caught.value) for words in said)


def test_what_fits_is_not_refused() -> None:
    generator = KNOWN_GENERATORS[A14B].config
    for overrides in (
        (),
        ("sampler.graded_steps=13",),
        ("model.expert=high", "sampler.graded=[4, 5, 6]"),
        ('sampler.graded="last"', "sampler.graded_steps=1"),
    ):
        require_expert(load_config("rtx4090-20step", [f'model.id="{A14B}"', "sampler.shift=3", *overrides]), generator)


def test_of_a_generator_of_one_transformer_no_expert_is_trained() -> None:
    with pytest.raises(BadInputError, match="has one transformer"):
        make_plan(load_config("rtx4090-20step", ["model.expert=high"]), card_named("RTX 4090"))


@pytest.mark.parametrize(("overrides", "trained"), [(LOW, "transformer_2"), (HIGH, "transformer")], ids=["low", "high"])
def test_the_lora_is_on_the_one_that_is_trained(configured, folder: Path, overrides, trained: str) -> None:
    models, _ = loaded(configured(*overrides))
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[trained]
    for model, subfolder in ((models.transformer, trained), (models.expert, other)):
        weight = load_denoiser(str(folder), subfolder=subfolder).proj_out.weight
        assert torch.equal(model.proj_out.weight, weight)
    assert not any(parameter.requires_grad for parameter in models.expert.parameters())
    assert not any("lora" in name for name, _ in models.expert.named_parameters())


@pytest.fixture(scope="module")
def resident(configured):
    """Gradients where all weights are on the card."""
    return {expert: gradients(configured(*expert)) for expert in (LOW, HIGH)}


@pytest.mark.parametrize("expert", [LOW, HIGH], ids=["low", "high"])
@pytest.mark.parametrize(
    "memory",
    [
        ('memory.park=["transformer","critic","vae"]',),
        ("memory.checkpoint=true", 'memory.stream=["transformer"]'),
        (
            "memory.checkpoint=true",
            'memory.stream=["transformer"]',
            'memory.park=["transformer"]',
            "memory.record_rollout=true",
        ),
    ],
    ids=["parked", "streamed", "both, recorded"],
)
def test_gradients_are_the_same_wherever_the_weights_wait(configured, resident, expert, memory) -> None:
    wanted, got = resident[expert], gradients(configured(*expert, *memory))
    assert all(tensor.any() for tensor in wanted)
    assert all(torch.equal(*pair) for pair in zip(wanted, got, strict=True))


@pytest.mark.parametrize("expert", [LOW, HIGH], ids=["low", "high"])
def test_one_is_on_the_card_at_a_time(configured, expert) -> None:
    config = configured(*expert, 'memory.park=["transformer"]')
    models, _ = loaded(config)
    both, seen = {"transformer": models.transformer, "expert": models.expert}, []

    def awake(*_):
        seen.append({name for name, model in both.items() if model.proj_out.weight.numel()})

    for model in both.values():
        model.register_forward_pre_hook(awake)
    made = generate(models, config.sampler, as_prompts(PROMPTS), [0, 1])
    order = ["expert", "transformer", "transformer"] if expert is LOW else ["transformer", "expert", "expert"]
    assert seen == [{name} for name in order for _ in range(2)]  # with guidance two passes a step
    awake()
    assert seen[-1] == set()  # the VAE's turn
    resident = generate(loaded(configured(*expert))[0], config.sampler, as_prompts(PROMPTS), [0, 1])
    assert torch.equal(made.frames_BTCHW, resident.frames_BTCHW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [LOW, ("model.expert=high", "sampler.steps=6", "sampler.graded=[0, 1]", 'memory.park=["transformer"]')],
    ids=["low, resident", "high, parked"],
)
def test_the_plan_is_a_real_update(configured, overrides) -> None:
    """Bytes of all stages; and the shortened plan equals the whole one, although its sampler has other noise levels."""
    config = configured(*overrides, "batch=1", "micro_batch=1", "kernels.ops=naive")
    plan, whole = make_plan(config, card_named("")), make_plan(config, card_named(""), whole=True)
    measured = measure(config, torch.device("cpu"), None, Console(quiet=True))
    for stage in set(STAGES) - {"text"}:
        assert plan.stages[stage].peak_gib == pytest.approx(measured.gib[stage], rel=0.05), stage
        assert plan.stages[stage].peak_gib == pytest.approx(whole.stages[stage].peak_gib, rel=0.01), stage


@pytest.mark.slow
def test_of_two_parked_transformers_the_card_holds_one(configured) -> None:
    """In the rollout and in the graded steps; resident ones are both there all the time."""
    resident, parked = (
        make_plan(configured(*LOW, *memory), card_named("")) for memory in ((), ('memory.park=["transformer"]',))
    )
    with Ledger(ALLOCATOR_BLOCK) as ledger:
        model = tiny_transformer()
        ledger.adopt([*model.parameters(), *model.buffers()])
        one = ledger.card_bytes / 1024**3
    for stage, gone in (("rollout", 1), ("decode", 2), ("critic", 2), ("vae_backward", 2), ("denoise_backward", 1)):
        assert resident.stages[stage].weights_gib - parked.stages[stage].weights_gib == pytest.approx(gone * one), stage


def test_a_run_from_the_command_to_the_file(tiny_preset, folder: Path, tmp_path) -> None:
    """Train, sample, export: the file names its transformer, and a merged model lies in the subfolder that the pipeline
    reads."""
    overrides = [f'model.id="{folder.as_posix()}"', *LOW, "log.sample_every=0", 'memory.park=["transformer"]']
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 1, None, False, overrides, False)
    sample_command(run, None, PROMPTS[:1], None, None, True, 1.0, 0, tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    exported = export_run(run, form="diffusers")
    assert exported.paths == (run / "run-step-000001-low-noise.diffusers.safetensors",)
    assert "for the low-noise model (diffusers: load_into_transformer_2=True)" in str(exported)
    with safe_open(exported.paths[0], "pt") as file:
        metadata = file.metadata()
    assert metadata["lowmem_drf.expert"] == "low noise" and metadata["modelspec.architecture"] == "wan2.2/lora"
    merged = export_run(run, merge=tmp_path / "merged")
    assert 'subfolder="transformer_2"' in str(merged)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["transformer_2"]


def test_an_exported_file_is_read_by_the_pipeline_it_is_for(tiny_preset, folder: Path, tmp_path) -> None:
    """``load_lora_weights(…, load_into_transformer_2=True)`` puts it on the trained transformer."""
    from diffusers import WanPipeline

    run = tmp_path / "run"
    overrides = [f'model.id="{folder.as_posix()}"', *LOW, "log.sample_every=0", "optim.lr=0.1"]
    train_command(str(tiny_preset), None, run, 1, None, False, overrides, False)
    (file,) = export_run(run, dtype="fp32").paths
    pipe = WanPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file, load_into_transformer_2=True)
    models = load_models(load_config(run / "config.toml"), as_prompts(PROMPTS), with_critic=False)
    load_run_lora(models.transformer, checkpoint_folder(run), load_config(run / "config.toml"))
    x, text = tiny_latents(1, dtype=torch.float32), tiny_condition(1, torch.float32)
    with torch.no_grad():
        wanted, got = as_velocity(models.transformer)(x, 0.5, text), as_velocity(pipe.transformer_2)(x, 0.5, text)
        base = as_velocity(load_denoiser(str(folder), subfolder="transformer_2"))(x, 0.5, text)
    assert (got - wanted).abs().max() < 1e-3 * (wanted - base).abs().max()
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_both_are_downloaded(folder: Path, tmp_path, monkeypatch) -> None:
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    asked: list[str] = []

    def download(repository: str, allow_patterns: list[str], dry_run: bool = False) -> str | list[DryRunFileInfo]:
        if dry_run:
            return [
                DryRunFileInfo("1" * 40, 1, name, "", is_cached=False, will_download=True) for name in allow_patterns
            ]
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert prepare("someone/two-experts", "generator", lambda text: None) == folder
    assert {
        "transformer_2/config.json",
        "transformer_2/diffusion_pytorch_model.safetensors",
        "model_index.json",
    } <= set(asked)
