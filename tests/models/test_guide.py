"""CLIP's text tower beside a model, for pruning that reads the expression."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nanogap
from nanogap import NanogapError
from nanogap.prune import STRATEGIES, needs_of
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights/mini"
READ_TEXT = [name for name in STRATEGIES if "text" in needs_of(name)]


@pytest.fixture(scope="module")
def guide() -> nanogap.clip.CLIPText:
    return nanogap.load(MINI, "cpu").text_guide


def test_only_the_text_side_of_the_minis_own_is_loaded(guide):
    parts = {name.split(".")[0] for name in guide.state_dict()}
    assert parts == {"text_model", "text_projection", "visual_projection"}
    assert guide.embed("the man on the left").shape == (128,)


def test_openais_own_file_is_a_pickle_and_means_the_same(guide, tmp_path: Path):
    """openai/clip-vit-large-patch14-336 has pytorch_model.bin and no safetensors."""
    clip = shutil.copytree(MINI / "clip_text", tmp_path / "clip")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    after = nanogap.load(MINI, "cpu", clip=clip).text_guide.embed("a man in blue")
    assert torch.equal(after, guide.embed("a man in blue"))


def test_special_tokens_in_an_expression_stay_text_and_long_ones_are_cut(guide):
    assert not torch.equal(guide.embed("a man<|endoftext|>"), guide.embed("a man"))
    most = guide.text_model.config.max_position_embeddings                    # with both ends
    assert torch.equal(guide.embed("man " * 500), guide.embed("man " * (most - 2)))


@pytest.mark.parametrize("prune", READ_TEXT)
@pytest.mark.parametrize("family, says", [
    ("llava", r"takes CLIP's text tower, .*clip-vit-large-patch14-336 .* give it by --clip"),
    ("llava_next", r"takes CLIP's text tower, .*clip-vit-large-patch14-336 .* give it by --clip"),
    # for 224 pixels
    ("shikra", r"takes CLIP's text tower, .*`hf download openai/clip-vit-large-patch14 .*--clip"),
    ("minigpt_v2", "^MiniGPT-v2 has no text tower; choose a strategy that does not read the ")])
def test_a_model_without_one_says_what_to_do(family: str, says: str, prune: str):
    model = tiny_model(family)
    with pytest.raises(NanogapError, match=says):
        model.ground(ROOT / "image.jpg", "the man", prune, 4)
    model.ground(ROOT / "image.jpg", "the man", prune, 4, "full", max_new_tokens=1)
