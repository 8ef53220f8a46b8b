"""Pieces as they are published, tiny and random, become one folder; what is wrong is one line."""

import argparse
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Size, Tensor

import nanogap
from nanogap import NanogapError
from nanogap.checks.command import answer_for
from nanogap.clip import CLIPVisionConfig
from nanogap.convert import __main__ as convert
from nanogap.convert import shards
from nanogap.convert.minigpt import merged
from nanogap.convert.pieces import Part, Piece
from nanogap.convert.recipes import LLAVA_NAMES, pinpoints, with_rows
from nanogap.convert.sentencepiece import merges_of, read_llama_tokenizer, read_varint
from nanogap.convert.shards import divide, write_parts
from nanogap.models import MODELS
from nanogap.models.saving import our_name
from tests.checks.test_weights import Change, put, without
from tests.checks.test_weights import refusal as not_loaded
from tests.models.test_reference import PUBLISHED, assert_same, live, needs_published
from tests.pieces import (
    DECODER,
    LORA,
    PIECES,
    VISION,
    eva_tensors,
    field,
    llama_tensors,
    sentencepiece,
    tower_tensors,
    write_bins,
    write_clip,
    write_delta,
    write_llama,
    write_llava,
    write_minigpt,
)
from tests.tiny import lines_of, tiny_config, tiny_next_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [1, 319, 400, 77, 512, PIECES, 35, 36, 500, 9, 301, 88]
PICTURE = Image.new("RGB", (60, 40), (200, 30, 90))


def flags(**pieces: Path | None) -> list[str]:
    return [word for flag, path in pieces.items() if path for word in (f"--{flag}", str(path))]


def made(name: str, out: Path, **pieces: Path | None) -> Path:
    """What the command makes of pieces."""
    convert.command([name, *flags(**pieces), "--out", str(out)])
    return out


def refusal(name: str, out: Path, **pieces: Path | None) -> str:
    """The one line with which it is refused; nothing is left, under the final name or beside it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(NanogapError) as caught:
        made(name, out, **pieces)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, by their names there."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


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


def test_numbers_come_in_groups_of_seven_bits_the_lowest_first():
    assert read_varint(bytes([0b10101100, 0b00000010, 99]), 0) == (300, 2)


def test_pieces_keep_their_order_and_special_tokens_come_behind_them(tmp_path: Path):
    scores = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "▁": -1.0, "a": -2.0, "▁a": -0.5}
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(scores))
    tokenizer = read_llama_tokenizer(tmp_path / "tokenizer.model", ("<image>", "<pad>"))
    assert [tokenizer.id_to_token(i) for i in range(8)] == [*scores, "<image>", "<pad>"]
    assert tokenizer.encode("a a").ids == [1, 5, 5]


@needs_published
def test_the_published_tokenizer_comes_out_with_its_pieces_and_merges_in_order():
    built = read_llama_tokenizer(PUBLISHED / "tokenizer.model", ("<image>", "<pad>"))
    ours = json.loads(built.to_str())
    theirs = json.loads((PUBLISHED / "tokenizer.json").read_text())
    for part in (ours, theirs):
        del part["post_processor"]["pair"]                # of two texts, which there never are
    assert ours == theirs
    assert list(ours["model"]["vocab"]) == list(theirs["model"]["vocab"])


MISTRAL = PUBLISHED.parent / "mistral-7b-instruct-v0.2/tokenizer.model"


@pytest.mark.skipif(not MISTRAL.is_file(), reason="needs Mistral's published tokenizer.model")
def test_mistrals_tokenizer_makes_the_ids_that_sentencepiece_makes():
    tokenizer = read_llama_tokenizer(MISTRAL, ("<image>", "<pad>"))
    assert tokenizer.encode("[INST] <image>\nPlease provide").ids == [
        1, 733, 16289, 28793, 28705, 32000, 28705, 13, 12069, 3084]


@pytest.mark.parametrize("data, says", [
    (b"", "its pieces do not begin with <unk> <s> </s>"),
    (b"{'json': 1}", "or is cut off"),
    (sentencepiece({"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0})[:-3], "or is cut off"),
    (sentencepiece({"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}), "do not begin with"),     # T5's
    (sentencepiece({"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0}, dummy_prefix=0),
     "its add_dummy_prefix is 0, and LLaMA's 1"),
    (sentencepiece({"<unk>": 0.0, "<s>": 0.0, "</s>": float("nan")}), "the score of '</s>' is nan"),
    (field(1, field(1, b"\xff")), "or is cut off")])
def test_a_tokenizer_model_that_is_broken_or_anothers_is_named(
        data: bytes, says: str, tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(NanogapError) as caught:
        read_llama_tokenizer(path, ())
    assert str(caught.value).startswith(f"{path} is no tokenizer.model of LLaMA's")
    assert says in str(caught.value)


# ----- LLaVA's own layout -------------------------------------------------------------------------


@pytest.mark.parametrize("files, inside, tower", [
    ("bin", False, "pytorch_model.bin"), ("bin", False, "model.safetensors"),
    ("legacy", False, "pytorch_model.bin"), ("safetensors", True, None),
    ("safetensors", False, "model.safetensors")])
def test_llava_in_its_own_layout_gives_the_logits_of_the_hubs(
        files: str, inside: bool, tower: str | None, tmp_path: Path):
    """The same numbers under the hub's names, and 560 rows of embeddings in place of 640."""
    hub = write_checkpoint(tmp_path / "hub", tiny_config(vocab_size=PIECES + 80))
    clip = write_clip(tmp_path / "clip", tower or "pytorch_model.bin")
    own = write_llava(tmp_path / "own", inside, files)
    out = made("llava", tmp_path / "out", base=own, clip=clip)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json"]
    theirs, ours = tensors_in(hub), tensors_in(out)
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        same = value[:PIECES] if value.shape[0] == PIECES + 80 else value
        assert torch.equal(ours[name][:len(same)], same), name
    assert_same(logits(out), logits(hub))
    model = nanogap.load(out, "cpu")
    assert model.config.image_token == PIECES and model.config.text.vocab_size == 576
    assert model.tokenizer.token_to_id("<pad>") == PIECES + 1


