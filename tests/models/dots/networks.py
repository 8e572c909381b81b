"""What a model library brings: a transformer, a video VAE that is causal in time, and a text encoder."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch.nn import functional as F

SPATIAL, TEMPORAL, WORDS = 4, 4, 64


class DotsBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden, text):
        x, seen = self.norm(hidden), torch.cat([self.norm(hidden), text], dim=1)
        q, k, v = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, seen), (self.v, seen))
        )
        hidden = hidden + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))


class DotsTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, channels=4, width=16, heads=2, num_layers=2, text_dim=8):
        super().__init__()
        self.gradient_checkpointing = False
        self.dots_in, self.time, self.text = nn.Linear(channels, width), nn.Linear(1, width), nn.Linear(text_dim, width)
        self.dots_blocks = nn.ModuleList(DotsBlock(width, heads) for _ in range(num_layers))
        self.dots_out = nn.Linear(width, channels)

    def forward(self, x_BCFhw, sigma, text_BLD):
        hidden = self.dots_in(x_BCFhw.flatten(2).transpose(1, 2)) + self.time(x_BCFhw.new_full((1, 1, 1), sigma))
        text = self.text(text_BLD)
        for block in self.dots_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, text)
            else:
                hidden = block(hidden, text)
        return self.dots_out(hidden).transpose(1, 2).reshape(x_BCFhw.shape)


class DotsVae(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels=4, width=6):
        super().__init__()
        self.encoder = nn.Conv3d(3, channels, 1)
        self.first = nn.Conv3d(channels, width, (2, 3, 3), padding=(0, 1, 1))
        self.second = nn.Conv3d(width, TEMPORAL * 3 * SPATIAL**2, (2, 1, 1))

    def decode(self, z_BCFhw):
        """All frames at once: (B, T, 3, H, W), not clamped."""
        x = torch.tanh(self.first(F.pad(z_BCFhw, (0, 0, 0, 0, 1, 0))))
        frames = self.pixels(self.second(F.pad(x, (0, 0, 0, 0, 1, 0))))
        return torch.cat([frames[:, :1], frames[:, TEMPORAL:]], dim=1)  # the first latent frame makes one

    @staticmethod
    def pixels(x_BCFhw):
        frames = x_BCFhw.unflatten(1, (TEMPORAL, -1)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
        return F.pixel_shuffle(frames.flatten(0, 1), SPATIAL).unflatten(0, (len(x_BCFhw), -1)) + 0.5


class DotsText(nn.Module):
    def __init__(self, width=8, num_layers=1):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))

    def forward(self, ids_BL, mask_BL):
        x = self.embed(ids_BL)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * mask_BL[..., None]
