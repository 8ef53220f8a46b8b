"""Several models asked with one command: each one's own table, a row for each, and one picture."""

import json
import re
import weakref
from argparse import Namespace

from PIL import Image

from nanogap.evaluate import __main__ as evaluate
from nanogap.evaluate import plot, report
from nanogap.evaluate.data import Data
from tests.evaluate.asking import MINI, SHIKRA, run
from tests.tiny import tiny_config, write_checkpoint

MODES = ("full", "shifted", "permuted", "gap")


def test_each_model_has_its_table_as_alone_and_all_together_a_row_each(printed):
    asked = ["--limit", 3, "--keep", "50%", "25%"]
    together, *parts = printed("--weights", MINI, SHIKRA, *asked).split("\n\n")
    cells = {}
    for weights, name, part in zip((MINI, SHIKRA), ("mini", "mini-shikra"), parts, strict=True):
        alone, both = (re.sub(r" +\d+ ms", "", text.rstrip())
                       for text in (printed("--weights", weights, *asked), part))
        assert alone == both and both.startswith(f"{weights}, scenes:val, 3 expressions")
        for line in both.split("\n")[3:]:
            prune, keep, _, mode, share, interval, *_ = line.split()
            cells[name, prune, keep, mode] = [share, interval]
    caption, head, *rows, counted = together.split("\n")
    assert counted == ("pixels: boxes in pixels of the original image, continuous areas, IoU >= "
                       "0.5; scenes:val, 3 of 3 expressions")
    assert caption.startswith("Acc@0.5 with 95 % intervals")
    assert re.split("  +", head) == ["model", "prune", "keep", "all tokens", *MODES[1:], "no box"]
    assert [line.split()[:-1] for line in rows] == [
        [name, "random", keep, *cells[name, "none", "144", "full"],
         *sum((cells[name, "random", keep, mode] for mode in MODES[1:]), [])]
        for keep in ("50%", "25%") for name in ("mini", "mini-shikra")]


def test_one_model_at_a_time_is_in_memory(folder, monkeypatch, capsys):
    loaded, load = [], evaluate.load

    def counted(*args: object, **options: object) -> object:
        assert [each() for each in loaded] == [None] * len(loaded)
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluate, "load", counted)
    assert run("--weights", MINI, folder, SHIKRA, "--limit", 1, "--keep", 4) == 0
    assert len(loaded) == 3


def test_each_model_keeps_its_answers_in_a_folder_and_goes_on_after_ctrl_c(
        folder, tmp_path, monkeypatch, capsys):
    """Interrupted in the second model: its table is told, and nothing asked again."""
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    out = tmp_path / "answers"
    asked = ["--weights", folder, other, "--limit", 2, "--keep", 4, "--out", out]
    ask_model = evaluate.ask_model

    def interrupted(args: Namespace, name: str, data: Data) -> object:
        if name == "other":
            raise KeyboardInterrupt
        return ask_model(args, name, data)

    monkeypatch.setattr(evaluate, "ask_model", interrupted)
    assert run(*asked) == 130
    told, err = capsys.readouterr()
    assert told.startswith("Acc@0.5") and f"{folder}, scenes:val" in told
    assert f"stopped; the same command with --resume goes on with {out}" in err
    first = (out / f"{folder.name}.jsonl").read_text()
    monkeypatch.setattr(evaluate, "ask_model", ask_model)
    assert run(*asked) == 2
    assert f"{folder.name}.jsonl exists; continue it with --resume" in capsys.readouterr().err
    assert run(*asked, "--resume") == 0
    assert (out / f"{folder.name}.jsonl").read_text() == first
    assert len((out / "other.jsonl").read_text().splitlines()) == 8


def test_a_strategy_that_a_model_cannot_run_is_left_out_in_a_line(
        folder, tmp_path, printed, refused):
    picture = tmp_path / "x.png"
    asked = ["--limit", 1, "--prune", "text_similarity", "random", "trim", "--mode", "full", "gap"]
    said = printed("--weights", folder, MINI, *asked, "--plot", picture)
    table, tiny, mini = said.split("\n\n")
    reason = "to compare patches with words takes CLIP's text tower"
    for name in ("text_similarity", "trim"):
        assert f"\nwithout {name}: {reason}" in tiny and f"without {name}" not in mini
    assert [line.split()[:3] for line in table.split("\n")[2:6]] == [
        [folder.name, "random", "50%"], ["mini", "random", "50%"],
        ["mini", "text_similarity", "50%"], ["mini", "trim", "50%"]]
    assert Image.open(picture).width == plot.WIDTH
    models = json.loads(printed("--weights", folder, MINI, *asked, "--json"))["models"]
    assert [list(model["cannot_run"]) for model in models] == [["text_similarity", "trim"], []]
    assert reason in refused("--weights", folder, *asked)                      # alone: an error


def test_a_later_model_that_can_run_nothing_takes_nothing_from_those_before(folder, capsys):
    """100 of 16 tokens cannot be kept."""
    assert run("--weights", MINI, folder, "--limit", 1, "--keep", 100) == 2
    told, said = capsys.readouterr()
    assert f"{MINI}, scenes:val, 1 expressions" in told
    assert "random cannot keep 100 of 16 visual tokens: give a whole" in said


def test_the_ablation_of_several_has_their_tables_only(folder, tmp_path, printed):
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    said = printed("--weights", folder, other, "--limit", 1, "--keep", 4, "--ablate",
                   "--max-new-tokens", 2)
    tables = said.strip().split("\n\n")
    assert len(tables) == 2 and all("text collides" in table for table in tables)


def test_no_box_is_the_highest_share_in_the_row_and_there_is_a_row_where_nothing_was_pruned():
    rows = [{"accuracy": 0.5, "low": 0.4, "high": 0.6, "no_box": no_box, "mode": mode, "keep": 72,
             "prune": "none" if mode == "full" else "random"}
            for mode, no_box in (("full", 0.0), ("shifted", 0.25), ("gap", 0.125))]
    for asked, line in ((rows, ["random", "72", *["0.500", "0.400..0.600"] * 3, "0.250"]),
                        (rows[:1], ["none", "100%", "0.500", "0.400..0.600", "0.000"])):
        said = report.comparison([report.Report("mini", "", {}, Data("", 1), asked, [])])
        assert said.split("\n")[2].split() == ["mini", *line]
