"""The parts of a text-to-image diffusion model, loaded from the repository, a folder or the Hugging Face hub.

Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752) is five parts: a tokenizer and a text encoder turn a prompt
into embeddings, a variational autoencoder (VAE) turns pictures into latents and back, a U-Net predicts the noise in
latents, and a noise schedule says how much noise each timestep has. MiniSD has the same parts, smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from helpers.base import hub
from helpers.base.device import default_device, resolve_dtype
from helpers.base.paths import ROOT
from helpers.presets.configuration import Preset

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
CLIP_VOCABULARY = 49_408  # every Stable Diffusion 1 and 2 has CLIP's tokenizer; MiniSD has a smaller one of its own
CHUNK = 16  # pictures or prompts that go through the VAE or the text encoder at once, at most

# What a hub repository has to send: one safetensors file a part, never a pickle.
UNET, UNET_FP16 = (f"unet/diffusion_pytorch_model{kind}.safetensors" for kind in ("", ".fp16"))
OTHERS = ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
HUB_FILES = ["model_index.json", "*/*.json", "tokenizer/*", *OTHERS]
# Without which a copy is not complete; "a|b": one of the two
NEEDED = [*OTHERS, *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))]
NEEDED += ["scheduler/scheduler_config.json"]
NEEDED += [f"tokenizer/{file}|tokenizer/tokenizer.json" for file in ("vocab.json", "merges.txt")]
EITHER = f"{UNET}|{UNET_FP16}"
UNET_SAVED_GB = 1.7  # that the U-Net in float16 is smaller to download than in float32


class ComponentsError(ValueError):
    """A model cannot be loaded: its folder or a part of it is missing, or does not fit the preset."""


@dataclass
class Components:
    """The parts of one model. They are in evaluation mode and frozen: a LoRA brings its own parameters.

    noise_scheduler: the schedule for training; sampling reads `alphas_cumprod` from it.
    name: hub repository or folder name. resolution: pixels on a side, by default what the U-Net was made for.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    name: str
    is_minisd: bool
    resolution: int = 0

    def __post_init__(self) -> None:
        # Each level of the VAE but the last halves the picture.
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if not self.resolution:
            self.resolution = self.unet.config.sample_size * factor
        if self.resolution % factor:
            raise ComponentsError(f"resolution {self.resolution} is no multiple of {factor}, as {self.name} needs")
        self._latent_size = self.resolution // factor

    @property
    def device(self) -> torch.device:
        """Where the U-Net's weights are, and with them all that is computed."""
        return next(self.unet.parameters()).device  # diffusers' own property walks through all modules each time

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture."""
        return self.unet.config.in_channels, self._latent_size, self._latent_size

    @property
    def prediction_type(self) -> str:
        """What the U-Net outputs: "epsilon" or "v_prediction"."""
        return self.noise_scheduler.config.prediction_type

    @property
    def title(self) -> str:
        """What figures call the model: "MiniSD", or the name of the hub repository or folder."""
        return "MiniSD" if self.is_minisd else self.name


def load_components(preset: Preset, device: str | torch.device | None = None) -> Components:
    """The parts of the preset's model, frozen, in evaluation mode, on `device` (by default the best there is).

    `preset.dtype` is that of the U-Net's weights. VAE and text encoder are float32: they are small and seldom run, and
    a VAE in half precision may return NaN. Only safetensors files are read.
    Raises ComponentsError or HubError (ValueErrors), with what to do, when weights are missing or not the preset's.
    """
    device = torch.device(device or default_device())
    dtype = resolve_dtype(preset.dtype, device)
    folder, name = find_model(preset, half=dtype == torch.float16)
    parts = read_parts(folder)
    found = parts["noise_scheduler"].config.prediction_type
    if found != preset.prediction_type:
        raise ComponentsError(f"{name} predicts {found}, but preset {preset.name!r} says {preset.prediction_type}")
    for part in ("text_encoder", "vae", "unet"):
        parts[part].to(device).eval().requires_grad_(False)
    nn.Module.to(parts["unet"], dtype)  # diffusers' own `to` warns of half precision
    # A table that every step reads: once where the model is
    parts["noise_scheduler"].alphas_cumprod = parts["noise_scheduler"].alphas_cumprod.to(device)
    is_minisd = not preset.on_hub and len(parts["tokenizer"]) < CLIP_VOCABULARY
    return Components(**parts, name=name, is_minisd=is_minisd, resolution=preset.resolution)


def find_model(preset: Preset, half: bool = False) -> tuple[Path, str]:
    """The folder that holds the preset's model (downloaded if it lives on the hub), and the model's name.

    half: a U-Net stored in float16 will do, and is what is downloaded. Only who computes in float16 gets the same
    numbers from it: bfloat16 would be rounded twice.
    """
    if not preset.on_hub:
        folder = ROOT / preset.model
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise ComponentsError(
                f"no model in {preset.model}: it has no {', '.join(missing)} folder; restore it with "
                f"`git checkout -- {preset.model}`, or name another folder in diffusers layout"
            )
        return folder, folder.name
    if half:
        with suppress(hub.HubError):  # a repository that has none
            smaller = preset.download_gb - UNET_SAVED_GB
            found = hub.fetch(
                preset.title, preset.repositories, "model", [*HUB_FILES, UNET_FP16], [*NEEDED, EITHER], smaller
            )
            return found.folder, found.name
    found = hub.fetch(
        preset.title, preset.repositories, "model", [*HUB_FILES, UNET], [*NEEDED, UNET], preset.download_gb
    )
    return found.folder, found.name


def read_parts(folder: Path) -> dict:
    """The five parts in a folder of diffusers layout, as float32 on the CPU, named as in `Components`."""
    safe = {"use_safetensors": True, "torch_dtype": torch.float32}
    stored = {"variant": "fp16"} if not (folder / UNET).is_file() and (folder / UNET_FP16).is_file() else {}
    readers = {
        "tokenizer": CLIPTokenizer.from_pretrained,
        "text_encoder": read_text_encoder,
        "vae": lambda path: AutoencoderKL.from_pretrained(path, **safe),
        "unet": lambda path: UNet2DConditionModel.from_pretrained(path, **safe, **stored),
        "noise_scheduler": read_noise_scheduler,
    }
    parts = {}
    for name, read in readers.items():
        subfolder = folder / ("scheduler" if name == "noise_scheduler" else name)
        try:
            parts[name] = read(subfolder)
        except Exception as error:  # OSError, SafetensorError, KeyError, json's: all mean that the part is unusable
            raise ComponentsError(f"cannot read the {subfolder.name} of the model in {folder}: {error}") from error
    # Without its files transformers makes a tokenizer that knows two tokens, and says nothing
    known, expected = len(parts["tokenizer"]), parts["text_encoder"].config.vocab_size
    if known != expected:
        raise ComponentsError(f"the tokenizer in {folder} knows {known} tokens, its text encoder {expected}")
    use_padding_of_stable_diffusion_2(parts)
    return parts


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers shows neither a progress bar nor a table of the weights it read."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def read_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder, with every weight found in the file (transformers 4 and 5 name them differently)."""
    with quiet_transformers():
        model, report = CLIPTextModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ComponentsError(f"these weights are missing: {', '.join(sorted(report['missing_keys']))}")
    return model.float()


