"""CogVideoX's models from a folder in diffusers' layout, or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.cogvideox.published import BLOCKS, NAME, empty_transformer
from lowmem_drf.models.t5 import load_t5, stream_text
from lowmem_drf.models.weights.finite import refuse_model
from lowmem_drf.models.weights.quant import Quant
from lowmem_drf.models.weights.reader import Changes, TensorFiles, files_in, fill_from_files, require_complete
from lowmem_drf.models.weights.sources import complete, downloaded, loading

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["drop_encoder", "load_file", "load_text", "load_transformer", "load_vae", "stream_text"]


def load_transformer(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: Quant = "none",
    subfolder: str = "transformer",
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> Any:
    """See ``Family``."""
    from diffusers import CogVideoXTransformer3DModel

    with loading("the transformer", folder_or_id):
        folder = Path(folder_or_id) if Path(folder_or_id).is_dir() else downloaded(folder_or_id, subfolder)
        model = empty_transformer(CogVideoXTransformer3DModel.load_config(folder, subfolder=subfolder), quant=quant)
        files = TensorFiles(files_in(folder / subfolder))
        require_complete(files, model)
        names = {name: name for name in files.entries}
        model = fill_from_files(model, files, names, dtype, device, home, changes, blocks, taken, BLOCKS)
        return model.to(device if home is None else home)  # the table of positions too


def load_file(file: str | Path, config: Mapping[str, Any], model: str, *arguments: Any, **options: Any) -> Any:
    """Raises BadInputError: single files are not read yet."""
    raise BadInputError(
        f"model.transformer = {str(file)!r}: transformers of {NAME} are read from folders in diffusers' layout alone. "
        "Give that folder as model.id, and leave model.transformer empty."
    )


def load_vae(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """The VAE in subfolder ``vae`` of a diffusers model: frozen, eval. Raises BadInputError if it cannot be loaded."""
    from diffusers import AutoencoderKLCogVideoX

    load = AutoencoderKLCogVideoX.from_pretrained
    with loading("the VAE", folder_or_id):
        vae = complete(load(folder_or_id, subfolder="vae", torch_dtype=dtype, output_loading_info=True))
    vae = vae.to(device).eval().requires_grad_(False)
    refuse_model(vae, f"the VAE of {folder_or_id}")
    return vae


def drop_encoder(vae: Any) -> None:
    """Frees the weights that only encoding needs."""
    vae.encoder = None


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder with its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int = 226) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype. Longer texts are truncated. As in
        ``CogVideoXPipeline`` the padding is part of the text: encoder and transformer see its tokens, without a
        mask."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=max_tokens, truncation=True, add_special_tokens=True,
            return_tensors="pt",
        )  # fmt: skip
        embeds_BLD: Tensor = self.model(tokens.input_ids.to(self.model.device)).last_hidden_state
        return embeds_BLD


def load_text(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    stream: bool = False,
    subfolder: str = "text_encoder",
) -> TextEncoder:
    """See ``t5.load_t5``."""
    from transformers import T5EncoderModel

    return TextEncoder(*load_t5(T5EncoderModel, folder_or_id, dtype, device, stream, subfolder))
