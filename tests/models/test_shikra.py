"""Shikra: the image inside the sentence, a white square, three decimals, and one linear layer."""

import pytest
import torch
from PIL import Image

import nanogap
from nanogap.errors import NanogapError
from nanogap.models.saving import save
from nanogap.models.shikra import Shikra
from nanogap.prompt import DESCRIBE
from nanogap.train.untrained import train_llama_tokenizer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shikra(tmp_path_factory: pytest.TempPathFactory) -> Shikra:
    """A random one with 4 x 4 patches, saved and loaded again."""
    folder = tmp_path_factory.mktemp("shikra")
    save(folder, tiny_model("shikra"), torch.float32)
    return nanogap.load(folder, "cpu")


def pieces(model: Shikra, question: str) -> list[str]:
    ids = model.encode_question(question).tolist()
    return [model.tokenizer.id_to_token(i) for i in ids]


def test_the_image_is_one_token_between_start_and_end_and_no_space_is_next_to_them(shikra: Shikra):
    said = pieces(shikra, shikra.question("the man on the left"))
    at = said.index("<im_start>")
    assert said[0] == "<s>" and "".join(said[:at]).endswith("▁in▁the▁image")
    assert said[at:at + 3] == ["<im_start>", "<im_patch>", "<im_end>"]
    assert "".join(said[at + 3:]) == "▁and▁provide▁the▁coordinates▁of▁its▁location?▁ASSISTANT:"
    said = pieces(shikra, DESCRIBE)                   # a question without an image begins with it
    assert "".join(said[:said.index("<im_start>")]).endswith("▁USER:")


@pytest.mark.parametrize("expression", ["the <image> on the left", "</s>", "<im_patch> <im_end>"])
def test_special_tokens_in_an_expression_stay_text(shikra: Shikra, expression: str):
    said = pieces(shikra, shikra.question(expression))
    special = [piece for piece in said if piece in ("<s>", "</s>", *Shikra.special_tokens)]
    assert special == ["<s>", "<im_start>", "<im_patch>", "<im_end>"]
    before, _ = shikra.template.around(shikra.question(expression))
    assert expression in before


def test_a_tokenizer_without_the_images_own_tokens_is_named():
    with pytest.raises(NanogapError, match="the tokenizer has no <im_start> or no <im_end>"):
        Shikra.template.encode(train_llama_tokenizer(["a cup"], 420), "a cup", 1, 32000)


def test_a_picture_is_padded_with_white(shikra: Shikra):
    """40 x 20 black pixels in a square of 56: a band of 28 rows between two of white."""
    square = shikra.frame.fit(Image.new("RGB", (40, 20)), 56)
    assert [square.getpixel((28, y)) for y in (0, 12, 28, 44, 55)] == [
        (255, 255, 255), (255, 255, 255), (0, 0, 0), (255, 255, 255), (255, 255, 255)]
    assert shikra.frame == Shikra.frame


def test_a_box_there_and_back(shikra: Shikra):
    """Of 640 x 480 pixels the square has 80 above: (298.08 + 80) / 640 = 0.59075."""
    box = (334.72, 298.08, 522.88, 450.24)
    said = shikra.box_format.say(shikra.frame.from_pixels(box, 640, 480))
    assert said == "Answer: [0.523,0.591,0.817,0.829] ."
    assert shikra.to_pixels(shikra.parse_box(said), 640, 480) == pytest.approx(box, abs=0.32)


@pytest.mark.parametrize("text, box", [
    ("Answer: [0.123,0.456,0.789,1.000] .", (0.123, 0.456, 0.789, 1.0)),
    ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
    ("two: [0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8]", (0.1, 0.2, 0.3, 0.4)),
    ("Answer: [0.5,0.2,0.3,0.4] .", None), ("[0.1,0.2,0.3]", None), ("", None),
    ("[0.1,0.2,0.3,1.4]", None)])
def test_the_first_box_of_an_answer_is_read(shikra: Shikra, text: str, box: tuple | None):
    assert shikra.parse_box(text) == box
