"""Training: what it learns from, that shared prefixes change nothing, and that it continues."""

import hashlib
import random
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import nanogap
from nanogap.checks.command import answer_for
from nanogap.models import MODELS, VLM
from nanogap.train import __main__ as train
from nanogap.train import recipes
from nanogap.train.losses import llava_loss
from nanogap.train.recipes import Batch, Scenes, decimal_places, short_questions
from nanogap.train.scenes import scene
from nanogap.train.untrained import new_model
from tests.tiny import lines_of

ASKED = {"images": 2, "asked": {"box": 6, "find": 4, "word": 5, "description": 8}, "later": 0.0,
         "weights": {"hundredths": 0.25, "find": 20.0, "word": 3.0}}
TINY = replace(recipes.RECIPE,
               vision=replace(recipes.RECIPE.vision, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=2, num_attention_heads=2, image_size=56),
               stages=tuple(replace(stage, **ASKED) for stage in recipes.RECIPE.stages),
               text=replace(recipes.RECIPE.text, hidden_size=16, intermediate_size=32,
                            num_hidden_layers=1, num_attention_heads=2),
               decoder=replace(recipes.RECIPE.decoder, hidden_size=32, intermediate_size=48,
                               num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                               head_dim=16))
BOX = TINY.stages[-1]
MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"


@pytest.fixture(scope="module")
def model() -> VLM:
    return new_model(TINY, 0)


def drawn(model: VLM, later: float = 0.0) -> Batch:
    return Scenes(0, replace(BOX, later=later), model)[3]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("later", [0.0, 0.6])
def test_the_loss_on_shared_prefixes_is_that_of_each_conversation_alone(family: str, later: float):
    model = new_model(replace(TINY, family=family), 0)
    pixels, scenes, said = drawn(model, later)
    losses, weights = [], []
    for one in said:
        tokens = torch.tensor([*one.head, model.config.image_token, *one.tokens])
        size = scenes[one.image].image.size
        logits = model(tokens[:-1], pixels[one.image], size=size)
        behind = [i - len(one.tokens) for i, weight in enumerate(one.weights) if weight > 0]
        losses.append(F.cross_entropy(logits[behind], tokens[behind], reduction="none"))
        weights += [one.weights[i] for i in behind]
    alone = (torch.cat(losses) * torch.tensor(weights)).sum() / sum(weights)
    assert llava_loss(model, drawn(model, later)).item() == pytest.approx(alone.item(), abs=1e-5)


def test_a_share_of_the_questions_comes_after_others_about_the_same_image(model: VLM):
    """In the form of a conversation, and the loss is on all answers, each with its own weights."""
    asked = [drawn(model, later)[2] for later in (0.0, 0.6, 1.0)]
    kinds = [Counter(one.kind for one in said) for said in asked]
    assert kinds[0] == {"box": 6, "find": 4, "word": 5, "description": 2}
    assert 4 < kinds[1]["turns"] < 17 and kinds[2] == {"turns": 17}
    one = asked[2][0]
    text = "".join(map(model.tokenizer.id_to_token, one.tokens))
    end = text.count("</s>")
    assert text.count("</s>▁USER:") + 1 == end in (2, 3) and text.endswith("</s>")
    assert [one.tokens[i] for i, w in enumerate(one.weights) if w > 0].count(2) == end
    finds = [one for one in asked[2] if one.weights[-1] == BOX.weights["find"]]
    assert len(finds) == 4 and all(one.tokens[-1] != 2 for one in finds)


def test_hundredths_weigh_less_than_what_finds_the_thing_and_words_more(model: VLM):
    said = {}                                             # an answer of each kind, and its weights
    for one in drawn(model)[2]:
        tokens = [model.tokenizer.id_to_token(token) for token in one.tokens]
        start = len(tokens) - tokens[::-1].index(":")
        said[one.kind] = tokens[start:], one.weights[start:]
    box, weights = said["box"]
    assert len(box) == 25 and [at for at in range(25) if weights[at] == 0.25] == [4, 10, 16, 22]
    assert [box[at - 2] for at in (4, 10, 16, 22)] == 4 * ["."]
    assert {*said["word"][1]} == {3.0} and {*said["description"][1]} == {1.0}
    (*begun, tenth), weights = said["find"]
    assert begun == box[:3] and tenth.isdigit() and weights == [0.0, 0.0, 0.0, 20.0]


@pytest.mark.parametrize("tokens, places", [
    ("[ 0 . 1 2 , 0 . 3 4 ]", [0, 0, 0, 1, 2, 0, 0, 0, 1, 2, 0]),
    ("{< 1 2 >< 7 >< 1 0 0 >}", [0, 1, 2, 0, 1, 0, 1, 2, 3, 0])])
def test_each_digit_of_a_box_has_its_place(tokens: str, places: list[int]):
    assert decimal_places([*tokens.split(), ""]) == [*places, 0]


