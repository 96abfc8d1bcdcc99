"""MiniSD's parts: Stable Diffusion's own classes, small enough to train on two CPU cores.

The four modules have the structure of Stable Diffusion 2.1 (Rombach et al. 2022, arXiv 2112.10752): a KL-regularised
autoencoder with scaling factor 0.18215, a U-Net with cross-attention at its upper levels and none at the lowest, a CLIP
text encoder, and the scaled-linear noise schedule with v-prediction. Only the sizes differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCALING_FACTOR = 0.18215  # Stable Diffusion's: latents are multiplied by it to have unit variance
END, START = "<|endoftext|>", "<|startoftext|>"


@dataclass(frozen=True)
class Geometry:
    """Sizes of a MiniSD. The picture has `picture` pixels a side, the latent picture / 2 ** (len(vae) - 1)."""

    picture: int = 128
    vae: tuple[int, ...] = (32, 64, 96, 128)
    vae_layers: int = 1
    vae_groups: int = 8
    latent_channels: int = 10
    unet: tuple[int, ...] = (48, 96, 192)
    unet_layers: int = 2
    unet_heads: tuple[int, ...] = (2, 4, 6)
    unet_groups: int = 16
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_positions: int = 48
    vocabulary: int = 832

    @property
    def downsampling(self) -> int:
        """Pixels of the picture to one of the latent, along a side."""
        return 2 ** (len(self.vae) - 1)


MINI = Geometry()  # latents of 16 x 16: an adapter for it trains in minutes on two cores
TINY = Geometry(
    picture=32, vae=(8, 8, 8, 8), vae_groups=4, unet=(8, 16, 16), unet_heads=(2, 2, 2), unet_groups=4,
    unet_layers=1, text_width=16, text_layers=2, text_heads=2, text_positions=24, vocabulary=600,
)  # fmt: skip


def build_tokenizer(captions: Iterable[str], geometry: Geometry) -> CLIPTokenizer:
    """CLIP's byte-level BPE with an end-of-word mark, its merges learnt from `captions`."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    words = (" ".join(caption.replace(",", " ,").replace("'", " '").split()) for caption in captions)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    room = geometry.vocabulary - 256 - 2  # CLIP's vocabulary: bytes, bytes ending a word, merges, two special tokens
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=room,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            min_frequency=2,
            show_progress=False,
        ),
    )
    merges = [tuple(m) for m in _merges(bpe)]
    letters = sorted(alphabet)
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + [START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token="!",  # as Stable Diffusion 2.1's, whose padding is "!"
        model_max_length=geometry.text_positions,
    )


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


def build_vae(g: Geometry) -> AutoencoderKL:
    """Pictures [B, 3, picture, picture] in -1..1 to latents [B, C, h, w] and back."""
    levels = len(g.vae)
    return AutoencoderKL(
        block_out_channels=g.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=g.vae_layers,
        latent_channels=g.latent_channels,
        norm_num_groups=g.vae_groups,
        mid_block_add_attention=False,  # so that it is convolutional: crops teach it what whole pictures need
        sample_size=g.picture,
        scaling_factor=SCALING_FACTOR,
    )


def build_unet(g: Geometry) -> UNet2DConditionModel:
    """Noisy latents [B, C, h, w], timesteps [B] and text [B, L, text_width] to the velocity [B, C, h, w]."""
    levels = len(g.unet)
    return UNet2DConditionModel(
        sample_size=g.picture // g.downsampling,
        in_channels=g.latent_channels,
        out_channels=g.latent_channels,
        block_out_channels=g.unet,
        layers_per_block=g.unet_layers,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        mid_block_type="UNetMidBlock2DCrossAttn",
        attention_head_dim=g.unet_heads,  # head counts, in spite of the name
        cross_attention_dim=g.text_width,
        norm_num_groups=g.unet_groups,
        use_linear_projection=True,
    )


def build_text_encoder(g: Geometry, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids [B, text_positions] to embeddings [B, text_positions, text_width]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=g.text_width,
            intermediate_size=4 * g.text_width,
            num_hidden_layers=g.text_layers,
            num_attention_heads=g.text_heads,
            max_position_embeddings=g.text_positions,
            projection_dim=g.text_width,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 2.1's schedule: scaled-linear betas, v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build(geometry: Geometry, captions: Iterable[str], seed: int = 0) -> dict:
    """All parts of a MiniSD with random weights: tokenizer, text_encoder, vae, unet, scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(captions, geometry)
        return {
            "tokenizer": tokenizer,
            "text_encoder": build_text_encoder(geometry, tokenizer).eval(),
            "vae": build_vae(geometry).eval(),
            "unet": build_unet(geometry).eval(),
            "scheduler": build_scheduler(),
        }


def build_tiny(seed: int = 0) -> dict:
    """A MiniSD of a few thousand random weights, for tests of the code around it."""
    return build(TINY, ["a drawing of a man with a red scarf", "a portrait of a cat, vintage style"] * 4, seed)


def pipeline(parts: dict) -> StableDiffusionPipeline:
    """The parts as diffusers' own pipeline, without a safety checker."""
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )  # fmt: skip


def save(parts: dict, folder: Path) -> None:
    """Write the parts in diffusers' pipeline layout: U-Net and VAE as fp16, the text encoder as fp32.

    An fp16 text encoder does not run beside an fp16 U-Net in transformers 5, so it keeps full precision. The weights
    of both are `rounded`; those of the VAE are not, since they are few and a picture shows it.
    """
    folder = Path(folder)
    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    copies = {name: _copy(parts[name]) for name in ("unet", "vae", "text_encoder")}
    for name in ("unet", "text_encoder"):
        copies[name].load_state_dict({key: rounded(weight) for key, weight in copies[name].state_dict().items()})
    copies |= {name: copies[name].half() for name in ("unet", "vae")}
    pipeline({**parts, **copies}).save_pretrained(staging, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def rounded(weight: Tensor) -> Tensor:
    """Each row of a weight [out, ...] as multiples k of one power of two, |k| <= 255; vectors as they are.

    fp16 holds them exactly, and git packs them into ten bits each: 20 MB of U-Net become 13.
    """
    if weight.ndim < 2 or not weight.is_floating_point():
        return weight
    rows = weight.flatten(1)
    # The smallest power of two with max |w| <= 255 step
    step = torch.exp2(torch.ceil(torch.log2(rows.abs().amax(1, keepdim=True).clamp(min=1e-6) / 255)))
    return (step * (rows / step).round()).view_as(weight)


def _copy(module: nn.Module) -> nn.Module:
    if isinstance(module, CLIPTextModel):
        return deepcopy(module)
    # Without the folder that it was loaded from
    copy = type(module).from_config({k: v for k, v in module.config.items() if k != "_name_or_path"})
    copy.load_state_dict(module.state_dict())
    return copy
