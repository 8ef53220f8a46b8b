"""Training: what it learns from, that shared prefixes change nothing, and that it continues."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nanogap
from nanogap import NanogapError, fit, train
from nanogap.clip import CLIPVisionConfig
from nanogap.llava import Llava
from nanogap.objectives import SINGLES, Scenes, contents, llava_loss, tasks
from nanogap.scenes import Thing, scene

VISION = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                          image_size=56, patch_size=14)
TINY = replace(train.CPU, vision=VISION, projection_dim=8, clip_images=2, llava_images=2, questions=6,
               text=replace(train.CPU.text, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2),
               decoder=replace(train.CPU.decoder, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                               num_attention_heads=2, num_key_value_heads=2, head_dim=16))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Llava:
    return train.new_llava(TINY, 0, train.new_clip(TINY, 0)[0])


def test_the_loss_on_shared_prefixes_is_the_loss_on_whole_sequences(model: Llava):
    """Each question run alone, as inference does, against all of them hung from one image and one system."""
    pixels, scenes, _ = Scenes("test", 2, 56)[3]
    before = model.prompt("anything").tolist()
    before = before[:before.index(model.config.image_token) + 1]
    boxes, descriptions = tasks(model, scenes, 6, random.Random(5))
    assert len(boxes.answers) == 6 and len(descriptions.answers) == 2
    losses = []
    for task in (boxes, descriptions):
        for prompt, answer, i in zip(task.prompts, task.answers, task.about):
            logits = model(torch.tensor(before + prompt + answer[:-1]), pixels[i:i + 1])
            losses.append(F.cross_entropy(logits[-len(answer):], torch.tensor(answer), reduction="none"))
    together = llava_loss(model, (pixels, scenes, random.Random(5)), CPU, 6)
    assert together.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_training_never_touches_the_vision_tower_in_stage_one(model: Llava):
    llava_loss(model, Scenes("test", 2, 56)[0], CPU, 6).backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.multi_modal_projector.parameters())
    model.zero_grad()


def test_the_curriculum_starts_with_one_thing_then_two():
    data = Scenes("test", 4, 56, single=10)
    counts = [{len(s.things) for s in data[i][1]} for i in (0, 9, 10, 19)]
    assert counts == [{1}, {1}, {2}, {2}]
    assert max(len(s.things) for i in range(20, 24) for s in data[i][1]) > 2


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
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_training_writes_a_model_that_loads_and_the_seed_decides_every_byte(tmp_path: Path):
    first, second, other = (run(tmp_path / name, [2, 2], seed=seed) for name, seed in
                            (("a", 0), ("b", 0), ("c", 1)))
    assert list(first) == ["clip_text/config.json", "clip_text/model.safetensors", "clip_text/tokenizer.json",
                           "config.json", "generation_config.json", "model.safetensors",
                           "preprocessor_config.json", "tokenizer.json"]
    assert first == second != other
    model = nanogap.load(tmp_path / "a", device="cpu")
    assert model.ground(scene("test", 0).image, "the man", "random", 8, "gap").timings["new_tokens"] >= 1


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch):
    whole = run(tmp_path / "whole", [2, 4])
    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)                               # save after every step
    steps_left = 2

    def interrupted(*args: object) -> torch.Tensor:
        nonlocal steps_left
        if steps_left == 0:
            raise KeyboardInterrupt
        steps_left -= 1
        return llava_loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "llava_loss", interrupted)
        run(tmp_path / "broken", [2, 4])
    assert (tmp_path / "broken" / "training.pt").exists()
    assert run(tmp_path / "broken", [2, 4]) == whole
    assert not (tmp_path / "broken" / "training.pt").exists()


def test_a_training_with_other_settings_is_not_continued(tmp_path: Path):
    torch.save({"settings": {"seed": 7}}, tmp_path / "training.pt")
    with pytest.raises(NanogapError, match="is of a training with other settings .* delete it to start anew"):
        train.train(tmp_path, TINY, CPU, steps=[1, 1])
