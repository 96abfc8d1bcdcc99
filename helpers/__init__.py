"""Fine-tuning Stable Diffusion with LoRA, by hand: the library that the notebooks build and use."""

import os

# Importing diffusers' pipelines makes transformers warn about torchvision, which nothing here needs; a warning on
# stderr would fail the strict notebook tests.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # likewise its notes on dtypes
# PyTorch's threads wait for each other asleep: where they spin, one busy neighbour makes a step ten times as long
# (benchmarks/README.md). The runtime reads this when PyTorch is loaded, so import helpers first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
