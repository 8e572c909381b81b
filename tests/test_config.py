"""Presets, overrides, and errors that say everything at once."""

import tomllib

import pytest

from lowmem_drf.assembly.sizes import require_room
from lowmem_drf.config import known_keys, load_config, parse_override, to_toml
from lowmem_drf.distributed.launch import launch
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import generator_config
from lowmem_drf.preset_files import preset_path
from lowmem_drf.sampling.published import AS_PUBLISHED
from lowmem_drf.schema import Config


def refusal(*overrides, preset="toy"):
    with pytest.raises(BadInputError) as caught:
        load_config(preset, overrides)
    return str(caught.value)


def test_a_preset_is_laid_over_the_defaults():
    config = load_config("toy")
    assert (config.video.width, config.model.id, config.critic.id) == (32, "toyworld", "toyworld")
    assert config.optim.betas == Config().optim.betas


def test_the_tree_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        load_config("toy").video.width = 64


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr = 0.5", 0.5),
        ("steps=12", 12),
        ("memory.checkpoint=true", True),
        ("sampler.graded=[0, 2]", [0, 2]),
        ("critic.mode=vanilla", "vanilla"),
        ('critic.mode="vanilla"', "vanilla"),
        ("model.id=a/b-c", "a/b-c"),
        ("sampler.negative_prompt=a=b", "a=b"),
        ("sampler.negative_prompt=", ""),
    ],
)
def test_override_values_are_toml_and_bare_words_are_strings(text, value):
    parsed = parse_override(text)[1]
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_win_and_the_last_one_counts():
    config = load_config("toy", ["optim.lr=1e-2", "critic.weights.Phy=2", "optim.lr=3e-2"])
    assert config.optim.lr == 3e-2
    assert config.critic.weights.Phy == 2.0


def test_another_number_of_steps_than_a_presets_takes_the_grid_of_the_shift():
    assert len(load_config("rtx4090").sampler.timesteps) == 4
    assert load_config("rtx4090", ["sampler.steps=8"]).sampler.timesteps == []
    assert len(load_config("rtx4090", ["sampler.steps=4"]).sampler.timesteps) == 4
    own = ["sampler.steps=2", "sampler.graded_steps=2", "sampler.timesteps=[1000, 500]"]
    assert load_config("rtx4090", own).sampler.timesteps == [1000, 500]


@pytest.mark.parametrize(
    ("model", "shift", "guidance"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 8.0, 6.0),
        ("/models/Wan2.1-T2V-14B-Diffusers", 3.0, 5.0),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers video={width=1280,height=720}", 5.0, 5.0),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 5.0, 5.0),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 12.0, 4.0),
        ("toyworld", 3.0, 5.0),
    ],
)
def test_a_model_is_sampled_as_its_publishers_do(tmp_path, model, shift, guidance):
    bare, run = tmp_path / "bare.toml", tmp_path / "run.toml"
    bare.write_text("")
    overrides = f"model.id={model}".split()
    sampler = load_config(bare, overrides).sampler
    assert (sampler.shift, sampler.guidance) == (shift, guidance)
    assert ("多余的手指" in sampler.negative_prompt) == (model != "toyworld")
    mine = load_config(bare, [*overrides, "sampler.shift=2", "sampler.guidance=3", "sampler.negative_prompt="])
    assert (mine.sampler.shift, mine.sampler.guidance, mine.sampler.negative_prompt) == (2.0, 3.0, "")
    run.write_text(to_toml(mine))
    assert load_config(run) == mine
    assert load_config(run, [f"{key}=auto" for key in AS_PUBLISHED]).sampler == sampler


def test_a_whole_section_as_an_inline_table():
    weights = load_config("toy", ["critic.weights={TA=0.5, VQ=0}"]).critic.weights
    assert weights.model_dump() == {"TA": 0.5, "Phy": 2.0, "VQ": 0.0}


