"""Pieces as they are published, tiny and random, become one folder; what is wrong is one line."""

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import nanogap
from nanogap import NanogapError
from nanogap.checks.command import answer_for
from nanogap.convert import __main__ as convert
from nanogap.convert import recipes, tensors
from nanogap.convert.recipes import shikra_tensors
from nanogap.convert.sentencepiece import merges_of, read_llama_tokenizer
from nanogap.convert.tensors import Piece
from nanogap.models.saving import START_TOKENS
from tests.checks.test_weights import Change, put, without
from tests.checks.test_weights import refusal as not_loaded
from tests.models.test_reference import PUBLISHED, assert_same, needs_published
from tests.pieces import (
    PIECES,
    WIDE,
    clip_tensors,
    eva_tensors,
    llama_tensors,
    lora_name,
    sentencepiece,
    write_clip,
    write_delta,
    write_llama,
    write_llava,
    write_minigpt,
)
from tests.tiny import lines_of, tiny_config, tiny_next_config, tiny_tokenizer, write_checkpoint

PROMPT = [1, 319, 400, 77, 512, PIECES, 35, 36, 500, 9, 301, 88]
PICTURE = Image.new("RGB", (60, 40), (200, 30, 90))


def made(name: str, out: Path, **pieces: Path) -> Path:
    """What the command makes of pieces."""
    flags = [word for flag, path in pieces.items() for word in (f"--{flag}", str(path))]
    convert.command([name, *flags, "--out", str(out)])
    return out


def logits(folder: Path) -> Tensor:
    """What the model in a folder says of one prompt and one picture, of the pieces."""
    model = nanogap.load(folder, "cpu", "float32")
    ids, size = torch.tensor(PROMPT), PICTURE.size
    return model(ids, model.prepare_image(PICTURE), size=size)[:, :PIECES]


# ----- tokenizer.model ----------------------------------------------------------------------------


def test_a_piece_is_made_in_every_way_and_the_best_piece_comes_first():
    """ab before ba before aba, which can be made of a and ba (IDs 3, 6) or of ab and a (5, 3)."""
    scores = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "a": -3.0, "b": -4.0, "ab": -0.5, "ba": -1.0,
              "aba": -2.0}
    assert merges_of(scores) == [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]
    scores["aba"] = -0.5                                  # as good as ab: in the order of IDs
    assert merges_of(scores) == [("a", "b"), ("a", "ba"), ("ab", "a"), ("b", "a")]


@needs_published
def test_the_published_tokenizer_comes_out_with_its_pieces_and_merges_in_order():
    built = read_llama_tokenizer(PUBLISHED / "tokenizer.model", ("<image>", "<pad>"))
    ours = json.loads(built.to_str())
    theirs = json.loads((PUBLISHED / "tokenizer.json").read_text())
    for part in (ours, theirs):
        del part["post_processor"]["pair"]                # of two texts, which there never are
    assert ours == theirs
    assert list(ours["model"]["vocab"]) == list(theirs["model"]["vocab"])


# ----- LLaVA's own layout -------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["bin", "legacy", "safetensors"])
def test_llava_in_its_own_layout_gives_the_logits_of_the_hubs(files: str, tmp_path: Path):
    """The same numbers under the hub's names, and 576 rows of embeddings in place of 640."""
    hub = write_checkpoint(tmp_path / "hub", tiny_config(vocab_size=PIECES + 80))
    own = write_llava(tmp_path / "own", files)
    out = made("llava", tmp_path / "out", base=own, clip=write_clip(tmp_path / "clip", files))
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json"]
    assert_same(logits(out), logits(hub))
    model = nanogap.load(out, "cpu")
    assert model.config.image_token == PIECES and model.config.text.vocab_size == 576
    assert model.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    head = model.language_model.lm_head.weight
    assert_same(head[PIECES:], head[:PIECES].mean(0).expand(16, -1))    # never the likeliest


