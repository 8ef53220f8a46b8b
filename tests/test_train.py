"""Training: what it learns from, that shared prefixes change nothing, and that it continues."""

import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import nanogap
from nanogap import NanogapError
from nanogap.cli import answer_for
from nanogap.clip import CLIPVisionConfig
from nanogap.models.llava import Llava
from nanogap.scenes import Scene, Thing, draw_scene, named, scene
from nanogap.train import __main__ as train
from nanogap.train import fit, objectives
from nanogap.train.fit import Progress
from nanogap.train.objectives import (
    SINGLES,
    Mixture,
    Scenes,
    contents,
    draw_alike,
    draw_often_alike,
    llava_loss,
    short_questions,
    tasks,
)

VISION = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, image_size=56, patch_size=14)
MIXTURE = Mixture(boxes=6, finds=4, words=5, hundredths=0.25, find=20.0, word=3.0)
TINY = replace(train.CPU, vision=VISION, projection_dim=8,
               stages=tuple(replace(stage, images=2, asked=stage.asked and MIXTURE)
                             for stage in train.CPU.stages),
               text=replace(train.CPU.text, hidden_size=16, intermediate_size=32,
                            num_hidden_layers=1, num_attention_heads=2),
               decoder=replace(train.CPU.decoder, hidden_size=32, intermediate_size=48,
                               num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                               head_dim=16))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Llava:
    return train.new_model(TINY, 0, train.new_clip(TINY, 0)[0])


def test_the_loss_on_shared_prefixes_is_the_loss_on_whole_sequences(model: Llava):
    """Each question alone, as in inference, against all of them behind one image."""
    pixels, scenes, _ = Scenes("test", 2, 56)[3]
    before = model.prompt("anything").tolist()
    before = before[:before.index(model.config.image_token) + 1]
    asked = tasks(model, scenes, MIXTURE, random.Random(5))
    assert [len(task.answers) for task in asked] == [6, 4, 5, 2]   # boxes, finds, words, captions
    losses = []
    for task in asked:
        for prompt, answer, i in zip(task.prompts, task.answers, task.about, strict=True):
            logits = model(torch.tensor(before + prompt + answer[:-1]), pixels[i:i + 1])
            said = logits[-len(answer):]
            losses.append(F.cross_entropy(said, torch.tensor(answer), reduction="none"))
    weights = torch.cat([task.token_weights() for task in asked])
    alone = (torch.cat(losses) * weights).sum() / weights.sum()
    together = llava_loss(model, (pixels, scenes, random.Random(5)), CPU, MIXTURE)
    assert together.item() == pytest.approx(alone.item(), abs=1e-5)


def test_hundredths_weigh_less_than_what_finds_the_thing_and_words_more(model: Llava):
    scenes = Scenes("test", 2, 56)[3][1]
    boxes, finds, words, descriptions = tasks(model, scenes, MIXTURE, random.Random(5))
    tokens = [model.tokenizer.id_to_token(i) for i in boxes.answers[0]]
    light = [at for at, weight in enumerate(boxes.token_weights()[:25]) if weight == 0.25]
    assert len(tokens) == 25 and light == [4, 10, 16, 22]
    assert all(tokens[at - 2] == "." for at in light)
    assert words.token_weights().unique().tolist() == [3.0]
    *start, tenth = (model.tokenizer.id_to_token(i) for i in finds.answers[0])
    assert start == tokens[:3] and tenth.isdigit()
    assert finds.token_weights()[:4].tolist() == [0.0, 0.0, 0.0, 20.0]
    assert descriptions.token_weights().unique().tolist() == [1.0]
    plain = tasks(model, scenes, Mixture(boxes=6), random.Random(5))
    assert [task.token_weights().unique().tolist() for task in plain] == [[1.0], [1.0]]


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


def test_muon_takes_the_matrices_of_projector_and_decoder_and_adamw_the_rest(model: Llava):
    names = {id(p): name for name, p in model.named_parameters()}
    _, read, find, _ = TINY.stages
    adamw, muon = ({names[id(p)] for group in stepper.param_groups for p in group["params"]}
                   for stepper in fit.optimizers(model, find))
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= adamw
    layer = "language_model.model.layers.0."
    assert {"multi_modal_projector.linear_1.weight", layer + "mlp.up_proj.weight"} <= muon
    assert adamw | muon == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not adamw & muon and all("norm" not in name for name in muon)
    assert len(fit.optimizers(model, read)) == 1


