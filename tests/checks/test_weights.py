"""Checkpoints: what loads, what it costs, and what each broken one is told."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import nanogap
from nanogap import NanogapError, weights
from nanogap.clip import CLIPVisionConfig
from nanogap.llama import LlamaConfig
from nanogap.models import MODELS
from nanogap.models.saving import save
from nanogap.prune import STRATEGIES
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint, write_shards, write_tensors

ROOT = Path(__file__).resolve().parents[2]
NORM = "language_model.model.norm.weight"
PROMPT = torch.tensor([1, 319, 400, 560, 36, 500, 9])
TINY = tiny_tensors(tiny_config())
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], object]


def logits(folder: Path) -> Tensor:
    """What the model in that folder says of one prompt and one image: (3 + 16 + 3, 640)."""
    pixels = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)) * 4 - 2
    return nanogap.load(folder, "cpu")(PROMPT, pixels)


def refusal(folder: Path | str, **options: object) -> str:
    """The text of the error with which a folder is refused: always one line."""
    with pytest.raises(NanogapError) as caught:
        nanogap.load(folder, **{"device": "cpu"} | options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def put(name: str, data: bytes | str) -> Change:
    """Something else in the place of a file, or of a link to one."""
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return replace


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def tensors(changed: dict[str, Tensor | None]) -> Change:
    """Other tensors on disk; None takes one away."""
    state = {name: value for name, value in (TINY | changed).items() if value is not None}
    return lambda folder: write_tensors(folder / MODEL, state)


def key(part: str | None, name: str, value: object) -> Change:
    """A key of config.json: of text_config, of vision_config, or of the top (None)."""
    def change(config: dict) -> None:
        (config[f"{part}_config"] if part else config)[name] = value
    return lambda folder: edit(folder / "config.json", change)


def sharded(name: str, change: Callable[[Path], object]) -> Change:
    """Two shards in the place of one file, and then a change to one of the files."""
    def shard(folder: Path) -> None:
        (folder / MODEL).unlink()
        write_shards(folder, TINY, 2)
        change(folder / name)
    return shard


def cut(share: float) -> Change:
    return lambda folder: os.truncate(
        folder / MODEL, int(share * (folder / MODEL).stat().st_size))


# ----- what loads ---------------------------------------------------------------------------------


LAYOUTS = {       # by a tensor that only the one has
    "a": "vision_tower.vision_model.pre_layrnorm.bias",
    "b": "vision_tower.pre_layrnorm.bias",
    "c": "model.vision_tower.vision_model.pre_layrnorm.bias",
    "d": "model.vision_tower.pre_layrnorm.bias"}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_single_or_sharded_gives_the_same_logits_bit_for_bit(
        layout: str, shards: int, folder: Path, tmp_path: Path):
    other = write_checkpoint(tmp_path / "other", layout=layout, shards=shards)
    assert len(list(other.glob("*.safetensors"))) == shards
    assert LAYOUTS[layout] in dict(weights.read_tensors(other))
    assert torch.equal(logits(other), logits(folder))


def test_what_is_saved_loads_again_bit_for_bit(folder: Path, tmp_path: Path):
    save(tmp_path / "again", nanogap.load(folder, "cpu"), torch.float32)
    assert torch.equal(logits(tmp_path / "again"), logits(folder))
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json"]


def test_buffers_that_older_files_hold_are_ignored(folder: Path):
    expected = logits(folder)
    tensors(dict.fromkeys(("language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
                           "vision_tower.vision_model.embeddings.position_ids"),
                          torch.arange(4)))(folder)
    assert torch.equal(logits(folder), expected)


def test_tied_embeddings_need_no_lm_head_on_disk(tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True)), "cpu")
    state = model.state_dict()
    assert torch.equal(state["language_model.lm_head.weight"],
                       state["language_model.model.embed_tokens.weight"])


# ----- device and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16])
def test_any_precision_on_disk_becomes_the_one_asked_for(
        stored: torch.dtype, asked: torch.dtype, tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path, dtype=stored), "cpu", asked)
    assert {value.dtype for value in model.state_dict().values()} == {asked}
    assert torch.equal(model.state_dict()[NORM], TINY[NORM].to(stored).to(asked))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_converted_answers_with_every_strategy(
        dtype: torch.dtype, picture: Image.Image):
    """The text guide goes with it."""
    model = nanogap.load("mini", "cpu")
    model.to(dtype)
    assert model.dtype == model.text_guide.text_projection.weight.dtype == dtype
    for name in STRATEGIES:
        model.ground(picture, "the red car", name, 100, max_new_tokens=2)


def test_an_unknown_dtype_or_device_is_refused_with_the_choices(folder: Path):
    choices = "choose from float32, bfloat16, float16"
    assert refusal(folder, dtype="int8") == f"unknown dtype int8; {choices}"
    assert refusal(folder, dtype=torch.int8) == f"unknown dtype torch.int8; {choices}"
    assert refusal(folder, device="abacus").startswith(
        "device abacus is not available here; choose from cpu")


# ----- what is missing, broken or another model's -------------------------------------------------


GET = "`hf download llava-hf/llava-1.5-7b-hf --local-dir weights/llava-1.5-7b-hf` (14 GB)"
GET_OR = (f"get the published weights with {GET}, or take some that come with nanogap, such as "
          "mini")
MORE = "language_model.model.layers.3.input_layernorm.weight"                 # there are 0 to 2
NOT_LOADED = "FOLDER cannot be loaded as llava (Error(s) in loading state_dict for VLM: "
NO_OBJECT = "FOLDER/{} holds no JSON object but a {}: it is some other file under this name"
# what is done to a folder, and what it is told; "..." stands for any end
BROKEN: list[tuple[Change, str]] = [
    (lambda folder: folder.rename(folder.parent / "x"), f"FOLDER is not a folder; {GET_OR}"),
    (without("config.json"),
     f"FOLDER has no config.json, so it is not a checkpoint; {GET_OR}"),
    (without(MODEL),
     f"FOLDER holds no {MODEL} and no index of shards; {GET_OR}"),
    # tokenizer.json
    (without("tokenizer.json"), "FOLDER has no tokenizer.json; download it, or write one from ..."),
    *((put("tokenizer.json", text), "FOLDER/tokenizer.json cannot be read (...")
      for text in ("", "{", "{}", '{"version": "2.0"}')),
    (put("tokenizer.json", "[]"), NO_OBJECT.format("tokenizer.json", "list")),
    (lambda folder: write_checkpoint(folder, tiny_config(vocab_size=561)),    # <pad> has ID 561
     "FOLDER/tokenizer.json has more tokens than the model has embeddings (561): it belongs to "
     "another checkpoint"),
    (lambda folder: edit(folder / "tokenizer.json", lambda form: form["added_tokens"][-1].update(
        content="<|im_start|>")), "FOLDER/tokenizer.json holds <|im_start|>, a word of ..."),
    # tensors that do not fit
    (tensors({NORM: None}), f'{NOT_LOADED}Missing key(s) in state_dict: "{NORM}"...'),
    (tensors({MORE: torch.ones(64)}), f'{NOT_LOADED}Unexpected key(s) in state_dict: "{MORE}"...'),
    (tensors({NORM: torch.ones(63)}), f"{NOT_LOADED}size mismatch for {NORM}: copying a param ..."),
    # shards and their index
    (sharded("model-00002-of-00002.safetensors", Path.unlink),
     "FOLDER lacks model-00002-of-00002.safetensors, which its index names; run the download "
     "again: it continues where it stopped"),
    (sharded(INDEX, lambda path: path.write_text("404")), NO_OBJECT.format(INDEX, "int")),
    # files of tensors
    *((cut(share), f"FOLDER/{MODEL} cannot be read (...); download it again")
      for share in (0.0, 0.00001, 0.001, 0.5, 0.99)),
    *((put(name, text), f"FOLDER/{name} is a {says}...")
      for name in (MODEL, "tokenizer.json", "config.json") for text, says in (
          ("version https://git-lfs.github.com/spec/v1\nsize 14126854144\n", "pointer of git-lfs"),
          ("<!DOCTYPE html>", "web page"))),
    # config.json, and the files beside it
    (put("config.json", "null"), NO_OBJECT.format("config.json", "NoneType")),
    *((key(None, "model_type", kind),
       f"FOLDER/config.json describes a {kind!r} model, not a "
       f"{' or '.join(map(repr, MODELS))}; {GET_OR}")
      for kind in ("llama", "llava_onevision", None, ["llava"])),
    *((put(name, "{"), f"FOLDER/{name} cannot be read (...")
      for name in ("config.json", "preprocessor_config.json")),
    (put("preprocessor_config.json", '{"image_mean": 0.5}'),
     "FOLDER cannot be loaded as llava (..."),
    *((key("text", name, value), "FOLDER cannot be loaded as llava (...") for name, value in (
        ("hidden_size", "64"), ("num_key_value_heads", 3), ("rope_parameters", [1e4]))),
    *((key(None, name, value), f"config.json: {name} is {value}; nanogap implements {known} only")
      for name, value, known in (
        *((name, -200, "range(0, 641)") for name in ("image_token_index", "image_token_id")),
        *(("vision_feature_layer", layer, "range(-3, -1)") for layer in (-1, 0, 3, -4, [-2])))),
    (key(None, "image_token_index", 300),
     "config.json: image_token_index is 300, which is a word in FOLDER/tokenizer.json; give the "
     "tokenizer.json that the checkpoint was published with")]


@pytest.mark.parametrize("damage, says", BROKEN, ids=[f"{says:.60}" for _, says in BROKEN])
def test_what_is_missing_broken_or_another_models_is_named(damage: Change, says: str, folder: Path):
    damage(folder)
    begin, _, end = says.replace("FOLDER", str(folder)).partition("...")
    text = refusal(folder)
    assert text.startswith(begin) and text.endswith(end)
    assert "..." in says or text == begin


# ----- what config.json omits, and what it must be asked for -------------------------------------


def test_an_empty_llava_config_is_that_of_transformers_classes(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    config = weights.read_config(tmp_path)
    assert config.text == LlamaConfig(
        4096, 11008, 32, 32, 32, 128, 32000, 1e-6, 10000.0, 2048, False)
    assert config.vision == CLIPVisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5)
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    b_32 = CLIPVisionConfig(768, 3072, 12, 12, 224, 32, 1e-5)
    assert weights.read_config(tmp_path).vision == b_32


def test_keys_that_hold_their_defaults_may_be_null_and_small_files_missing(folder: Path):
    expected = logits(folder)
    for name in ("num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "rope_scaling",
                 "attention_bias", "bos_token_id", "eos_token_id", "layer_norm_eps"):
        key("text", name, None)(folder)
        key("vision", name, None)(folder)
    (folder / "generation_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("part, name, value", [
    ("text", "rms_norm_eps", 1e-2), ("text", "rope_theta", 5000.0),
    ("vision", "layer_norm_eps", 1e-2), (None, "vision_feature_layer", -3)])
def test_what_the_config_says_is_read_and_not_guessed(
        part: str | None, name: str, value: object, folder: Path):
    before = logits(folder)
    key(part, name, value)(folder)
    assert float((logits(folder) - before).abs().max()) > 0.01


# ----- memory -------------------------------------------------------------------------------------

# VmHWM, the most that was ever resident, begins anew with a program; ru_maxrss inherits pytest's
MEASURE = """
import sys
import nanogap, torch

def megabytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))

nanogap.load(sys.argv[2], "cpu")                     # a tiny one first: what loading itself needs
before = megabytes("VmRSS")
model = nanogap.load(sys.argv[1], "cpu", sys.argv[3], pack=sys.argv[4] == "packed")
print(megabytes("VmHWM") - before, len({p.dtype for p in model.parameters()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read off /proc")
@pytest.mark.parametrize("stored, asked, how, least, most", [
    (torch.float32, "float32", "plain", 0, 0.2),                      # mapped: read when used
    (torch.float16, "bfloat16", "plain", 0.9, 1.15),                  # converted: one copy
    (torch.float32, "float32", "packed", 0.5, 1.25),                  # packed: one copy as well
    (torch.float16, "bfloat16", "packed", 0.5, 1.25)])
def test_loading_needs_no_more_memory_than_one_copy(
        stored: torch.dtype, asked: str, how: str, least: float, most: float, folder: Path,
        tmp_path: Path):
    config = tiny_config(hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                         num_key_value_heads=16, head_dim=64,
                         num_hidden_layers=4 // stored.itemsize)
    large = write_checkpoint(tmp_path / "large", config, dtype=stored)
    size = (large / "model.safetensors").stat().st_size / 2 ** 20
    assert size > 60
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, large, folder, asked, how]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    grown, dtypes = done.stdout.split()
    assert dtypes == "1" and least * size - 5 <= float(grown) <= most * size + 5


def test_a_start_does_not_import_torchs_compiler():
    """A second, for one operation on the meta device that torch knows only by its decomposition."""
    code = """
import sys
import nanogap
nanogap.load("weights/mini", "cpu").ground("image.jpg", "a man", keep=72)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