def test_llava_1_6_keeps_the_tower_that_it_holds_and_turns_the_pinpoints(tmp_path: Path):
    """Its tensors tell its sizes: CLIP's heads have 64 channels each."""
    own = write_llava(tmp_path / "own", "safetensors", tiles=True)
    out = made("llava", tmp_path / "out", base=own)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert config["image_grid_pinpoints"] == [[112, 56], [56, 112], [112, 112]]
    hub = write_checkpoint(tmp_path / "hub", replace(
        tiny_next_config(), vision=WIDE, image_grid_pinpoints=((112, 56), (56, 112), (112, 112))))
    assert_same(logits(out), logits(hub))
    assert nanogap.load(out, "cpu").config.vision == WIDE


# ----- Shikra -------------------------------------------------------------------------------------


def test_shikra_is_llama_and_the_difference_added_in_float16(pieces: Path):
    """Its ends are those of its code: its config.json says 0 and 1, LLaMA's oldest mistake."""
    out = made("shikra", pieces / "out", **given("shikra", pieces))
    found, llama = load_file(out / "model.safetensors"), llama_tensors()
    changes: dict[str, Tensor] = {}
    for path in (pieces / "delta").glob("*.bin"):
        changes |= torch.load(path, weights_only=True)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(found[f"language_model.{name}"], llama[name] + changes[name])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = found[f"language_model.{name}"]
        assert torch.equal(rows[:PIECES], llama[name] + changes[name][:PIECES])
        assert torch.equal(rows[PIECES:], changes[name][PIECES:]) and len(rows) == PIECES + 3
    assert torch.equal(found["multi_modal_projector.bias"], changes["model.mm_projector.bias"])
    name = "vision_model.encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(found[f"vision_tower.{name}"], clip_tensors()[name].half())
    assert {value.dtype for value in found.values()} == {torch.float16}
    model = nanogap.load(out, "cpu")
    c = model.config
    assert (c.bos_token, c.eos_token, c.image_token) == (1, 2, PIECES)
    assert c.text.rms_norm_eps == 1e-6 and c.text.max_position_embeddings == 512
    assert [model.tokenizer.token_to_id(token) for token in model.special_tokens] == [
        PIECES, PIECES + 1, PIECES + 2]
    assert model.ground(PICTURE, "the man on the left", keep=4, max_new_tokens=3).text


# ----- MiniGPT-v2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [False, True], ids=["peft 0.2, torch before 1.6", "newer"])
def test_minigpt_is_put_together_of_three_pieces(newer: bool, tmp_path: Path):
    """Newer: other names of LoRA, and a checkpoint that trained more than the published ones."""
    pieces = write_minigpt(tmp_path, blocks=40, newer=newer)
    out = made("minigpt-v2", tmp_path / "out", **pieces)
    found, llama, eva = load_file(out / "model.safetensors"), llama_tensors(), eva_tensors(40)
    trained = torch.load(pieces["checkpoint"], weights_only=False)["model"]
    for kind in "qv":
        name = f"model.layers.2.self_attn.{kind}_proj.weight"
        a, b = (trained[lora_name(2, kind, half, newer)] for half in "AB")
        expected = (llama[name].float() + 32 / 8 * b @ a).half()
        assert torch.equal(found[f"llama_model.{name}"], expected)
    name = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(found[f"llama_model.{name}"], llama[name])
    assert torch.equal(found["llama_proj.weight"], trained["llama_proj.weight"])
    assert found["ln_vision.weight"].tolist() == [3.0 if newer else 1.0] * 88
    assert found["ln_vision.bias"].tolist() == [0.0] * 88
    for name in trained.keys() & found.keys():
        assert torch.equal(found[name], trained[name])
    for name in ("pos_embed", "blocks.38.attn.qkv.weight"):                   # of 39 blocks
        assert torch.equal(found[f"visual_encoder.{name}"], eva[name])
    assert len([name for name in found if name.startswith("visual_encoder.")]) == 511
    model = nanogap.load(out, "cpu")
    assert model.config.vision.num_attention_heads == 1
    assert model.config.vision.grid == 4 and model.config.text.rms_norm_eps == 1e-5
    assert model.ground(PICTURE, "the man on the left", keep=2, max_new_tokens=3).text


# ----- what is wrong with a piece -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pieces, none of them broken."""
    place = tmp_path_factory.mktemp("pieces")
    write_clip(place / "clip")
    write_llava(place / "llava")
    write_llama(place / "llama")
    write_delta(place / "delta")
    write_minigpt(place / "minigpt")
    return place


