"""Many questions in one cache: the words stay those of one by one, and so does every number."""

import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogap import NanogapError
from nanogap import ground as lesson
from nanogap.fast import lanes
from nanogap.fast.ground_all import TOGETHER, Asked, begin_alike
from nanogap.fast.lanes import CHOICES, Lane
from nanogap.gap import MODES
from nanogap.ground import Result
from nanogap.methods import reader
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import MODELS, VLM
from nanogap.prune import STRATEGIES, needs_of
from nanogap.train.scenes import Scene, scene
from tests.tiny import tiny_model

THINGS = ["the man", "a red car behind the tall tree", "woman with a blue umbrella", "the dog",
          "the second cup from the right"]
MODULE = sys.modules["nanogap.fast.ground_all"]


def differences(a: list[Result], b: list[Result], *without: str) -> set[str]:
    """In which fields any two results differ, times left out."""
    def told(result: Result, name: str) -> object:
        value = getattr(result, name)
        return value.tolist() if isinstance(value, Tensor) else value

    names = {field.name for field in fields(Result)} - {"timings", *without}
    return {name for one, other in zip(a, b, strict=True) for name in names
            if told(one, name) != told(other, name)}


def one_by_one(model: VLM, image: object, expressions: list[str], prune: str = "cls_attention",
               keep: Any = "50%", mode: str = "gap", *seed: int, **more) -> list[Result]:
    """The answers of the lesson, without a draft."""
    cuts = prunes_there(prune) and mode != "full" and not isinstance(keep, list | Tensor)
    ground = reader.ground if cuts else lesson.ground
    return [ground(model, image, expression, prune, keep, mode, *seed, **more)
            for expression in expressions]


def both(model: VLM, image: object, expressions: list[str], *args, drafts: bool = True,
         **more) -> list[list[Result]]:
    """The answers one by one, and together."""
    return [one_by_one(model, image, expressions, *args, **more),
            model.ground_all(image, expressions, *args, drafts=drafts, **more)]


