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


def rows(text: str) -> list[tuple[str, ...]]:
    """The table: token, token ID, keep, ID before, ID now, cache row; "" where there is none."""
    table = re.findall("^   (.{20})" + 4 * "(.{11})" + "( +(?:[0-9]+|-))$", text, re.MULTILINE)
    return [tuple(map(str.strip, row)) for row in table]


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
    known = [*ids.tolist(), *range(next_position, next_position + 40)]
    *shown, last = rows(text)
    assert all(known[int(row[5])] == int(row[4]) for row in shown) and last[5] == "-"
    said = [int(row[5]) for row in shown[9:]]                # nine of the prompt's tokens are shown
    assert len(said) > 1 and said == list(range(len(ids), len(ids) + len(said)))
    ends = [*fed[:3], fed[-1]]
    assert [int(row[2]) for row in shown if row[0] == "patch"] == ends
    before = [int(row[3]) for row in shown[:9]]
    assert before == [0, 1, 32, *(33 + k for k in ends), 177, 199]


@pytest.mark.parametrize("prune", STRATEGIES)
def test_whatever_prunes_is_told_in_80_columns(prune: str, mini: VLM):
    text = told(mini, "shifted", "permuted", "gap", prune=prune)
    assert max(map(len, text.split("\n"))) <= 80
    assert ("behind the last cut:" in " ".join(text.split())) == prunes_there(prune)
    added = "added" in [row[0] for row in rows(text)]
    assert (" added | A = " in text) == added == (prune in ADDS)


def test_modes_say_what_is_theirs_alone(mini: VLM):
    assert "\n   not in mode full: all 144 visual tokens stay\n" in told(mini, "full")
    text = told(mini, "full", "original, text collides")
    assert ("\n6  Mode original, text collides: raster order, original position IDs\n"
            "   and compact ones for the text after the image\n") in text
    assert text.count("ones for the text after the image") == 1


if __name__ == "__main__":
    mini = nanogap.load(ROOT / "weights" / "mini", "cpu", "float32")
    GOLDEN.write_text(told(mini, "gap"), encoding="utf-8")