def read_noise_scheduler(folder: Path) -> DDPMScheduler:
    """The training schedule, whichever sampler the folder's configuration is for."""
    config = DDIMScheduler.load_config(folder)
    return DDPMScheduler.from_config(config, clip_sample=False, steps_offset=1)


def use_padding_of_stable_diffusion_2(parts: dict) -> None:
    """Stable Diffusion 2 was trained with captions padded by token 0 ("!"), though some of its files say otherwise."""
    if parts["text_encoder"].config.hidden_size == 1024:
        parts["tokenizer"].pad_token = parts["tokenizer"].convert_ids_to_tokens(0)


def in_own_precision(components: Components) -> torch.autocast:
    """Within the block VAE and text encoder compute in their own float32, also where autocast halves the U-Net's."""
    return torch.autocast(components.device.type, enabled=False)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[nn.Module]:
    """Within the block the module's weights are float32: half precision fits into it, so they return to the same bits.

    Each returns to a dtype of its own: in a half-precision model A and B of a LoRA are float32, and stay so. A GPU's
    convolutions do not round what they read either (TF32 would keep 10 bits of it).
    """
    dtypes, of_cudnn = [(p, p.dtype) for p in module.parameters()], torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield module.float()
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
        torch.backends.cudnn.allow_tf32 = of_cudnn


def as_pipeline(components: Components) -> StableDiffusionPipeline:
    """The same modules as diffusers' own pipeline with a DDIM sampler and no safety checker. Nothing is copied."""
    ddim = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    pipeline = StableDiffusionPipeline(
        **{part: getattr(components, part) for part in ("vae", "text_encoder", "tokenizer", "unet")},
        scheduler=DDIMScheduler.from_config(components.noise_scheduler.config, **ddim),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
