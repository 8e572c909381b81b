"""A critic's files other than its weights: preprocessor settings and tokenizer, and whether they fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.preprocess import VideoGeometry
from lowmem_drf.texts import parse_json


def video_geometry(settings: Mapping[str, Any]) -> VideoGeometry:
    """A preprocessor's JSON -> the numbers for ``method/preprocess.py``, before ``Family.fitted``. Raises BadInputError
    if one is missing."""
    size = settings.get("size") or {}
    try:
        if "max_image_size" in settings:  # SmolVLM2's, where ``video_sampling`` comes before ``size``
            longest = ((settings.get("video_sampling") or {}).get("video_size") or size)["longest_edge"]
            side = int(settings["max_image_size"]["longest_edge"])
            mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
            return VideoGeometry(1, 1, 1, side * side, side * side, mean, std, square=(int(longest), side))
        return VideoGeometry(
            patch=int(settings["patch_size"]),
            temporal_patch=int(settings["temporal_patch_size"]),
            merge=int(settings["merge_size"]),
            min_pixels=int(settings.get("min_pixels") or size["shortest_edge"]),
            max_pixels=int(settings.get("max_pixels") or size["longest_edge"]),
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            max_video_tokens=settings.get("max_video_tokens"),
        )
    except KeyError as error:
        raise BadInputError(f"The critic's preprocessor settings lack {error}: use the complete folder.") from error


def require_fit(model: Any, tokenizer: Any) -> None:
    """Raises BadInputError if the model cannot embed every token."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= (rows := model.get_input_embeddings().num_embeddings):
        raise BadInputError(
            f"The critic's tokenizer and model do not belong together: token {token!r} has id {last}, and the model "
            f"embeds {rows} tokens. Take the tokenizer's files and the weights from one model."
        )


def load_tokenizer(folder_or_id: str) -> Any:
    """The tokenizer, with its chat template if there is one. Raises OSError or ValueError as transformers does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_or_id)
    if not tokenizer.chat_template:  # before transformers 4.50 it was a separate file
        tokenizer.chat_template = _read_json(folder_or_id, "chat_template.json").get("chat_template")
    return tokenizer


def video_settings(folder_or_id: str) -> dict[str, Any]:
    """The video processor's settings from the files in which transformers looks for them, in its order. Read as JSON,
    because the class needs torchvision. Raises OSError if there are none."""
    settings = (
        _read_json(folder_or_id, "video_preprocessor_config.json")
        or _read_json(folder_or_id, "processor_config.json").get("video_processor")
        or _read_json(folder_or_id, "preprocessor_config.json")
    )
    if not settings:
        raise OSError("it has no video_preprocessor_config.json, processor_config.json or preprocessor_config.json")
    return dict(settings)


def _read_json(folder_or_id: str, name: str) -> dict[str, Any]:
    """A JSON file of a model folder or of the hub; empty if there is none."""
    from transformers.utils import cached_file

    failures = ("gated_repo", "missing_entries", "connection_errors")
    path = cached_file(folder_or_id, name, **{f"_raise_exceptions_for_{kind}": False for kind in failures})
    if path is None:
        return {}
    content: dict[str, Any] = parse_json(Path(path).read_bytes())
    return content