def test_a_rate_warms_up_and_decays_to_what_the_stage_leaves():
    for left, shares in ((0.0, [0.005, 0.5, 0.5, 0.001]), (0.5, [0.005, 0.5, 0.75, 0.5005])):
        found = [fit.rate_share(step, 1000, left) for step in (0, 99, 500, 999)]
        assert found == pytest.approx(shares)


def test_training_never_touches_the_vision_tower_in_stage_one(model: Llava):
    llava_loss(model, Scenes("test", 2, 56)[0], CPU, MIXTURE).backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.multi_modal_projector.parameters())
    model.zero_grad()


def test_each_stage_draws_its_own_scenes():
    data = [Scenes("test", 4, 56, stage.draw) for stage in train.CPU.stages]
    counts = [{len(drawn.things) for i in range(9) for drawn in scenes[i][1]} for scenes in data]
    assert [stage.name for stage in train.CPU.stages] == ["CLIP", "read", "find", "box"]
    assert counts.pop(1) == {1}
    assert all(min(count) == 2 and max(count) > 4 for count in counts)


def test_things_that_are_alike_are_told_apart_by_kind_alone_or_by_colour_alone():
    counts = Counter()
    for seed in range(200):
        drawn = draw_alike(random.Random(seed), 56)
        kinds = {thing.kind for thing in drawn.things}
        colours = {thing.colour for thing in drawn.things}
        assert sorted((len(kinds), len(colours))) == [1, len(drawn.things)]
        assert [i for _, i in drawn.expressions] == list(range(len(drawn.things)))
        assert all({drawn.things[i].kind, drawn.things[i].colour} < {*words.split()}
                   for words, i in drawn.expressions)
        counts[len(kinds) == 1, len(drawn.things)] += 1
    assert set(counts) == {(one_kind, n) for one_kind in (True, False) for n in (2, 3, 4)}
    assert 145 <= sum(counts[True, n] for n in (2, 3, 4)) <= 175              # four in five


def test_two_of_three_scenes_can_show_things_alike():
    def alike(drawn: Scene) -> bool:
        names = [f"the {named(thing.kind, thing.colour)}" for thing in drawn.things]
        return [expression for expression, _ in drawn.expressions] == names

    data = [Scenes("test", 4, 56, draw) for draw in (draw_often_alike, draw_scene)]
    often, any_scene = (sum(alike(drawn) for i in range(12) for drawn in scenes[i][1])
                        for scenes in data)
    assert 26 <= often <= 40 and any_scene == 0                               # of 48


def test_batches_follow_from_the_seed_and_belong_to_no_split():
    assert torch.equal(Scenes("0 llava", 2, 56)[7][0], Scenes("0 llava", 2, 56)[7][0])
    assert not torch.equal(Scenes("0 llava", 2, 56)[7][0], Scenes("1 llava", 2, 56)[7][0])
    drawn = [s.things for s in Scenes("0 llava", 8, 56)[0][1]]
    assert scene("train", 0).things not in drawn and scene("val", 0).things not in drawn


def test_a_caption_is_true_of_an_image_that_holds_at_least_as_much():
    box = (0.0, 0.0, 1.0, 1.0)
    two_trees = [Thing("tree", "green", box)] * 2
    assert contents(two_trees[:1]) <= contents(two_trees)
    assert not contents(two_trees) <= contents(two_trees[:1])
    assert contents(two_trees) == Counter({("tree", "green"): 2})
    assert len(SINGLES) == 64


def run(out: Path, steps: list[int], **options: object) -> dict[str, bytes]:
    train.train(out, TINY, CPU, steps=steps, **options)
    return {path.relative_to(out).as_posix(): path.read_bytes()
            for path in sorted(out.rglob("*")) if path.is_file()}


