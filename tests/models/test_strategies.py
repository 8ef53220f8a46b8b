"""Every strategy with every model; those that read the expression need CLIP's text tower."""

from pathlib import Path

import pytest
import torch

import nanogap
from nanogap import NanogapError
from nanogap.gap import MODES
from nanogap.models import MODELS
from nanogap.prune import STRATEGIES, needs_of
from tests.reference.make_next import noise
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights/mini"
READ_TEXT = [name for name in STRATEGIES if "text" in needs_of(name)]
PRUNED = [mode for mode in MODES if mode != "full"]


@pytest.mark.parametrize("prune", [name for name in STRATEGIES if name not in READ_TEXT])
@pytest.mark.parametrize("family", MODELS)
def test_every_strategy_prunes_what_every_model_sees_in_every_mode(family: str, prune: str):
    """One token may be added to each view, and LLaVA-1.6's newlines are not counted."""
    model = tiny_model(family)
    image = model.encode_image(noise(100, 60))
    (P, A), N = model.around_image(model.prompt("the man")), image.n_visual
    for mode in PRUNED:
        result = model.ground(image, "the man", prune, "50%", mode, max_new_tokens=2)
        keep = result.keep.tolist()
        not_counted = len(model.newlines(image) & set(keep)) + len(model.views(image))
        assert 0 < result.visual_tokens <= N / 2 + not_counted
        assert len(set(keep)) == len(keep)
        if MODES[mode][0] == "raster":
            assert keep == sorted(keep)
        if mode == "gap":
            assert result.position_ids[P:P + len(keep)].tolist() == [P + index for index in keep]
            assert result.position_ids[-A:].tolist() == list(range(P + N, P + N + A))
            assert result.next_position == P + N + A


@pytest.mark.parametrize("prune", READ_TEXT)
@pytest.mark.parametrize("name", ["mini-next", "mini-shikra"])
def test_strategies_that_read_the_expression_find_clip_beside_a_model(name: str, prune: str):
    model = nanogap.load(MINI.parent / name, "cpu")
    image = model.encode_image(ROOT / "image.jpg")
    left, right = (model.ground(image, words, prune, 20, max_new_tokens=1)
                   for words in ("a man", "a tree"))
    assert len(left.keep) >= 20 and left.keep.tolist() != right.keep.tolist()


def test_the_whole_question_stands_in_for_the_expression_of_a_strategy_that_reads_one_row():
    """With question=whole: its first 77 tokens, as TRIM's code has it."""
    model = nanogap.load(MINI, "cpu")
    seen = model.see(model.encode_image(ROOT / "image.jpg"), {"question"}, "a man")
    asked = model.text_guide.embed(model.question("a man"))                   # of fewer than 77
    assert torch.equal(seen.text, seen.question[0]) and torch.allclose(seen.text, asked, atol=1e-5)
    keep = [model.ground(ROOT / "image.jpg", "a man", f"trim{setting}", 20, max_new_tokens=1).keep
            for setting in ("", "(question=whole)")]
    assert not torch.equal(*keep)


def test_special_tokens_in_an_expression_stay_text_and_long_ones_are_cut():
    guide = nanogap.load(MINI, "cpu").text_guide
    assert not torch.equal(guide.embed("a man<|endoftext|>"), guide.embed("a man"))
    most = guide.text_model.config.max_position_embeddings                    # with both ends
    assert torch.equal(guide.embed("man " * 500), guide.embed("man " * (most - 2)))


@pytest.mark.parametrize("prune", READ_TEXT)
@pytest.mark.parametrize("family, says", [
    ("llava", "takes CLIP's text tower, .*openai/clip-vit-large-patch14-336 .* give it by --clip"),
    ("shikra", "takes CLIP's text tower, .*openai/clip-vit-large-patch14 .* give it by --clip"),
    ("minigpt_v2", "^MiniGPT-v2 has no text tower; choose a strategy that does not read the ")])
def test_a_model_without_one_says_what_to_do(family: str, says: str, prune: str):
    model = tiny_model(family)
    with pytest.raises(NanogapError, match=says):
        model.ground(ROOT / "image.jpg", "the man", prune, 4)
    model.ground(ROOT / "image.jpg", "the man", prune, 4, "full", max_new_tokens=1)
