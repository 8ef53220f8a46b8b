"""The vision tower: which layers run, what CLS is, and what pruning reads."""

import pytest
import torch

from nanogap.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig, CLIPVisionTower, quick_gelu

CONFIG = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                          num_attention_heads=2, image_size=56, patch_size=14)


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def tower() -> CLIPVisionTower:
    return filled(CLIPVisionTower(CONFIG))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))


def fields(tower: CLIPVisionTower, pixels: torch.Tensor, *needs: str) -> dict[str, torch.Tensor]:
    """What a strategy that needs these would see in the one image."""
    before, after = tower(pixels)
    return tower.fields(before[0], after[0], needs)


def test_56_pixels_in_patches_of_14_are_16_tokens_in_raster_order(tower, pixels):
    """Changing the pixels of patch 6 (row 1, column 2) changes the embedding of row 1 + 6 alone."""
    changed = pixels.clone()
    changed[:, :, 14:28, 28:42] += 1
    differs = (tower.embeddings(pixels) != tower.embeddings(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 + 6]
    before, after = tower(pixels)
    assert before.shape == after.shape == (1, 1 + 16, 16)


def test_features_are_those_of_the_last_layer_but_one(tower, pixels):
    """hidden_states[-2] of five: what layer 2 returns, CLS first, without post_layernorm."""
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:2]:
        x = layer(x)
    before, after = tower(pixels)
    assert torch.equal(before, x)
    assert torch.equal(after, tower.encoder.layers[2](x))
    assert torch.equal(fields(tower, pixels, "cls")["cls"], after[0, 0])


def test_the_last_layer_is_not_run_for_features(pixels):
    ran = []
    tower = filled(CLIPVisionTower(CONFIG))
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    fields(tower, pixels, "cls", "cls_attention", "keys", "last_queries", "last_keys")
    assert ran == [0, 1, 2]


def test_another_feature_layer_can_be_asked_for(pixels):
    early, late = filled(CLIPVisionTower(CONFIG, -3)), filled(CLIPVisionTower(CONFIG, -2))
    assert torch.equal(early(pixels)[1], late(pixels)[0])
    assert torch.equal(filled(CLIPVisionTower(CONFIG, 3))(pixels)[1], late(pixels)[1])


def test_cls_attention_is_the_row_that_the_feature_layer_used(tower, pixels):
    """With the written-out row as weights, layer 2's values give what the fused kernel gave CLS."""
    attention, layer = tower.encoder.layers[2].self_attn, tower.encoder.layers[2]
    h = layer.layer_norm1(tower(pixels)[0])
    row = fields(tower, pixels, "cls_attention")["cls_attention"]           # (H, N)
    own = 1 - row.sum(-1, keepdim=True)                                     # what CLS gives itself
    weights = torch.cat([own, row], -1)[None, :, None]                      # (1, H, 1, 1 + N)
    mixed = (weights @ attention.split(attention.v_proj(h))).transpose(1, 2).flatten(2)
    assert torch.allclose(attention.out_proj(mixed)[:, 0], attention(h)[:, 0], atol=1e-5)
    assert row.shape == (2, 16) and bool((own > 0).all())


def test_keys_are_those_of_the_feature_layer_the_mean_over_its_heads_without_cls(tower, pixels):
    layer = tower.encoder.layers[2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(tower(pixels)[0]))[0]   # (1 + N, C)
    first, second = keys[1:, :8], keys[1:, 8:]                              # of two heads
    assert torch.allclose(fields(tower, pixels, "keys")["keys"], (first + second) / 2, atol=1e-6)


def test_queries_and_keys_of_the_next_layer_come_before_the_split_into_heads(tower, pixels):
    seen, layer = fields(tower, pixels, "last_keys", "last_queries"), tower.encoder.layers[3]
    h = layer.layer_norm1(tower(pixels)[1])
    assert seen["last_keys"].shape == seen["last_queries"].shape == (1 + 16, 16)
    assert torch.equal(seen["last_keys"], layer.self_attn.k_proj(h)[0])
    assert torch.equal(seen["last_queries"], layer.self_attn.q_proj(h)[0])


def test_quick_gelu_is_not_the_exact_one():
    assert quick_gelu(torch.tensor(1.0)).item() == pytest.approx(0.8458, abs=1e-4)
    assert torch.nn.functional.gelu(torch.tensor(1.0)).item() == pytest.approx(0.8413, abs=1e-4)


def test_the_text_tower_reads_at_the_end_token_and_never_beyond():
    """99 is the highest ID and ends a text; what pads behind it changes nothing."""
    text = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, vocab_size=100)
    clip = filled(CLIPText(CONFIG, text, projection_dim=8))
    short, padded = torch.tensor([[98, 5, 6, 99]]), torch.tensor([[98, 5, 6, 99, 99, 99]])
    read = clip.text_model
    assert torch.allclose(read(short), read(padded), atol=1e-6)
    assert not torch.allclose(read(short), read(torch.tensor([[98, 6, 5, 99]])), atol=1e-3)
