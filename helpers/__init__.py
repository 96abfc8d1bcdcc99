"""Fine-tuning Stable Diffusion with LoRA, by hand: the library that the notebooks build and use."""

import os

# Importing diffusers' pipelines makes transformers warn about torchvision, which nothing here needs; a warning on
# stderr would fail the strict notebook tests.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # likewise its notes on dtypes
