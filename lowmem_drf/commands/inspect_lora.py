"""``lowmem-drf inspect-lora``: what a LoRA file is, which model it is for, and which programs take it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from lowmem_drf.models.lora.reading import lora_file, read_lora
from lowmem_drf.models.lora.report import Layer, Report, make_report
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.terminal import printable
from lowmem_drf.texts import escaped, some

_PARTS = {"self-attention": "attn1.", "cross-attention": "attn2.", "feed-forward": "ffn."}
_LINEARS = {"attn1.": ("to_q", "to_k", "to_v", "to_out.0"), "ffn.": ("net.0.proj", "net.2")}
_LINEARS["attn2."] = _LINEARS["attn1."]
COLOURS = {"yes": "green", "in part": "yellow", "no": "red"}


def inspect_command(path: Path, as_json: bool) -> None:
    """Prints the report, or JSON. Raises BadInputError that names what the file is, if it is no LoRA of a Wan
    model."""
    report = make_report(lora_file(path), read_lora(path))
    if as_json:
        print(escaped(json.dumps(report.as_json(), indent=1, ensure_ascii=False)))
    else:
        show(report)


def show(report: Report) -> None:
    """Three tables: what it is, how large its changes are, who takes it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def table(rows: Sequence[Sequence[str]], styles: Sequence[str], numbers: Sequence[int] = ()) -> None:
        made = Table.grid(padding=(0, 2))
        for i in range(len(styles)):
            made.add_column(overflow="fold", justify="right" if i in numbers else "left")
        for row in rows:
            made.add_row(
                *(Text(printable(cell), COLOURS.get(cell, style)) for cell, style in zip(row, styles, strict=True))
            )
        console.print(made)

    console.print(Text(printable(f"{report.file}: {_kind(report)}, {_size(report.bytes)}"), "bold"))
    table([row for row in _facts(report) if row[1]], ("bold", ""))
    console.print()
    heading: tuple[str, ...] = ("norm of the change", "together", "smallest", "largest")
    table([heading, *_sizes(report)], ("", "", "", ""), numbers=(1, 2, 3))
    console.print()
    heading = ("program", "takes it", "")
    table([heading, *((row.program, row.takes, row.why) for row in report.programs)], ("bold", "", ""))


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "model", _model(report)
    yield "written by", report.written_by
    yield "layout", report.layout
    if report.ranks:
        scale = f"scale {_span(report.scales)}"
        yield "rank", f"{_span(list(report.ranks))}, alpha {_span(report.alphas)}, {scale}"
    yield "layers", "; ".join(_layers(report))
    yield "parameters", f"{report.parameters:,} in {' and '.join(report.dtypes)}"
    for why, keys in report.left_out.items():
        yield "left out", f"{why}: {_count(len(keys), 'tensor')} ({some(keys, 1)})"
    yield "untrained", _unchanged(report)
    if any(report.norms.values()) and (largest := max(report.norms, key=report.norms.__getitem__)):
        yield "changes most", f"{largest.removesuffix('.weight')}, by {report.norms[largest]:.3g}"
    for name, value in report.training.items():
        yield name.replace("_", " "), value


def _kind(report: Report) -> str:
    kinds = dict(report.kinds)
    first = next((kind for kind in ("LoRA", "DoRA", "LoKr", "LoHa") if kinds.pop(kind, 0)), "")
    rest = " and ".join(
        f"{count} of {kind}" for kind, count in kinds.items() if kind not in ("difference", "lora_B.bias")
    )
    whole = sum(kinds.get(kind, 0) for kind in ("difference", "lora_B.bias"))
    with_ = " and ".join(filter(None, (rest, _count(whole, "plain difference") if whole else "")))
    return f"{first or 'no LoRA'}{f' with {with_}' if with_ else ''}"


def _model(report: Report) -> str:
    """ "Wan2.1-T2V-1.3B (width 1536, 30 blocks)"."""
    names = [
        "ToyWorld" if name == TOYWORLD else name.split("/")[-1].removesuffix("-Diffusers") for name in report.models
    ]
    width = f"width {report.width}" if report.width else "width unknown"
    if not names:
        return f"another {report.family} model: {width}, at least {max(report.blocks, default=-1) + 1} blocks"
    if report.total_blocks:
        width += f", {report.total_blocks} blocks"
    return f"{' or '.join(names)} ({width})"


def _span(numbers: Sequence[float]) -> str:
    """ "16", or "16 to 64"."""
    least, most = f"{min(numbers):.4g}", f"{max(numbers):.4g}"
    return least if least == most else f"{least} to {most}"


def _layers(report: Report) -> Iterator[str]:
    """ "attention and feed-forward of 30 of 30 blocks", and what else is changed."""
    linear = {layer.name: layer for layer in report.layers if layer.blocks}
    parts: dict[tuple[int, ...], list[str]] = defaultdict(list)
    known = {} if any(name.startswith("attn.") for name in linear) else _PARTS  # attn2 is then no cross-attention
    for part, prefix in known.items():
        by_blocks: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in _LINEARS[prefix]:
            if layer := linear.pop(prefix + name, None):
                by_blocks[layer.blocks].append(name)
        for blocks, names in by_blocks.items():
            whole = len(names) == len(_LINEARS[prefix])
            parts[blocks].append(part if whole else f"{part} ({', '.join(names)})")
    for blocks, named in parts.items():
        if named[:2] == ["self-attention", "cross-attention"]:
            named[:2] = ["attention"]
        yield f"{_joined(named)} of {_blocks(blocks, report.total_blocks)}"
    if linear:
        counts = {group: sum(len(layer.norms) for layer in layers) for group, layers in _grouped(list(linear.values()))}
        yield f"in the blocks also: {', '.join(f'{group} ({count})' for group, count in counts.items())}"
    if outside := [layer.name.removeprefix("condition_embedder.") for layer in report.layers if not layer.blocks]:
        yield f"outside the blocks: {', '.join(outside)}"


def _sizes(report: Report) -> Iterator[tuple[str, str, str, str]]:
    for group, layers in _grouped(report.layers):
        norms = [norm for layer in layers for norm in layer.norms.values() if norm is not None]
        if not norms:
            yield f"{group} ({layers[0].kind})", "depends on the model", "", ""
            continue
        together = sum(norm**2 for norm in norms) ** 0.5
        yield group, f"{together:.3g}", f"{min(norms):.3g}", f"{max(norms):.3g}"


def _grouped(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """Layers by the name of a row: biases and norms have one row each."""

    def row(layer: Layer) -> str:
        if layer.name.endswith(".bias"):
            return "biases"
        return "norms" if "norm" in layer.name else layer.name.removeprefix("condition_embedder.")

    order = {name: i for i, name in enumerate(dict.fromkeys(map(row, layers)))}
    ordered = sorted(layers, key=lambda layer: (row(layer) in ("biases", "norms"), order[row(layer)]))
    return [(name, list(group)) for name, group in groupby(ordered, key=row)]


def _unchanged(report: Report) -> str:
    zero = [name.removesuffix(".weight") for name, norm in report.norms.items() if norm == 0]
    if not zero:
        return ""
    if len(zero) == len(report.norms):
        return "all its changes are zero: nothing was trained, or B was not saved"
    return f"{len(zero)} of {len(report.norms)} changes are zero ({some(zero)})"


def _blocks(blocks: tuple[int, ...], total: int | None) -> str:
    """ "30 of 30 blocks", "3 of 30 blocks (0-1, 7)"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0])]
    listed = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    count = f"{len(blocks)} of {total} blocks" if total else f"{len(blocks)} blocks"
    return count if len(blocks) == total else f"{count} ({listed})"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
