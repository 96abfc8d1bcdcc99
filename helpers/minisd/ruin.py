"""Ruined faces for the judge to learn from: one eye, lens or mouth smeared, warped, wiped away or mixed with another.

What a young U-Net does to faces, done on purpose, so that the judge's map of the face learns to leave such a part out.
The same is done at places where there is no part, so that it learns the ruin and not the trace of the tool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 0.5  # of the pictures lose one part; as many are touched elsewhere
REACH = (0.06, 0.10)  # radius of the ruin, of the picture's side
WAYS = 4


def windows(x: Tensor, centers: Tensor, radius: Tensor) -> Tensor:
    """Soft discs [B, 1, S, S] around `centers` [B, 2] (x, y in 0..1): 1 within 2/3 of `radius` [B], 0 outside."""
    cells = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    across, down = cells - centers[:, :1], cells - centers[:, 1:]
    distance = (across[:, None, :] ** 2 + down[:, :, None] ** 2).sqrt() / radius[:, None, None]
    return ((1 - distance) * 3).clamp(0, 1)[:, None]


def smeared(x: Tensor) -> Tensor:
    """x [B, 3, S, S], each pixel the mean of about a tenth of the side around it."""
    k = x.shape[-1] // 12 * 2 + 1
    rows = F.avg_pool2d(F.pad(x, (k // 2,) * 4, mode="replicate"), (1, k), 1)
    return F.avg_pool2d(rows, (k, 1), 1)  # one side after the other: ten times faster than a square window


def warped(x: Tensor, g: torch.Generator) -> Tensor:
    """x [B, 3, S, S] through rippled glass: displaced by up to a tenth of the side, another way every few pixels."""
    coarse = 0.2 * (2 * torch.rand(len(x), 2, 12, 12, generator=g, device=x.device) - 1)
    shift = F.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    eye = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(eye, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid + shift, mode="bilinear", padding_mode="border", align_corners=False)


def shifted(x: Tensor, g: torch.Generator) -> Tensor:
    """x [B, 3, S, S] moved by a seventh of the side in a random direction: what lies beside a part covers it."""
    angle = 6.2832 * torch.rand(len(x), generator=g, device=x.device)
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = 0.29 * angle.cos(), 0.29 * angle.sin()
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def ruin(x: Tensor, parts: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ruin one part of about half the pictures x [B, 3, S, S]; `parts` [B, P, 3] as `faces.positions` gives them.

    Returns the pictures and the parts that are left: a ruined one has kind -1.
    """
    n, device = len(x), x.device

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device=device)

    rows, which = torch.arange(n, device=device), torch.randint(parts.shape[1], (n,), generator=g, device=device)
    ways = torch.stack([smeared(x), warped(x, g), shifted(x, g), 0.5 * (x + x.roll(1, 0))])
    one = ways[torch.randint(WAYS, (n,), generator=g, device=device), rows]
    hit = rand(n) < SHARE
    radius = REACH[0] + (REACH[1] - REACH[0]) * rand(n)
    elsewhere = 0.1 + 0.8 * rand(n, 2)
    near = (elsewhere[:, None] - parts[..., 1:]).norm(dim=-1).amin(1) < 0.16
    center = torch.where(hit[:, None], parts[rows, which, 1:], elsewhere)
    mask = windows(x, center, radius) * (hit | ~near)[:, None, None, None]
    left = parts.clone()
    left[rows[hit], which[hit], 0] = -1
    return x + mask * (one - x), left
