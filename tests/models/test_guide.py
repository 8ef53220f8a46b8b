"""CLIP's text tower beside a LLaVA, for pruning that reads the expression."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nanogap
from nanogap import NanogapError
from nanogap.prune import STRATEGIES, needs_of
from tests.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights/mini"
GET = ("`hf download openai/clip-vit-large-patch14-336 pytorch_model.bin config.json "
       "tokenizer.json --local-dir weights/clip-vit-large-patch14-336` (1.7 GB)")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return shutil.copytree(MINI / "clip_text", tmp_path / "clip")


def refusal(clip: Path) -> str:
    with pytest.raises(NanogapError) as caught:
        nanogap.load(MINI, "cpu", clip=clip)
    return str(caught.value)


def test_the_minis_own_is_found_beside_it():
    guide = nanogap.load(MINI, "cpu").text_guide
    assert guide.embed("the man on the left").shape == (128,)


def test_only_the_text_side_is_loaded(clip: Path):
    guide = nanogap.load(MINI, "cpu", clip=clip).text_guide
    parts = {name.split(".")[0] for name in guide.clip.state_dict()}
    assert parts == {"text_model", "text_projection", "visual_projection"}


def test_openais_own_file_is_a_pickle_and_means_the_same(clip: Path):
    """openai/clip-vit-large-patch14-336 has pytorch_model.bin and no safetensors."""
    before = nanogap.load(MINI, "cpu", clip=clip).text_guide.embed("a man in blue")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    after = nanogap.load(MINI, "cpu", clip=clip).text_guide.embed("a man in blue")
    assert torch.equal(after, before)


def test_a_text_is_compared_with_the_captions_that_training_saw():
    """The tower tells colours and kinds apart: a paraphrase is nearer than another thing."""
    guide = nanogap.load(MINI, "cpu").text_guide
    red, also, other = (torch.nn.functional.normalize(guide.embed(words), dim=0)
                        for words in ("a red car and a blue ball", "a blue ball and a red car",
                                      "a green tree"))
    assert red @ also > 0.9 > red @ other


def test_special_tokens_in_an_expression_stay_text_and_long_ones_are_cut():
    guide = nanogap.load(MINI, "cpu").text_guide
    assert not torch.equal(guide.embed("a man<|endoftext|>"), guide.embed("a man"))
    most = guide.clip.text_model.config.max_position_embeddings               # with both ends
    assert torch.equal(guide.embed("man " * 500), guide.embed("man " * (most - 2)))


@pytest.mark.parametrize("change, message", [
    (lambda c: shutil.rmtree(c), "has no config.json, so it is no CLIP; get it with " + GET),
    (lambda c: (c / "model.safetensors").unlink(),
     "holds no model.safetensors and no index of shards; get the weights with " + GET),
    (lambda c: (c / "config.json").write_text('{"model_type": "llava"}'),
     "describes a 'llava' model, not a 'clip'"),
    (lambda c: (c / "tokenizer.json").unlink(), "has no tokenizer.json; download it again, whole"),
])
def test_what_is_no_clip_is_refused(clip: Path, change, message: str):
    change(clip)
    assert refusal(clip).endswith(message)


def test_a_pickle_that_would_run_code_is_refused(clip: Path):
    (clip / "model.safetensors").unlink()
    (clip / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pytorch_model.bin cannot be read (" in refusal(clip)


def test_the_clip_of_another_model_is_refused(clip: Path):
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 64, "num_attention_heads": 4}
    (clip / "config.json").write_text(json.dumps(config))
    assert refusal(clip) == (f"{clip} is a CLIP of hidden_size 64, and the vision tower has 128: "
                             "give the CLIP that it comes from")


READ_TEXT = [name for name in STRATEGIES if "text" in needs_of(name)]


def test_some_strategies_read_the_expression():
    assert {"text_similarity", "trim"} <= set(READ_TEXT)


@pytest.mark.parametrize("prune", READ_TEXT)
def test_a_llava_without_one_says_how_to_get_it(tmp_path: Path, prune: str):
    write_checkpoint(tmp_path / "tiny")
    model = nanogap.load(tmp_path / "tiny", "cpu")
    with pytest.raises(NanogapError, match="takes CLIP's text tower, .* give it by --clip"):
        model.ground(ROOT / "image.jpg", "the man", prune, 4)
    model.ground(ROOT / "image.jpg", "the man", prune, 4, "full", max_new_tokens=1)
