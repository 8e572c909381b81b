"""What is in a LoRA file, for ``lowmem-drf inspect-lora``: kind, model, ranks, layers, norms, programs that take it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import GeneratorConfig, Verdict
from lowmem_drf.models.generators import FAMILIES, KNOWN_GENERATORS, family_of, generator_config
from lowmem_drf.models.lora.init import require_linears
from lowmem_drf.models.lora.keys import family_with
from lowmem_drf.models.lora.settings import ADAPTER_METADATA
from lowmem_drf.models.weights.files import read_header
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.texts import one_line, parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.lora.changes import Factors, LoraChanges, Other, Pair, Shape

DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
_BLOCK = re.compile(r"\w*blocks\.(\d+)\.(.+)")
_FACTS = {
    "title": ("modelspec.title", "ss_output_name"),
    "base_model": ("lowmem_drf.model", "ss_base_model_version", "modelspec.architecture", "ss_sd_model_name"),
    "expert": ("lowmem_drf.expert",),
    "transformer": ("lowmem_drf.transformer",),
    "merged_into_it": ("lowmem_drf.base_lora",),
    "began_with": ("lowmem_drf.init_lora",),
    "method": ("lowmem_drf.method",),
    "critic": ("lowmem_drf.critic",),
    "steps": ("lowmem_drf.steps", "ss_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "learning_rate": ("ss_learning_rate",),
    "schedule": ("ss_lr_scheduler",),
    "optimizer": ("ss_optimizer",),
    "video": ("lowmem_drf.video", "modelspec.resolution", "ss_resolution"),
    "update": ("lowmem_drf.update",),
    "timesteps": ("lowmem_drf.timesteps",),
    "shift": ("lowmem_drf.shift", "ss_discrete_flow_shift"),
    "guidance": ("lowmem_drf.guidance",),
    "max_sigma": ("lowmem_drf.max_sigma",),
    "seed": ("ss_seed",),
    "date": ("modelspec.date",),
    "trigger_phrase": ("modelspec.trigger_phrase",),
    "license": ("modelspec.license",),
}
"""Name in the report -> keys of the header, the best one first."""
_AT_ONCE = 2**22
"""Numbers of a LoHa that are multiplied out at once."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of every block, or one module outside the blocks, with what changes it."""

    name: str
    """As in diffusers, without the block: ``attn1.to_q``."""
    kind: str
    blocks: tuple[int, ...]
    """Empty for a module outside the blocks."""
    norms: Mapping[str, float | None]
    """Frobenius norm of the change by parameter. ``None``: it depends on the model's weights (DoRA)."""

    @property
    def norm(self) -> float | None:
        """Of all of them together."""
        known = [norm for norm in self.norms.values() if norm is not None]
        return math.hypot(*known) if known else None


@dataclass(frozen=True)
class Report:
    """The content of a LoRA file."""

    file: Path
    bytes: int
    kinds: Mapping[str, int]
    """Kind of change -> number of parameters."""
    layout: str
    written_by: str
    """The program; empty if neither names nor header tell."""
    family: str
    """``NAME`` of the family whose modules it changes."""
    models: tuple[str, ...]
    """Hub ids, or ``toyworld``, of the models that it fits."""
    width: int | None
    blocks: tuple[int, ...]
    """Those that it changes."""
    total_blocks: int | None
    """Of the model; ``None`` if it is not known."""
    ranks: Mapping[int, int]
    """Rank -> number of modules."""
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    layers: tuple[Layer, ...]
    dtypes: tuple[str, ...]
    parameters: int
    left_out: Mapping[str, list[str]]
    programs: tuple[Verdict, ...]
    training: Mapping[str, str]

    @property
    def norms(self) -> dict[str, float]:
        """By parameter, as far as they are known."""
        rows = ((name, norm) for layer in self.layers for name, norm in layer.norms.items())
        return {name: norm for name, norm in rows if norm is not None}

    def as_json(self) -> dict[str, Any]:
        """The contract of ``--json``: keys are added, and not renamed."""
        norms = self.norms
        return {
            "file": str(self.file),
            "bytes": self.bytes,
            "kinds": dict(self.kinds),
            "layout": self.layout,
            "written_by": self.written_by or None,
            "model": {
                "fits": list(self.models),
                "width": self.width,
                "blocks": self.total_blocks,
                "changed_blocks": list(self.blocks),
            },
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alphas": list(self.alphas),
            "scales": list(self.scales),
            "layers": [
                {"name": layer.name, "kind": layer.kind, "blocks": list(layer.blocks), "norm": layer.norm}
                for layer in self.layers
            ],
            "norms": norms,
            "unchanged": [name for name, norm in norms.items() if norm == 0],
            "dtypes": list(self.dtypes),
            "parameters": self.parameters,
            "left_out": {why: list(keys) for why, keys in self.left_out.items()},
            "programs": [{"program": row.program, "takes": row.takes, "why": row.why or None} for row in self.programs],
            "training": dict(self.training),
        }


