"""The moving average of the weights (EMA): a smoother adapter than the last step's.

m = d m + (1 - d) w after each step, where d grows towards the decay, so that the first steps are soon forgotten. The
average lies with AdamW's moments, so that checkpoints keep it. (Polyak and Juditsky 1992, SIAM J. Control Optim. 30; as
diffusers' EMAModel does it.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AVERAGE = "average"  # its name among the states of a parameter


def states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """(parameter, what the optimizer keeps of it) of each parameter that took a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Take the weights after step `step` (from 0) into the average. decay: from 0 (no average) to below 1."""
    d = min(decay, (1 + step) / (10 + step))
    for parameter, state in states(optimizer):
        # m = d m + (1 - d) w
        state.setdefault(AVERAGE, parameter.detach().clone()).lerp_(parameter, 1 - d)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the weights are their average, where there is one; afterwards they are what they were."""
    having = [(parameter, state) for parameter, state in states(optimizer) if AVERAGE in state]
    kept = [(parameter, parameter.detach().clone(), state) for parameter, state in having]
    with torch.no_grad():
        for parameter, _, state in kept:
            parameter.copy_(state[AVERAGE])
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight, _ in kept:
                parameter.copy_(weight)
