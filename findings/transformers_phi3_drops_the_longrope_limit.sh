#!/bin/sh
# transformers 5.24.0 (torch 2.13.0): Phi3Config takes the limit between LongRoPE's short and long
# factors from its own argument original_max_position_embeddings (4096 if left out), and overwrites
# the key of that name that stands in rope_parameters, without a word.
# Expected: RopeParameters has that key, and "rope_parameters" is where RoPE is set since 5.0, so a
# limit of 16 that is given there is 16 (or is refused where the two contradict each other).
# Seen: 4096.  IDs beyond 16 go on with the short factors.
# What to do: give original_max_position_embeddings to the config as well.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 >&2
cat > "$folder/try.py" <<'PYTHON'
import torch
import transformers

def rope():
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8, "original_max_position_embeddings": 16, "factor": 4.0}

sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0,
         "vocab_size": 100, "intermediate_size": 64, "max_position_embeddings": 64}
for name, more in (("in rope_parameters alone", {}),
                   ("in both places", {"original_max_position_embeddings": 16})):
    config = transformers.Phi3Config(**sizes, rope_parameters=rope(), **more)
    rotary = transformers.Phi3Model(config).rotary_emb
    x = torch.zeros(1, 3, 64)
    below, beyond = (rotary(x, torch.tensor([ids]))[0][0, 1] for ids in ([0, 1, 2], [0, 1, 20]))
    print(name + ": limit", config.rope_parameters["original_max_position_embeddings"],
          "- an ID of 20 takes", "the short" if torch.equal(below, beyond) else "the long",
          "factors")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null | tee "$folder/seen"
grep -q "in rope_parameters alone: limit 4096 - an ID of 20 takes the short factors" "$folder/seen"
grep -q "in both places: limit 16 - an ID of 20 takes the long factors" "$folder/seen"
