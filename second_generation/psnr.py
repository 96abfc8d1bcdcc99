"""PSNR in dB of every style through the committed autoencoder, and a sheet of pictures beside their decoding."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from helpers.minisd.pretrain import WEIGHTS, save_sheet
from helpers.minisd.train_vae import psnr, reconstruct
from helpers.world.scenes import STYLES, sample_scene
from helpers.world.styles import render

vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32).eval()
pairs = []
for style in STYLES:
    drawn = np.stack([np.array(render(sample_scene(random.Random(9000 + k)), style, 128)) for k in range(16)])
    decoded = reconstruct(vae, drawn, 16).numpy()
    print(f"{style:14} {psnr(drawn, decoded).mean():.2f} dB, least {psnr(drawn, decoded).min():.2f}", flush=True)
    for k in range(4):
        pairs += [Image.fromarray(drawn[k]), Image.fromarray(decoded[k])]
save_sheet(pairs, 8, Path("runs") / "second_generation.png", 2)
