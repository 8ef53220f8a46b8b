"""What nanogap.bench reports: keys and arithmetic, never times.  And what it measures with: random
weights of every size, and decoding with graphs.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nanogap
from nanogap import NanogapError
from nanogap.bench import EXPRESSION, IMAGE, measure
from nanogap.bench import __main__ as bench
from nanogap.bench.sizes import SIZES, random_model, save_random
from nanogap.checks.command import answer_for
from nanogap.fast.graph import GraphedDecoder
from nanogap.models import VLM
from tests.tiny import lines_of

pytestmark = pytest.mark.filterwarnings("ignore")           # transformers' warnings
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with 4 x 4 patches, as `--random tiny --save DIR` writes them."""
    folder = tmp_path_factory.mktemp("random") / "tiny"
    save_random("tiny", folder, CPU, torch.bfloat16)
    return folder


def document(capsys: pytest.CaptureFixture, *argv: str) -> tuple[dict, str]:
    """The JSON on the last line of what the command says, and what stands before it."""
    bench.command([*argv, "--device", "cpu", "--rounds", "2", "--new", "3"])
    before, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return json.loads(last), before


# ----- the document -------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
@pytest.mark.parametrize("flags", [[], ["--no-pack"]])
def test_packed_weights_are_measured_and_named(capsys, tiny, flags: list[str]):
    said, before = document(capsys, "--weights", str(tiny), *flags)
    assert said["packed"] == (", packed, " in before) == (not flags)


def test_a_run_for_all_tokens_and_for_every_budget(capsys, tiny):
    """The cache: 3 layers of 64 channels in float32; of 3 new tokens the last is never fed.

    Ratios are quotients of the medians beside them.
    """
    said, before = document(capsys, "--weights", str(tiny), "--keep", "8", "25%", "--json")
    assert before == ""
    assert [(r["prune"], r["visual_tokens"]) for r in said["runs"]] == [
        ("none", 16), ("cls_attention", 8), ("cls_attention", 4)]
    assert said["dtype"] == "float32" and said["new_tokens"] == 3 and said["theirs"] is None
    assert said["runs"][0]["prompt_tokens"] - said["runs"][2]["prompt_tokens"] == 12
    for run in said["runs"]:
        assert run["kv_bytes"] == (run["prompt_tokens"] + 2) * 2 * 3 * 64 * 4
        assert run["full_over_this"] == {
            key: said["runs"][0][key] / run[key] for key in measure.BOUGHT}
    assert said["ours"]["weight_bytes"] == said["parameters"] * 4


def test_the_table_says_what_pruning_buys_and_the_json_comes_last(capsys):
    said, before = document(capsys, "--random", "tiny", "--keep", "4", "--prune", "random")
    ratios = said["runs"][1]["full_over_this"]
    assert said["weights"] == "random tiny" and "ours: loaded in" in before
    assert before.endswith(
        f"a pass of the decoder {ratios['pass_ms']:.2f}; the cache is 1.2 times smaller.")
    assert f"than with all: prefill {ratios['prefill_ms']:.1f}, " in before


# ----- against transformers -----------------------------------------------------------------------


@pytest.fixture(params=["tiny", "mini-next"])
def folder(request: pytest.FixtureRequest, tiny: Path) -> Path:
    """Of a peer; that of LLaVA-1.6 sees tiles, and is told how large the picture is."""
    pytest.importorskip("transformers")
    return tiny if request.param == "tiny" else MINI.parent / "mini-next"


def test_the_peer_takes_turns_and_says_the_same(capsys, folder: Path):
    said, before = document(capsys, "--weights", str(folder), "--against", "transformers")
    assert said["theirs"]["same_tokens"] and said["theirs"]["library"].startswith("transformers ")
    for run in said["runs"]:
        assert run["theirs_over_this"]["pass_ms"] == said["theirs"]["pass_ms"] / run["pass_ms"]
        drafted = said["theirs"]["box_ms"] / run["drafted_box_ms"]
        assert run["theirs_over_this"]["drafted_box_ms"] == drafted
    assert "times faster than transformers" in before


def test_agreement_one_after_the_other(capsys, folder: Path):
    said, _ = document(capsys, "--weights", str(folder), "--agree")
    assert said["same_argmax"] == said["logits"] > 16 and said["same_tokens"]
    assert said["largest_difference"] <= 2e-5 * said["largest_logit"]


def test_without_transformers_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NanogapError, match="not installed here; get it with `pip install transf"):
        bench.command(["--against", "transformers", "--weights", "mini"])


# ----- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, message", [
    (["--random", "tiny", "--weights", "w"], "--weights: not allowed with argument --random"),
    (["--save", "w"], "--save DIR is for random weights: add --random SIZE"),
    (["--random", "tiny", "--agree"], "add --save DIR"),
    (["--new", "1"], "'1' is not a whole number from 2 on"),
    (["--random", "tiny", "--keep", "17"], "cannot keep 17 of 16 visual tokens"),
    (["--random", "tiny", "--prune", "nothing"], "unknown strategy 'nothing'"),
    (["--weights", "nowhere"], "nowhere is not a folder; get the published weights"),
])
def test_a_mistake_is_one_line(argv: list[str], message: str, capsys):
    assert answer_for("nanogap.bench", bench.command, [*argv, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and lines_of(err) == 1


def test_nothing_is_overwritten(tiny: Path):
    with pytest.raises(NanogapError, match="is there already; give a new folder, or measure what"):
        save_random("tiny", tiny, CPU, torch.bfloat16)


# ----- random weights -----------------------------------------------------------------------------


def test_random_weights_come_back_from_disk_as_they_were_drawn(tiny):
    drawn = random_model("tiny", CPU, torch.bfloat16)
    loaded = nanogap.load(tiny, "cpu", "bfloat16")
    assert loaded.config == replace(drawn.config, dtype="bfloat16")
    for name, value in drawn.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("size, parameters", [("7b", 7.06e9), ("13b", 13.35e9), ("350m", 0.35e9)])
def test_the_sizes_are_those_that_are_published(size: str, parameters: float):
    with torch.device("meta"):
        drawn = sum(p.numel() for p in VLM(SIZES[size]).parameters())
    assert drawn == pytest.approx(parameters, rel=0.01)
    assert SIZES[size].vision.grid ** 2 == 576


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_graphed_decoder_says_the_same_with_drafts_and_without(device: str):
    """On a CPU the same code runs unrecorded: a cache of a fixed number of rows, and a mask."""
    model = nanogap.load(MINI, device, "float32")
    image = model.encode_image(IMAGE)
    questions = [("full", None, 25), ("gap", 36, 25), ("full", None, 9)]

    def said(drafts: bool) -> list:
        answers = [model.ground(image, EXPRESSION, "random", keep, mode,
                                max_new_tokens=most, drafts=drafts)
                   for mode, keep, most in questions]
        return [(r.tokens, r.kv_bytes, r.timings["passes"]) for r in answers]

    plain = said(False) + said(True)
    model.next_pass = GraphedDecoder(model.language_model.model)
    assert said(False) + said(True) == plain
    assert {rows % 64 for rows, _ in model.next_pass.recordings} == {0}


