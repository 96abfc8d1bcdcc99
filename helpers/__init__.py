"""Fine-tuning Stable Diffusion with LoRA, by hand: the library that the notebooks build and use."""

import os

# Importing diffusers' pipelines makes transformers warn about torchvision, which nothing here needs; a warning on
# stderr would fail the strict notebook tests.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # likewise its notes on dtypes
# PyTorch's threads wait for each other in a short loop, then asleep: with the runtimes' own long loop one busy
# neighbour can make a step a hundred times as long, and without any a quiet step takes twice as long on a virtual
# machine (benchmarks/README.md). The runtimes (GNU's, LLVM's) read this when PyTorch is loaded: import helpers first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # turns of the loop
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # milliseconds
