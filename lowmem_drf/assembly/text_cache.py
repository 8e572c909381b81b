"""Prompts -> their embeddings. A large encoder's are kept on the disk, so that its 11 GB are read once per prompt set,
and it is gone afterwards.

A file holds the embedding of one text under a name that is the hash of all that it depends on. It is a cache: a file
that cannot be read counts as missing, and a folder that cannot be written to only forgets.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.cache import cache_folder
from lowmem_drf.files import written_aside
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.wan.text import TextEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

BATCH = 32
"""Texts that a small encoder reads at once. A large one reads one at a time, so that what is in the cache does not
depend on what was encoded with it; 512 tokens keep a card busy."""

LARGE_BYTES = 1 << 28
"""Of an encoder's weights: below, encoding again is as quick as a cache, and nothing is kept."""

WHOLE_BYTES = 1 << 26
SLICES, SLICE_BYTES = 64, 1 << 16
"""A file up to so large is fingerprinted as a whole, a larger one by its size and evenly spaced slices."""

VERSION = 1
"""Of what a file holds. To be raised when ``TextEncoder.encode`` changes what it gives."""


def encode_texts(config: Config, generator: str, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Text -> embedding (l, D) on the CPU in the run's dtype, without the zeros after its end.

    Args:
        generator: the generator's folder, with ``text_encoder`` and ``tokenizer``; a hub id loads, and nothing is kept.
        texts: in any order, with repetitions.
        device: where the encoder runs, if it has to.

    Raises:
        BadInputError: the encoder cannot be loaded.
    """
    unique = list(dict.fromkeys(texts))
    cache = _cache_for(config, Path(generator), device)
    encoded = {text: value for text in unique if cache is not None and (value := cache.get(text)) is not None}
    missing = [text for text in unique if text not in encoded]
    if missing:
        from lowmem_drf.models.wan.text import load_text

        encoder = load_text(generator, DTYPES[config.dtype], device, config.memory.text_device == "stream")
        for text, value in _encoded(encoder, missing, config.model.text_tokens, BATCH if cache is None else 1):
            encoded[text] = value
            if cache is not None:
                cache.put(text, value)
        del encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            if release := getattr(torch.accelerator, "empty_host_cache", None):  # not in every version
                release()  # of a streamed encoder: PyTorch would keep its pinned memory for this process
    return {text: encoded[text] for text in unique}


def _encoded(encoder: TextEncoder, texts: list[str], max_tokens: int, batch: int) -> Iterator[tuple[str, Tensor]]:
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        for text, row_LD in zip(some, encoder.encode(some, max_tokens), strict=True):
            yield text, without_padding(row_LD.cpu())


def without_padding(row_LD: Tensor) -> Tensor:
    """Without the rows of zeros at the end; a copy, so that the batch it came from is freed."""
    used = row_LD.any(dim=1).nonzero()
    return row_LD[: int(used.max()) + 1 if len(used) else 0].clone()


class TextCache:
    """Embeddings by text, of one encoder. ``key``: JSON, all that they depend on besides the text."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder, self._key = folder, key

    def get(self, text: str) -> Tensor | None:
        """What was put, or ``None``."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(text), framework="pt") as file:
                own = (file.metadata() or {}).get("key") == self._name(text)
                return file.get_tensor("embedding_LD").clone() if own else None
        except (OSError, SafetensorError):
            return None

    def put(self, text: str, embedding_LD: Tensor) -> None:
        """Written aside and renamed: a reader never sees a part."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with written_aside(self._file(text)) as aside:
                save_file({"embedding_LD": embedding_LD.contiguous()}, aside, metadata={"key": self._name(text)})

    def _name(self, text: str) -> str:
        return json.dumps(self._key | {"text": text}, sort_keys=True, ensure_ascii=False)

    def _file(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(self._name(text).encode()).hexdigest()[:32]}.safetensors"


def _cache_for(config: Config, generator: Path, device: torch.device) -> TextCache | None:
    """``None`` for a small encoder, and for one whose files are not at hand."""
    weights = sum(file.stat().st_size for file in (generator / "text_encoder").glob("*.safetensors"))
    if weights < LARGE_BYTES:
        return None
    key = {
        "version": VERSION,
        "encoder": _fingerprint(generator),
        "dtype": config.dtype,
        "max_tokens": config.model.text_tokens,
        "device": device.type,
    }
    return TextCache(cache_folder() / "texts", key)


def _fingerprint(generator: Path) -> str:
    """Hash over the files of encoder and tokenizer: names, sizes, contents (of large files in slices)."""
    digest = hashlib.sha256()
    for subfolder in ("text_encoder", "tokenizer"):
        for file in sorted(path for path in (generator / subfolder).iterdir() if path.is_file()):
            size = file.stat().st_size
            digest.update(f"{subfolder}/{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                if size <= WHOLE_BYTES:
                    digest.update(stream.read())
                else:
                    for i in range(SLICES):
                        stream.seek((size - SLICE_BYTES) * i // (SLICES - 1))
                        digest.update(stream.read(SLICE_BYTES))
    return digest.hexdigest()[:32]
