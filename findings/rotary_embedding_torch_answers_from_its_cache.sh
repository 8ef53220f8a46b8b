#!/bin/sh
# rotary-embedding-torch 0.9.1 (torch 2.13.0): RotaryEmbedding.forward(t, seq_len=n) takes positions
# t, and remembers its result by n alone.  A second call with other positions and the same n gets
# the angles of the first; rotate_queries_or_keys, which takes no positions, gets them as well, so
# one forward pass with gaps turns every later pass without gaps.
# Expected: angles of the positions that are given, or a cache that is used for 0, 1, 2, ... alone.
# Seen: positions 0 to 7 answered as 0 1 2 5 8 12 17 19.
# What to do: cache_if_possible=False wherever positions have gaps, or no seq_len.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 rotary-embedding-torch==0.9.1 >&2
cat > "$folder/try.py" <<'PYTHON'
import torch
from rotary_embedding_torch import RotaryEmbedding

gaps, dense = torch.tensor([0.0, 1, 2, 5, 8, 12, 17, 19]), torch.arange(8.0)
rotary, fresh = RotaryEmbedding(dim=8), RotaryEmbedding(dim=8)
rotary(gaps, seq_len=8)
print("positions 0 to 7 answered as", *[int(n) for n in rotary(dense, seq_len=8)[:, 0]])
print("without a call before them:", *[int(n) for n in fresh(dense, seq_len=8)[:, 0]])
keys = torch.ones(1, 1, 8, 8)
same = torch.allclose(rotary.rotate_queries_or_keys(keys), fresh.rotate_queries_or_keys(keys))
print("keys of a later pass:", "as ever" if same else "turned by the gaps of the first")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null | tee "$folder/seen"
grep -q "positions 0 to 7 answered as 0 1 2 5 8 12 17 19" "$folder/seen"
grep -q "without a call before them: 0 1 2 3 4 5 6 7" "$folder/seen"
grep -q "keys of a later pass: turned by the gaps of the first" "$folder/seen"
