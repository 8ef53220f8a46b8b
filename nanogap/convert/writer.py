"""Writing safetensors tensor by tensor: a header that says where each will stand, then the numbers.

In:  tensors, as they are made.  Out: model.safetensors.
(safetensors' own writer wants all tensors of a file at once.)
Source: the format, https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanogap.checks.command import tell

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
GB = 1_000_000_000


def write_tensors(path: Path, empty: dict[str, Tensor],
                  tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors one after the other; each gigabyte is told on stderr.

    empty: the same, in their order, without numbers
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in empty.items():
        begin, total = total, total + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, total]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                       # the numbers begin at a multiple of 8
    written = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            # its bytes as they are; torch has no such view without numpy
            tensor = tensor.contiguous()
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            before, written = written, written + tensor.nbytes
            if before // GB < written // GB:
                tell(f"{written / GB:.0f} of {total / GB:.1f} GB ...")