def make_report(file: Path, lora: LoraChanges) -> Report:
    """The report on a LoRA that was read from ``file``, whose header is read again."""
    header, _ = read_header(file)
    header.pop("__metadata__", None)
    left = {key for keys in lora.left_out.values() for key in keys}
    used = {key: entry for key, entry in header.items() if key not in left and not key.endswith(".alpha")}
    layers = tuple(_layers(lora))
    blocks = sorted({number for layer in layers for number in layer.blocks})
    models = tuple(model for model, shapes in _known_shapes() if _fits(lora, shapes))
    total = {_described(model).transformer["num_layers"] for model in models}
    pairs, family = _pairs(lora), family_with([*lora.pairs, *lora.others])
    ranks: dict[int, int] = defaultdict(int)
    for pair in pairs:
        ranks[pair.rank] += 1
    kinds: dict[str, int] = defaultdict(int)
    for layer in layers:
        kinds[layer.kind] += len(layer.norms)
    return Report(
        file=file,
        bytes=file.stat().st_size,
        kinds=dict(kinds),
        layout=lora.layout,
        written_by=written_by(lora.metadata, lora.layout),
        family=family.NAME,
        models=models,
        width=_width(lora, models),
        blocks=tuple(blocks),
        total_blocks=total.pop() if len(total) == 1 else None,
        ranks=dict(sorted(ranks.items())),
        alphas=tuple(sorted({pair.alpha for pair in pairs})),
        scales=tuple(sorted({pair.scale for pair in pairs})),
        layers=layers,
        dtypes=tuple(sorted({DTYPES.get(entry["dtype"], entry["dtype"]) for entry in used.values()})),
        parameters=sum(math.prod(entry["shape"]) for entry in used.values()),
        left_out=lora.left_out,
        programs=(*_ours(lora), *family.verdicts(lora, header)),
        training=training_facts(lora.metadata),
    )


def _ours(lora: LoraChanges) -> list[Verdict]:
    """One for each door of this program."""
    why = ""
    try:
        require_linears(lora)
    except BadInputError as error:
        why = str(error)
    init = Verdict("train --init-lora", "no" if why else "yes", why)
    return [Verdict("sample --lora", "yes"), Verdict("model.base_lora", "yes"), init]


def _layers(lora: LoraChanges) -> Iterable[Layer]:
    """In the model's order: blocks first."""
    rows: list[tuple[str, Pair | Other]] = [(f"{module}.weight", pair) for module, pair in lora.pairs.items()]
    rows += [(name, other) for name, others in lora.others.items() for other in others]
    by_name: dict[str, list[Pair | Other]] = defaultdict(list)
    for name, change in rows:
        by_name[name].append(change)
    found: dict[tuple[bool, str, str], dict[str, float | None]] = defaultdict(dict)
    for name, changes in by_name.items():
        block = _BLOCK.fullmatch(name)
        layer = (block[2] if block else name).removesuffix(".weight")
        norm = change_norm(changes[0]) if len(changes) == 1 else _norm_of_sum(changes)
        found[block is None, layer, changes[0].kind][name] = norm
    for (_, layer, kind), norms in sorted(found.items()):
        numbers = sorted(int(block[1]) for block in map(_BLOCK.fullmatch, norms) if block)
        ordered = dict(sorted(norms.items(), key=lambda item: (len(item[0]), item[0])))
        yield Layer(layer, kind, tuple(numbers), ordered)


def change_norm(change: Pair | Other) -> float | None:
    """The Frobenius norm of a change. ``None``: it depends on the model's weights, or is no number of fp64."""
    made: Any = change
    match change.kind:
        case "LoRA":
            norm = _product_norm(made.b, made.a)
        case "LoKr":  # |kron(v, w)| = |v| |w|
            norm = math.prod(_product_norm(*parts) for parts in (made.first, made.second))
        case "LoHa":
            norm = _loha_norm(made)
        case "DoRA":
            return None
        case _:
            norm = _product_norm(made.value)
    norm *= abs(made.scale)
    return norm if math.isfinite(norm) else None