@pytest.fixture
def pieces(whole: Path, tmp_path: Path) -> Path:
    """A copy of them, of which one is to be broken."""
    return shutil.copytree(whole, tmp_path, dirs_exist_ok=True)


def given(model: str, at: Path) -> dict[str, Path]:
    """The flags of a model."""
    return {"llava": {"base": at / "llava", "clip": at / "clip"},
            "shikra": {"base": at / "llama", "delta": at / "delta", "clip": at / "clip"},
            "minigpt-v2": {"base": at / "minigpt/llama-2",
                           "vision": at / "minigpt/eva_vit_g.pth",
                           "checkpoint": at / "minigpt/minigptv2_checkpoint.pth"}}[model]


def half(file: str) -> Change:
    return lambda at: os.truncate(at / file, (at / file).stat().st_size // 2)


def keys(file: str, **changed: object) -> Change:
    """Other values in a JSON file."""
    return lambda at: put(file, json.dumps(json.loads((at / file).read_text()) | changed))(at)


def other(file: str, **changed: Tensor | None) -> Change:
    """Other tensors in a pickle; None takes one away."""
    def change(at: Path) -> None:
        state = torch.load(at / file, weights_only=True)
        inner = state["model"] if file == TRAINED else state
        inner.update(changed)
        for name, value in changed.items():
            if value is None:
                del inner[name]
        (at / file).unlink()
        torch.save(state, at / file)
    return change


NORM = "model.norm.weight"
SECOND = "pytorch_model-00002-of-00002.bin"
EVA, TRAINED = "minigpt/eva_vit_g.pth", "minigpt/minigptv2_checkpoint.pth"
BROKEN: list[tuple[str, Change, str]] = [
    # missing
    ("llava", without("llava/tokenizer.model"), "llava lacks tokenizer.model"),
    ("llava", other(f"llava/{SECOND}", **{NORM: None}),
     'Missing key(s) in state_dict: "language_model.model.norm.weight".); get those of one model'),
    ("shikra", other(f"llama/{SECOND}", **{NORM: None}),
     "llama lacks model.norm.weight; get it whole with `hf download huggyllama/llama-7b"),
    ("minigpt-v2", without(EVA), "eva_vit_g.pth does not exist; get it"),
    ("minigpt-v2", other(TRAINED, **{lora_name(2, "q", "B"): None}),
     'Unexpected key(s) in state_dict: "model.layers.2.self_attn.q_proj.lora_A"'),
    # broken
    ("llava", half("llava/tokenizer.model"), "or is cut off"),
    ("minigpt-v2", half(EVA), "eva_vit_g.pth cannot be read ("),
    ("shikra", other(f"delta/{SECOND}", **{NORM: torch.ones(64, dtype=torch.int8)}),
     "delta: model.norm.weight is torch.int8, and weights are float32, bfloat16, float16; get it"),
    # foreign
    ("llava", keys("llava/config.json", mm_projector_type="linear"),
     "mm_projector_type is 'linear'; nanogap implements 'mlp2x_gelu' only"),
    ("llava", keys("llava/config.json", model_type="llava_mpt"),
     "llava/config.json describes a 'llava_mpt' model, not 'llava'; get one with `hf download"),
    ("llava", keys("llava/config.json", mm_vision_tower=None), "or get one that is with `hf down"),
    ("llava", keys("llava/config.json", rope_scaling={"type": "linear", "factor": 2.0}),
     "llava: config.json: rope_scaling: factor is"),
    ("llava", keys("clip/config.json", model_type="siglip"),
     "describes a 'siglip' model, not 'clip'; get one with"),
    ("llava", keys("clip/config.json", vision_config={"image_size": 224, "patch_size": 14}),
     "clip is a CLIP for 224 pixels, and the model was trained with another; get it with `hf down"),
    ("shikra", keys("llama/config.json", rms_norm_eps=1e-5),
     "llama/config.json: rms_norm_eps is 1e-05, and that of "),
    ("shikra", other(f"llama/{SECOND}", **{NORM: torch.ones(65)}),
     "the pieces are not whole, or belong to different models ("),
    ("minigpt-v2", keys("minigpt/llama-2/config.json", max_position_embeddings=2048),
     "max_position_embeddings is 2048, which is LLaMA-1's or Vicuna's"),
    ("llava", put("llava/tokenizer.model", sentencepiece(["<pad>", "</s>", "<unk>"])),
     "tokenizer.model is of another kind than LLaMA's"),                      # but T5's
    ("llava", put("llava/tokenizer.model", sentencepiece(START_TOKENS)),
     "tokenizer.model has 3 tokens, and the embeddings have rows for 560"),
    ("minigpt-v2", put(EVA, "<!DOCTYPE html>"), "eva_vit_g.pth is a web page")]


@pytest.mark.parametrize("model, damage, says", BROKEN,
                         ids=[f"{model}-{says[:40]}" for model, _, says in BROKEN])
def test_a_missing_broken_or_foreign_piece_is_one_line_that_names_it(
        model: str, damage: Change, says: str, pieces: Path):
    damage(pieces)
    with pytest.raises(NanogapError) as caught:
        made(model, pieces / "out", **given(model, pieces))
    text = str(caught.value)
    assert says in text and len(text) < 700 and "\n" not in text, text
    assert [*(pieces / "out").glob("*")] == []


def test_a_mistake_is_one_line_on_stderr_and_status_2(
        pieces: Path, capsys: pytest.CaptureFixture):
    argv = ["llava", "--base", str(pieces / "llava"), "--out", str(pieces / "out")]
    assert answer_for("nanogap.convert", convert.command, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nanogap.convert: the vision tower is apart; get it with")
    assert err.endswith("give it by --clip\n") and lines_of(err) == 1
    assert not (pieces / "out").exists()
    assert answer_for("nanogap.convert", convert.command, ["shikra", "--base", "x"]) == 2
    assert "--delta" in capsys.readouterr().err


# ----- where it is written ------------------------------------------------------------------------


def test_a_folder_with_files_in_it_is_left_alone_and_an_empty_one_is_taken(pieces: Path):
    out = pieces / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(NanogapError, match="has files in it already, and they are not overwritten"):
        made("llava", out, **given("llava", pieces))
    (out / "mine").unlink()
    made("llava", out, **given("llava", pieces))


def test_each_gigabyte_is_told(
        pieces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Here one is a hundred kilobytes, and the whole is 993,920 bytes."""
    monkeypatch.setattr(tensors, "GB", 100_000)
    made("llava", pieces / "out", **given("llava", pieces))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 of 9.9 GB ..." and lines[-1] == "9 of 9.9 GB ..."


def test_no_more_than_two_results_are_in_memory(pieces: Path, monkeypatch: pytest.MonkeyPatch):
    """The one that was written goes when the next is made."""
    results: list[weakref.ref] = []

    def watched(*read: Piece) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in shikra_tensors(*read):
            if not tensor.is_meta:
                results.append(weakref.ref(tensor))
                assert sum(result() is not None for result in results) <= 2
            yield name, tensor

    monkeypatch.setattr(recipes, "shikra_tensors", watched)
    out = made("shikra", pieces / "out", **given("shikra", pieces))
    assert len(results) == len(load_file(out / "model.safetensors"))


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.is_file(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("files", ["bin", "safetensors"])
def test_the_numbers_of_a_piece_stay_in_its_files(files: str, tmp_path: Path):
    piece = Piece(write_llava(tmp_path / "llava", files), "`hf download`")
    places = [line.split() for line in MAPS.read_text().splitlines() if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in place[0].split("-")] for place in places]
    for name, tensor in piece.items():
        assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), name


# ----- what a folder in one of these layouts is told ----------------------------------------------


@pytest.mark.parametrize("name, line", [
    ("llava", "`python -m nanogap.convert llava --base {} --clip DIR --out DIR`"),
    ("delta", "`python -m nanogap.convert shikra --base DIR --delta {} --clip DIR --out DIR`"),
    ("minigpt", "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "
                "--checkpoint minigptv2_checkpoint.pth --out DIR`"),
    (TRAINED, "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth ")])
def test_a_folder_in_one_of_these_layouts_is_answered_with_the_line_that_converts_it(
        name: str, line: str, pieces: Path):
    assert line.format(pieces / name) in not_loaded(pieces / name)
