"""A checkpoint's files, by the kinds of what is wrong with them: loops over all of each kind.

In:  a tiny checkpoint, of which one file says something else.
Out: an answer that follows it, or one line that names it; never a piece of it passed over.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nanogap
from nanogap import NanogapError, weights
from nanogap.checks import silent as settings
from nanogap.checks.command import answer_for
from nanogap.checks.silent import silent
from tests.checks.test_weights import (
    MODEL,
    ROOT,
    TINY,
    Change,
    edit,
    logits,
    refusal,
    tensors,
)
from tests.tiny import write_shards, write_tensors


def put(folder: Path, file: str, **keys: object) -> None:
    """Keys into a JSON file, which is there afterwards."""
    path = folder / file
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | keys))


# ----- every key is followed, or refused by its name ----------------------------------------------

TABLES = [
    ("config.json", None, settings.LLAVA), ("config.json", "text_config", settings.DECODER),
    ("config.json", "vision_config", settings.CLIP),
    *((name, None, table) for name, table in settings.FILES.items())]


@pytest.mark.parametrize("file, part, table", TABLES)
def test_a_key_that_would_change_an_answer_is_refused_by_its_name(
        file: str, part: str | None, table: settings.Table, folder: Path):
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    for key, harmless in table.items():
        for value in (*harmless, None, True, False, 7, 0.5, "other", [3], {"a": 1}):
            changed = before | {key: value}
            if part is not None:
                changed = before | {part: before[part] | {key: value}}
            path.write_text(json.dumps(changed))
            if value is None or value in harmless:
                silent(folder)
            else:
                with pytest.raises(NanogapError, match=f"{file}.*: {key} is "):
                    silent(folder)


@pytest.mark.parametrize("file, keys", [
    ("config.json", {"use_cache": False, "pad_token_id": 3, "ignore_index": -100}),
    ("generation_config.json", {"max_length": 7, "temperature": 0.1, "pad_token_id": 3}),
    ("preprocessor_config.json", {"do_convert_rgb": True, "data_format": "channels_first"}),
    ("tokenizer_config.json", {"model_max_length": 5, "padding_side": "left", "legacy": False})])
def test_a_key_that_changes_nothing_is_left_alone(file: str, keys: dict, folder: Path, whole: Path):
    """Length and sampling are the caller's: here answers are greedy, and end at max_new_tokens."""
    put(folder, file, **keys)
    silent(folder)
    assert weights.read_config(folder) == weights.read_config(whole)


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_theta": 500.0, "rope_scaling": None}])
def test_each_spelling_of_rope_is_read(spelling: dict, folder: Path):
    edit(folder / "config.json", lambda config: config["text_config"].update(
        {"rope_theta": None} | spelling))
    silent(folder)
    assert weights.read_config(folder).text.rope_theta == 500.0


@pytest.mark.parametrize("spelling", [
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}])
def test_scaled_positions_are_refused_in_each_spelling(spelling: dict, folder: Path):
    edit(folder / "config.json", lambda config: config["text_config"].update(spelling))
    with pytest.raises(NanogapError, match="config.json: "):
        silent(folder)


def test_the_image_processor_is_found_in_either_file(folder: Path):
    """transformers 5 writes it into processor_config.json, which then counts."""
    half, third = ({"image_mean": [x] * 3, "image_std": [x / 2] * 3} for x in (0.5, 0.25))
    put(folder, "preprocessor_config.json", **third)
    config = nanogap.load(folder, "cpu").config
    assert (config.image_mean, config.image_std) == ((0.25,) * 3, (0.125,) * 3)
    put(folder, "processor_config.json", image_processor=half)
    config = nanogap.load(folder, "cpu").config
    assert (config.image_mean, config.image_std) == ((0.5,) * 3, (0.25,) * 3)
    put(folder, "processor_config.json", image_processor=half | {"do_normalize": False})
    with pytest.raises(NanogapError, match="^processor_config.json: do_normalize is"):
        silent(folder)


@pytest.mark.parametrize("ends, first, others", [
    (None, 2, ()), (7, 7, ()), ([7], 7, ()), ([7, 9], 7, (9,)), ([9, 2, 7], 9, (2, 7))])
def test_any_of_several_end_tokens_ends_an_answer(ends: object, first: int, others: tuple,
                                                  folder: Path):
    """Those of generation_config.json where it says any, or else of config.json."""
    put(folder, "generation_config.json", eos_token_id=ends)
    silent(folder)
    config = weights.read_config(folder)
    assert (config.eos_token, config.other_ends) == (first, others)


LLAMA3 = ("{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
          "{{ m['content'] }}<|eot_id|>{% endfor %}")
VICUNA = ("{% for message in messages %}{% if message['role'] != 'system' %}"
          "{{ message['role'].upper() + ': '}}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json",
                                   "processor_config.json", "tokenizer_config.json"])
def test_another_chat_template_is_refused_wherever_it_stands(where: str, folder: Path):
    def write(template: object) -> None:
        if where.endswith(".jinja"):
            (folder / where).write_text(str(template))
        else:
            put(folder, where, chat_template=template)

    for template in (VICUNA, [{"name": "default", "template": VICUNA}]):
        write(template)
        silent(folder)
    for template in (LLAMA3, VICUNA.replace("ASSISTANT:", "[/INST]")):
        write(template)
        with pytest.raises(NanogapError, match=f"{where} holds another chat template than the "):
            silent(folder)


