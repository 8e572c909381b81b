"""What the study trains: a line each."""

from __future__ import annotations

from dataclasses import dataclass, replace

LAZY = ("optim.anchor=1", "optim.anchor_every=8")
HUBER = ("optim.anchor=4", "optim.anchor_huber=0.05")
NOW: tuple[str, ...] = ("optim.anchor=8", "optim.anchor_huber=0.05", "optim.anchor_every=4")
NOW += ("lora.alpha=64", "lora.scale=1.5", "batch=4", "micro_batch=4")
"""What ``toy-fast`` has now, which the study's runs do without (``runs.BEFORE``)."""
SHORT, SCREEN, FAR = 200, 400, 2000
"""Updates of ``toy``'s run, of an idea's first try, and of what is longer than comfortable."""
LATE = 0.9
"""``lora.max_sigma`` at which a run is measured besides, at its end: the last two of four steps, seven of ten."""


@dataclass(frozen=True)
class Variant:
    """A training that is measured on its way."""

    group: str
    """The table that it belongs to."""
    says: str
    """What differs from the preset, in words."""
    overrides: tuple[str, ...] = ()
    preset: str = "toy"
    updates: int = SCREEN
    method: str = "drf"
    """See ``baselines.py``."""
    levers: tuple[str, ...] = ()
    """See ``levers.py``."""


def _settings(group: str, **rows: tuple[str, str]) -> dict[str, Variant]:
    """Name -> (words, settings with blanks between them)."""
    return {name: Variant(group, says, tuple(change.split())) for name, (says, change) in rows.items()}


