"""A device that is not there: CPU memory that refuses to be mixed with tensors of the CPU.

In:  nothing.  Out: `torch.device("pretend")`, to which a model can be moved.  A forgotten
`.to(device)` is an error there, as it is on a GPU.  And as there, a CPU tensor of one number may
stand in arithmetic: it is sent along.

torch lets a program fill in a device of its own (torch.utils.backend_registration).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")    # what moves between devices
FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step")


class Pretended(Tensor):
    """A tensor that says it is on the device, and holds one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(NAME), requires_grad=False)
        self.held = held
        return self

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()             # which torch refuses for its subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do on the CPU what is asked of the device, and say of the result that it is there."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    stay = all(isinstance(x, Pretended) or x.dim() == 0 for x in tensors)
    if not stay and func.name() not in COPIES:
        raise RuntimeError(f"{func} of tensors on {NAME} and on the CPU, of shapes "
                           f"{[list(x.shape) for x in tensors]}")
    there = torch.device(kwargs["device"] if kwargs.get("device") else NAME).type == NAME
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    result = func(*args, **kwargs)
    if not there:
        return result
    ordinary = any(not x.is_inference() for x in tensors)         # so are views of these
    with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
        return tree_map_only(Tensor, Pretended, result)


def made_there(name: str) -> Callable[..., Tensor]:
    """What makes tensors, on the device."""
    packet, _, overload = name.partition(".")
    make = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def kernel(*args: Any, device: object = None, **kwargs: Any) -> Tensor:
        return Pretended(make(*args, **kwargs, device="cpu"))

    return kernel


def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """From or to the device."""
    return run(torch.ops.aten.copy_.default, target, source)


@cache
def pretended() -> torch.device:
    """The device; registered once."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        library.impl(name, made_there(name), "PrivateUse1")
    library.impl("_copy_from", copy, "PrivateUse1")
    pretended.library = library               # it lasts as long as this does
    return torch.device(NAME)
