"""What a transformer takes of texts and of images. All is encoded before a run's models are loaded, and the encoders
are freed. What a large encoder made is cached on disk, so that its 11 GB are read once per prompt set.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.assembly.cache import TensorCache, cache_folder
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import EncodedImage
from lowmem_drf.models.generators import KNOWN_GENERATORS, family_of, generator_config, image_use
from lowmem_drf.models.weights.finite import not_finite
from lowmem_drf.schema import Config
from lowmem_drf.terminal import working
from lowmem_drf.texts import shown
from lowmem_drf.video import read_image

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.family import GeneratorConfig, ImageEncoder, TextEncoder
    from lowmem_drf.types import Prompt

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
    # LTX-Video's transformers do not agree on whether the padding of a text is masked
    own = {key: value for key, value in described.transformer.items() if not key.startswith("_")}
    depends = {"max_tokens": config.model.text_tokens, "transformer": own}
    cache = _cache_for("texts", config, Path(generator), list(described.text_encoders), device, depends)
    encoded = {text: found["embedding_LD"] for text in unique if cache is not None and (found := cache.get(text))}
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
                cache.put(text, {"embedding_LD": encoded[text]})
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
    cache: TensorCache | None,
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
    _collect(device)


def _collect(device: torch.device) -> None:
    """Frees encoders."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if release := getattr(torch.accelerator, "empty_host_cache", None):  # not in every version
            release()  # frees the pinned memory of a streamed encoder, which PyTorch would keep


def require_images(prompts: Sequence[Prompt], generator: GeneratorConfig, config: Config) -> None:
    """Raises BadInputError where a prompt lacks the image that the generator needs, or has one that it cannot use."""
    use, name = image_use(generator), config.model.id
    named = [(f"{p.id} ({shown(p.text, 60)})", bool(p.image)) for p in prompts]
    having, lacking = ([name for name, has in named if has == wanted] for wanted in (True, False))
    if having and use == "no":
        raise BadInputError(
            f"prompt {having[0]} has an image, and {name} makes clips of text alone. Take out the images, or take a "
            f"model that begins with one: {', '.join(_with_images())}."
        )
    if having and config.video.frames == 1:
        raise BadInputError(
            f"prompt {having[0]} has an image, after which a clip of one frame has nothing to make. Raise video.frames."
        )
    if lacking and (having or use == "must"):
        why = "others have one" if use == "may" else f"{name} begins every clip with one"
        raise BadInputError(
            f"prompt {lacking[0]} has no image, and {why}. Name it in a jsonl prompt file "
            '({"prompt": "...", "image": "first.png"}), or with sample --image.'
        )


def _with_images() -> list[str]:
    return [name for name, known in KNOWN_GENERATORS.items() if image_use(known.config) != "no"]


def encode_images(
    config: Config, generator: str, files: Sequence[str], device: torch.device
) -> dict[str, EncodedImage]:
    """File -> what the transformer takes of its image, on the CPU. The VAE and the encoder of images are loaded if
    anything is not cached, and freed.

    Args:
        generator: folder, as for ``encode_texts``.
        files: in any order, with repetitions.

    Raises BadInputError: not an image, an encoder cannot be loaded, or its result is not finite.
    """
    place, described = Path(generator), generator_config(generator)
    family, video = family_of(described), config.video
    if not files or family.IMAGES is None:
        return {}
    vae_dtype = DTYPES[config.memory.vae_dtype]
    names = ["vae", *(["image_encoder"] if described.image else [])]
    depends = {"vae_dtype": config.memory.vae_dtype, "frames": video.frames}
    cache = _cache_for("images", config, place, names, device, depends)
    encoder: ImageEncoder | None = None
    encoded: dict[str, EncodedImage] = {}
    unique = list(dict.fromkeys(files))
    with working("encoding images", len(unique)) as advance:
        for file in unique:
            advance(1)
            image = read_image(Path(file), video.width, video.height)
            name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            if found := cache.get(name) if cache else None:
                encoded[file] = EncodedImage(found["latents_CFhw"], found.get("tokens_LD"))
                continue
            if encoder is None:
                vae = family.load_vae(generator, vae_dtype, device)
                encoder = family.IMAGES.encoder(generator, described, vae, DTYPES[config.dtype], device)
            encoded[file] = made = encoder.encode(image, video.frames)
            parts = {"latents_CFhw": made.latents_CFhw, "tokens_LD": made.tokens_LD}
            given = {part: tensor for part, tensor in parts.items() if tensor is not None}
            if lost := not_finite(given):
                raise BadInputError(
                    f"the encoders of {generator} make NaN or infinity of {file} ({', '.join(lost)}): "
                    "use -s memory.vae_dtype=fp32 -s dtype=fp32, or get the weights anew."
                )
            if cache:
                cache.put(name, given)
    if encoder is not None:
        del encoder, vae
        _collect(device)
    return encoded


def without_padding(row_LD: Tensor) -> Tensor:
    """Drops the rows of zeros at the end. A copy, so that the batch is freed."""
    used = row_LD.any(dim=1).nonzero()
    return row_LD[: int(used.max()) + 1 if len(used) else 0].clone()


def _cache_for(
    kind: Literal["texts", "images"],
    config: Config,
    generator: Path,
    encoders: Sequence[str],
    device: torch.device,
    depends: Mapping[str, Any],
) -> TensorCache | None:
    """``None`` for small encoders, and for a hub id. ``depends``: on what the results depend besides the encoders."""
    weights = sum(file.stat().st_size for name in encoders for file in (generator / name).glob("*.safetensors"))
    if weights < LARGE_BYTES:
        return None
    key = {
        "version": VERSION,
        "encoder": _fingerprint(generator, encoders),
        "dtype": config.dtype,
        **depends,
        "device": device.type,
    }
    return TensorCache(cache_folder() / kind, key)


def _fingerprint(generator: Path, encoders: Sequence[str]) -> str:
    """Hash of names, sizes and contents (large files: slices) of encoders and tokenizers."""
    digest = hashlib.sha256()
    folders = [*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders if "text" in name)]
    folders += ["image_processor"] if "image_encoder" in encoders else []
    for subfolder in folders:
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
