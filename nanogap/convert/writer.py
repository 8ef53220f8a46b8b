"""Writing safetensors tensor by tensor: a header that says where each will stand, then the numbers.

In:  parts.  Out: model.safetensors; no more than one result is in memory.
(safetensors' own writer wants all tensors of a file at once.)
Source: the format, https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
from pathlib import Path

import torch

from nanogap.checks.command import tell
from nanogap.convert.pieces import Part
from nanogap.errors import NanogapError

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
GB = 1_000_000_000


def write_parts(path: Path, parts: dict[str, Part]) -> None:
    """Make all parts, one after the other, and write them; each gigabyte is told on stderr.

    raises: NanogapError where one is not finite
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, part in parts.items():
        begin, total = total, total + part.empty.nbytes
        header[name] = {"dtype": NAMES[part.empty.dtype], "shape": list(part.empty.shape),
                        "data_offsets": [begin, total]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                       # the numbers begin at a multiple of 8
    written = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts.values():
            tensor = part.tensor().contiguous()
            if not bool(tensor.isfinite().all()):
                raise NanogapError(f"{part.where()}: numbers are not finite; download it again")
            # its bytes as they are; torch has no such view without numpy
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            before, written = written, written + tensor.nbytes
            if before // GB < written // GB:
                tell(f"{written / GB:.0f} of {total / GB:.1f} GB ...")
