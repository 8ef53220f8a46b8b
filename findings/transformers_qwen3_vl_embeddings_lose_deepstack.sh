#!/bin/sh
# transformers 5.24.0 (torch 2.13.0): Qwen3-VL that is given `inputs_embeds`, made as its own forward
# pass makes them (get_image_features scattered into the embeddings) and at its own get_rope_index,
# leaves out the features that DeepStack adds behind its first layers.  There is no warning, and no
# argument of the public forward pass for them.  Qwen2.5-VL, without DeepStack, gives equal logits.
# Expected: the same logits as with input_ids and pixel_values, or an error that names what is lost.
# Seen: "Qwen2.5-VL 0.000" and "Qwen3-VL 0.574", the largest difference of two logits.
# What to do: patch get_image_features, so that forward itself scatters and adds them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 >&2
cat > "$folder/try.py" <<'PYTHON'
import torch
import transformers

tokens = {"image_token_id": 151, "video_token_id": 152, "vision_start_token_id": 153,
          "vision_end_token_id": 154}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 200,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                            "rope_theta": 10000.0}}
vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
          "out_hidden_size": 64, "spatial_merge_size": 2}
torch.manual_seed(0)
models = {
    "Qwen2.5-VL": (14, transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, **tokens, vision_config=vision | {
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}))),
    "Qwen3-VL": (16, transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, **tokens, vision_config=vision | {
            "patch_size": 16, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1]})))}
grid = torch.tensor([[1, 8, 16]])                            # 128 patches, 32 tokens
ids = torch.tensor([[5, 6, 153, *[151] * 32, 154, 9, 10]])
image = (ids == 151)
far = {}
for name, (side, model) in models.items():
    model.eval()
    pixels = torch.randn(8 * 16, 3 * 2 * side * side)
    with torch.no_grad():
        right = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid,
                      mm_token_type_ids=image.int()).logits
        seen = torch.cat(list(model.get_image_features(pixels, grid).pooler_output))
        x = model.get_input_embeddings()(ids).masked_scatter(image[..., None], seen)
        places = model.model.get_rope_index(ids, mm_token_type_ids=image.int(),
                                            image_grid_thw=grid)[0]
        far[name] = (model(inputs_embeds=x, position_ids=places).logits - right).abs().max().item()
print(transformers.__version__, *(f"{name} {by:.3f}" for name, by in far.items()))
assert far["Qwen2.5-VL"] < 1e-4 and far["Qwen3-VL"] > 0.01, "it changed"
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