def _norm_of_sum(changes: Iterable[Pair | Other]) -> float | None:
    """Of several changes of one parameter: a pair, a difference. They have to be multiplied out."""
    import torch

    from lowmem_drf.models.lora.changes import Difference

    made = list(changes)
    whole = next((change.value for change in made if isinstance(change, Difference)), None)
    if whole is None or any(change.kind == "DoRA" or not change.fits(tuple(whole.shape)) for change in made):
        return None
    weight = torch.zeros(whole.shape)
    for change in made:
        weight += change(weight)
    return float(torch.linalg.vector_norm(weight))


def _product_norm(left: Tensor, right: Tensor | None = None) -> float:
    """|B A|, from products that take no more memory than B and A: |B A|^2 = trace((B^T B)(A A^T)). In fp64 if fp32 has
    no such numbers."""
    import torch

    for dtype in (torch.float32, torch.float64):
        b = left.to(dtype).flatten(1) if left.ndim > 1 else left.to(dtype)[None]
        a = None if right is None else right.to(dtype).flatten(1)
        if a is None:
            square = b.square().sum()
        elif len(a) > min(len(b), a.shape[1]):  # a rank above that of any product
            square = (b @ a).square().sum()
        else:
            square = ((b.t() @ b) * (a @ a.t())).sum()
        if bool(square.isfinite()) and float(square) > 0:
            break
    return math.sqrt(max(float(square), 0.0))


def _loha_norm(factors: Factors) -> float:
    import torch

    total, (rows, columns) = 0.0, (len(factors.first[0]), factors.first[-1].shape[1])
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        parts = []
        for whole in (factors.first, factors.second):
            made = whole[0][start : start + step].to(torch.float32)
            parts.append(made if len(whole) == 1 else made @ whole[1].to(torch.float32))
        total += float((parts[0] * parts[1]).square().sum(dtype=torch.float64))
    return math.sqrt(total)


def _known_shapes() -> Iterable[tuple[str, dict[str, Shape]]]:
    for model in (*KNOWN_GENERATORS, TOYWORLD):
        yield model, family_of(_described(model)).parameter_shapes(_described(model).transformer)


def _described(model: str) -> GeneratorConfig:
    return KNOWN_GENERATORS[model].config if model in KNOWN_GENERATORS else generator_config(model)


def _fits(lora: LoraChanges, shapes: Mapping[str, Shape]) -> bool:
    try:
        lora.require_fit(shapes)
    except BadInputError:
        return False
    return True


def _pairs(lora: LoraChanges) -> list[Pair]:
    """Also those of DoRA."""
    others: list[Any] = [other for own in lora.others.values() for other in own if other.kind == "DoRA"]
    return [*lora.pairs.values(), *(other.pair for other in others if other.pair.kind == "LoRA")]


def _width(lora: LoraChanges, models: Iterable[str]) -> int | None:
    """Of the model, if it is known or pairs tell."""
    for model in map(_described, models):
        return family_of(model).sizes(model.transformer, model.vae).width
    for module, pair in lora.pairs.items():
        if re.search(r"\.attn[12]\.to_(q|out\.0)$|\.ffn\.net\.2$", module):
            return int(pair.b.shape[0])
        if module.endswith(".ffn.net.0.proj") or re.search(r"\.attn1\.to_[kv]$", module):
            return int(pair.a.shape[1])
    return None


def training_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the header says about the training, without the prompts that some programs write there."""
    found = {name: next((metadata[key] for key in keys if metadata.get(key)), "") for name, keys in _FACTS.items()}
    return {name: one_line(value, 100) for name, value in found.items() if value not in ("", "None", "none", "null")}


def written_by(metadata: Mapping[str, str], layout: str) -> str:
    """The program that wrote a file, as far as its header or its layout tell; else ""."""
    if version := metadata.get("lowmem_drf.version"):
        return one_line(f"lowmem-drf {version}", 60)
    if software := metadata.get("software"):  # ai-toolkit
        try:
            told = parse_json(software)
            return one_line(f"{told['name']} {told.get('version', '')}", 60)
        except (ValueError, KeyError, TypeError, AttributeError):
            return one_line(software, 60)
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    if any(f"lora_{family.NAME.lower()}" in metadata.get("ss_network_module", "") for family in FAMILIES):
        return "musubi-tuner"
    if layout in ("VideoX-Fun", "OneTrainer", "DiffSynth-Studio"):
        return layout
    if any(key.startswith("ss_") for key in metadata):
        return "a program with kohya's header"
    if ADAPTER_METADATA in metadata:
        return "diffusers"
    return "lowmem-drf (a checkpoint)" if metadata.keys() == {"alpha"} else ""