def test_the_resolved_configuration_is_complete_and_reads_back(tmp_path):
    prompt = 'sampler.negative_prompt="a \\"b\\" \\\\ é\\n"'
    config = load_config("toy", ["sampler.graded=[7, 9]", "sampler.graded_steps=2", prompt, "critic.hinge=-0.1"])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config
    for key in known_keys():
        assert key.rpartition(".")[2] + " = " in to_toml(config) or key == "rewards", key  # a table for each


def test_control_characters_and_infinities_read_back():
    config = load_config("toy")
    odd = {"negative_prompt": "".join(map(chr, [*range(32), 127, 133, 0x2028])), "shift": float("inf")}
    config = config.model_copy(update={"sampler": config.sampler.model_copy(update=odd)})
    assert tomllib.loads(to_toml(config)) == config.model_dump()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("sampler.step", "sampler.steps"),
        ("optm.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("video.widht", "video.width"),
        ("lora.ranks", "lora.rank"),
        ("stepz", "steps"),
    ],
)
def test_a_typo_in_a_key_is_answered_with_the_key_that_was_meant(typo, meant):
    assert f"'{typo}'. Did you mean {meant}?" in refusal(f"{typo}=3")


def test_a_section_in_place_of_a_key_is_answered_with_its_keys():
    assert "video.width, video.height" in refusal("video=3")


def test_every_problem_is_reported_at_once_with_its_source():
    message = refusal("optm.lr=1", "sampler.chain=ful", "video.frames=8", "batch=0", "nonsense")
    for part in (
        "-s optm.lr=1: there is no key",
        "sampler.chain: ",
        "-s video.frames=8: video.frames: 8 is not 4n + 1",
        "-s batch=0: batch: ",
        "nonsense",
    ):
        assert part in message


def test_problems_of_a_file_name_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("steps = 'many'\n[video]\nwidht = 8\n", encoding="utf-8")
    message = refusal(preset=str(file))
    assert f"{file}: steps: " in message
    assert f"{file}: there is no key 'video.widht'. Did you mean video.width?" in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler.graded_steps=11"], "do not fit in sampler.steps = 10"),
        (["video.frames=10"], "nearest: 9 or 13"),
        (["video.width=30"], "multiple of 8"),
        (["sampler.lv_samples=2"], 'set graded = "last"'),
        (["sampler.graded=last"], "set it to 1"),
        (["sampler.graded=[1, 1]", "sampler.graded_steps=2"], "different step numbers"),
        (["sampler.graded=[1, 2]"], "make them agree"),
        (
            ["sampler.timesteps=[1000, 500]"],
            "lists 2 noise levels, and sampler.steps is 10",
        ),
        (["sampler.steps=2", "sampler.graded_steps=2", "sampler.timesteps=[500, 757]"], "must fall"),
        (["micro_batch=9"], "micro_batch=8"),
        (["critic.frames=10"], "cannot see 10"),
        (["critic.frames=fps:9"], "8 frames a second"),
        (["critic.frames=fps:0"], "above 0"),
        (["critic.frames=often"], '"fps:rate"'),
        (["critic.quant=int3"], "nf4"),
        (["model.products=int8", "model.quant=nf4"], "set quant"),
        (["critic.mode=structured"], "vanilla"),
        (["critic.weights={TA=0, Phy=0, VQ=0}"], "no reward"),
        (["lora.targets=[]"], "nothing would be trained"),
        (['lora.rank_pattern=["to_q=0"]'], "a rank from 1 to 1024"),
        (['lora.rank_pattern=["to_(q=8"]'], "no regular expression"),
        (['lora.rank_pattern=["to_q=8"]', "lora.rslora=true"], "one rank for all layers"),
        (["memory.vae_backward=window"], "window:n"),
        (["optim.lr=0"], "optim.lr: input should be at least 1e-12, not 0"),
        (["optim.lr=nan"], "optim.lr: "),
        (["steps=1.5"], "integer"),
        (["memory.checkpoint=1"], "boolean"),
    ],
)
def test_values_that_cannot_work_are_refused(overrides, said):
    assert said in refusal(*overrides)


