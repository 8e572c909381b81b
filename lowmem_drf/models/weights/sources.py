"""Where models come from: ToyWorld's names, a folder, or a Hugging Face id; one clear error when loading fails."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from lowmem_drf.errors import BadInputError
from lowmem_drf.shortage import shortage_of
from lowmem_drf.terminal import working

TOYWORLD = "toyworld"
READER = "toyworld-reader"
"""ToyWorld's second critic, which also understands quoted phrases and captions in a clip's place."""
FEWSTEP = "toyworld-fewstep"
"""ToyWorld's step-distillation LoRA, for ``model.base_lora``."""
WEIGHTS = Path(__file__).resolve().parents[2] / "toy" / "weights"


def resolve(model_id: str, role: Literal["generator", "critic", "reward"]) -> str:
    """ToyWorld's names -> the folder of that role in the package; a folder or hub id is returned unchanged."""
    if role == "reward":  # ToyWorld has none
        return model_id
    near = difflib.get_close_matches(model_id, (TOYWORLD, READER), n=1, cutoff=0.75)
    if near and model_id not in (TOYWORLD, READER) and not os.path.exists(model_id):
        raise BadInputError(f"there is no model {model_id!r}. Did you mean {near[0]}?")
    if model_id != TOYWORLD and (model_id, role) != (READER, "critic"):
        return model_id
    folder = WEIGHTS / ("reader" if model_id == READER else role)
    if not folder.is_dir():
        raise BadInputError(
            f"ToyWorld's {role} is missing ({folder}). Reinstall lowmem-drf, or rebuild it: "
            "python -m lowmem_drf.toy.build"
        )
    return str(folder)


@contextmanager
def loading(what: str, folder_or_id: str) -> Iterator[None]:
    """Turns a library's failure to find or read a model into a BadInputError that says what to do. transformers' own
    bars become ours (``terminal.working``)."""
    from safetensors import SafetensorError

    try:
        with _bars(f"reading {what}"):
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if shortage_of(error):  # the input did not cause it
            raise
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise BadInputError(
            f"Cannot load {what} from {folder_or_id!r}: {reason}\n"
            "Give 'toyworld', a folder in diffusers / transformers layout, or a Hugging Face id (downloaded once, "
            "then cached)."
        ) from error


@contextmanager
def _bars(what: str) -> Iterator[None]:
    """Inside the block transformers counts the weights that it reads in our bar and not in its own."""
    if "transformers" not in sys.modules:  # it is not what loads
        yield
        return
    from transformers.utils.logging import set_tqdm_hook

    with ExitStack() as opened:  # a bar ends with the block, also where an error leaves a loop in the middle

        def counted(make: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
            items: Any = args[0] if args else settings.get("iterable")
            if not hasattr(items, "__len__"):
                return make(*args, **settings | {"disable": True})
            return opened.enter_context(closing(each(items)))

        def each(items: Collection[Any]) -> Generator[Any]:
            with working(what, len(items)) as advance:
                for item in items:
                    yield item
                    advance(1)

        opened.callback(set_tqdm_hook, set_tqdm_hook(counted))
        yield


def downloaded(hub_id: str, subfolder: str) -> Path:
    """Downloads a subfolder of a repository to the hub's cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=[f"{subfolder}/*.json", f"{subfolder}/*.safetensors"]))


def complete(loaded: tuple[Any, Any]) -> Any:
    """The model from ``from_pretrained(…, output_loading_info=True)``. Raises ValueError if weights were missing: the
    libraries only warn, and leave them random."""
    model, info = loaded
    refuse_missing(info["missing_keys"])
    return model


def refuse_missing(names: Collection[str]) -> None:
    """Raises ValueError unless ``names``, the tensors that the weights lack, is empty."""
    if names:
        raise ValueError(
            f"its weights lack {len(names)} tensors of the model its config.json describes (the first: {min(names)})"
        )
