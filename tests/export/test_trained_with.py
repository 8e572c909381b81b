"""A LoRA file says which base it belongs to, and is sampled on it."""

import json

import pytest

from lowmem_drf.config import change, load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.export.trained_with import HEADER, as_trained, header, in_words

RUN = load_config("rtx4090", ["model.base_lora_scale=0.9"])


def test_what_to_load_in_which_order_and_how_to_sample_it():
    said = in_words(RUN, "tuned.safetensors")
    assert said.startswith(
        "To be used as it was trained: load Wan-AI/Wan2.1-T2V-1.3B-Diffusers, then Kijai/WanVideo_comfy/"
    )
    assert "at strength 0.9, then tuned.safetensors at strength 1; 4 steps with fresh noise at each (lcm)" in said
    assert said.endswith("sigmas 0.9877, 0.7827, 0.609, 0.4062, 0, guidance 1.")
    plain = in_words(load_config("rtx4090-20step"), "tuned.safetensors")
    assert plain.endswith("then tuned.safetensors at strength 1; 20 steps by Euler, shift 8, guidance 6.")


def test_a_preset_samples_it_as_it_was_trained():
    config, lines = as_trained(load_config("rtx4090-20step"), header(RUN), [], may_change=True)
    assert (config.sampler.model_dump(), config.model) == (
        load_config("rtx4090").sampler.model_dump() | {"negative_prompt": config.sampler.negative_prompt},
        RUN.model.model_copy(update={"products": "16bit"}),
    )
    assert len(lines) == 1 and lines[0].startswith("as it was trained: model.base_lora=")
    assert as_trained(RUN, header(RUN), [], may_change=True) == (RUN, [])


def test_where_the_lora_is_used_is_said_and_done():
    late = change(RUN, ["lora.max_sigma=0.7"])
    assert "sigmas up to 0.7 alone (lora.max_sigma), the first 2 steps without: docs/lora.md." in in_words(late, "a")
    assert "lora.max_sigma" not in in_words(RUN, "a")
    config, (line,) = as_trained(RUN, header(late), [], may_change=True)
    assert config == late and line == "as it was trained: lora.max_sigma=0.7"
    old = {HEADER: json.dumps({"model.id": RUN.model.id})}  # of a version that had it in all steps
    assert as_trained(late, old, [], may_change=True)[0] == RUN


def test_what_the_user_sets_stays_and_a_run_keeps_its_settings():
    base = load_config("rtx4090-20step")
    asked = ['model.base_lora=""', "model.base_lora_scale=1.0", "sampler.steps=4"]
    config, (line,) = as_trained(change(base, ["sampler.steps=4"]), header(RUN), asked, may_change=True)
    assert config.model == base.model and "base_lora" not in line and config.sampler.update == "renoise"
    config, (line,) = as_trained(base, header(RUN), [], may_change=False)
    assert config == base and line.endswith("; this run has other settings")


def test_files_of_the_users_own_are_named_and_not_looked_for():
    mine = change(RUN, ["model.base_lora=/home/me/mine.safetensors", "model.id=/home/me/Wan"])
    config, lines = as_trained(RUN, header(mine), [], may_change=True)
    assert config == RUN and len(lines) == 2
    assert "it was trained on Wan, and is used on Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in lines
    assert any("give that: -s model.base_lora=FOLDER/mine.safetensors" in line for line in lines)


def test_the_base_of_the_package_is_set_as_one_of_the_hub_is():
    fast = load_config("toy-fast")
    config, (line,) = as_trained(load_config("toy"), header(fast), [], may_change=True)
    assert (config.model.base_lora, config.sampler.steps) == (fast.model.base_lora, 4) and "FOLDER" not in line


@pytest.mark.parametrize(
    "file", ["/a/b/c.safetensors", "~/b/c.safetensors", "../../c.safetensors", "C:/b/c.safetensors"]
)
def test_a_header_makes_no_file_of_this_machine_be_read(file):
    """A LoRA file may come from anybody. One of the hub is downloaded as any base is, and said."""
    told = {**header(RUN), HEADER: json.dumps({"model.id": RUN.model.id, "model.base_lora": file})}
    config, lines = as_trained(RUN, told, [], may_change=True)
    assert config == RUN and len(lines) == 1 and file in lines[0]


@pytest.mark.parametrize("told", ["", "[]", "{}", "{", json.dumps({"model.id": "x", "sampler.steps": None}), "\0" * 9])
def test_a_header_that_says_nonsense_is_left_alone(told):
    config, lines = as_trained(RUN, {HEADER: told}, [], may_change=True)
    assert config == RUN and lines == ["its header says how it was trained, and cannot be used"]


def test_another_number_of_steps_takes_its_own_levels_and_all_else_from_the_file():
    late = change(RUN, ["lora.max_sigma=0.95"])
    for preset in ("rtx4090", "rtx4090-20step"):
        asked = ["sampler.steps=8", "sampler.graded_steps=2"]
        config, _ = as_trained(load_config(preset, asked), header(late), asked, may_change=True)
        assert config.sampler.steps == 8 and config.sampler.timesteps == [] and config.sampler.graded_steps == 2
        assert config.lora == late.lora and config.model.base_lora == RUN.model.base_lora
        assert config.sampler.update == "renoise" and config.sampler.guidance == 1


def test_a_file_of_one_of_two_transformers_is_used_in_that_one():
    low = load_config("rtx4090-20step", ["model.id=Wan-AI/Wan2.2-T2V-A14B-Diffusers"])
    high = change(low, ["model.expert=high"])
    told = header(change(low, ["lora.max_sigma=0.7"]), "low")
    config, _ = as_trained(high, told, [], may_change=True)
    assert config.model.expert == "low" and config.lora.max_sigma == 0.7
    for asked, may_change in ((["model.expert=high"], True), ([], False)):
        with pytest.raises(BadInputError, match="trained for the low-noise transformer"):
            as_trained(high, told, asked, may_change)
    assert as_trained(low, header(low), [], may_change=True) == (low, [])  # no word of it: one transformer
