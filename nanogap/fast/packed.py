"""Products on a CPU as fast as it can: each large matrix in the order in which it multiplies.

A CPU's product wants its matrix in blocks, so torch rearranges it in every call, which takes longer
than a product with the few rows of a decoder's pass.  Here it is done once, and there is one copy.
Whoever looks at the parameters of a layer gets them plain, bit for bit, and the layer multiplies by
these from there on: what is packed can never be stale.
Sums are taken in another order, so logits differ in their last digits.  A small tower's matrices
are left to torch, for VisPruner chooses by the last digit of what it sees.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes: smaller ones lie in the processor's cache, where a call costs more than rearranging
LARGE = 1 << 20
# Products of two numbers: with fewer, torch's own library is faster in float32
MANY = 1 << 20


def can_pack(weight: Tensor) -> bool:
    """Whether this torch packs weights of that precision, on their device."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    fast = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return fast.get(weight.dtype, False)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class QuickLinear(nn.Linear):
    """nn.Linear that multiplies many rows in float32 by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if (x.dtype == torch.float32 and x.is_cpu and x.numel() * self.out_features >= MANY
                and not torch.is_grad_enabled()):
            return product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class PackedLinear(QuickLinear):
    """nn.Linear whose matrix is packed until anybody looks at its parameters."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.weight, self.bias)
        return product(x, self.packed, self.bias)

    def unpack(self) -> None:
        """Become a plain layer again."""
        with torch.inference_mode(False):
            plain = nn.Parameter(self.packed.to_dense(), requires_grad=False)
        self.__class__ = QuickLinear                                # type: ignore[assignment]
        del self.packed
        self._parameters["weight"] = plain

    # whatever torch does with parameters comes by one of these
    @property
    def _parameters(self) -> dict:                                   # type: ignore[override]
        self.unpack()
        return self._parameters

    @property
    def weight(self) -> Tensor:                                      # type: ignore[override]
        self.unpack()
        return self.weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is copied or pickled is plain."""
        self.unpack()
        return self.__reduce_ex__(protocol)


def pack(model: nn.Module) -> nn.Module:
    """Pack every large matrix of a model where that is faster, one by one; returns the model."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for small in (p for p in model.parameters() if p.is_cpu and p.nbytes < LARGE):
        small.data = small.data.clone()    # mapped, it would hold its neighbours in the file too
    decoder = set(getattr(model, "language_model", model).modules())
    for module in model.modules():
        if not isinstance(module, nn.Linear) or type(module) not in (nn.Linear, QuickLinear):
            continue
        weight = module.weight
        if module in decoder:
            module.__class__ = QuickLinear
        if (weight.nbytes >= LARGE and uses[id(weight)] == 1 and not weight.requires_grad
                and can_pack(weight)):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            module.__dict__["packed"] = packed
            module._parameters["weight"] = None           # it keeps its place
            module.__class__ = PackedLinear
    return model
