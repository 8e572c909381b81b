"""What a family of generators brings: one folder with a module of the names in ``Family``, and its line in
``generators.FAMILIES``. Everything outside such a folder asks the family of the generator in use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lowmem_drf.types import Decoder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.models.blocks import Activations
    from lowmem_drf.models.lora.changes import LoraChanges
    from lowmem_drf.models.weights.quant import Quant
    from lowmem_drf.models.weights.reader import Changes
    from lowmem_drf.types import Velocity


@dataclass(frozen=True)
class GeneratorConfig:
    """The ``config.json`` files of a generator's models, and its ``model_index.json``."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    transformer_2: dict[str, Any] | None = None
    """The low-noise expert if there are two (``experts.py``); ``transformer`` is then the high-noise one."""
    boundary: float | None = None
    """``boundary_ratio`` between two experts, in (0, 1)."""
    more_text: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of further text encoders, by subfolder: ``text_encoder_2`` and so on."""
    image: dict[str, Any] | None = None
    """Of an encoder of images (``image_encoder``), if there is one."""
    first_frame: bool = False
    """``expand_timesteps``: the model takes a clean first latent frame, with timestep 0 for its tokens."""

    @property
    def text_encoders(self) -> dict[str, dict[str, Any]]:
        """All of them by subfolder, in their order."""
        return {"text_encoder": self.text, **self.more_text}


@dataclass(frozen=True)
class KnownGenerator:
    """A published generator: its configuration, and the parameters of each model by field name."""

    config: GeneratorConfig
    parameters: Mapping[str, int]


@dataclass(frozen=True)
class GeneratorSizes:
    """The sizes of a generator, by the ``config.json`` of its transformer and its VAE."""

    channels: int
    """Of the latents."""
    spatial: int
    """Pixels on a side for each of the latents."""
    temporal: int
    """Pixel frames for each latent frame but the first, which makes one. 0: there is no other, it makes images."""
    patch: tuple[int, int, int]
    """Latents that make a token: frames, height, width."""
    positions: int
    """Tokens that the position embedding covers, along each axis."""
    heads: int
    head_dim: int
    hidden: int
    """Width inside the feed-forward."""
    text_dim: int
    """Width of the text embeddings that the transformer takes."""
    vae_widths: tuple[int, ...]
    """Channels of the decoder's levels, that of full resolution first."""
    vae_patch: int
    """Pixels on a side for each output of the decoder's last layer."""
    vae_group: int = 1
    """Latent frames that the VAE decodes together, and one more at the beginning (``types.Decoder.group``)."""
    tiny_decoder: str = ""
    """``owner/repo/file.safetensors`` of a published ``model.decoder_file`` for these latents; "" if there is none."""

    @property
    def width(self) -> int:
        """Of a token inside the transformer."""
        return self.heads * self.head_dim

    def tokens(self, latents: Sequence[int]) -> int:
        """Of latents of (F, h, w)."""
        return math.prod(side // patch for side, patch in zip(latents, self.patch, strict=True))


@dataclass(frozen=True)
class ModuleNames:
    """The names of a transformer's modules: diffusers' -> those of LoRA files and original checkpoints."""

    linears: Mapping[str, str]
    """The Linears inside every block, for which every format of LoRA files has a name."""
    in_block: Mapping[str, str]
    """All modules inside a block, and its parameters."""
    outside: Mapping[str, str]
    """Those outside the blocks."""
    comfyui: str = "diffusion_model"
    """What stands before a module's name in LoRA files that ComfyUI reads. Empty: diffusers does not read that form."""
    kohya: bool = True
    """Whether LoRA files are also written in kohya's form, and diffusers reads it."""
    image_linears: Mapping[str, str] = field(default_factory=dict)
    """More ``linears`` of models whose blocks attend to an image."""


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file says of the model's family."""

    version: str
    """``ss_base_model_version`` of kohya's header, and the beginning of ``modelspec.architecture``."""
    implementation: str
    """``modelspec.implementation``: where its publishers' code is."""
    network: str = ""
    """``ss_network_module``, by which programs with kohya's header know the family. Empty: they do not."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a program does with a LoRA file."""

    program: str
    takes: Literal["yes", "in part", "no"]
    why: str = ""
    """What it leaves out, or why it fails."""


class TextEncoder(Protocol):
    """A prompt encoder with its tokenizer. Where a generator has several, one is loaded after the other, and the sum of
    their embeddings is that of a text: each has zeros where another one has values."""

    def encode(self, texts: Sequence[str], max_tokens: int = ...) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype; zero rows at the end are padding."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageCondition:
    """The condition of a ``Velocity`` whose clip begins with an image: an ``EncodedImage`` beside the text."""

    text_BLD: Tensor
    latents_BCFhw: Tensor
    tokens_BLD: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What a transformer takes of an image, in the family's own form. On the host."""

    latents_CFhw: Tensor
    tokens_LD: Tensor | None = None
    """Of ``image_encoder``."""


class ImageEncoder(Protocol):
    """What makes a generator's conditions of images."""

    def encode(self, image: Image, frames: int) -> EncodedImage:
        """``image``: RGB, of the clip's width and height. ``frames``: pixel frames of the clip."""
        ...


class Images(Protocol):
    """What a family brings whose clips can begin with an image: a module with these names."""

    def use(self, generator: GeneratorConfig) -> Literal["no", "may", "must"]:
        """Whether a clip begins with an image of its prompt."""
        ...

    def encoder(
        self,
        folder_or_id: str,
        generator: GeneratorConfig,
        vae: Any,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> ImageEncoder:
        """For a generator whose ``use`` is not ``no``.

        Args:
            vae: of ``Family.load_vae``, with its encoder, on ``device``.
            dtype: of the image encoder, if the generator has one, and of the results.

        Raises BadInputError: it cannot be loaded.
        """
        ...

    def blank(self, generator: GeneratorConfig, latents: Sequence[int], dtype: torch.dtype) -> EncodedImage:
        """Zeros of the shapes and dtypes that ``encoder``'s results have for a clip of latents (F, h, w)."""
        ...


class ClipDecoder(Decoder, Protocol):
    """``types.Decoder`` around a VAE."""

    vae: Any
    spatial_factor: int


class Family(Protocol):
    """A module with these names, written against diffusers 0.42.1. It is imported with the package, so it imports
    diffusers and transformers only in functions. A *transformer* is diffusers' module, here with a list of equal
    blocks; ``config`` is a model's ``config.json``.
    """

    NAME: str
    """For messages: "a Wan text-to-video model"."""
    KINDS: Mapping[str, str]
    """Subfolder of a diffusers model -> ``_class_name`` (diffusers) or ``model_type`` (transformers): ``transformer``,
    ``vae``, ``text_encoder``, and ``text_encoder_2`` and so on if there are several. The transformer's class tells the
    family."""
    KNOWN: Mapping[str, KnownGenerator]
    """Published generators by hub id."""
    BLOCKS: str
    """Name of the transformer's list of blocks, which are checkpointed, streamed and packed one by one."""
    NAMES: ModuleNames
    IMAGES: Images | None
    """``None``: no clip begins with an image."""

    def refuse(self, generator: GeneratorConfig, place: str) -> None:
        """Raises BadInputError for a model of the family that is not trained here, such as a control model."""
        ...

    def sizes(self, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> GeneratorSizes: ...

    def parameter_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of the transformer's parameters by name. To make the model, also without memory, takes the seconds in
        which diffusers is imported."""
        ...

    def empty_transformer(self, config: Mapping[str, Any], layers: int | None = None, quant: Quant = "none") -> Any:
        """The transformer on ``meta``, except tensors that no checkpoint holds; blocks' linear layers laid out for
        ``quant``. ``layers``: at most so many blocks. Raises BadInputError if bitsandbytes is missing."""
        ...

    def empty_vae(self, config: Mapping[str, Any]) -> Any:
        """The VAE on ``meta``."""
        ...

    def empty_text(self, config: Mapping[str, Any], layers: int | None = None) -> Any:
        """The text encoder on ``meta``: called with (ids_BL, mask_BL)."""
        ...

    def load_transformer(
        self,
        folder_or_id: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        quant: Quant = "none",
        subfolder: str = "transformer",
        home: str | torch.device | None = None,
        changes: Changes | None = None,
        blocks: int | None = None,
        taken: Callable[[nn.Parameter], None] | None = None,
    ) -> Any:
        """The transformer of a diffusers folder: frozen, eval, in the dtypes of ``from_pretrained``. Arguments as of
        ``reader.fill_from_files``. Raises BadInputError."""
        ...

    def load_file(
        self,
        file: str | Path,
        config: Mapping[str, Any],
        model: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        quant: Quant = "none",
        home: str | torch.device | None = None,
        changes: Changes | None = None,
        blocks: int | None = None,
        taken: Callable[[nn.Parameter], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Any:
        """As ``load_transformer``, from a single file that must fit ``config``. ``model``: whose configuration it is,
        for messages. ``say`` is told what is dequantised and left out."""
        ...

    def load_vae(
        self, folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Any: ...

    def load_text(
        self,
        folder_or_id: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        stream: bool = False,
        subfolder: str = "text_encoder",
    ) -> TextEncoder:
        """``stream``: its weights stay in host memory (``stream_text``). ``subfolder``: which one."""
        ...

    def stream_text(self, model: Any, device: torch.device, store: HostStore) -> None:
        """Streams the weights of ``empty_text``'s model to ``device`` block by block."""
        ...

    def set_activations(self, transformer: Any, how: Activations = ...) -> Sequence[str] | None:
        """Sets how the blocks compute and which activations they keep. May be called again, with or without a LoRA.

        Returns the settings, if any, that change nothing because the family does not bring them.

        Raises BadInputError: an option that the family does not bring.
        """
        ...

    def as_velocity(
        self, transformer: Any, recorder: Recorder | None = None, call: Any = None, fps: float = 24.0
    ) -> Velocity:
        """``call``: called in place of the transformer. ``fps``: frames a second of the clips, where positions in time
        are seconds."""
        ...

    def decoder(
        self,
        vae: Any,
        *,
        grad_dtype: torch.dtype | None = None,
        strips: int = 1,
        caches: Literal["card", "host"] = "card",
        store: HostStore | None = None,
        norm_silu: Any = None,
    ) -> ClipDecoder:
        """Arguments as in the settings ``memory.vae_*``. ``norm_silu``: a kernel, or ``None``."""
        ...

    def drop_encoder(self, vae: Any) -> None:
        """Frees what only encoding needs."""
        ...

    def probe(self, config: Mapping[str, Any], side: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the smallest latents, two tokens long and ``side`` tokens high and wide, and text embeddings that
        use all weights of a transformer; of one that needs an image, also those of the latents and the tokens of an
        ``ImageCondition``, as far as it has them."""
        ...

    def pipeline(self, transformer: Any) -> Any:
        """diffusers' pipeline around the transformer, without other models: it loads LoRA files as users do."""
        ...

    def lora_header(self, generator: GeneratorConfig) -> LoraHeader: ...

    def kind_of(self, names: Collection[str], complete: bool) -> tuple[str, str] | None:
        """(what a file is, what to do) if the names of its tensors tell that it is of no model that is trained here.
        ``complete``: all tensors of a transformer that is trained are among them."""
        ...

    def verdicts(self, lora: LoraChanges, header: Mapping[str, Any]) -> list[Verdict]:
        """Which other programs take a LoRA file as it is. ``header``: of its tensors."""
        ...