def test_padding_and_truncation_left_over_in_a_tokenizer_change_no_prompt(
        folder: Path, whole: Path):
    pad = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3,
           "pad_type_id": 0, "pad_token": "<pad>"}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    ids = nanogap.load(whole, "cpu").prompt("the man on the left").tolist()
    for keys in ({"padding": pad}, {"truncation": cut}, {"padding": pad, "truncation": cut}):
        put(folder, "tokenizer.json", **{"padding": None, "truncation": None} | keys)
        assert nanogap.load(folder, "cpu").prompt("the man on the left").tolist() == ids


# ----- which of several files counts --------------------------------------------------------------


def test_the_file_that_counts_is_the_one_that_transformers_would_take(tmp_path: Path):
    """Each kind of file holds the number of its place in the order; the first there is counts."""
    made: dict[str, Callable[[float], object]] = {
        "model.safetensors": lambda v: write_tensors(tmp_path / "model.safetensors",
                                                     {"x": torch.full((2,), v)}),
        "model.safetensors.index.json": lambda v: write_shards(
            tmp_path, {"x": torch.full((2,), v), "y": torch.ones(1)}, 2),
        "pytorch_model.bin": lambda v: torch.save({"x": torch.full((2,), v)},
                                                  tmp_path / "pytorch_model.bin")}
    for value, name in reversed(list(enumerate(made))):
        made[name](float(value))
        found = dict(weights.read_tensors(tmp_path))["x"]
        assert found.tolist() == [value, value], name


# ----- whole files of another form ----------------------------------------------------------------

PROJECTION = "language_model.model.layers.0.mlp.down_proj.weight"


FORMS: list[tuple[Change, str]] = [
    *((lambda folder, name=name: (folder / MODEL).rename(folder / name), says) for name, says in (
        ("adapter_model.safetensors", "adapter"), ("non_lora_trainables.bin", "adapter"),
        ("mm_projector.bin", "LLaVA's own layout"), ("llava-q4.gguf", "GGUF"))),
    *((tensors({name: value}), says) for name, value, says in (
        ("base_model.model.x.lora_A.weight", torch.ones(2), "adapter"),
        ("model.mm_projector.0.weight", torch.ones(2), "LLaVA's own layout"),
        (PROJECTION, torch.zeros(9, 1, dtype=torch.uint8), "quantised"))),
    (lambda folder: put(folder, "adapter_config.json", peft_type="LORA"), "adapter"),
    (lambda folder: put(folder, "config.json", quantization_config={"quant_method": "gptq"}),
     "quantised"),
    (lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"), "save_pretrained")]


@pytest.mark.parametrize("change, says", FORMS)
def test_a_whole_file_of_another_form_is_told_what_it_is_and_not_fetched_again(
        change: Change, says: str, folder: Path):
    change(folder)
    said = refusal(folder)
    assert says in said and "again" not in said and "broken" not in said, said


def test_a_folder_of_the_hubs_cache_is_used(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "snapshots" / "abc")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("abc\n")
    for given in (tmp_path, tmp_path / "snapshots" / "abc"):
        assert torch.equal(logits(given), logits(whole))


def test_each_pickle_of_torchs_is_read_today_or_by_hand(folder: Path, whole: Path):
    (folder / "model.safetensors").unlink()
    for legacy in (False, True):                      # torch before 1.6 wrote no archive
        torch.save(TINY, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        assert torch.equal(logits(folder), logits(whole))
    for state in ([1], {"epoch": 7}, nanogap.load(whole, "cpu")):
        torch.save(state, folder / "pytorch_model.bin")
        said = refusal(folder)
        assert "more than tensors" in said and "torch.save(model.state_dict(), PATH)" in said


# ----- what a mistake is blamed on ----------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"),
                                   RuntimeError("unable to mmap: Cannot allocate memory (12)")])
def test_a_lack_of_memory_is_not_called_broken(error: Exception, folder: Path, monkeypatch, capsys):
    def full(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(weights, "safe_open", full)
    assert answer_for("run.py", lambda _: nanogap.load(folder, "cpu"), []) == 2
    assert capsys.readouterr().err.startswith("run.py: memory ran out (")


# ----- a CLIP that the tower does not come from ---------------------------------------------------


def other_words(clip: Path) -> None:
    edit(clip / "tokenizer.json", lambda form: form.update(post_processor=None))


def other_tower(change: Callable[[Tensor], Tensor]) -> Change:
    def write(clip: Path) -> None:
        write_tensors(clip / MODEL, {
            name: change(value.float()) if name.startswith("vision_model.") and value.dim() > 1
            else value.float() for name, value in list(weights.read_tensors(clip))})
    return write


@pytest.mark.parametrize("change, says", [
    (other_words, "ends no text with its highest ID, where CLIP reads it; give the one"),
    (other_tower(torch.randn_like), "is not the CLIP that the vision tower comes from"),
    (other_tower(lambda value: value[:1]), "is not the CLIP that the vision tower comes from"),
    (other_tower(lambda value: value.bfloat16().float() * 1.05), None)])
def test_another_clip_is_refused_though_all_sizes_fit(
        change: Change, says: str | None, tmp_path: Path):
    clip = shutil.copytree(ROOT / "weights/mini/clip_text", tmp_path / "clip")
    change(clip)
    if says is None:
        nanogap.load("mini", "cpu", clip=clip)
    else:
        assert says in refusal("mini", clip=clip)
