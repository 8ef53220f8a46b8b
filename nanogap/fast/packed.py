"""Each matrix a second time, in the order in which a CPU multiplies: faster, for twice the memory.

In:  a model on a CPU.  Out: the same model, with the same weights and names.

A CPU's product wants its matrix in blocks, so torch rearranges it in every call.  With many rows
that is little; with the few of a decoder's pass it takes longer than the product.  Here it is done
once.  Sums are taken in another order, so logits differ in their last digits.
`python -m nanogap.bench --pack` measures what it brings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogap.errors import NanogapError


def version(weight: Tensor) -> int:
    """How often a weight was changed in place (through its `.data` it goes unnoticed)."""
    return 0 if weight.is_inference() else weight._version


def can_pack(weight: Tensor) -> bool:
    """Whether this torch packs weights of that precision, on their device."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    fast = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return fast.get(weight.dtype, False)


class PackedLinear(nn.Linear):
    """nn.Linear that packs its matrix when it first multiplies, and again after a change.

    The plain one remains what counts; where gradients are wanted it multiplies as well.
    """

    packed: Tensor | None = None
    source: Tensor | None = None     # what was packed: held, so that nothing else gets its memory
    source_version = 0

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def __getstate__(self) -> dict:
        """Copies, and what is pickled, have the plain matrix alone."""
        return {**self.__dict__, "packed": None, "source": None}

    def is_packed(self) -> bool:
        """Whether the weight is still what was packed."""
        return (self.source is not None and self.source.data_ptr() == self.weight.data_ptr()
                and self.source_version == version(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        if not self.is_packed():
            self.source, self.source_version = self.weight.detach(), version(self.weight)
            self.packed = (torch.ops.mkldnn._reorder_linear_weight(self.source)
                           if can_pack(self.source) else None)
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Let every nn.Linear of a model pack its matrix.

    raises: NanogapError where the weights are not on a CPU, or torch does not pack theirs
    """
    plain = [(module, name, child) for module in list(model.modules())
             for name, child in module.named_children() if type(child) is nn.Linear]
    for _, _, linear in plain:
        weight = linear.weight
        if not can_pack(weight):
            raise NanogapError(f"weights in {weight.dtype} on {weight.device} cannot be packed "
                               "here: leave --pack out, or give --device cpu --dtype float32")
    for module, name, linear in plain:
        setattr(module, name, PackedLinear(linear))
