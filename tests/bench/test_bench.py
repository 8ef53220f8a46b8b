"""What nanogap.bench reports: keys and arithmetic, never times.  And the weights it measures with.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import nanogap
from nanogap import NanogapError
from nanogap.bench import __main__ as bench
from nanogap.bench import measure
from nanogap.bench.sizes import SIZES
from nanogap.checks.command import answer_for
from nanogap.fast.graph import GraphedDecoder
from nanogap.models import VLM
from tests.tiny import lines_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.filterwarnings("ignore")           # transformers' warnings
MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"
SHORT = ["--device", "cpu", "--rounds", "1", "--new", "3"]


def document(capsys: pytest.CaptureFixture, *argv: str) -> tuple[dict, str]:
    """The JSON on the last line of what the command says, and what stands before it."""
    bench.command([*argv, *SHORT])
    before, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return json.loads(last), before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("random") / "tiny"
    bench.command(["--random", "tiny", "--save", str(folder), *SHORT])
    return folder


# ----- the document -------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
@pytest.mark.parametrize("flags", [[], ["--no-pack"]])
def test_packed_weights_are_measured_and_named(capsys, tiny, flags: list[str]):
    said, before = document(capsys, "--weights", str(tiny), *flags)
    assert said["packed"] == (", packed, " in before) == (not flags)


def test_a_run_for_all_tokens_and_for_every_budget(capsys, tiny):
    """A token of the cache: keys and values of 3 layers and 64 channels in float32.

    Ratios are quotients of the medians beside them.
    """
    said, before = document(capsys, "--weights", str(tiny), "--keep", "8", "25%", "--json")
    assert before == ""
    runs = said["runs"]
    assert [(r["prune"], r["visual_tokens"]) for r in runs] == [
        ("none", 16), ("cls_attention", 8), ("cls_attention", 4)]
    assert said["dtype"] == "float32" and said["new_tokens"] == 3 and said["theirs"] is None
    assert runs[0]["kv_mb"] - runs[2]["kv_mb"] == 12 * 2 * 3 * 64 * 4 / 2 ** 20
    for run in runs:
        assert run["full_over_this"] == {key: runs[0][key] / run[key] for key in measure.BOUGHT}


def test_the_table_says_what_pruning_buys_and_the_json_comes_last(capsys, tiny):
    said, before = document(capsys, "--weights", str(tiny), "--keep", "4", "--prune", "random")
    ratios = said["runs"][1]["full_over_this"]
    assert before.endswith(
        f"With 4 visual tokens, times faster than with all: prefill {ratios['prefill_ms']:.1f}, "
        f"the vision tower {ratios['vision_ms']:.2f}, a pass of the decoder "
        f"{ratios['pass_ms']:.2f}; the cache is 1.2 times smaller.")
    assert (f"ours: loaded in {said['ours']['load_s']:.2f} s; peak memory "
            f"{said['ours']['peak_over_weights']:.2f} times the weights' ") in before
    assert ", random 4: " in before and "\nrandom              4 " in before


# ----- against transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "mini-next"])
def test_the_peer_takes_turns_and_says_the_same(capsys, name: str, tiny: Path):
    """That of LLaVA-1.6 sees tiles, and is told how large the picture is."""
    pytest.importorskip("transformers")
    folder = tiny if name == "tiny" else MINI.with_name(name)
    said, before = document(capsys, "--weights", str(folder), "--against", "transformers")
    theirs = said["theirs"]
    assert theirs["same_tokens"] and theirs["library"].startswith("transformers ")
    assert theirs["largest_difference"] <= 2e-5 * theirs["largest_logit"]
    for run in said["runs"]:
        assert run["theirs_over_this"]["pass_ms"] == theirs["pass_ms"] / run["pass_ms"]
        drafted = theirs["box_ms"] / run["drafted_box_ms"]
        assert run["theirs_over_this"]["drafted_box_ms"] == drafted
    assert "times faster than transformers" in before


def test_what_transformers_cannot_run_is_one_line(monkeypatch):
    against = ["--against", "transformers", *SHORT]
    with pytest.raises(NanogapError, match="holds a 'shikra' model, and transformers has only"):
        bench.command(["--weights", "mini-shikra", *against])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NanogapError, match="not installed here; get it with `pip install transf"):
        bench.command(["--weights", "mini", *against])


# ----- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, message", [
    (["--random", "tiny"], "random weights are asked for by --random SIZE --save DIR, and others"),
    (["--save", "w"], "random weights are asked for by --random SIZE --save DIR"),
    (["--random", "tiny", "--save", "w", "--weights", "w"], "and others by --weights DIR"),
    (["--new", "1"], "'1' is not a whole number from 2 on"),
    (["--weights", "mini", "--keep", "145"], "cannot keep 145 of 144 visual tokens"),
    (["--prune", "nothing"], "unknown strategy 'nothing'"),
    (["--weights", "nowhere"], "nowhere is not a folder; get the published weights"),
])
def test_a_mistake_is_one_line(argv: list[str], message: str, capsys):
    assert answer_for("nanogap.bench", bench.command, [*argv, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and lines_of(err) == 1


def test_nothing_is_overwritten(tiny: Path):
    with pytest.raises(NanogapError, match="has files in it already, and they are not overwritten"):
        bench.command(["--random", "tiny", "--save", str(tiny)])


# ----- random weights -----------------------------------------------------------------------------


def test_random_weights_are_read_with_the_spread_that_their_rows_ask_for(tiny):
    model = nanogap.load(tiny, "cpu")
    assert model.config.text == SIZES["tiny"].text and model.config.vision == SIZES["tiny"].vision
    layer = model.language_model.model.layers[0]
    assert float(layer.mlp.down_proj.weight.std()) == pytest.approx(128 ** -0.5, rel=0.03)
    assert set(layer.input_layernorm.weight.tolist()) == {1.0}


@pytest.mark.parametrize("size, parameters", [("7b", 7.06e9), ("350m", 0.35e9)])
def test_the_sizes_are_those_that_are_published(size: str, parameters: float):
    with torch.device("meta"):
        drawn = sum(p.numel() for p in VLM(SIZES[size]).parameters())
    assert drawn == pytest.approx(parameters, rel=0.01)
    assert SIZES[size].vision.grid ** 2 == 576


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_graphed_decoder_says_the_same_with_drafts_and_without(device: str):
    """On a CPU the same code runs unrecorded: a cache of a fixed number of rows, and a mask."""
    model = nanogap.load(MINI, device, "float32")
    image = model.encode_image(measure.IMAGE)
    questions = [("full", None, 25), ("gap", 36, 25), ("full", None, 9)]

    def said(drafts: bool) -> list:
        answers = [model.ground(image, measure.EXPRESSION, "random", keep, mode,
                                max_new_tokens=most, drafts=drafts)
                   for mode, keep, most in questions]
        return [(r.tokens, r.kv_bytes, r.timings["passes"]) for r in answers]

    plain = said(False) + said(True)
    model.next_pass = GraphedDecoder(model.language_model.model)
    assert said(False) + said(True) == plain
    assert {rows % 64 for rows, _ in model.next_pass.recordings} == {0}
