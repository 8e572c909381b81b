"""Text embeddings. Those of a large encoder are cached on disk, so that its 11 GB are read once per prompt set; the
encoder is freed afterwards.

One file per text, named by the hash of everything that the embedding depends on. An unreadable file counts as missing;
an unwritable folder caches nothing.
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
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import written_aside
from lowmem_drf.models.generators import family_of, generator_config
from lowmem_drf.models.weights.finite import not_finite
from lowmem_drf.schema import Config
from lowmem_drf.terminal import working

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.family import GeneratorConfig, TextEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BATCH = 32
"""Texts per batch of a small encoder. A large one encodes one at a time, so that a cached embedding does not depend on
its batch; 512 tokens keep a card busy."""

LARGE_BYTES = 1 << 28
"""Embeddings of encoders with less weights are not cached: encoding again is as fast."""

WHOLE_BYTES = 1 << 26
SLICES, SLICE_BYTES = 64, 1 << 16
"""Files above ``WHOLE_BYTES`` are fingerprinted by their size and evenly spaced slices."""

VERSION = 1
"""Raise it when ``TextEncoder.encode`` changes its result."""


def encode_texts(config: Config, generator: str, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Text -> embedding (l, D) on the CPU in the run's dtype, without padding.

    Args:
        generator: folder with ``text_encoder`` and ``tokenizer``, or a hub id, for which nothing is cached. Of several
            encoders one is loaded after the other.
        texts: in any order, with repetitions.
        device: where the encoder runs.

    Raises BadInputError: the encoder cannot be loaded, or an embedding is not finite.
    """
    unique = list(dict.fromkeys(texts))
    described = generator_config(generator)
    cache = _cache_for(config, Path(generator), list(described.text_encoders), device)
    encoded = {text: value for text in unique if cache is not None and (value := cache.get(text)) is not None}
    missing = [text for text in unique if text not in encoded]
    if missing:
        *others, last = described.text_encoders
        rows: dict[str, Tensor] = {}
        for subfolder in others:
            for text, row_LD in _rows(config, generator, described, subfolder, missing, cache, device):
                rows[text] = row_LD + rows[text] if text in rows else row_LD
        for text, row_LD in _rows(config, generator, described, last, missing, cache, device):
            encoded[text] = without_padding(row_LD + rows.pop(text) if text in rows else row_LD)
            if cache is not None:
                cache.put(text, encoded[text])
    if lost := not_finite(encoded):
        raise BadInputError(
            f"the text encoder of {generator} makes NaN or infinity of {len(lost)} of {len(encoded)} prompts in "
            f"{config.dtype} (the first: {lost[0]!r}). Get its weights anew, or use -s dtype=fp32."
        )
    return {text: encoded[text] for text in unique}


def _rows(
    config: Config,
    generator: str,
    described: GeneratorConfig,
    subfolder: str,
    texts: list[str],
    cache: TextCache | None,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """The texts with their embeddings (L, D) by one encoder, which is loaded, and freed."""
    stream, batch = config.memory.text_device == "stream", BATCH if cache is None else 1
    load, dtype = family_of(described).load_text, DTYPES[config.dtype]
    encoder: TextEncoder = load(generator, dtype, device, stream, subfolder)
    with working("embedding prompts", len(texts)) as advance:
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            for text, row_LD in zip(some, encoder.encode(some, config.model.text_tokens), strict=True):
                yield text, row_LD.cpu()
                advance(1)
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if release := getattr(torch.accelerator, "empty_host_cache", None):  # not in every version
            release()  # frees the pinned memory of a streamed encoder, which PyTorch would keep


def without_padding(row_LD: Tensor) -> Tensor:
    """Drops the rows of zeros at the end. A copy, so that the batch is freed."""
    used = row_LD.any(dim=1).nonzero()
    return row_LD[: int(used.max()) + 1 if len(used) else 0].clone()


class TextCache:
    """Embeddings of one encoder by text. ``key``: JSON of everything else that they depend on."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder, self._key = folder, key

    def get(self, text: str) -> Tensor | None:
        """The embedding, or ``None``."""
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


def _cache_for(config: Config, generator: Path, encoders: Sequence[str], device: torch.device) -> TextCache | None:
    """``None`` for small encoders, and for a hub id."""
    weights = sum(file.stat().st_size for name in encoders for file in (generator / name).glob("*.safetensors"))
    if weights < LARGE_BYTES:
        return None
    key = {
        "version": VERSION,
        "encoder": _fingerprint(generator, encoders),
        "dtype": config.dtype,
        "max_tokens": config.model.text_tokens,
        "device": device.type,
    }
    return TextCache(cache_folder() / "texts", key)


def _fingerprint(generator: Path, encoders: Sequence[str]) -> str:
    """Hash of names, sizes and contents (large files: slices) of encoders and tokenizers."""
    digest = hashlib.sha256()
    for subfolder in (*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders)):
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
