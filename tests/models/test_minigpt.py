"""MiniGPT-v2: EVA's tower, four neighbours to one token, boxes in hundredths, and its files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import nanogap
from nanogap.errors import NanogapError
from nanogap.models.base import Stretch
from nanogap.models.eva import interpolate_positions
from nanogap.models.minigpt import MiniGPT
from nanogap.models.saving import save
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tiny() -> MiniGPT:
    """8 x 8 patches are 8 x 2 tokens."""
    return tiny_model("minigpt_v2")


def test_the_prompt_begins_with_two_bos_and_its_image_stands_between_img_tags(tiny: MiniGPT):
    pieces = [tiny.tokenizer.id_to_token(i) for i in tiny.prompt("the man").tolist()]
    at = pieces.index("<ImageHere>")
    assert pieces[:2] == ["<s>", "<s>"]
    assert "".join(pieces[2:at]) == "▁[INST]▁<Img>"
    assert "".join(pieces[at + 1:]) == (
        "▁</Img>▁[refer]▁give▁me▁the▁location▁of▁the▁man▁[/INST]")


def test_every_hundredth_comes_back_as_it_was_and_what_is_between_is_rounded_down():
    """0.29 is a little less than 29 / 100 in binary, and still no 28."""
    for low in range(100):
        text = f"{{<{low}><0><{low + 1}><{100 - low}>}}"
        assert MiniGPT.box_format.say(MiniGPT.box_format.parse(text)) == text
    assert MiniGPT.box_format.say((0.129, 0.0, 0.999, 1.0)) == "{<12><0><99><100>}"


@pytest.mark.parametrize("text, box", [
    ("{<0><5><7><100>}", (0.0, 0.05, 0.07, 1.0)),                  # one digit, and three
    ("{ < 12 ><34>  <56><78> }", (0.12, 0.34, 0.56, 0.78)),
    ("the man {<1><2><3><4>} and {<5><6><7><8>}", (0.01, 0.02, 0.03, 0.04)),
    ("{<12><34><56>}", None), ("{<12><34><56><78><90>}", None), ("{<12><34><56><101>}", None),
    ("{<56><34><12><78>}", None), ("<12><34><56><78>", None)])
def test_only_four_numbers_in_the_form_are_a_box(text: str, box: tuple | None):
    assert MiniGPT.box_format.parse(text) == box


def test_a_token_shows_the_rectangle_of_its_four_patches(tiny: MiniGPT):
    """80 x 40 pixels in 8 rows of 2 tokens: each shows 40 x 5 of them."""
    image = tiny.encode_image(Image.new("RGB", (80, 40)))
    assert tiny.cells(image)[[0, 1, 2, 15]].tolist() == [
        [0, 0, 40, 5], [40, 0, 80, 5], [0, 5, 40, 10], [40, 35, 80, 40]]
    assert (image.rows, image.columns, image.n_visual) == (8, 2, 16)
    assert tiny.padding(image, torch.arange(16)) == 0
    assert "below, 8 x 2 tokens are called patches" in tiny.walk(image)[1]


def test_a_picture_is_stretched_and_its_box_is_a_share_of_each_side():
    frame = Stretch()
    left_half = Image.new("RGB", (200, 100))
    left_half.paste((255, 255, 255), (0, 0, 100, 100))
    assert frame.fit(left_half, 8).getpixel((1, 7)) == (255, 255, 255)
    assert frame.fit(left_half, 8).getpixel((6, 0)) == (0, 0, 0)
    assert frame.to_pixels((0.0, 0.25, 0.5, 1.0), 200, 100) == (0, 25, 100, 100)
    assert frame.from_pixels((0, 25, 100, 100), 200, 100) == (0.0, 0.25, 0.5, 1.0)
    assert frame.to_pixels((-0.5, 0.0, 1.5, 1.0), 200, 100) == (0, 0, 200, 100)


def test_positions_are_interpolated_as_in_the_original():
    """Golden values of MiniGPT-4's own code: 16 r + c at row r, column c, behind a zero for CLS."""
    table = torch.cat([torch.zeros(1), torch.arange(256.)]).view(1, -1, 1)
    out = interpolate_positions(table, 32)[0, 1:, 0].view(32, 32)
    assert out[0, :6].tolist() == [
        -1.79296875, -1.49609375, -1.01953125, -0.390625, 0.015625, 0.609375]
    assert float(out[1, 0]) == 2.95703125 and float(out[31, 31]) == 256.79296875
    assert out[15, 15:17].tolist() == [124.046875, 124.453125]


def test_what_the_tower_says_of_patches_is_averaged_over_tokens(tiny: MiniGPT):
    """Written out from the weights: the last block's attention of CLS, its queries and keys."""
    image = tiny.encode_image(pixels := Image.new("RGB", (30, 20), (200, 90, 30)))
    needs = {"cls", "cls_attention", "keys", "last_queries", "last_keys"}
    fields = tiny.fields(image, needs)
    assert {name: tuple(value.shape) for name, value in fields.items()} == {
        "cls": (128,), "cls_attention": (2, 16), "keys": (16, 16), "last_queries": (17, 32),
        "last_keys": (17, 32)}
    before, after = tiny.vision_tower(tiny.prepare_image(pixels))
    block = tiny.vision_tower.blocks[-1]
    q, k, _ = (block.norm1(before[0]) @ block.attn.qkv.weight.T).split(32, dim=1)    # (65, C)
    q = q + block.attn.q_bias
    scores = q.view(65, 2, 16)[:1].transpose(0, 1) @ k.view(65, 2, 16).permute(1, 2, 0) / 4
    by_patch = scores.softmax(-1)[:, 0, 1:]                                   # (H, 64)
    by_token = by_patch.view(2, 16, 4).mean(2)
    torch.testing.assert_close(fields["cls_attention"], by_token)
    torch.testing.assert_close(fields["last_queries"][0], q[0])
    torch.testing.assert_close(fields["last_keys"][1:], k[1:].view(16, 4, 32).mean(1))
    torch.testing.assert_close(fields["keys"], k[1:].view(16, 4, 2, 16).mean((1, 2)))
    assert torch.equal(fields["cls"], torch.cat(4 * [tiny.ln_vision(after[0, 0])]))
    chosen = tiny.ground(pixels, "the man", "cls_attention", 5, "permuted").keep
    assert chosen.tolist() == by_token.mean(0).argsort(descending=True)[:5].tolist()


def test_a_model_is_written_under_the_published_names_and_read_again(
        tiny: MiniGPT, tmp_path: Path):
    save(tmp_path, tiny, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    again = nanogap.load(tmp_path, "cpu")
    assert again.config == tiny.config
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    header = (tmp_path / "model.safetensors").read_bytes()[:20000]
    for name in ("visual_encoder.blocks.2.attn.q_bias", "visual_encoder.patch_embed.proj.bias",
                 "ln_vision.weight", "llama_proj.bias", "llama_model.lm_head.weight",
                 "llama_model.model.layers.0.self_attn.q_proj.weight"):
        assert name.encode() in header


def test_four_patches_must_stand_side_by_side_in_a_row(tiny: MiniGPT):
    vision = replace(tiny.config.vision, image_size=84)
    with pytest.raises(NanogapError, match="image_size 84 makes 6 patches to a row, and MiniGPT-v2 "
                                           "makes one token of every 4 of them"):
        replace(tiny.config, vision=vision)
