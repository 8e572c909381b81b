"""The settings of an adapter as peft writes them: in the header of diffusers' files (``lora_adapter_metadata``), or in
an ``adapter_config.json`` beside the file. They say how strong each module's change is.

Source: ``LoraConfig`` and ``get_pattern_key`` of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.texts import one_line, parse_json, shown

ADAPTER_METADATA = "lora_adapter_metadata"
LEAST, MOST = 1e-6, 1e6
"""Of an alpha: other numbers make no sense."""
_SAFE_PATTERN = re.compile(r"\^?(?:[\w.-]|\\\.|\\d\+?|\.\*)+\$?")
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""``init_lora_weights`` that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
_OTHERWISE = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "use_bdlora", "use_qalora"),
    *("target_parameters", "trainable_token_indices"),
)
"""Settings with which an adapter computes something else than B A on Linears."""
_METHODS = ("LORA", "LOKR", "LOHA")


@dataclass(frozen=True)
class Settings:
    """Ranks and alphas of an adapter's modules."""

    method: str
    """``LORA``, ``LOKR`` or ``LOHA``."""
    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int]
    """Regular expression of module names -> rank."""
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    """rsLoRA (arXiv 2312.03732): the scale is alpha / sqrt(rank)."""

    def alpha_of(self, names: tuple[str, ...], rank: int) -> float:
        """The alpha with which a module's scale is alpha / rank.

        Args:
            names: of the module, in the file and in diffusers.

        Raises:
            BadInputError: the settings have another rank than the tensors.
        """
        said = _matching(self.rank_pattern, names, self.rank)
        if said is not None and said != rank:
            raise BadInputError(f"its settings say rank {said} for {shown(names[0])}, and its tensors have rank {rank}")
        alpha = _matching(self.alpha_pattern, names, self.alpha)
        if alpha is None:
            return float(rank)
        checked = checked_alpha(alpha, f"the alpha of {shown(names[0])} in its settings")
        return checked * math.sqrt(rank) if self.rank_stabilised else checked


def read_settings(text: str | bytes, where: str) -> Settings:
    """From JSON. Keys may have the prefix ``transformer.`` or ``transformer_2.``; ``where``: for messages.

    Raises:
        BadInputError: it cannot be read, or says something that is not supported.
    """
    try:
        config = parse_json(text)
        plain = {re.sub(r"^transformer(_2)?\.", "", key): value for key, value in config.items()}
        return _settings(plain)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"{where} is damaged: {one_line(str(error))}") from error


def checked_alpha(alpha: float, what: str) -> float:
    """Raises BadInputError unless it makes sense."""
    if not LEAST <= alpha <= MOST:  # also false for NaN
        raise BadInputError(f"{what} is {alpha}, and numbers from {LEAST:g} to {MOST:g} make sense")
    return alpha


def _settings(config: dict[str, Any]) -> Settings:
    method = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if method not in _METHODS:
        raise BadInputError(
            f"it is an adapter of peft's method {shown(method)}, which is not read: LoRA, LoKr and LoHa are"
        )
    for key, what in (("fan_in_fan_out", "transposed matrices"), ("modules_to_save", "whole modules")):
        if config.get(key):
            raise BadInputError(f"its settings have {key} = {shown(config[key])}: {what} are not read")
    if odd := next((key for key in _OTHERWISE if config.get(key)), ""):
        raise BadInputError(f"its settings have {odd} = {shown(config[odd])}: then peft computes more than B A")
    begun = config.get("init_lora_weights", True)
    if begun not in _PLAIN_STARTS:
        raise BadInputError(
            f"its settings have init_lora_weights = {shown(begun)}, which changes the base too: B A alone is another "
            "change. peft can convert it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") not in ("none", None):
        raise BadInputError(f"its settings have bias = {shown(config['bias'])}: it replaces biases, which is not read")
    alpha = next((key for key in ("lora_alpha", "alpha") if key in config), "")
    return Settings(
        method,
        int(config["r"]) if "r" in config else None,
        float(config[alpha]) if alpha else None,
        {_checked_pattern(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
        {_checked_pattern(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        bool(config.get("use_rslora")),
    )


def _matching(patterns: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value of the first pattern that matches, as in peft."""
    for pattern, value in patterns.items():
        if any(_compiled(pattern).fullmatch(name) for name in names):
            return value
    return default


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def _checked_pattern(pattern: str) -> str:
    """Module names, with the few signs that real files use: others can keep a regular expression busy for ever."""
    if len(pattern) > 200 or not _SAFE_PATTERN.fullmatch(pattern) or pattern.count("*") + pattern.count("+") > 3:
        raise BadInputError(f"its settings name modules by {shown(pattern)}, a pattern that is not supported")
    return pattern