VARIANTS: dict[str, Variant] = {
    **{
        name: replace(variant, overrides=(*NOW, *variant.overrides), preset="toy-fast", updates=FAR)
        for name, variant in _settings(
            "main",
            far=("the preset `toy-fast`", ""),
            far_constant=("a constant rate", "optim.schedule=constant"),
            far_free=("no anchor, used at the strength of training", "optim.anchor=0 lora.scale=1"),
            far_yesno=("yes/no questions in their place", "critic.mode=yesno"),
            far_vanilla=("one global question", "critic.mode=vanilla"),
            far_ta_only=("questions about the text alone", "critic.weights.Phy=0 critic.weights.VQ=0"),
            far_draft_1=("the last step of four graded (DRaFT-1)", "sampler.graded_steps=1"),
        ).items()
    },
    **_settings(
        "free",
        default=("the preset `toy`", ""),
        yesno=("yes/no questions in their place", "critic.mode=yesno"),
        vanilla=("one global question", "critic.mode=vanilla"),
        ta_only=("questions about the text alone", "critic.weights.Phy=0 critic.weights.VQ=0"),
        draft_1=("the last step graded (DRaFT-1)", "sampler.graded_steps=1"),
    ),
    **_settings(
        "baselines",
        draft_3=("the last three steps graded (DRaFT-K)", "sampler.graded_steps=3"),
        draft_lv=(
            "the last step, two noised copies (DRaFT-LV)",
            "sampler.graded=last sampler.graded_steps=1 sampler.lv_samples=2",
        ),
        drtune=(
            "three random steps, gradient by the identity (DRTune)",
            "sampler.graded=random sampler.graded_steps=3 sampler.chain=drtune",
        ),
    ),
    "refl": Variant("baselines", "the prediction of a random step (ReFL)", method="refl"),
    "best_of_n": Variant(
        "baselines", "flow matching on the better of own clips", ("optim.lr=1e-4",), method="best_of_n"
    ),
    "awm": Variant("baselines", "policy gradient (AWM)", method="awm"),
    **_settings(
        "drift",
        **{f"anchor_{weight}": (f"anchor {weight}", f"optim.anchor={weight}") for weight in (0.3, 1)},
        hinge=("log-probabilities above -0.05 count as reached", "critic.hinge=-0.05"),
        rank_4=("rank 4", "lora.rank=4 lora.alpha=4"),
    ),
    **{
        name: replace(variant, updates=SHORT)
        for name, variant in _settings(
            "short",
            short=("the preset `toy`", ""),
            short_anchor=("anchor 1", "optim.anchor=1"),
            short_anchor_fast=("anchor 1, rate 1e-3", "optim.anchor=1 optim.lr=1e-3"),
            short_lazy_4=("anchor 1 in every fourth update", "optim.anchor=1 optim.anchor_every=4"),
            short_lazy_8=("anchor 1 in every eighth update", "optim.anchor=1 optim.anchor_every=8"),
            short_lazy_fast=("the same, rate 1e-3", "optim.anchor=1 optim.anchor_every=8 optim.lr=1e-3"),
            short_hinge=("log-probabilities above -0.05 count as reached", "critic.hinge=-0.05"),
        ).items()
    },
    "short_few_140": Variant("short", "`toy-fast` for 140 updates", ("optim.anchor=1",), "toy-fast", 140),
    "short_few": Variant("short", "`toy-fast`, 280 updates, anchor 1", ("optim.anchor=1",), "toy-fast", 280),
    "short_few_huber": Variant("short", "the same, anchor 4, Huber's", HUBER, "toy-fast", 280),
    "short_few_strong": Variant(
        "short", "the same, used at 1.5 times the strength", (*HUBER, "lora.scale=1.5"), "toy-fast", 280
    ),
    "short_few_four": Variant("short", "the preset `toy-fast`: batches of 4 clips", NOW, "toy-fast", 480),
    "short_last": Variant(
        "short", "the same, the last step graded (DRaFT-1)", (*NOW, "sampler.graded_steps=1"), "toy-fast", 480
    ),
    "short_huber": Variant(
        "short", "anchor 4 in every eighth update, Huber's", (*HUBER, "optim.anchor_every=8"), updates=SHORT
    ),
    "short_few_360": Variant("short", "anchor 0.5, 360 updates", ("optim.anchor=0.5",), "toy-fast", 360),
    "short_some": Variant(
        "short",
        "five random steps graded, 250 updates, rate 1e-3",
        ("optim.anchor=1", "sampler.graded=random", "sampler.graded_steps=5", "optim.lr=1e-3"),
        updates=250,
    ),
    **_settings(
        "alarm",
        hot=("a constant rate of 2e-3", "optim.lr=2e-3 optim.schedule=constant"),
        vanilla_hot=(
            "one global question, a constant rate of 1e-3",
            "critic.mode=vanilla optim.lr=1e-3 optim.schedule=constant",
        ),
        ta_only_hot=(
            "questions about the text alone, a constant rate of 1e-3",
            "critic.weights.Phy=0 critic.weights.VQ=0 optim.lr=1e-3 optim.schedule=constant",
        ),
    ),
    "long": Variant("long", "anchor 1 in every eighth update", LAZY, updates=1200),
    "longer": Variant("long", "the same", LAZY, updates=FAR),
    "long_few": Variant("long", "`toy-fast` with batches of 8 clips", HUBER, "toy-fast", 1200),
    "long_last": Variant(
        "long",
        "the same with the last step graded (DRaFT-1)",
        (*HUBER, "lora.scale=1.5", "sampler.graded_steps=1"),
        "toy-fast",
        1200,
    ),
    "long_four": Variant("long", "the preset `toy-fast`", NOW, "toy-fast", 1200),
    "ema": Variant("drift", "moving average of the LoRA", levers=("ema",)),
    "dropout": Variant("drift", "half of the questions, at random", levers=("dropout",)),
    "aspects": Variant("drift", "each aspect's gradient scaled to its share", levers=("aspects",)),
}
"""A new idea is a line."""

QUICK = 60
"""Updates of ``--quick``, measured at the end."""


def quick(variant: Variant) -> Variant:
    return replace(variant, updates=QUICK)
