"""Dots as a ``models.family.Family``."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file as read_safetensors

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.blocks import AS_IN_DIFFUSERS, set_blocks
from lowmem_drf.models.family import GeneratorSizes, LoraHeader, ModuleNames
from lowmem_drf.models.weights.quant import lay_out, require_library
from lowmem_drf.models.weights.reader import TensorFiles, files_in, fill_from_files, require_complete
from lowmem_drf.texts import parse_json

from .decoder import DotsDecoder as decoder  # noqa: F401
from .networks import SPATIAL, TEMPORAL, WORDS, DotsText, DotsTransformer, DotsVae

NAME = "Dots"
KINDS = {"transformer": "DotsTransformer", "vae": "DotsVae", "text_encoder": "dots"}
KNOWN = {}
BLOCKS = "dots_blocks"
IMAGES = None
_LINEARS = {name: name for name in ("q", "k", "v", "o", "up", "down")}
NAMES = ModuleNames(_LINEARS, {**_LINEARS, "norm": "norm"}, {x: x for x in ("dots_in", "time", "text", "dots_out")})


def refuse(generator, place):
    if generator.transformer["channels"] != generator.vae["channels"]:
        raise BadInputError(
            f"the transformer and the VAE of {place} have latents of other channels. Give whole models."
        )


def sizes(transformer, vae):
    return GeneratorSizes(
        channels=transformer["channels"], spatial=SPATIAL, temporal=TEMPORAL, patch=(1, 1, 1), positions=1024,
        heads=transformer["heads"], head_dim=transformer["width"] // transformer["heads"],
        hidden=2 * transformer["width"], text_dim=transformer["text_dim"], vae_widths=(vae["width"],), vae_patch=1,
    )  # fmt: skip


def parameter_shapes(config):
    return {name: tuple(parameter.shape) for name, parameter in empty_transformer(config).named_parameters()}


def empty_transformer(config, layers=None, quant="none"):
    require_library(quant, "model.quant", ("none", "nf4", "int8"))
    fewer = {} if layers is None else {"num_layers": min(layers, config["num_layers"])}
    with torch.device("meta"):
        model = DotsTransformer.from_config({**config, **fewer})
    lay_out(model, quant, lambda name: name.startswith(f"{BLOCKS}."))
    return model


def empty_vae(config):
    with torch.device("meta"):
        return DotsVae.from_config(dict(config))


def empty_text(config, layers=None):
    with torch.device("meta"):
        return DotsText(config["width"], min(config["num_layers"], layers or config["num_layers"]))


def load_transformer(
    folder_or_id, dtype=torch.float32, device="cpu", quant="none", subfolder="transformer", home=None, changes=None,
    blocks=None, taken=None,
):  # fmt: skip
    folder = Path(folder_or_id) / subfolder
    model = empty_transformer(DotsTransformer.load_config(folder), quant=quant)
    files = TensorFiles(files_in(folder))
    require_complete(files, model)
    names = {name: name for name in files.entries}
    return fill_from_files(model, files, names, dtype, device, home, changes, blocks, taken, BLOCKS)


def load_file(file, config, model, *arguments, **options):
    raise BadInputError(f"model.transformer, {file}: transformers of {NAME} come in folders. Give model.id the folder.")


def load_vae(folder_or_id, dtype=torch.float32, device="cpu"):
    vae = DotsVae.from_pretrained(folder_or_id, subfolder="vae", torch_dtype=dtype)
    return vae.to(device).eval().requires_grad_(False)


def load_text(folder_or_id, dtype=torch.float32, device="cpu", stream=False, subfolder="text_encoder"):
    folder = Path(folder_or_id) / subfolder
    config = parse_json((folder / "config.json").read_bytes())
    model = DotsText(config["width"], config["num_layers"])
    model.load_state_dict(read_safetensors(folder / "model.safetensors"))
    return _TextEncoder(model.to(device, dtype).eval().requires_grad_(False))


class _TextEncoder:
    def __init__(self, model):
        self._model = model

    @torch.no_grad()
    def encode(self, texts, max_tokens=512):
        ids = [[1 + len(word) % (WORDS - 1) for word in text.split()][:max_tokens] for text in texts]
        ids_BL = torch.tensor([row + [0] * (max_tokens - len(row)) for row in ids])
        return self._model(ids_BL, ids_BL > 0)


def stream_text(model, device, store):
    """It is small enough to stay where it is."""


class _Forward:
    def __init__(self, block):
        self._run = type(block).forward.__get__(block)

    def __call__(self, hidden, *rest, kept_attention=None, recorded=False):
        return self._run(hidden, *rest)

    unread = __call__


def set_activations(transformer, how=AS_IN_DIFFUSERS):
    """The blocks are diffusers' own: no slices, no kernels."""
    if how.keep_attention != "none":
        raise BadInputError(f"{NAME} keeps no attentions: set memory.keep_attention = 'none'.")
    set_blocks(transformer, list(transformer.dots_blocks), lambda block, weights: _Forward(block), how)


def as_velocity(transformer, recorder=None, call=None, fps=24.0):
    call = transformer if call is None else call

    def velocity(x_BCFhw, sigma, cond):
        dtype = transformer.dots_in.weight.dtype
        with recorder.during(cond) if recorder else nullcontext():
            return call(x_BCFhw.to(dtype), sigma, cond.to(x_BCFhw.device, dtype)).to(x_BCFhw.dtype)

    return velocity


def drop_encoder(vae):
    vae.encoder = None


def probe(config, side):
    return (1, config["channels"], 2, side, side), (1, 16, config["text_dim"])


def pipeline(transformer):
    def load(folder, weight_name, local_files_only):
        transformer.load_lora_adapter(folder, weight_name=weight_name, local_files_only=local_files_only)

    return SimpleNamespace(load_lora_weights=load)


def lora_header(generator):
    return LoraHeader("dots", "https://example.org/dots", "networks.lora_dots")


def kind_of(names, complete):
    return None


def verdicts(lora, header):
    return []
