"""Plans every preset for its card and writes the figures to docs/fit.md, the README and the presets.

    python -m bench.plans.fit                # all presets; --only NAME: some of them, the other rows stay as they are

Writes docs/fit.md, the README's table between the ``fit`` marks, and each preset's ``# Plan:`` line.
``tests/planner/test_preset_plans.py`` compares the headers with the plans, and this page with the headers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_drf.config import load_config
from lowmem_drf.errors import LowmemError
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.plan import make_plan, new_fakes
from lowmem_drf.planner.stages import STAGES
from lowmem_drf.planner.words import in_words
from lowmem_drf.preset_files import preset_card, preset_summary, presets

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "fit.md", ROOT / "README.md"
IN_README = ("rtx4060", "rtx3060", "rtx4090", "rtx4090-wan14b")
MARKS = "<!-- fit: begin -->\n", "<!-- fit: end -->\n"

ABOUT = """\
# What fits where

Every preset, planned (`python -m bench.plans.fit` writes this page; `lowmem-drf plan --preset NAME` prints one in more
detail). Stages: GiB at the peak of each stage of an update, as requested from PyTorch's allocator; *of*: the most that
the tightest stage may take ([memory.md](memory.md)). Host: GiB that wait in host memory for the card, without Python,
the libraries and CUDA; for several cards, GiB for each card, and in brackets for all. Seconds per update are estimates,
and a run is its preset's `steps` updates.
*Copies hidden*: share of the time of copies between card and host during which the card computes; *waiting*: the rest,
as a share of the update.
"""
AFTER = """
All of them also keep the critic's language model in 4 bit, and decode frames and take the VAE's gradients in 16.

Streaming makes this table possible: the frozen weights of the transformer's blocks and of the critic's layers come to
the card one layer at a time, while the layer before computes ([memory.md](memory.md)).
"""

OTHERS = """
## LTX-2

Video and sound of 19B parameters, with Gemma 3 12B for its prompts: not trained here. A plan with diffusers' modules at
true size (`python -m bench.plans.ltx2` writes it): 704x480, 121 frames, distilled to 8 steps, 3 of them graded, two
clips an update; settings of `rtx4090-ltx13b`: weights in 8 bit, streamed.

"""
OTHERS_MARKS = "<!-- ltx2: begin -->\n", "<!-- ltx2: end -->\n"


UNRECORDED = ("memory.record_decode=0", "memory.record_rollout=false")
"""What ``train`` sets first where the host's memory does not suffice."""


def plan(name: str, fakes: Fakes, *overrides: str) -> dict[str, Any]:
    """The output of ``lowmem-drf plan --json``; with ``unrecorded_gib`` of host memory, where less would do."""
    config, card = load_config(name, overrides), card_named(preset_card(presets()[name]))
    made = make_plan(config, card, config.memory.vram_gib or card.gib, fakes=fakes).as_json(name)
    if config.memory.record_rollout or config.memory.record_decode:
        made["unrecorded_gib"] = plan(name, fakes, *UNRECORDED)["host_gib"]
    return made


def largest(made: Mapping[str, Any]) -> str:
    """The stage with the highest peak."""
    return max(made["stages"], key=lambda stage: made["stages"][stage]["peak_gib"])


def plan_line(name: str, made: Mapping[str, Any]) -> str:
    """The ``# Plan:`` line of a preset's header."""
    figures = f"{made['peak_gib']:.1f} GiB at the peak ({largest(made)}), {made['host_gib']:.1f} GiB of host memory"
    if made["processes"] > 1:
        figures += f" each and {made['all_host_gib']:.0f} together"
    if made.get("unrecorded_gib", made["host_gib"]) < made["host_gib"]:
        figures += f" ({made['unrecorded_gib']:.1f} without records)"
    return f"# Plan: {figures}, about {made['update_s']:,.0f} s an update of {clips(name)} (an estimate)"


def host(made: Mapping[str, Any], unit: str = "") -> str:
    """Host memory of each process, and of all."""
    return f"{made['host_gib']:.1f}{unit}" + (f" ({made['all_host_gib']:.0f}{unit})" if made["processes"] > 1 else "")


def clips(name: str) -> str:
    """Clips of an update."""
    batch = load_config(name).batch
    return f"{batch} clip{'s' * (batch > 1)}"


