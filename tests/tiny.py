"""Small models of random weights that several test files share."""

import torch
from diffusers import UNet2DConditionModel


def tiny_unet(seed=0, dtype=torch.float32, width=8):
    """Stable Diffusion's structure with two levels; the same seed gives the same weights. In evaluation mode."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return unet.to(dtype).eval()


def tiny_stable_diffusion_unet(use_linear_projection, heads, seed=0, layers_per_block=1):
    """Stable Diffusion's four levels, each a hundred times narrower. In evaluation mode.

    heads: attention heads, one number for all levels or one a level. (Both versions of Stable Diffusion call it
    attention_head_dim in their configuration.) Stable Diffusion itself has two layers in each block.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=layers_per_block,
        cross_attention_dim=8,
        attention_head_dim=heads,
        use_linear_projection=use_linear_projection,
    )
    return unet.eval()


def tiny_sd15_unet(seed=0, layers_per_block=1):
    """Like Stable Diffusion 1.5's: `proj_in` and `proj_out` are 1x1 convolutions, the same heads on every level."""
    return tiny_stable_diffusion_unet(False, 2, seed, layers_per_block)


def tiny_sd21_unet(seed=0, layers_per_block=1):
    """Like Stable Diffusion 2.1's: `proj_in` and `proj_out` are linear, wider levels have more heads."""
    return tiny_stable_diffusion_unet(True, (1, 2, 4, 4), seed, layers_per_block)


def tiny_text_encoder(seed=0, layers=2):
    """CLIP's text encoder with an output as wide as the tiny U-Nets read, 8 positions. In evaluation mode."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": layers}
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()


def tiny_components(unet):
    """The five parts of a model around a tiny U-Net, without a tokenizer."""
    from diffusers import AutoencoderKL, DDPMScheduler

    from helpers.diffusion.components import Components

    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16).eval()
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = {"text_encoder": tiny_text_encoder(), "vae": vae, "unet": unet, "noise_scheduler": schedule}
    return Components(tokenizer=None, **parts, name="tiny", is_minisd=False)


def tiny_minisd():
    """All parts of a MiniSD with a few thousand random weights, frozen; the same weights each time."""
    from diffusers import DDPMScheduler

    from helpers.diffusion.components import Components
    from helpers.minisd.architecture import build_tiny

    parts = build_tiny(seed=0)
    scheduler = parts.pop("scheduler")
    parts["vae"].register_to_config(scaling_factor=4.0)  # brings the latents of noise pictures to about size 1
    for part in ("text_encoder", "vae", "unet"):
        parts[part].eval().requires_grad_(False)
    return Components(**parts, noise_scheduler=DDPMScheduler.from_config(scheduler.config), name="tiny", is_minisd=True)


def random_adapter(unet, seed, rank=2):
    """Random weights for the attention layers of a U-Net, large enough to be seen."""
    from helpers import lora
    from helpers.lora.lowrank import LoRAWeights
    from helpers.presets.configuration import ATTENTION

    g = torch.Generator().manual_seed(seed)
    parts = {}
    for name in lora.find_targets(unet, ATTENTION):
        rows, columns = unet.get_submodule(name).weight.shape
        A, B = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
        parts[name] = LoRAWeights(A, B, alpha=1.0)
    return parts


def random_engine(components):
    """A playground's engine with two random adapters."""
    from helpers.playground.engine import STYLES, Engine
    from helpers.presets.variants import get_preset

    adapters = {name: random_adapter(components.unet, seed) for seed, name in enumerate(STYLES)}
    return Engine(get_preset("smoke"), components, adapters)
