#!/bin/sh
# transformers 5.24.0 (torch 2.13.0): generate(mm_encoder_outputs=..., num_beams=2) changes the
# object that it is given.  Its pooler_output holds one entry for each beam afterwards, so a greedy
# call or a forward pass with the same arguments, which works before, raises ValueError behind it.
# Expected: arguments stay as they were, as pixel_values, input_ids and position_ids do.
# Seen: "features after the call with beams: 2" and "greedy after it: ValueError".
# What to do: make a new BaseModelOutputWithPooling for each call.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 >&2
cat > "$folder/try.py" <<'PYTHON'
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

torch.manual_seed(0)
vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
          "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
        "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
    vision_config=vision, text_config=text, image_token_index=90)).eval()
ids = torch.tensor([[5, 6, *[90] * 16, 8, 9]])
with torch.no_grad():
    features = model.get_image_features(torch.randn(1, 3, 56, 56)).pooler_output
    seen = BaseModelOutputWithPooling(pooler_output=list(features))

def ask(beams):
    try:
        model.generate(input_ids=ids, mm_encoder_outputs={"image": seen}, num_beams=beams,
                       do_sample=False, max_new_tokens=3)
        return "words"
    except ValueError as error:
        return f"ValueError: {error}"

print("greedy before it:", ask(1), "- features:", len(seen.pooler_output))
ask(2)
print("features after the call with beams:", len(seen.pooler_output))
print("greedy after it:", ask(1))
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null | tee "$folder/seen"
grep -q "greedy before it: words - features: 1" "$folder/seen"
grep -q "features after the call with beams: 2" "$folder/seen"
grep -q "greedy after it: ValueError" "$folder/seen"
