"""The ComfyUI workflow of the docs samples as the preset trains."""

import json
import re
from pathlib import Path

import pytest

from lowmem_drf.config import load_config

WORKFLOW = Path(__file__).parents[2] / "docs" / "comfyui" / "wan-distilled.json"


def test_the_workflow_samples_as_the_preset_trains():
    config = load_config("rtx4090", [])
    nodes = {name: (node["class_type"], node["inputs"]) for name, node in json.loads(WORKFLOW.read_text()).items()}
    of_kind = {kind: inputs for kind, inputs in nodes.values()}
    levels = [float(level) * 1000 for level in re.findall(r"[\d.]+", of_kind["ManualSigmas"]["sigmas"])]
    assert levels == pytest.approx([*config.sampler.timesteps, 0])
    assert config.sampler.update == "renoise" and of_kind["KSamplerSelect"]["sampler_name"] == "lcm"
    assert of_kind["SamplerCustom"]["cfg"] == config.sampler.guidance
    size, video = of_kind["EmptyHunyuanLatentVideo"], config.video
    assert (size["width"], size["height"], size["length"]) == (video.width, video.height, video.frames)
    assert of_kind["SaveAnimatedWEBP"]["fps"] == video.fps
    # the tuned LoRA on the distilled one on the model, and every link leads to a node
    sampled, chain = of_kind["SamplerCustom"]["model"][0], []
    while sampled:
        kind, inputs = nodes[sampled]
        chain.append(inputs.get("lora_name", kind))
        sampled = inputs.get("model", [""])[0]
    assert isinstance(config.model.base_lora, str)
    assert chain[1:] == [config.model.base_lora.rpartition("/")[2], "UNETLoader"]
    links = [value for _, inputs in nodes.values() for value in inputs.values() if isinstance(value, list)]
    assert {name for name, _ in links} | {"13"} == set(nodes)
