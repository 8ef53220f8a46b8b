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
from nanogap.checks.loading import MINI
from nanogap.checks.silent import silent
from tests.checks.test_weights import INDEX, MODEL, TINY, Change, edit, logits, refusal, tensors
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


@pytest.mark.parametrize("spelling, refused", [
    ({"rope_theta": 500.0, "rope_scaling": None}, False),
    ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, False),
    ({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 1.0}}, False),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, True),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, True)])
def test_each_spelling_of_rope_is_read_and_scaled_positions_are_refused(
        spelling: dict, refused: bool, folder: Path):
    edit(folder / "config.json", lambda config: config["text_config"].update(
        {"rope_theta": None} | spelling))
    if refused:
        assert refusal(folder).startswith("config.json: rope_")
    else:
        silent(folder)
        assert weights.read_config(folder).text.rope_theta == 500.0


def test_the_image_processor_is_found_in_either_file(folder: Path):
    """transformers 5 writes it into processor_config.json, which then counts."""
    put(folder, "preprocessor_config.json", image_mean=[0.25] * 3, image_std=[0.125] * 3)
    config = weights.read_config(folder)
    assert (config.image_mean, config.image_std) == ((0.25,) * 3, (0.125,) * 3)
    put(folder, "processor_config.json", image_processor={"image_mean": [0.5] * 3})
    assert weights.read_config(folder).image_mean == (0.5,) * 3
    put(folder, "processor_config.json", image_processor={"do_normalize": False})
    assert refusal(folder).startswith("processor_config.json: do_normalize is")


LLAMA3 = "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
VICUNA = "{{ m['role'].upper() + ': '}}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"


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
    put(folder, "tokenizer.json", padding=pad, truncation=cut)
    ours, theirs = (nanogap.load(at, "cpu").prompt("the man on the left") for at in (folder, whole))
    assert torch.equal(ours, theirs)
    guide = nanogap.load("mini", "cpu").text_guide       # a whole question may be longer than 77
    assert guide and guide.tokenizer.truncation is None and guide.tokenizer.padding is None


def test_a_stray_file_beside_a_whole_checkpoint_hides_no_mistake(folder: Path):
    (folder / "model.gguf").touch()
    put(folder, "generation_config.json", num_beams=5)
    assert "num_beams is 5; nanogap implements 1 only" in refusal(folder)


def test_the_file_that_counts_is_the_one_that_transformers_would_take(folder: Path, whole: Path):
    """One file before an index of shards, and these before a pickle."""
    torch.save({}, folder / "pytorch_model.bin")
    put(folder, INDEX, weight_map={"x": "an-older-shard.safetensors"})
    assert torch.equal(logits(folder), logits(whole))
    (folder / MODEL).unlink()
    write_shards(folder, TINY, 2)
    assert torch.equal(logits(folder), logits(whole))


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


def test_a_lack_of_memory_is_not_called_broken(folder: Path, monkeypatch, capsys):
    def full(*args: object, **options: object) -> None:
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

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
    (other_words, "ends no text with the CLIP's highest ID, where it reads it; give the one"),
    (other_tower(torch.randn_like), "is not the CLIP that the vision tower comes from"),
    (other_tower(lambda value: value[:1]), "is not the CLIP that the vision tower comes from"),
    (other_tower(lambda value: value.bfloat16().float() * 1.05), None)])
def test_another_clip_is_refused_though_all_sizes_fit(
        change: Change, says: str | None, tmp_path: Path):
    clip = shutil.copytree(MINI / "clip_text", tmp_path / "clip")
    change(clip)
    if says is None:
        nanogap.load("mini", "cpu", clip=clip)
    else:
        assert says in refusal("mini", clip=clip)