def test_training_writes_a_model_that_loads_and_the_seed_decides_every_byte(tmp_path: Path):
    first, second, other = (run(tmp_path / name, [2, 1, 1, 2], seed=seed) for name, seed in
                            (("a", 0), ("b", 0), ("c", 1)))
    assert list(first) == [
        "clip_text/config.json", "clip_text/model.safetensors", "clip_text/tokenizer.json",
        "config.json", "generation_config.json", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json"]
    assert first == second != other
    model = nanogap.load(tmp_path / "a", device="cpu")
    result = model.ground(scene("test", 0).image, "the man", "random", 8, "gap")
    assert result.timings["new_tokens"] >= 1


@pytest.mark.parametrize("steps_left", [2, 7])   # within "read", within "box"
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_left: int):
    whole = run(tmp_path / "whole", [2, 4, 1, 3])
    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)   # save after every step

    def interrupted(*args: object, **named: object) -> torch.Tensor:
        nonlocal steps_left
        if steps_left == 0:
            raise KeyboardInterrupt
        steps_left -= 1
        return llava_loss(*args, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "llava_loss", interrupted)
        run(tmp_path / "broken", [2, 4, 1, 3])
    assert (tmp_path / "broken" / "training.pt").exists()
    assert run(tmp_path / "broken", [2, 4, 1, 3]) == whole
    assert not (tmp_path / "broken" / "training.pt").exists()


def test_steps_that_are_given_count_and_not_those_that_were_saved(tmp_path: Path, capsys):
    model = train.new_clip(TINY, 0)[0]
    torch.save({"settings": {"seed": 0, "size": 56, "stages": ["CLIP", "read", "find", "box"]},
                "steps": [9, 9, 9, 9], "stage": 1, "step": 0, "clip": model.state_dict(),
                "state": {}}, tmp_path / "training.pt")
    run(tmp_path, [9, 1, 2, 1])
    assert capsys.readouterr().out.endswith("--steps 9 1 2 1\n")


def test_minutes_become_steps_by_what_the_last_ones_took(tmp_path: Path):
    progress = Progress(tmp_path / "training.pt", {}, steps=[7, 7], minutes=[9.0, 1.0], stage=1)
    assert progress.choose_steps(20, seconds=10.0, seconds_per_step=0.5) == 20 + 50 / 0.5
    assert progress.steps == [7, 120]
    assert progress.choose_steps(120, seconds=70.0, seconds_per_step=0.5) == 121


def test_a_slow_start_does_not_shorten_a_training(tmp_path: Path, monkeypatch, capsys):
    """By a clock that goes on by a second when it is read, and by ten before the first step."""
    told = [0, *range(10, 10_000)]
    monkeypatch.setattr(fit, "TIMED", 2)
    monkeypatch.setattr(fit, "time", SimpleNamespace(time=lambda: told.pop(0)))
    stage = replace(TINY.stages[0], steps=9)
    progress = Progress(tmp_path / "training.pt", {}, [stage.steps], [1.0])
    clip, words = train.new_clip(TINY, 0)
    fit.fit(stage, clip, lambda batch: objectives.clip_loss(clip, words, batch, CPU),
            Scenes("test", 2, 56), progress, 0)
    assert progress.steps[0] >= 30 and told[0] <= 60   # by the first two steps alone about ten


def test_workers_send_no_pictures():
    """Which would be most of what goes through their pipe; of a picture, training asks the size."""
    drawn = Scenes("test", 2, 56)[3][1]
    assert [s.image.mode for s in drawn] == ["1", "1"]
    assert {s.image.width for s in drawn} <= {56, 112}
    assert len(pickle.dumps(drawn)) < 10_000


def test_a_training_takes_steps_or_minutes(tmp_path: Path, capsys):
    asked = ["--out", str(tmp_path), "--minutes", "1", "--steps", *"1111"]
    assert answer_for("train", train.command, asked) == 2
    assert "not allowed with argument --minutes" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [
    {"seed": 7},
    {"seed": 0, "size": 56, "courses": ["CLIP", "read", "find", "box"]},      # of an older version
])
def test_a_training_with_other_settings_is_not_continued(tmp_path: Path, settings: dict):
    torch.save({"settings": settings, "course": 1}, tmp_path / "training.pt")
    message = "is of a training with other settings .* delete it to start anew"
    with pytest.raises(NanogapError, match=message):
        train.train(tmp_path, TINY, CPU, steps=[1, 1, 1, 1])


@pytest.mark.parametrize("data", [b"", b"not a saved state", pickle.dumps([], protocol=2)])
def test_a_broken_state_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "training.pt").write_bytes(data)
    with pytest.raises(NanogapError, match="training.pt cannot be read .* delete it to start anew"):
        train.train(tmp_path, TINY, CPU, steps=[1, 1, 1, 1])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NanogapError, match="file/out cannot be written .*; give another folder"):
        train.train(tmp_path / "file" / "out", TINY, CPU, steps=[1, 1, 1, 1])
