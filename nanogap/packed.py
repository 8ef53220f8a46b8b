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

from nanogap.cli import NanogapError


def changes(weight: Tensor) -> tuple[int, int]:
    """What is another when a weight was changed in place, moved or converted."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class PackedLinear(nn.Linear):
    """nn.Linear with its matrix in blocks beside the plain one, which remains what counts.

    Where gradients are wanted, and after the weight has changed, it multiplies by the plain one.
    """

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self.packed_from = changes(self.weight)

    def __getstate__(self) -> dict:
        """Copies, and what is pickled, have the plain matrix alone."""
        return {**self.__dict__, "packed": None, "packed_from": None}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or changes(self.weight) != self.packed_from:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Pack all nn.Linear of a model whose weights will not change.

    raises: NanogapError where the weights are not on a CPU, or this torch cannot pack theirs
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                weight = child.weight
                if weight.device.type != "cpu":
                    raise NanogapError(f"packed weights are for a CPU, and these are on "
                                       f"{weight.device}: leave --pack out")
                try:
                    setattr(module, name, PackedLinear(child))
                except (RuntimeError, AttributeError) as error:   # no oneDNN, or not for this dtype
                    raise NanogapError(f"torch cannot pack weights in {weight.dtype} on this CPU "
                                       f"({str(error).splitlines()[0]:.80}): leave --pack out, or "
                                       "give another --dtype") from None