def test_short_questions_have_one_true_answer():
    """Asked of scenes from the generator, answered again from what is in them."""
    rng, answers = random.Random(1), Counter()
    for index in range(60):
        drawn = scene("short", index, 64)
        there = [(thing.kind, thing.colour) for thing in drawn.things]
        for question, word in short_questions(drawn, rng):
            words = question.removesuffix("?").split()
            if question.startswith("What colour is the "):
                assert {drawn.things[thing].colour for expression, thing in drawn.expressions
                        if expression.removeprefix("the ") == " ".join(words[4:])} == {word}
            elif question.startswith("What is "):
                assert [kind for kind, colour in there if colour in words] == [word]
            else:
                assert word == ("yes" if any(k in words and c in words for k, c in there) else "no")
                answers[word] += 1
    assert min(answers["yes"], answers["no"]) > 50


def test_muon_takes_the_matrices_of_projector_and_decoder_and_adamw_the_rest(model: VLM):
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = ({names[id(p)] for group in stepper.param_groups for p in group["params"]}
                   for stepper in train.optimizers(model, TINY.stages[2]))
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= adamw
    layer = "language_model.model.layers.0."
    assert {"multi_modal_projector.linear_1.weight", layer + "mlp.up_proj.weight"} <= muon
    tower = {name for name in names.values() if name.startswith("vision_tower.")}   # it is frozen
    assert adamw | muon == {*names.values()} - tower != {*names.values()}
    assert not adamw & muon and all("norm" not in name for name in muon)
    assert len(train.optimizers(model, TINY.stages[1])) == 1


def test_what_each_stage_draws_and_asks_stays_what_it_was(model: VLM):
    """The recipe was found with these; workers send no pictures."""
    said = []
    for stage in recipes.RECIPE.stages:
        _, scenes, asked = Scenes(0, stage.share(8), model)[0]
        assert {one.image.mode for one in scenes} == {"1"}
        said += [(one.things, one.expressions) for one in scenes]
        said += asked if stage.name == "CLIP" else [
            (one.kind, one.image, model.tokenizer.decode(one.tokens)) for one in asked]
    assert hashlib.sha256(repr(said).encode()).hexdigest()[:16] == "2df1e78484215ba5"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def run(out: Path, steps: list[int], seed: int = 0, start: Path | None = None) -> dict[str, bytes]:
    stages = tuple(replace(stage, steps=number)
                   for stage, number in zip(TINY.stages[-len(steps):], steps, strict=True))
    args = Namespace(out=out, start=start, seed=seed, minutes=None, workers=0)
    out.mkdir()
    train.train(args, replace(TINY, stages=stages), torch.device("cpu"))
    return files_of(out)


def test_training_writes_a_model_that_loads_and_the_seed_decides_every_byte(tmp_path: Path):
    first, second, other = (run(tmp_path / name, [2, 1, 1, 2], seed)
                            for name, seed in zip("abc", (0, 0, 1), strict=True))
    assert list(first) == [
        "clip_text/config.json", "clip_text/model.safetensors", "clip_text/tokenizer.json",
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json"]
    assert first == second != other
    model = nanogap.load(tmp_path / "a", device="cpu")
    assert model.ground(scene("test", 0).image, "the man", "random", 8).timings["new_tokens"] >= 1


def test_what_was_interrupted_goes_on_behind_the_last_stage_that_ended(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "llava_loss", Mock(side_effect=KeyboardInterrupt))
        run(tmp_path / "a", [2, 1, 1, 1])
    begun = files_of(tmp_path / "a")
    done = run(tmp_path / "b", [1, 1, 1], start=tmp_path / "a")
    changed = {name for name in begun if begun[name] != done[name]}
    assert begun.keys() == done.keys() and changed == {"model.safetensors"}


class Blank(Scenes):
    """Steps without scenes."""

    def __getitem__(self, step: int) -> int:
        return step


@pytest.mark.parametrize("minutes, steps", [(None, 1000), (1, 60)])
def test_the_steps_of_a_stage_or_as_many_as_fit_into_the_minutes(
        minutes: int | None, steps: int, monkeypatch: pytest.MonkeyPatch, capsys):
    """By a clock that goes on by a second a step.  Rates warm up, and decay to half."""
    clock = count()
    shares = []
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(train, "take_step", lambda *given: shares.append(given[3]) or 0.5)
    steps_of = Blank(0, replace(BOX, steps=1000, rate_left=0.5), None)
    assert train.fit(torch.nn.Linear(2, 2), Mock(), steps_of, minutes) == len(shares) == steps
    assert [shares[i] for i in (0, 39)] == pytest.approx([0.005, 0.2])
    if not minutes:
        assert [shares[i] for i in (99, 500, 999)] == pytest.approx([0.5, 0.75, 0.5005])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"box    step {steps}/{steps}  loss 0.500  0:00:00 to go ..."


@pytest.mark.parametrize("words, message", [
    (["--out", "file/out"], "file/out cannot be written"),
    (["--minutes", "0"], "--minutes: '0' is not a whole number from 1 on"),
    (["--stages", "box", "--steps", "1"], "--steps 1: give a number for each of CLIP, box"),
    (["--start", str(MINI), "--model", "minigpt_v2"], "start from a minigpt_v2")])
def test_a_mistake_is_one_line(
        words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert answer_for("train", train.command, ["--out", "out", "--device", "cpu", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and lines_of(said) == 1
    assert not [*tmp_path.glob("out/*")]
