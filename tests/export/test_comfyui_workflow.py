"""The ComfyUI workflows of the docs sample as their presets train."""

import json
import re

import pytest
from _root import ROOT

from lowmem_drf.config import load_config
from lowmem_drf.models.generators import KNOWN_GENERATORS, family_of
from lowmem_drf.models.lora.formats import default_format

ROW = r"^\| \[`(.+?)`\]\(comfyui/\1\.json\) \| (.+?) \| `(.+?)` \|"
ROWS = re.findall(ROW, (ROOT / "docs/lora.md").read_text("utf-8"), re.MULTILINE)
"""(workflow, presets, format of the LoRA) of the table in docs/lora.md."""


def links(inputs):
    """The nodes whose outputs these are."""
    return [value[0] for value in inputs.values() if isinstance(value, list)]


def inputs_of(nodes, name):
    """(key, value) of all inputs of a node and of those that lead to it."""
    inputs = nodes[name]["inputs"]
    return [*inputs.items(), *(pair for link in links(inputs) for pair in inputs_of(nodes, link))]


def test_the_docs_name_every_workflow():
    assert sorted(name for name, *_ in ROWS) == sorted(file.stem for file in (ROOT / "docs/comfyui").iterdir())


@pytest.mark.parametrize(("name", "presets", "form"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_workflow_samples_as_its_presets_train(name, presets, form):
    nodes = json.loads((ROOT / f"docs/comfyui/{name}.json").read_text("utf-8"))
    of_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    linked = {link for node in nodes.values() for link in links(node["inputs"])}
    (end,) = set(nodes) - linked
    assert linked < set(nodes) and nodes[end]["class_type"] in ("SaveAnimatedWEBP", "SaveImage")
    sampler = of_kind.get("SamplerCustom") or of_kind["CogVideoSampler"]
    to_the_model = inputs_of(nodes, sampler["model"][0])
    files = {value for _, value in to_the_model if isinstance(value, str)}
    assert {value for key, value in to_the_model if key.startswith("strength")} == {1.0}
    numbers = {k: value for inputs in of_kind.values() for k, value in inputs.items() if not isinstance(value, list)}
    for config in (load_config(preset, []) for preset in re.findall(r"`(.+?)`", presets)):
        assert files >= {"lowmem-drf.safetensors", *(lora.rpartition("/")[2] for lora, _ in config.model.base_loras())}
        assert form == default_format(family_of(KNOWN_GENERATORS[config.model.id].config))
        video, rule = config.video, config.sampler
        frames = numbers.get("length", numbers.get("num_frames", 1))
        assert (numbers["width"], numbers["height"], frames) == (video.width, video.height, video.frames)
        assert {numbers[key] for key in ("fps", "frame_rate") if key in numbers} <= {video.fps}
        assert sampler["cfg"] == rule.guidance
        prompts = [value for key, value in inputs_of(nodes, sampler["negative"][0]) if key in ("text", "prompt")]
        assert rule.guidance == 1 or rule.negative_prompt in prompts
        if "ManualSigmas" in of_kind:
            levels = [float(level) * 1000 for level in numbers["sigmas"].split(",")]
            assert levels == pytest.approx([*rule.timesteps, 0])
            assert numbers["sampler_name"] == {"euler": "euler", "renoise": "lcm"}[rule.update]
        else:  # the scheduler of which ``ddim_levels`` makes the preset's levels
            assert (sampler["scheduler"], sampler["steps"]) == ("CogVideoXDDIM", rule.steps)
        if "T5TokenizerOptions" in of_kind:
            assert numbers["min_length"] == config.model.text_tokens - 78  # of CLIP, and a pooled row