def five_of(drawn: Scene) -> list[str]:
    return [expression for expression, _ in drawn.expressions[:5]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each pass of the decoder is fed of the questions of each lane."""
    seen: list[dict] = []
    feed = Lane.feed

    def look(lane: Lane, *more):
        tokens, position_ids, part = feed(lane, *more)
        seen.append({"ids": position_ids.tolist(), "tokens": part.size, "mask": part.mask,
                     "rows": len(lane.owner) - part.size, "room": part.cache.keys.shape[3]})
        return tokens, position_ids, part

    monkeypatch.setattr(Lane, "feed", look)
    return seen


# ----- the same words -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_says_what_it_says_one_by_one(mini: VLM, mode: str):
    """A trained model, whose answers are boxes, of which drafts foretell most."""
    texts = set()
    for number in range(3):
        drawn = scene("ground_all", number)
        image, expressions = mini.encode_image(drawn.image), five_of(drawn)
        alone = one_by_one(mini, image, expressions, "spatial", 50, mode)
        texts |= {result.text for result in alone}
        for drafts in (True, False):
            together = mini.ground_all(image, expressions, "spatial", 50, mode, drafts=drafts)
            assert differences(alone, together, "kv_bytes") == set()
    assert len(texts) > 2


@pytest.mark.parametrize("name", [name for name in STRATEGIES if "text" not in needs_of(name)])
def test_every_strategy_keeps_what_it_keeps_alone(model, picture, name: str):
    """And with the same passes, a cache that holds as much."""
    for mode in ("gap", "permuted"):
        budget = 13 if prunes_there(name) else 6
        alone, together = both(model, picture, THINGS, name, budget, mode, 3, max_new_tokens=9,
                               drafts=False)
        assert len({tuple(result.tokens) for result in alone}) > 2
        assert differences(alone, together) == set()
        assert [r.timings["passes"] for r in together] == [r.timings["passes"] for r in alone]


@pytest.mark.parametrize("family", MODELS)
def test_every_family_says_what_it_says_one_by_one(family: str, picture):
    """Shikra's question stands before its image, so its questions share no cache."""
    model = tiny_model(family)
    for args in (("cls_attention", "50%", "gap"), ("random", None, "full"),
                 ("random", torch.tensor([9, 2, 14, 5]), "shifted")):
        alone, together = both(model, picture, THINGS, *args, max_new_tokens=9, drafts=False)
        assert differences(alone, together) == set()
        alone, together = both(model, picture, THINGS, *args, max_new_tokens=9)
        assert differences(alone, together, "kv_bytes") == set()


@pytest.mark.parametrize("questions", [0, 5])
def test_any_form_right_or_wrong_leaves_the_words_as_they_are(model, picture, monkeypatch,
                                                              questions: int):
    """Forms made of the true answers: chains and choices of which some questions say one, and
    others another or none.  Choices are drafted for so many questions at a time.
    """
    plain = model.ground_all(picture, THINGS, max_new_tokens=12, drafts=False)
    said = [result.tokens for result in plain]
    every = [tuple(sorted(set(column))) for column in zip(*said, strict=True)]
    some = [tuple({said[i % 5][i], said[(i + 1) % 5][i]}) for i in range(12)]
    monkeypatch.setitem(CHOICES, "cpu", questions)
    passes = []
    for form in (every, some, every[:5] + some, [(token,) for token in said[2]], []):
        monkeypatch.setattr(MODULE, "foretell", lambda *_, form=form: form)
        together = model.ground_all(picture, THINGS, max_new_tokens=12)
        assert [result.tokens for result in together] == said
        alone = model.ground_all(picture, THINGS[:1], max_new_tokens=12)
        assert alone[0].tokens == said[0]
        passes.append([result.timings["passes"] for result in together])
        if form == [(token,) for token in said[2]]:      # all in one pass, and each has its row
            assert together[2].kv_bytes == plain[2].kv_bytes
    assert passes[-1] == [11] * 5
    assert passes[3][2] == 0 and min(passes[3][:2] + passes[3][3:]) > 5
    assert (max(passes[0]) < 8) == bool(questions)


def test_several_prunings_at_once_say_what_each_says_by_itself(mini: VLM):
    drawn = scene("ground_all", 0)
    image, expressions = mini.encode_image(drawn.image), five_of(drawn)
    runs = [Asked(expressions[:n], prune, keep, mode) for n, prune, keep, mode in (
        (5, "spatial", 50, "gap"), (3, "random", "30%", "permuted"), (5, "spatial", 50, "full"),
        (0, "random", 9, "gap"), (2, "fastv", 50, "shifted"), (5, "random", [9, 2, 14], "gap"),
        (3, "text_similarity", 20, "gap"))]
    alone = [one_by_one(mini, image, expressions, *more, seed=3) for expressions, *more, _ in runs]
    for together in (mini.ground_runs(image, runs, 3), mini.ground_runs(image, runs * 5, 3)[-7:]):
        assert [len(answers) for answers in together] == [5, 3, 5, 0, 2, 5, 3]
        assert differences(sum(together, []), sum(alone, []), "kv_bytes") == set()


@pytest.mark.parametrize("most, sizes", [(1 << 30, [3]), (1, [1, 1, 1])])
def test_as_many_prunings_share_a_pass_as_memory_allows(model, picture, monkeypatch, most: int,
                                                        sizes: list[int]):
    """And a cache is given up when its questions are answered."""
    seen: list[list[Lane]] = []
    step = lanes.step
    monkeypatch.setattr(lanes, "step", lambda model, asked, *rest: (
        seen.append(asked), step(model, asked, *rest)))
    monkeypatch.setattr(lanes, "CACHES", most)
    model.ground_runs(picture, [Asked(THINGS[:2], "random", 4)] * 3, max_new_tokens=1)
    assert [len(asked) for asked in seen] == sizes
    assert not any(hasattr(lane, "cache") for asked in seen for lane in asked)


# ----- where everything stands --------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_each_token_stands_where_it_stands_alone(model: VLM, picture, passes, mode: str):
    """The rest of each prompt, and then a token of each answer to a pass; rows are dense."""
    alone, together = both(model, picture, THINGS, "random", 5, mode, max_new_tokens=4,
                           drafts=False)
    alike = begin_alike([model.prompt(thing) for thing in THINGS])
    texts = [len(model.prompt(thing)) - alike for thing in THINGS]
    expected = [[id_ for result, text in zip(alone, texts, strict=True)
                 for id_ in result.position_ids[-text:].tolist()]]
    expected += [[result.next_position + t for result in alone if len(result.tokens) > t + 1]
                 for t in range(3)]
    assert [fed["ids"] for fed in passes] == [ids for ids in expected if ids]
    rows = len(alone[0].position_ids) - texts[0]
    for fed in passes:
        assert fed["rows"] == rows
        rows += fed["tokens"]
        assert fed["mask"].shape == (fed["tokens"], rows)
    assert differences(alone, together) == set()


def test_a_question_that_is_answered_is_fed_nothing_more(model: VLM, picture, passes, monkeypatch):
    """With the third token of the second answer as the end of all answers."""
    said = one_by_one(model, picture, THINGS, max_new_tokens=8)
    end = said[1].tokens[2]
    monkeypatch.setattr(type(model), "end_tokens", (end,))
    alone, together = both(model, picture, THINGS, max_new_tokens=8, drafts=False)
    assert differences(alone, together) == set()
    lengths = [len(result.tokens) for result in together]
    assert min(lengths) < max(lengths) == 8 and not together[1].cut_off
    assert [p["tokens"] for p in passes[1:]] == [
        sum(length > t for length in lengths) for t in range(1, 8)]
    monkeypatch.setattr(MODULE, "foretell", lambda *_: [(token,) for token in said[1].tokens])
    drafted = model.ground_all(picture, THINGS, max_new_tokens=8)    # a draft that goes on behind
    assert [result.tokens for result in drafted] == [result.tokens for result in alone]


def test_a_hundred_questions_stand_in_four_caches(model: VLM, picture, passes):
    many = [f"the {thing} {i}" for i in range(25) for thing in ("man", "car", "dog", "cup")]
    together = model.ground_all(picture, many, max_new_tokens=2, drafts=False)
    prompts = [model.prompt(thing) for thing in many]
    longest = max(map(len, prompts)) - begin_alike(prompts)
    assert len(passes) == 2 * 4
    assert max(fed["room"] - fed["rows"] for fed in passes[:4]) <= TOGETHER * (longest + 2)
    alone = one_by_one(model, picture, many[30:36], max_new_tokens=2)
    assert [r.tokens for r in together[30:36]] == [r.tokens for r in alone]


def test_in_mode_full_and_with_indices_no_strategy_is_asked(model, picture, monkeypatch):
    monkeypatch.setattr(reader, "ground", None)
    full = model.ground_all(picture, THINGS, "fastv", 8, "full", max_new_tokens=2)
    own = model.ground_all(picture, THINGS, "fastv", torch.tensor([3, 1]), max_new_tokens=2)
    assert [len(result.keep) for result in full + own] == [16] * 5 + [2] * 5
    assert "(gap, 2 of 16 visual tokens); the model said" in str(own[0])


def test_one_expression_and_the_same_one_twice(model, picture):
    """The last token of a prompt is never shared: its logits are what is asked for."""
    alone = one_by_one(model, picture, THINGS[:1], max_new_tokens=5)
    once = model.ground_all(picture, iter(THINGS[:1]), max_new_tokens=5)
    twice = model.ground_all(picture, THINGS[:1] * 2, max_new_tokens=5)
    assert differences(alone * 3, once + twice, "kv_bytes") == set()
    assert model.ground_all(picture, []) == []


# ----- what comes back ----------------------------------------------------------------------------


def test_the_times_are_shares_of_what_all_took(model, picture, monkeypatch):
    """By a clock that counts how often it is asked: twice for each thing that takes a while."""
    ticks = iter(range(1000))
    image = model.encode_image(picture)
    for module in (MODULE, lanes):
        monkeypatch.setattr(module, "clock_ms", lambda device: float(next(ticks)))
    runs = model.ground_runs(image, [Asked(THINGS, mode="full"), Asked(THINGS, "random", 4)],
                             max_new_tokens=4)
    spent = [[r.timings["prefill_ms"] + r.timings["decode_ms"] for r in run] for run in runs]
    assert sum(map(sum, spent)) == pytest.approx(next(ticks) / 2)
    assert [len(set(of_run)) for of_run in spent] == [1, 1] and spent[0][0] > spent[1][0]
    assert {tuple(r.timings) for r in runs[0]} == {tuple(model.ground(image, "it").timings)}


# ----- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("expressions, more, message", [
    ("the man", {}, "expressions is a single text: give a list of them, or call ground"),
    (["the man", " "], {}, "the expression is empty"),
    (["the man", "the man " * 400], {}, "the expression is too long"),
    (["the man"], {"prune": "nothing"}, "unknown strategy 'nothing'"),
    (["the man"], {"mode": "gaps"}, "unknown mode 'gaps'"),
    (["the man"], {"max_new_tokens": 0}, "max_new_tokens is 0: give a whole number from 1"),
    (["the man"], {"keep": 17}, "cannot keep 17 of 16 visual tokens"),
])
def test_a_mistake_is_told_before_anything_is_asked(model, picture, passes, expressions, more,
                                                    message):
    with pytest.raises(NanogapError, match=message):
        model.ground_all(picture, expressions, **more)
    assert passes == []
