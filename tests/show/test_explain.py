"""--explain: what it says of the mini model, word for word; its numbers are those of gap.py.

The golden text is made again by `python -m tests.show.test_explain`.
"""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import nanogap
from nanogap import gap
from nanogap.methods.in_decoder import prunes_there
from nanogap.models import VLM
from nanogap.prune import STRATEGIES
from nanogap.show.explain import explain

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden_explain.txt")
EXPRESSION = "the man on the left"
BEST_FIRST = torch.randperm(144, generator=torch.Generator().manual_seed(0))[:72]   # random's
ADDS = ("prumerge", "prumerge_plus", "trim", "visionzip", "sparsevlm")   # tokens, such as a mean


def told(model: VLM, *modes: str, prune: str = "random") -> str:
    """What `run.py image.jpg "the man on the left" --explain` prints before its table."""
    image = model.encode_image(ROOT / "image.jpg")
    results = {mode: model.ground(image, EXPRESSION, prune, 72, mode) for mode in modes}
    with redirect_stdout(io.StringIO()) as out:
        explain(model, image, EXPRESSION, results)
    return out.getvalue()


def test_the_golden_walk_through_one_query(mini: VLM):
    assert told(mini, "gap") == GOLDEN.read_text(encoding="utf-8")


# ----- the numbers --------------------------------------------------------------------------------


def cells(text: str, name: str) -> list[str]:
    """All cells of the rows with a name, from left to right: the prompt's, then the answer's."""
    return " ".join(re.findall(rf"^   {name}  +(.*)$", text, re.MULTILINE)).split()


def spelled_out(text: str) -> list[int]:
    """The numbers that stand behind "0..2 5 | 7..8": 0 1 2 5 7 8."""
    runs = [[int(n) for n in run.split("..")] for run in text.replace("|", " ").split()]
    return [n for run in runs for n in range(run[0], run[-1] + 1)]


@pytest.mark.parametrize("mode", gap.MODES)
def test_every_position_id_is_that_of_gap_py_and_every_cache_row_is_dense(mode: str, mini: VLM):
    """The ID before pruning is the number of tokens before the image and the raster index."""
    text = told(mini, mode)
    P, A = mini.around_image(mini.prompt(EXPRESSION))
    layout = gap.lay_out(torch.arange(144) if mode == "full" else BEST_FIRST, P, 144, A, mode)
    ids, next_position, fed = layout.position_ids, layout.next_position, layout.kept.tolist()
    every = text.partition("position IDs: P")[2].partition("\n")[2].partition("   token ")[0]
    assert spelled_out(every) == ids.tolist()
    known = dict(enumerate([*ids.tolist(), *range(next_position, next_position + 40)]))
    pairs = zip(cells(text, "cache row"), cells(text, "ID now"), strict=True)
    rows = [(int(row), int(id_)) for row, id_ in pairs if row not in ("..", "-")]
    assert all(known[row] == id_ for row, id_ in rows)
    said = [row for row, _ in rows[9:]]                      # nine of the prompt's tokens are shown
    assert len(said) > 1 and said == list(range(len(ids), len(ids) + len(said)))
    ends = [*fed[:3], fed[-1]]
    assert [int(k) for k in cells(text, "keep") if k != ".."] == ends
    before = [int(id_) for id_ in cells(text, "ID before") if id_ != ".."]
    assert before == [0, 1, 32, *(33 + k for k in ends), 177, 199]


@pytest.mark.parametrize("prune", STRATEGIES)
def test_whatever_prunes_is_told_in_80_columns(prune: str, mini: VLM):
    text = told(mini, "shifted", "permuted", "gap", prune=prune)
    assert max(map(len, text.split("\n"))) <= 80
    assert ("behind the last cut it is" in text) == prunes_there(prune)
    assert (" added | A = " in text) == ("added" in cells(text, "token")) == (prune in ADDS)


def test_each_cut_in_the_decoder_is_told(mini: VLM):
    """72 of 144 tokens in the mean: for PyramidDrop 78, 43 and 23 from the second layer on."""
    text = told(mini, "gap", prune="pyramiddrop")
    assert ("   the first 1 of 4 layers read the whole sequence, all 144 patches;\n"
            "   before layer 1, counted from 0, it is cut to 78 visual tokens;\n"
            "   before layer 2, counted from 0, it is cut to 43 visual tokens;\n"
            "   before layer 3, counted from 0, it is cut to 23 visual tokens;\n") in text
    assert " | K = 23 patches | A = " in text


def test_modes_say_what_is_theirs_alone(mini: VLM):
    assert "\n   not in mode full: all 144 patches stay\n" in told(mini, "full")
    text = told(mini, "full", "original, text collides")
    assert ("\n6  Mode original, text collides: raster order, original position IDs\n"
            "   and compact ones for the text after the image\n") in text
    assert text.count("ones for the text after the image") == 1


if __name__ == "__main__":
    mini = nanogap.load(ROOT / "weights" / "mini", "cpu", "float32")
    GOLDEN.write_text(told(mini, "gap"), encoding="utf-8")
