"""The mini model that ships: what it says, word for word, and what pruning does to it.

The golden answers are made again by `python -m tests.test_mini`.
"""

import json
from pathlib import Path

import pytest
import torch

import nanogap
from nanogap.gap import MODES
from nanogap.llava import Llava
from nanogap.prune import Kept

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden_mini.json")
EXPRESSION = "the man on the left"


@pytest.fixture(scope="module")
def model() -> Llava:
    return nanogap.load(ROOT / "weights" / "mini", device="cpu", dtype="float32")


def said(model: Llava) -> dict[str, str]:
    look = model.look(ROOT / "image.jpg")
    return {f"{mode} {keep}": model.ground(look, EXPRESSION, "random", keep, mode).text
            for keep in (72, 144) for mode in MODES if keep == 72 or mode == "full"}


def test_the_golden_answers_in_each_mode(model: Llava):
    """One text tests tokenizer, weights, RoPE, cache, pruning and position IDs together."""
    assert said(model) == json.loads(GOLDEN.read_text())


def test_cached_generation_says_what_whole_passes_say_under_gap(model: Llava):
    look = model.look(ROOT / "image.jpg")
    result = model.ground(look, EXPRESSION, "random", 36, "gap", seed=2)
    fed = model.sequence(model.prompt(EXPRESSION), look.seen.features, Kept(result.keep), "gap")
    embed = model.language_model.model.embed_tokens
    x = torch.cat([fed.embeddings, embed(torch.tensor(result.tokens[:-1]))[None]], 1)
    ids = torch.cat([fed.position_ids, result.next_position + torch.arange(len(result.tokens) - 1)])
    logits = model.language_model(x, ids)[0, -len(result.tokens):]
    assert logits.argmax(-1).tolist() == result.tokens


def test_the_checkpoint_has_the_published_layout(model: Llava):
    from safetensors import safe_open
    with safe_open(ROOT / "weights" / "mini" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    parts = {name.split(".")[0] for name in names}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.pre_layrnorm.weight" in names
    assert "language_model.lm_head.weight" in names


def test_with_ids_permuted_but_nothing_removed_the_answer_changes(model: Llava):
    look = model.look(ROOT / "image.jpg")
    full, permuted = (model.ground(look, EXPRESSION, "random", 144, mode).text
                      for mode in ("full", "permuted"))
    assert full != permuted


if __name__ == "__main__":
    shipped = nanogap.load(ROOT / "weights" / "mini", "cpu", "float32")
    GOLDEN.write_text(json.dumps(said(shipped), indent=2) + "\n")