def test_rows_for_the_new_tokens_are_the_mean_so_none_is_ever_the_likeliest(tmp_path: Path):
    """Two rows (1, 3) and (3, 5), and two more of (2, 4)."""
    write_bins(tmp_path, {"lm_head.weight": torch.tensor([[1.0, 3.0], [3.0, 5.0]])}, 1)
    part = with_rows(Piece(tmp_path, ""), "lm_head.weight", 4, torch.float16)
    assert part.shape == (4, 2)
    assert part.make().tolist() == [[1, 3], [3, 5], [2, 4], [2, 4]]


@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_llava_1_6_keeps_the_tower_that_it_holds_and_turns_the_pinpoints(
        files: str, tmp_path: Path):
    own = write_llava(tmp_path / "own", True, files, tiles=True)
    other = write_clip(tmp_path / "clip")                 # its sizes are read, not its numbers
    write_bins(other, {name: value + 1 for name, value in
                       tower_tensors(VISION, torch.float32).items()}, 1)
    out = made("llava", tmp_path / "out", base=own, clip=other)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert config["image_grid_pinpoints"] == [[112, 56], [56, 112], [112, 112]]
    held, source = tensors_in(out), tower_tensors(VISION, torch.float32)
    name = "vision_model.embeddings.class_embedding"
    assert torch.equal(held[f"vision_tower.{name}"], source[name])
    assert held["image_newline"].shape == (64,)
    hub = write_checkpoint(tmp_path / "hub", replace(
        tiny_next_config(), image_grid_pinpoints=((112, 56), (56, 112), (112, 112))))
    assert_same(logits(out), logits(hub))


def test_of_pinpoints_that_are_as_good_the_hub_takes_the_one_that_llava_takes():
    """A square of 100 in tiles of 336: LLaVA reads (336, 672) first, as width and height."""
    found = pinpoints({"image_grid_pinpoints": [[336, 672], [672, 336]]}, Path())
    assert found == [[672, 336], [336, 672]]              # (height, width), the hub's


