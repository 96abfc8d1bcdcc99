"""A pretended Apple GPU: tensors that compute on the CPU, call their device "mps", and refuse float64 as it does.

`with apple():` makes `.to("mps")` and `device="mps"` work on any machine. Whatever would hold float64 there raises the
TypeError that PyTorch raises on a Mac, and an operation of such a tensor with one that lies on the CPU a RuntimeError.
Models are read from their files outside of the block, since that uses the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS = torch.device("mps", 0)
REFUSED = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"


class AppleTensor(torch.Tensor):
    """A tensor that lies on the pretended GPU; `held` is where its numbers really are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> AppleTensor:
        """Raises TypeError for float64."""
        if held.dtype == torch.float64:
            raise TypeError(REFUSED)
        own = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta", requires_grad=requires_grad,
        )  # fmt: skip
        own.held = held
        return own

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"AppleTensor({self.held!r})"

    @property  # type: ignore[override]
    def device(self) -> torch.device:
        """What code that asks for it is told."""
        return MPS

    @property
    def is_cpu(self) -> bool:
        """It does not lie in main memory."""
        return False

    def numpy(self, **settings: object) -> Any:
        """Raises TypeError: a tensor on a GPU has no array."""
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        """The numbers, which a GPU gives away too."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the numbers held, its results on the device where PyTorch would leave them."""
    target = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [leaf for leaf in tensors if isinstance(leaf, AppleTensor)]
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    indexes = "index" in function.__name__  # a table on the GPU may be read by indices of the CPU
    for leaf in tensors:
        if there and not copies and not indexes and leaf.dim() and not isinstance(leaf, AppleTensor):
            raise RuntimeError(f"{function}: Expected all tensors to be on the same device, but found mps:0 and cpu")
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(AppleTensor, lambda t: t.held, (args, kwargs))
    out = function(*args, **kwargs)
    # "meta" is what PyTorch's own code takes for the device of an AppleTensor, as when it builds a mask like one
    on_gpu = torch.device(target).type in ("mps", "meta") if target is not None else bool(there)
    if function is torch.ops.aten.copy_.default:
        on_gpu = isinstance(tensors[0], AppleTensor)
    if not on_gpu:
        return out
    if function._schema.is_mutable and there:  # in place: the same tensor as before
        own = {id(t.held): t for t in there}
        return tree_map_only(torch.Tensor, lambda t: own.get(id(t)) if id(t) in own else AppleTensor(t), out)
    return tree_map_only(torch.Tensor, AppleTensor, out)


class AppleMode(TorchDispatchMode):
    """Sends to the pretended GPU what names it as its device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


@contextmanager
def apple() -> Iterator[torch.device]:
    """Within the block there is an Apple GPU; gives its device. Inference mode is there without gradients only."""

    def enter(block: Any) -> None:
        block.without = torch.no_grad()
        block.without.__enter__()

    def tensor(data: Any, *, device: Any = None, **settings: Any) -> torch.Tensor:
        made = plain(data, **settings)
        return made if device is None else made.to(device)

    plain = torch.tensor
    with (
        AppleMode(),
        patch.object(torch, "tensor", tensor),  # the one way to make a tensor that asks no mode
        patch.object(torch.inference_mode, "__enter__", enter),  # a wrapper cannot be made from its tensors
        patch.object(torch.inference_mode, "__exit__", lambda block, *error: block.without.__exit__(*error)),
    ):
        yield MPS