def test_a_valid_neighbour_of_each_refusal_is_taken():
    last = ["sampler.graded=last", "sampler.graded_steps=1", "sampler.lv_samples=2"]
    config = load_config("toy", [*last, "memory.vae_backward=window:2"])
    assert config.vae_window == 2
    assert load_config("toy", ["critic.frames=fps:8"]).critic.frames == "fps:8"
    assert load_config("toy").vae_window is None
    assert load_config("toy", ["model.products=int8"]).model.storage == "int8"


def test_unknown_presets_are_answered_with_those_there_are():
    with pytest.raises(BadInputError, match="Did you mean toy\\? Presets: .*toy"):
        preset_path("toi")
    with pytest.raises(BadInputError, match="does not exist"):
        preset_path("nowhere/mine.toml")


def test_a_file_that_is_not_toml_is_named(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("steps = = 3", encoding="utf-8")
    assert str(file) in refusal(preset=str(file))


def test_a_run_of_an_earlier_version_is_read_where_nothing_it_used_has_changed(tmp_path):
    """A run's config.toml holds every key. Keys that went are dropped at the value that changes nothing, else named."""
    earlier = to_toml(load_config("toy")) + "\n"
    earlier = earlier.replace('questions = "critic"', 'questions = "templates"')
    for line in (
        'writer = ""',
        "check = true",
        "skip_prompts = []",
        "max_skipped = 5",
        'sample_first = "auto"',
        'fit = "auto"',
    ):
        earlier = earlier.replace(f"{line}\n", "")
    earlier = earlier.replace("[memory]\n", "[memory]\nkeep_blocks = 0\n")
    earlier = earlier.replace("[zero]\n", '[zero]\nnvme_path = ""\nstage3_max_live_parameters = 7\n')
    file = tmp_path / "config.toml"
    file.write_text(earlier)
    # its questions were not checked, its first clips were made, and what did not fit was refused
    acted = ["critic.check=false", "log.sample_first=true", "memory.fit=as_given"]
    assert load_config(file) == load_config("toy", acted)
    assert "keep_blocks" in earlier and '"templates"' in earlier and "writer" not in earlier
    file.write_text(earlier.replace("keep_blocks = 0", "keep_blocks = 3").replace('"toyworld"', '"elsewhere"'))
    with pytest.raises(BadInputError, match=r"no key 'memory\.keep_blocks'(.|\n)*\"templates\" is gone"):
        load_config(file)


def test_sizes_are_refused_before_anything_of_their_size_is_made():
    """``model.text_tokens=1e9`` filled the machine."""
    for key in ("model.text_tokens", "batch", "lora.rank", "sampler.steps", "log.eval_prompts", "log.sample_prompts"):
        with pytest.raises(BadInputError, match=f"{key}: input should be less than or equal to"):
            load_config("toy", [f"{key}=1000000000"])
    for settings, said in (
        (["video.width=1024"], "At most: -s video.width=512"),
        (["video.frames=257"], "At most: -s video.frames=253"),
        (["batch=64", "micro_batch=64", "video.width=512", "video.height=512"], "Lower micro_batch"),
    ):
        config = load_config("toy", settings)
        with pytest.raises(BadInputError, match=said):
            require_room(config, generator_config("toyworld"), {"micro_batch": config.micro_batch}, 1e9, "here are")
    require_room(load_config("toy"), generator_config("toyworld"), {"micro_batch": 8}, 1e9, "here are")


def test_more_processes_than_cards_or_memory_are_not_started(monkeypatch):
    monkeypatch.setattr("lowmem_drf.distributed.launch.available_host_bytes", lambda: 2 * 10**9)
    for cards, said in ((0, "host memory"), (2, "torch sees 2")):
        monkeypatch.setattr("torch.cuda.device_count", lambda cards=cards: cards)
        with pytest.raises(BadInputError, match=said):
            launch(8, ["false"], lambda: "")