def test_a_tower_that_is_inside_tells_its_sizes_where_no_clip_is_given(tmp_path: Path):
    """CLIP's heads have 64 channels each."""
    vision = CLIPVisionConfig(128, 64, 3, 2, image_size=56, patch_size=14)
    own = write_llava(tmp_path / "own", True, "safetensors", vision=vision)
    out = made("llava", tmp_path / "out", base=own)
    assert nanogap.load(out, "cpu").config.vision == vision
    narrow = write_llava(tmp_path / "narrow", True)
    assert "how many heads it has cannot be told; give the CLIP that it comes from by --clip" in \
        refusal("llava", tmp_path / "narrow.out", base=narrow)


def original(name: str) -> str:
    """A name of the hub's in LLaVA's own layout: LLaMA's names, and CLIP's tower inside."""
    name = name.replace("language_model.", "").replace("linear_1", "0").replace("linear_2", "2")
    name = name.replace("multi_modal_projector.", "model.mm_projector.")
    return name.replace("vision_tower.", "model.vision_tower.vision_tower.")


@needs_published
def test_llavas_own_names_become_the_686_published_ones():
    names = json.loads((PUBLISHED / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(names) == 686
    assert [our_name(original(name), LLAVA_NAMES) for name in names] == list(names)


@live
@pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "1.6"])
def test_transformers_reads_what_comes_out_and_says_the_same(tiles: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    own = write_llava(tmp_path / "own", inside=tiles, tiles=tiles)
    out = made("llava", tmp_path / "out", base=own, clip=write_clip(tmp_path / "clip"))
    model = nanogap.load(out, "cpu")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager").eval()
    pixels = model.prepare_image(PICTURE)
    n = model.encode_pixels(pixels, *PICTURE.size).n_visual
    at = PROMPT.index(PIECES)
    ids = torch.tensor([[*PROMPT[:at], *[PIECES] * n, *PROMPT[at + 1:]]])
    given = {"pixel_values": pixels[None] if tiles else pixels, "attention_mask": ids > -1}
    if tiles:
        given["image_sizes"] = torch.tensor([PICTURE.size[::-1]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, **given).logits[0]
    assert_same(model(torch.tensor(PROMPT), pixels, size=PICTURE.size), expected)


# ----- Shikra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["bin", "legacy", "safetensors"])
def test_shikra_is_llama_and_the_difference_added_in_float16(files: str, tmp_path: Path):
    base = write_llama(tmp_path / "llama", files)
    delta, clip = write_delta(tmp_path / "delta"), write_clip(tmp_path / "clip")
    out = made("shikra", tmp_path / "out", base=base, delta=delta, clip=clip)
    found, llama = tensors_in(out), llama_tensors(DECODER, torch.float16)
    changes: dict[str, Tensor] = {}
    for path in delta.glob("*.bin"):
        changes |= torch.load(path, weights_only=True)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(found[f"language_model.{name}"], llama[name] + changes[name])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = found[f"language_model.{name}"]
        assert torch.equal(rows[:PIECES], llama[name] + changes[name][:PIECES])
        assert torch.equal(rows[PIECES:], changes[name][PIECES:]) and len(rows) == PIECES + 3
    for name in ("weight", "bias"):
        assert torch.equal(found[f"multi_modal_projector.{name}"],
                           changes[f"model.mm_projector.{name}"])
    tower = tower_tensors(VISION, torch.float16)
    name = "vision_model.encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(found[f"vision_tower.{name}"], tower[name])
    assert {value.dtype for value in found.values()} == {torch.float16}


def test_shikra_takes_the_ends_and_tokens_that_its_code_takes_not_those_of_its_config(
        pieces: Path):
    """config.json and generation_config.json say 0 and 1, which are LLaMA's oldest mistake."""
    model = nanogap.load(made("shikra", pieces / "out", **given("shikra", pieces)), "cpu")
    c = model.config
    assert (c.bos_token, c.eos_token, c.image_token) == (1, 2, PIECES)
    assert c.text.rms_norm_eps == 1e-6 and c.text.max_position_embeddings == 512
    assert c.dtype == "float16" and type(model).__name__ == "Shikra"
    assert [model.tokenizer.token_to_id(token) for token in model.special_tokens] == [
        PIECES, PIECES + 1, PIECES + 2]
    assert model.ground(PICTURE, "the man on the left", keep=4, max_new_tokens=3).text


# ----- MiniGPT-v2 ---------------------------------------------------------------------------------


def test_lora_is_merged_by_hand_on_2_x_2_numbers(tmp_path: Path):
    """W + alpha / r * B A with alpha 1 and r 4: a quarter of [[4, 8], [0, 12]] is added."""
    write_bins(tmp_path, {"q.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 1)
    halves = {"a": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
              "b": torch.tensor([[4.0, 8.0, 0.0, 0.0], [0.0, 12.0, 0.0, 0.0]])}
    torch.save(halves, tmp_path / "lora.pth")
    llama, trained = Piece(tmp_path, ""), Piece(tmp_path / "lora.pth", "")
    part = merged(llama, trained, "q", {"A": "a", "B": "b"}, {"lora_alpha": 1})
    assert part.make().tolist() == [[2.0, 4.0], [3.0, 7.0]]


@pytest.mark.parametrize("newer, legacy", [(False, False), (True, False), (False, True)],
                         ids=["peft 0.2", "newer peft", "torch before 1.6"])
def test_minigpt_is_put_together_of_three_pieces(newer: bool, legacy: bool, tmp_path: Path):
    pieces = write_minigpt(tmp_path, newer=newer, legacy=legacy)
    out = made("minigpt-v2", tmp_path / "out", **pieces)
    found, llama = tensors_in(out), llama_tensors(DECODER, torch.float16)
    trained = torch.load(tmp_path / "minigptv2_checkpoint.pth", weights_only=True)["model"]
    for kind in "qv":
        name = f"model.layers.2.self_attn.{kind}_proj.weight"
        a, b = (trained[LORA.format(2, kind, half).replace(
            f"_{half}.", f"_{half}.default." if newer else f"_{half}.")] for half in "AB")
        expected = (llama[name].float() + 16 / 8 * b @ a).half()
        assert torch.equal(found[f"llama_model.{name}"], expected)
    name = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(found[f"llama_model.{name}"], llama[name])
    assert torch.equal(found["llama_proj.weight"], trained["llama_proj.weight"])
    assert found["ln_vision.weight"].tolist() == [1.0] * 88
    assert found["ln_vision.bias"].tolist() == [0.0] * 88
    eva = eva_tensors(3)
    assert torch.equal(found["visual_encoder.pos_embed"], eva["pos_embed"])   # its published size
    assert torch.equal(found["visual_encoder.blocks.2.attn.qkv.weight"],
                       eva["blocks.2.attn.qkv.weight"])
    assert not [name for name in found if "head" in name and "lm_head" not in name]
    model = nanogap.load(out, "cpu")
    assert model.config.vision.num_attention_heads == 1
    assert model.config.vision.grid == 4 and model.config.text.rms_norm_eps == 1e-5
    assert model.ground(PICTURE, "the man on the left", keep=2, max_new_tokens=3).text


def test_of_evas_40_blocks_39_are_taken_and_what_is_left_out_is_told(
        tmp_path: Path, capsys: pytest.CaptureFixture):
    out = made("minigpt-v2", tmp_path / "out", **write_minigpt(tmp_path, blocks=40))
    found = tensors_in(out)
    assert "visual_encoder.blocks.38.norm1.weight" in found
    assert "visual_encoder.blocks.39.norm1.weight" not in found
    assert len([name for name in found if name.startswith("visual_encoder.")]) == 511
    assert "leaves out 16 of its tensors, such as blocks.39." in capsys.readouterr().err


def test_ln_vision_is_taken_where_the_checkpoint_has_it(pieces: Path):
    tensors(TRAINED, **{"ln_vision.weight": torch.full((88,), 3.0)})(pieces)
    found = tensors_in(made("minigpt-v2", pieces / "out", **given("minigpt-v2", pieces)))
    assert found["ln_vision.weight"].tolist() == [3.0] * 88


def test_settings_may_be_a_namespace_and_no_other_object(tmp_path: Path):
    """argparse's is taken by its name; any other class is refused by its own."""
    settings = argparse.Namespace(model={"image_size": 56, "lora_alpha": 8})
    pieces = write_minigpt(tmp_path / "a", settings=settings)
    found = tensors_in(made("minigpt-v2", tmp_path / "out", **pieces))
    trained = torch.load(pieces["checkpoint"], weights_only=False)["model"]
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (trained[LORA.format(0, "q", half)] for half in "AB")
    llama = llama_tensors(DECODER, torch.float16)[name]
    assert torch.equal(found[f"llama_model.{name}"], (llama.float() + b @ a).half())
    pieces = write_minigpt(tmp_path / "b", settings=Path("x"))
    assert "it holds a pathlib" in refusal("minigpt-v2", tmp_path / "b.out", **pieces)


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
    """Links to them, of which one is to be broken."""
    for path in whole.rglob("*"):
        target = tmp_path / path.relative_to(whole)
        if path.is_dir():
            target.mkdir()
        else:
            target.symlink_to(path)
    return tmp_path


def given(model: str, at: Path) -> dict[str, Path]:
    """The flags of a model."""
    return {"llava": {"base": at / "llava", "clip": at / "clip"},
            "shikra": {"base": at / "llama", "delta": at / "delta", "clip": at / "clip"},
            "minigpt-v2": {"base": at / "minigpt/llama-2",
                           "vision": at / "minigpt/eva_vit_g.pth",
                           "checkpoint": at / "minigpt/minigptv2_checkpoint.pth"}}[model]


def half(file: str) -> Change:
    return lambda at: put(file, (at / file).read_bytes()[:(at / file).stat().st_size // 2])(at)


def keys(file: str, **changed: object) -> Change:
    """Other values in a JSON file."""
    return lambda at: put(file, json.dumps(json.loads((at / file).read_text()) | changed))(at)


def pickled(file: str, part: str, changed: dict) -> Change:
    """Other values in a part of a pickle, or in all of it; None takes one away."""
    def change(at: Path) -> None:
        state = torch.load(at / file, weights_only=True)
        inner = state
        for name in part.split():
            inner = inner[name]
        inner.update(changed)
        for name in [name for name, value in inner.items() if value is None]:
            del inner[name]
        (at / file).unlink()
        torch.save(state, at / file)
    return change


def tensors(file: str, **changed: Tensor | None) -> Change:
    return pickled(file, "model" if file == TRAINED else "", changed)


def training(**settings: object) -> Change:
    """What a training's file says of its model."""
    return pickled(TRAINED, "config model", settings)


NORM = "model.norm.weight"
SECOND = "pytorch_model-00002-of-00002.bin"
CLIP_BIN, EVA, TRAINED = ("clip/pytorch_model.bin", "minigpt/eva_vit_g.pth",
                          "minigpt/minigptv2_checkpoint.pth")
BROKEN: list[tuple[str, Change, str]] = [
    # missing
    ("llava", without(f"llava/{SECOND}"), f"llava lacks {SECOND}, which its"),
    ("llava", without("llava/tokenizer.model"), "llava lacks tokenizer.model"),
    ("llava", without("llava/config.json"), "llava/config.json cannot be read"),
    ("llava", without(CLIP_BIN), "clip holds no model.safe"),
    ("llava", tensors(f"llava/{SECOND}", **{NORM: None}),
     "llava lacks 1 of 89 tensors, such as language_model.model.norm.weight; get it whole with"),
    ("llava", tensors(CLIP_BIN, **{"vision_model.pre_layrnorm.bias": None}),
     "clip lacks 1 of 89 tensors, such as vision_tower.vision_model.pre_layrnorm.bias"),
    ("shikra", without(f"delta/{SECOND}"), f"delta lacks {SECOND}"),
    ("shikra", tensors(f"llama/{SECOND}", **{NORM: None}),
     "llama lacks model.norm.weight; get it whole with `hf download huggyllama/llama-7b"),
    ("shikra", tensors(f"delta/{SECOND}", **{NORM: None}),
     "delta lacks model.norm.weight; get it whole with `hf download shikras/shikra-7b-delta-v1"),
    ("minigpt-v2", without(EVA), "eva_vit_g.pth does not exist; get it"),
    ("minigpt-v2", tensors(EVA, **{"blocks.1.attn.q_bias": None}), "eva_vit_g.pth lacks 1 of "),
    ("minigpt-v2", tensors(TRAINED, **{"llama_proj.bias": None}),
     "minigptv2_checkpoint.pth lacks 1 of "),
    ("minigpt-v2", tensors(TRAINED, **{LORA.format(1, "v", "B"): None}),
     "LoRA's A and B of model.layers.1.self_attn.v_proj are [8, 64] and []"),
    # broken
    ("llava", half(f"llava/{SECOND}"), f"{SECOND} cannot be read ("),
    ("llava", half("llava/tokenizer.model"), "or is cut off"),
    ("llava", half("llava/config.json"), "llava/config.json cannot be read ("),
    ("shikra", half(CLIP_BIN), "pytorch_model.bin cannot be read ("),
    ("minigpt-v2", half(EVA), "eva_vit_g.pth cannot be read ("),
    ("minigpt-v2", half(TRAINED), "minigptv2_checkpoint.pth cannot be read ("),
    ("llava", tensors(f"llava/{SECOND}", **{NORM: torch.full((64,), torch.nan)}),
     f"{SECOND}: model.norm.weight holds numbers that are not finite"),
    ("shikra", tensors(f"delta/{SECOND}", **{NORM: torch.full((64,), torch.inf)}),
     f"{SECOND}: model.norm.weight holds numbers that are not finite"),
    ("shikra", tensors(f"delta/{SECOND}", **{NORM: torch.ones(64, dtype=torch.int8)}),
     f"{SECOND}: model.norm.weight is torch.int8, and weights are float32, bfloat16, float16"),
    # foreign
    ("llava", keys("llava/config.json", mm_projector_type="linear"),
     "mm_projector_type is 'linear'; nanogap implements 'mlp2x_gelu' only"),
    ("llava", keys("llava/config.json", mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    ("llava", keys("llava/config.json", model_type="llava_mpt"),
     "describes a 'llava_mpt' model in another layout than LLaVA's own"),
    ("llava", keys("llava/config.json", rope_scaling={"type": "linear", "factor": 2.0}),
     "llava: config.json: rope_scaling is"),
    ("llava", keys("llava/config.json", num_hidden_layers=2),
     "layers.2.self_attn.q_proj.weight is not a part of this model; give the piece"),
    ("llava", keys("llava/config.json", hidden_size=128),
     "with rows for new tokens, is [576, 64], and config.json makes it [576, 128]"),
    ("llava", keys("clip/config.json", model_type="siglip"),
     "describes a 'siglip' model, not a 'clip'"),
    ("llava", keys("clip/config.json", vision_config={
        "hidden_size": 1024, "image_size": 224, "num_attention_heads": 16, "patch_size": 14}),
     "clip is a CLIP for 224 pixels, and "),
    ("llava", put("llava/adapter_config.json", "{}"), "llava holds an adapter (LoRA)"),
    ("shikra", keys("delta/config.json", model_type="llama"),
     "delta/config.json describes a 'llama' model, not 'shikra'"),
    ("shikra", keys("delta/added_tokens.json", **{"<im_end>": PIECES}),
     "added_tokens.json gives <im_end> the ID 560, and Shikra's code 562"),
    ("shikra", keys("llama/config.json", model_type="mistral"),
     "llama/config.json describes a 'mistral' model, not 'llama'; get it with `hf download hugg"),
    ("shikra", tensors(f"llama/{SECOND}", **{NORM: torch.ones(5)}),
     f"{SECOND}: model.norm.weight is [5], and the difference to it in "),
    ("minigpt-v2", tensors(TRAINED, **{"llama_model.model.norm.weight": torch.ones(64)}),
     "llama_model.model.norm.weight is no part of what MiniGPT-v2 trains"),
    ("minigpt-v2", tensors(EVA, **{"blocks.0.gamma_1": torch.ones(88)}),
     "eva_vit_g.pth: blocks.0.gamma_1 is not a part of this model"),
    ("minigpt-v2", tensors(EVA, **{"patch_embed.proj.weight": torch.ones(90, 3, 14, 14)}),
     "a multiple of 88 channels"),
    # of another model, though all shapes fit
    ("shikra", keys("llama/config.json", rms_norm_eps=1e-5),
     "llama/config.json: rms_norm_eps is 1e-05, and "),
    ("shikra", keys("llama/config.json", max_position_embeddings=4096),
     "has 512: the pieces belong to different models; get the base with"),
    ("shikra", keys("delta/config.json", mm_hidden_size=1024),
     "mm_hidden_size is 1024; nanogap implements 32 only"),
    ("llava", put("clip/preprocessor_config.json", '{"crop_size": 224}'),
     "crop_size is 224, and the vision tower reads squares of 56 pixels"),
    ("minigpt-v2", training(lora_r=64), "have rank 8, and its config says lora_r 64"),
    ("minigpt-v2", training(arch="minigpt4"),
     "is of a training of 'minigpt4', and not of 'minigpt_v2'"),
    ("minigpt-v2", training(image_size=None),
     "its config says no image_size, and the vision tower is not the published one"),
    # in the place of a file
    ("minigpt-v2", put(EVA, "<!DOCTYPE html>"), "eva_vit_g.pth is a web page"),
    ("llava", put("llava/tokenizer.model", "version https://git-lfs.github.com/"),
     "tokenizer.model is a pointer of git-lfs")]


@pytest.mark.parametrize("model, damage, says", BROKEN,
                         ids=[f"{model}-{says[:40]}" for model, _, says in BROKEN])
def test_a_missing_broken_or_foreign_piece_is_one_line_that_names_it(
        model: str, damage: Change, says: str, pieces: Path):
    damage(pieces)
    text = refusal(model, pieces / "out", **given(model, pieces))
    assert says in text and len(text) < 700, text


def test_a_tower_apart_must_be_given(pieces: Path):
    text = refusal("llava", pieces / "out", base=pieces / "llava")
    assert "holds no vision tower (openai/clip-vit-large-patch14-336 is its own); get it" in text
    assert text.endswith("give it by --clip")


def test_a_mistake_is_one_line_on_stderr_and_status_2(
        pieces: Path, capsys: pytest.CaptureFixture):
    argv = ["llava", "--base", str(pieces / "nowhere"), "--out", str(pieces / "out")]
    assert answer_for("nanogap.convert", convert.command, argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("nanogap.convert: ")
    assert lines_of(said.err) == 1 and not (pieces / "out").exists()
    assert answer_for("nanogap.convert", convert.command, ["shikra", "--base", "x"]) == 2
    assert "--delta" in capsys.readouterr().err


# ----- where it is written ------------------------------------------------------------------------


def test_a_folder_with_files_in_it_is_left_alone_and_an_empty_one_is_taken(pieces: Path):
    out = pieces / "out"
    out.mkdir()
    made("llava", out, **given("llava", pieces))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(NanogapError, match="has files in it already, and they are not overwritten"):
        made("llava", out, **given("llava", pieces))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_disk_without_room_is_refused_before_anything_is_written(
        pieces: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type(shards.shutil.disk_usage("/"))
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage(9, 9, 0))
    assert "has room for 0.0 GB, and the model takes 0.0 GB" in refusal(
        "llava", pieces / "out", **given("llava", pieces))


def test_tensors_are_divided_into_shards_in_their_order():
    """Of 4, 4, 2, 9 and 1 bytes at most 8 go into one file, unless it is one tensor."""
    parts = {str(i): Part(Size((n // 2 or 1,)), torch.float16, Tensor, "") for i, n in
             enumerate((4, 4, 2, 18, 2))}
    assert [list(shard) for shard in divide(parts, 8)] == [["0", "1"], ["2"], ["3"], ["4"]]


def test_shards_and_their_index_are_read_again(pieces: Path, monkeypatch: pytest.MonkeyPatch):
    one = logits(made("llava", pieces / "one", **given("llava", pieces)))
    monkeypatch.setattr(convert, "write_parts",
                        lambda folder, parts: write_parts(folder, parts, 200_000))
    out = made("llava", pieces / "out", **given("llava", pieces))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for value in tensors_in(out).values())
    assert torch.equal(logits(out), one)


SLOW = """
import sys, time
from nanogap.convert import __main__ as convert, shards
numbers = shards.numbers
def slowly(tensor):
    print("writing", flush=True)
    time.sleep(0.2)
    return numbers(tensor)
shards.numbers = slowly
sys.exit(convert.answer_for("nanogap.convert", convert.command, None))
"""


@pytest.mark.parametrize("how, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_killed_in_the_middle_nothing_is_left_under_the_final_name(
        how: signal.Signals, status: int, pieces: Path):
    """And what SIGKILL left beside it goes when it is run again."""
    out = pieces / "out"
    argv = [sys.executable, "-c", SLOW, "llava", *flags(**given("llava", pieces)), "--out", out]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    beside = list(out.glob(".*.partial"))
    assert len(beside) == 1 and not list(out.glob("[!.]*"))
    with pytest.raises(NanogapError, match="is being written by another process"):
        made("llava", out, **given("llava", pieces))
    process.send_signal(how)
    process.communicate(timeout=20)
    assert process.returncode == status
    assert out.exists() == beside[0].exists() == (how == signal.SIGKILL)
    made("llava", out, **given("llava", pieces))
    assert not list(out.glob(".*")) and nanogap.load(out, "cpu").tokenizer


PEAK = """
import re, sys
from nanogap.convert import __main__ as convert
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
base, clip, small, out = sys.argv[1:]
convert.command(["llava", "--base", small, "--clip", clip, "--out", out + ".small"])
before = peak()                           # with all that is imported on the way
convert.command(["llava", "--base", base, "--clip", clip, "--out", out])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells a process's peak")
def test_no_more_than_one_shard_and_one_result_is_in_memory(tmp_path: Path):
    """Six shards of 20 MB, in the format that cannot be mapped."""
    wide = replace(DECODER, hidden_size=1024, intermediate_size=64, num_hidden_layers=12,
                   num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    own, clip = write_llava(tmp_path / "own"), write_clip(tmp_path / "clip")
    small = write_llava(tmp_path / "small", files="legacy")
    for path in own.glob("pytorch_model*"):
        path.unlink()
    with torch.device("meta"):
        state = MODELS["llava"](replace(tiny_config(), text=wide)).state_dict()
    tensors = {original(name): torch.full(value.shape, 0.5, dtype=torch.float16)
               for name, value in state.items() if not name.startswith("vision_tower.")}
    write_bins(own, tensors, 6, legacy=True)
    keys("config.json", hidden_size=1024, intermediate_size=64, num_hidden_layers=12,
         num_attention_heads=8, num_key_value_heads=8)(own)
    total = sum(value.nbytes for value in tensors.values())
    largest = max(path.stat().st_size for path in own.glob("*.bin"))
    assert total > 4 * largest
    said = subprocess.run([sys.executable, "-c", PEAK, own, clip, small, tmp_path / "out"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    grown = 1024 * int(said.stdout.split()[-1])
    assert largest < grown < 2.3 * largest < total / 2


# ----- what a folder in one of these layouts is told ----------------------------------------------


@pytest.mark.parametrize("name, line", [
    ("llava", "`python -m nanogap.convert llava --base {} --clip DIR --out DIR`"),
    ("delta", "`python -m nanogap.convert shikra --base DIR --delta {} --clip DIR --out DIR`"),
    ("minigpt", "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "
                "--checkpoint minigptv2_checkpoint.pth --out DIR`"),
    (EVA, "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth "),
    (TRAINED, "`python -m nanogap.convert minigpt-v2 --base DIR --vision eva_vit_g.pth ")])
def test_a_folder_in_one_of_these_layouts_is_answered_with_the_line_that_converts_it(
        name: str, line: str, pieces: Path):
    assert line.format(pieces / name) in not_loaded(pieces / name)


def test_llavas_names_in_a_folder_of_the_hubs_are_answered_as_well(whole: Path, tmp_path: Path):
    """config.json as on the hub, and beside it shards as LLaVA has them."""
    folder = write_checkpoint(tmp_path / "hub")
    (folder / "model.safetensors").unlink()
    write_bins(folder, {"model.mm_projector.0.weight": torch.ones(2)}, 1)
    assert f"python -m nanogap.convert llava --base {folder} " in not_loaded(folder)
