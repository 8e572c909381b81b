"""Diffusion-DRF (arXiv 2601.04153) on ToyWorld in one file and one autograd graph.

A frozen vision-language model (the critic) watches the clip that a video model generates and is asked about it. The
reward is the log-probability of the answers we want. Its gradient flows through the critic, the VAE decoder and the
last K denoising steps into LoRA weights. The package computes the same gradient in far less memory, piece by piece
(``lowmem_drf/method/step.py``); ``tests/test_example.py`` holds the two equal.

    python examples/drf_in_100_lines.py 30      # updates; on the CPU, no download, 3 s each

Shapes: B clips, Q questions, C channels, F latent frames (h, w), T pixel frames (H, W), L tokens, V vocabulary.
"""

import sys

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from lowmem_drf.method.preprocess import video_patches  # frames -> patches, differentiable
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.models.clamp import InwardClamp
from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS  # all linear layers of the blocks
from lowmem_drf.models.qwen_vl.files import video_geometry, video_settings
from lowmem_drf.models.weights.sources import resolve
from lowmem_drf.questions.toyworld import attributes, dense  # prompt -> questions with the answers we want
from lowmem_drf.toy.captions import train_prompts

GENERATOR, CRITIC = resolve("toyworld", "generator"), resolve("toyworld", "critic")  # folders in this package
N, K = 10, 3  # denoising steps, and how many of them carry gradient
SHARES = {"TA": 0.5, "Phy": 0.25, "VQ": 0.25}  # of the reward: text alignment, physical fidelity, visual quality


class Models:
    """Frozen models in the libraries' own classes, and a LoRA on the transformer: the only trained weights."""

    def __init__(self):
        def load(cls, folder, name="", **dtype):
            return cls.from_pretrained(folder, subfolder=name, **dtype).eval().requires_grad_(False)

        self.transformer = load(WanTransformer3DModel, GENERATOR, "transformer")
        self.vae = load(AutoencoderKLWan, GENERATOR, "vae")
        self.text_encoder = load(UMT5EncoderModel, GENERATOR, "text_encoder", dtype=torch.float32)
        self.text_tokenizer = AutoTokenizer.from_pretrained(GENERATOR, subfolder="tokenizer")
        self.critic = load(Qwen2_5_VLForConditionalGeneration, CRITIC, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(CRITIC)
        self.geometry = video_geometry(video_settings(CRITIC))
        self.transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(DEFAULT_TARGETS)))
        self.lora = [weight for weight in self.transformer.parameters() if weight.requires_grad]


@torch.no_grad()
def embed(models, prompts):
    """Prompts -> text embeddings (B, L, D), zeros after the end of each text."""
    tokens = models.text_tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    return models.text_encoder(**tokens).last_hidden_state * tokens.attention_mask[..., None]


def sample(transformer, noise_BCFhw, text_BLD):
    """The rollout: N Euler steps from noise to clean latents. The last K are in the graph."""
    x, sigmas = noise_BCFhw, flow_sigmas(N, shift=3.0).tolist()
    for k in range(N):
        with torch.set_grad_enabled(k >= N - K):
            timestep = torch.full((len(x),), int(1000 * sigmas[k]))
            x = x + (sigmas[k + 1] - sigmas[k]) * transformer(x, timestep, text_BLD).sample
    return x


def decode(vae, x_BCFhw):
    """Latents -> frames (B, T, 3, H, W) in [0, 1]. The VAE is causal: it decodes frame by frame and keeps caches."""
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    x = vae.post_quant_conv(x_BCFhw / (1 / std) + mean)  # rounded as in WanPipeline
    vae.clear_cache()
    pixels = [vae.decoder(x[:, :, f : f + 1], vae._feat_map, [0], first_chunk=f == 0) for f in range(x.shape[2])]
    # vae.decode clamps too, but loses the gradient of every saturated pixel; ours keeps it where it leads back inside
    return InwardClamp.apply(torch.cat(pixels, dim=2), -1.0, 1.0).transpose(1, 2) / 2 + 0.5


def reward(models, frames_TCHW, prompt):
    """The mean log-probability of the wanted answers' tokens, aspect by aspect. One question is one row."""
    questions = dense(attributes(prompt))  # of yes/no questions the wanted answer is one token; all else is the same
    patches, grid = video_patches(frames_TCHW[None], models.geometry)
    video = "<|video_pad|>" * (int(grid.prod()) // models.geometry.merge**2)
    texts = [f"<|vision_start|>{video}<|vision_end|>{q.text}<|im_end|>{q.answer}" for q in questions]
    tokens = models.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    logits_QLV = models.critic(
        **tokens,
        mm_token_type_ids=2 * (tokens.input_ids == models.critic.config.video_token_id),  # 2: video
        pixel_values_videos=patches.repeat(len(questions), 1),
        video_grid_thw=grid.repeat(len(questions), 1),
        second_per_grid_ts=torch.full((len(questions),), models.geometry.temporal_patch / 8),  # 8 frames a second
    ).logits
    log_p_QL = logits_QLV[:, :-1].log_softmax(-1).gather(-1, tokens.input_ids[:, 1:, None])[..., 0]
    of_aspect = {aspect: [] for aspect in SHARES}
    for question, log_p_L, length in zip(questions, log_p_QL, tokens.attention_mask.sum(-1), strict=True):
        answer = len(models.tokenizer(question.answer).input_ids)
        of_aspect[question.aspect].append(log_p_L[length - 1 - answer : length - 1].mean())
    return sum(SHARES[aspect] * torch.stack(rewards).mean() for aspect, rewards in of_aspect.items())


def mean_reward(models, noise_BCFhw, prompts):
    """The whole method: prompts and noise -> clips -> what the critic says of them, differentiable in the LoRA."""
    frames_BTCHW = decode(models.vae, sample(models.transformer, noise_BCFhw, embed(models, prompts)))
    return torch.stack([reward(models, *clip) for clip in zip(frames_BTCHW, prompts, strict=True)]).mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    models, prompts, rewards = Models(), train_prompts(), []
    optimizer = torch.optim.AdamW(models.lora, lr=6e-4, weight_decay=0.0)
    for update in range(int(sys.argv[1]) if len(sys.argv) > 1 else 30):
        batch = [prompts[i] for i in torch.randint(len(prompts), (8,))]
        value = mean_reward(models, torch.randn(8, 16, 3, 8, 8), batch)
        (-value).backward()
        torch.nn.utils.clip_grad_norm_(models.lora, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(value.item())
        last = rewards[-10:]
        print(f"update {update + 1:3d}  reward {last[-1]:.3f}  mean of ten {sum(last) / len(last):.3f}", flush=True)
