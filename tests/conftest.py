"""Fixtures that several test files share."""

import pytest


@pytest.fixture
def tiny():
    """Components of a MiniSD with a few thousand random weights, new for each test."""
    from diffusers import DDPMScheduler

    from helpers.components import Components
    from helpers.minisd.architecture import build_tiny

    parts = build_tiny(seed=0)
    scheduler = parts.pop("scheduler")
    for part in ("text_encoder", "vae", "unet"):
        parts[part].eval().requires_grad_(False)
    return Components(**parts, noise_scheduler=DDPMScheduler.from_config(scheduler.config), name="tiny", is_minisd=True)