def run(name: str, made: Mapping[str, Any]) -> str:
    """A run's updates and time."""
    steps = load_config(name).steps
    return f"{steps}: {in_words(steps * made['update_s'])}"


def header_line(name: str, key: str) -> str:
    """The text after ``# key:`` in a preset's header; empty if there is none."""
    found = re.search(rf"^# {key}: (.+)$", presets()[name].read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def measured(name: str) -> str:
    line = header_line(name, "Measured")
    return "not yet" if "not yet" in line else line


def kept_row(text: str, name: str) -> str:
    """The row of a preset's plan in a page or in the README."""
    row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` | ")), None)
    if row is None:
        raise LowmemError(f"{name} has no row yet. Plan it too: --only {name}")
    return row


def page(plans: Mapping[str, Mapping[str, Any]], before: str = "") -> str:
    """docs/fit.md. Rows of presets that are not in ``plans`` are those of the page ``before``."""
    columns = ["preset", "card", *STAGES, "peak, of", "host", "an update", "a run", "copies hidden", "waiting"]
    lines = [f"| {' | '.join(columns)} | measured |", "|---" * (len(columns) + 1) + "|"]
    for name in card_presets():
        if (made := plans.get(name)) is None:
            lines.append(kept_row(before, name))
            continue
        peaks = [f"{made['stages'][stage]['peak_gib']:.1f}" for stage in STAGES]
        peaks[STAGES.index(largest(made))] = f"**{peaks[STAGES.index(largest(made))]}**"
        memory = f"{made['peak_gib']:.1f}, {made['usable_gib']:.1f} | {host(made)}"
        shares = f"{made['hidden_share']:.0%} | {made['stall_share']:.1%}"
        lines.append(
            f"| `{name}` | {preset_card(presets()[name])} | {' | '.join(peaks)} | {memory} "
            f"| {made['update_s']:,.0f} s, {clips(name)} | {run(name, made)} | {shares} | {measured(name)} |"
        )
    given = ["", "## What was given up to get there", ""]
    given += ["| preset | what it does | what was given up |", "|---|---|---|"]
    for name in card_presets():
        summary = preset_summary(presets()[name]).rstrip(".")
        given.append(f"| `{name}` | {summary} | {header_line(name, 'Gives up')} |")
    kept = before.partition(OTHERS_MARKS[0])[2].partition(OTHERS_MARKS[1])[0]
    return "\n".join([ABOUT, *lines, *given, AFTER]) + OTHERS + OTHERS_MARKS[0] + kept + OTHERS_MARKS[1]


def readme_table(plans: Mapping[str, Mapping[str, Any]], before: str = "") -> str:
    """The README's table: the presets of ``IN_README``. ``before``: as of ``page``."""
    columns = ("preset", "card", "what is trained", "planned peak", "host memory", "an update", "a run", "measured")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in IN_README:
        if (made := plans.get(name)) is None:
            rows.append(kept_row(before, name))
            continue
        what = preset_summary(presets()[name]).rstrip(".")
        rows.append(
            f"| `{name}` | {preset_card(presets()[name])} | {what} | {made['peak_gib']:.1f} GiB ({largest(made)}) "
            f"| {host(made, ' GiB')} | {made['update_s']:,.0f} s, {clips(name)} | {run(name, made)} "
            f"| {measured(name)} |"
        )
    return "\n".join(rows) + "\n"


def card_presets() -> list[str]:
    """Presets for cards: single cards first, and small ones before large ones."""
    sizes = {name: re.match(r"(?:(\d+) x )?(\d+) GB", preset_card(path)) for name, path in presets().items()}
    return [
        name for *_, name in sorted((int(size[1] or 1), int(size[2]), name) for name, size in sizes.items() if size)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Plans and writes."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="plan these presets alone")
    options = parser.parse_args(arguments)
    names = options.only or card_presets()
    fakes, plans = new_fakes(), {}
    for name in names:
        made = plans[name] = plan(name, fakes)
        path = presets()[name]
        line = plan_line(name, made)
        text = re.sub(r"^# Plan: .*$", line, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
        shares = f"waiting {made['stall_share']:.1%}, hidden {made['hidden_share']:.0%}"
        print(f"{name}: {line}{'' if made['fits'] else ' DOES NOT FIT'}, {shares}", flush=True)
    PAGE.write_text(page(plans, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    table, _, after = rest.partition(MARKS[1])
    README.write_text(before + MARKS[0] + readme_table(plans, table) + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
