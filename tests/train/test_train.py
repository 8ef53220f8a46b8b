"""Training: what it learns from, that shared prefixes change nothing, and that it continues."""

import pickle
import random
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import nanogap
from nanogap.checks.command import answer_for
from nanogap.clip import CLIPVisionConfig
from nanogap.models import MODELS, VLM
from nanogap.train import __main__ as train
from nanogap.train import recipes
from nanogap.train.losses import llava_loss
from nanogap.train.recipes import Batch, Scenes, decimal_places, short_questions
from nanogap.train.scenes import Scene, named, scene
from nanogap.train.untrained import new_model
from tests.tiny import lines_of

VISION = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, image_size=56, patch_size=14)
ASKED = {"images": 2, "asked": {"box": 6, "find": 4, "word": 5, "description": 8}, "later": 0.0,
         "weights": {"hundredths": 0.25, "find": 20.0, "word": 3.0}}
TINY = replace(recipes.RECIPE, vision=VISION,
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
    recipe = replace(TINY, family=family)
    model = new_model(recipe, 0)
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
    shared = llava_loss(model, drawn(model, later))
    assert shared.item() == pytest.approx(alone.item(), abs=1e-5)


def test_a_share_of_the_questions_comes_after_others_about_the_same_image(model: VLM):
    """In the form of a conversation, and the loss is on all answers, each with its own weights."""
    asked = [drawn(model, later)[2] for later in (0.0, 0.6, 1.0)]
    kinds = [Counter(one.kind for one in said) for said in asked]
    assert kinds[0] == {"box": 6, "find": 4, "word": 5, "description": 2}
    assert 4 < kinds[1]["turns"] < 17 and kinds[2] == {"turns": 17}
    one = asked[2][0]
    head, text = ("".join(map(str, map(model.tokenizer.id_to_token, tokens)))
                  for tokens in (one.head, one.tokens))
    end = text.count("</s>")
    assert head.endswith("USER:▁") and 1 + text.count("USER") == end in (2, 3)
    assert "</s>▁USER:" in text and text.endswith("</s>")
    assert [one.tokens[i] for i, w in enumerate(one.weights) if w > 0].count(2) == end
    finds = [one for one in asked[2] if one.weights[-1] == BOX.weights["find"]]
    assert len(finds) == 4 and all(one.tokens[-1] != 2 for one in finds)


def test_hundredths_weigh_less_than_what_finds_the_thing_and_words_more(model: VLM):
    answers: dict[str, list[tuple[list, list]]] = {}      # (tokens, weights) of each kind
    for one in drawn(model)[2]:
        tokens = [model.tokenizer.id_to_token(token) for token in one.tokens]
        start = len(tokens) - tokens[::-1].index(":")
        answers.setdefault(one.kind, []).append((tokens[start:], one.weights[start:]))
    tokens, weights = answers["box"][0]
    light = [at for at, weight in enumerate(weights) if weight == 0.25]
    assert len(tokens) == 25 and light == [4, 10, 16, 22]
    assert all(tokens[at - 2] == "." for at in light)
    assert {weight for _, weights in answers["word"] for weight in weights} == {3.0}
    assert {weight for _, weights in answers["description"] for weight in weights} == {1.0}
    (*begun, tenth), weights = answers["find"][0]
    assert begun == tokens[:3] and tenth.isdigit() and weights == [0.0, 0.0, 0.0, 20.0]


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
            if question.startswith("What colour is the "):
                said = question.removeprefix("What colour is the ").removesuffix("?")
                told = {thing for expression, thing in drawn.expressions
                        if expression.removeprefix("the ") == said}
                assert {drawn.things[thing].colour for thing in told} == {word}
            elif question.startswith("What is "):
                kinds = [kind for kind, colour in there if f"What is {colour}?" == question]
                assert kinds == [word]
            else:
                words = question.removesuffix("?").split()
                assert word == ("yes" if any(k in words and c in words for k, c in there) else "no")
                answers[word] += 1
    assert min(answers["yes"], answers["no"]) > 50


def test_muon_takes_the_matrices_of_projector_and_decoder_and_adamw_the_rest(model: VLM):
    names = {id(p): name for name, p in model.named_parameters()}
    _, read, find, _ = TINY.stages
    adamw, muon = ({names[id(p)] for group in stepper.param_groups for p in group["params"]}
                   for stepper in train.optimizers(model, find))
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= adamw
    layer = "language_model.model.layers.0."
    assert {"multi_modal_projector.linear_1.weight", layer + "mlp.up_proj.weight"} <= muon
    assert adamw | muon == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not adamw & muon and all("norm" not in name for name in muon)
    assert len(train.optimizers(model, read)) == 1


def test_the_vision_tower_is_frozen_behind_clips_stage(model: VLM):
    llava_loss(model, drawn(model)).backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.multi_modal_projector.parameters())
    model.zero_grad()


def test_each_stage_draws_its_own_scenes(model: VLM):
    """One thing in *read*; in *find* two of three scenes show things alike."""
    def alike(drawn: Scene) -> bool:
        names = [f"the {named(thing.kind, thing.colour)}" for thing in drawn.things]
        return [expression for expression, _ in drawn.expressions] == names

    drawn = {stage.name: [one for i in range(2)
                          for one in Scenes(0, stage, model)[i][1]]
             for stage in recipes.RECIPE.stages}
    assert {len(one.things) for one in drawn["read"]} == {1}
    told = [({thing.kind for thing in one.things}, {thing.colour for thing in one.things})
            for one in drawn["find"] if alike(one)]
    assert 26 <= len(told) <= 40                                              # of 48
    assert all(min(len(kinds), len(colours)) == 1 for kinds, colours in told)
    assert len(told) / 2 < sum(len(kinds) == 1 for kinds, _ in told) < len(told)
    assert len(pickle.dumps(drawn["find"])) < 500_000   # workers send no pictures
    for name in ("CLIP", "box"):
        assert {len(one.things) for one in drawn[name]} >= {2, 3, 4, 5}
        assert not any(map(alike, drawn[name]))


# ----- a whole training ---------------------------------------------------------------------------


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
    first, second, other = (run(tmp_path / name, [2, 1, 1, 2], seed=seed) for name, seed in
                            (("a", 0), ("b", 0), ("c", 1)))
    assert list(first) == [
        "clip_text/config.json", "clip_text/model.safetensors", "clip_text/tokenizer.json",
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json"]
    assert first == second != other
    model = nanogap.load(tmp_path / "a", device="cpu")
    result = model.ground(scene("test", 0).image, "the man", "random", 8, "gap")
    assert result.timings["new_tokens"] >= 1


def test_what_was_interrupted_goes_on_behind_the_last_stage_that_ended(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "llava_loss", interrupted)
        run(tmp_path / "a", [2, 1, 1, 1])
    begun = files_of(tmp_path / "a")
    done = run(tmp_path / "b", [1, 1, 1], start=tmp_path / "a")
    assert {name for name in begun if begun[name] != done.pop(name)} == {"model.safetensors"}
    assert not done


class Blank:
    """A stage of a thousand steps without scenes."""

    stage = replace(BOX, steps=1000, rate_left=0.5)

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
    asked = train.fit(torch.nn.Linear(2, 2), lambda _, batch: batch, Blank(), minutes)
    assert asked == len(shares) == steps
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
    asked = ["--out", "out", "--device", "cpu", *words]
    assert answer_for("train", train.command, asked) == 2
    said = capsys.readouterr().err
    assert message in said and lines_of(said) == 1
    assert not [*tmp_path.glob("out/*")]
