"""Several models asked with one command: each one's own table, a row for each, and one picture."""

import json
import re
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from nanogap.evaluate import __main__ as evaluate
from nanogap.evaluate import compare, plot
from nanogap.evaluate.compare import Outcome
from nanogap.evaluate.plot import TITLE
from nanogap.show.draw import PAGE, PAPER
from tests.evaluate.asking import MINI, SHIKRA, run, write_lines
from tests.tiny import tiny_config, write_checkpoint

MODES = ("full", "shifted", "permuted", "gap")


def timeless(document: dict) -> dict:
    rows = [row | {"prefill_ms": 0, "decode_ms": 0} for row in document["runs"]]
    return document | {"runs": rows}


def row(accuracy: float, no_box: float = 0.0) -> dict:
    return {"accuracy": accuracy, "low": max(accuracy - 0.05, 0), "high": accuracy + 0.05,
            "no_box": no_box}


def outcome(model: str, prune: str = "random", keep: str = "50%", **modes: float) -> Outcome:
    return Outcome(model, prune, keep, {mode: row(share) for mode, share in modes.items()})


# ----- one command --------------------------------------------------------------------------------


def test_several_models_answer_as_each_alone(printed, capsys):
    asked = ["--limit", 3, "--keep", "50%", "25%", "--json"]
    alone = [timeless(json.loads(printed("--weights", weights, *asked)))
             for weights in (MINI, SHIKRA)]
    assert run("--weights", MINI, SHIKRA, *asked) == 0
    heard = capsys.readouterr()
    together = [timeless(document) for document in json.loads(heard.out)["models"]]
    assert together == [document | {"cannot_run": {}} for document in alone]
    assert alone[0]["runs"] != alone[1]["runs"]
    assert f"model 2 of 2: {SHIKRA} ...\n" in heard.err


def test_each_model_has_its_table_and_all_together_a_row_each(printed):
    said = printed("--weights", MINI, SHIKRA, "--limit", 3, "--keep", "50%", "25%")
    together, *parts = said.split("\n\n")
    assert [part.split(", ")[0] for part in parts] == [str(MINI), str(SHIKRA)]
    cells = {}
    for name, part in zip(("mini", "mini-shikra"), parts, strict=True):
        for line in part.rstrip().split("\n")[3:]:
            prune, keep, _, mode, share, interval, *_ = line.split()
            cells[name, prune, keep, mode] = [share, interval]
    caption, head, *rows, counted = together.split("\n")
    assert counted == ("pixels: boxes in pixels of the original image, continuous areas, IoU >= "
                       "0.5; scenes:val, 3 of 3 expressions")
    assert caption.startswith("Acc@0.5 with 95 % intervals")
    assert re.split("  +", head) == ["model", "prune", "keep", "all tokens", *MODES[1:], "no box"]
    assert [line.split()[:-1] for line in rows] == [
        [name, "random", keep, *cells[name, "none", "144", "full"],
         *sum((cells[name, "random", tokens, mode] for mode in MODES[1:]), [])]
        for keep, tokens in (("50%", "72"), ("25%", "36")) for name in ("mini", "mini-shikra")]


def test_half_of_the_tokens_is_one_row_whatever_number_it_is(folder, printed):
    """72 of 144 and 8 of 16."""
    table = printed("--weights", MINI, folder, "--limit", 1, "--mode", "gap").split("\n\n")[0]
    assert [line.split()[:3] for line in table.split("\n")[2:4]] == [
        ["mini", "random", "50%"], [folder.name, "random", "50%"]]


def test_a_model_given_twice_is_asked_once(folder, printed):
    said = printed("--weights", folder, folder, "--limit", 1, "--mode", "full")
    assert said.count("Acc@0.5") == 1 and "model" not in said


def test_one_model_at_a_time_is_in_memory(folder, monkeypatch, capsys):
    loaded, load = [], evaluate.load

    def counted(*args: object, **options: object) -> object:
        assert [each() for each in loaded] == [None] * len(loaded)
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluate, "load", counted)
    assert run("--weights", MINI, folder, SHIKRA, "--limit", 1, "--keep", 4) == 0
    assert len(loaded) == 6                                  # each is tried out, and then asked


def test_each_model_keeps_its_answers_in_a_folder_and_goes_on_after_ctrl_c(
        folder, tmp_path, monkeypatch, capsys):
    """Interrupted in the second model: its table is told, and nothing asked again."""
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    out = tmp_path / "answers"
    asked = ["--weights", folder, other, "--limit", 2, "--keep", 4, "--out", out]
    ask_model, calls = evaluate.ask_model, []

    def interrupted(args: Namespace, *more: int) -> object:
        calls.append(args.weights)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask_model(args, *more)

    monkeypatch.setattr(evaluate, "ask_model", interrupted)
    assert run(*asked) == 130
    told = capsys.readouterr().out
    assert told.startswith("Acc@0.5") and f"{folder}, scenes:val" in told
    first = (out / f"{folder.name}.jsonl").read_text()
    monkeypatch.setattr(evaluate, "ask_model", ask_model)
    assert run(*asked) == 2
    assert f"{folder.name}.jsonl exists; continue it with --resume" in capsys.readouterr().err
    assert run(*asked, "--resume") == 0
    assert (out / f"{folder.name}.jsonl").read_text() == first
    assert len((out / "other.jsonl").read_text().splitlines()) == 8


def test_models_that_could_not_be_asked_the_same_are_not_drawn_together(folder, tmp_path, printed):
    """An expression that is too long for one of them."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    data = write_lines(tmp_path / "a.jsonl", [
        {"image": "a.png", "expression": words, "box": [1, 2, 30, 31]}
        for words in ("the man", "the man " * 300)])
    picture = tmp_path / "x.png"
    said = printed("--weights", folder, MINI, "--data", data, "--mode", "full", "--plot", picture)
    assert "no picture: the models could not be asked the same expressions" in said
    assert "1, 2 of 2 expressions" in said and not picture.exists()


# ----- what one of them cannot do -----------------------------------------------------------------


def test_a_strategy_that_a_model_cannot_run_is_left_out_in_a_line(
        folder, tmp_path, printed, refused):
    picture = tmp_path / "x.png"
    asked = ["--limit", 1, "--prune", "text_similarity", "random", "trim", "--mode", "full", "gap"]
    said = printed("--weights", folder, MINI, *asked, "--plot", picture)
    table, tiny, mini = said.split("\n\n")
    without, = (line for line in tiny.split("\n") if line.startswith("without "))
    assert without.startswith("without text_similarity, trim: to compare patches with words "
                              "takes CLIP's text tower")
    assert [line.split()[0] for line in tiny.split("\n")[4:6]] == ["none", "random"]
    assert "trim  " not in tiny and "text_similarity  " not in tiny
    assert "without" not in mini
    assert [line.split()[:2] for line in table.split("\n")[2:6]] == [
        [folder.name, "random"], ["mini", "random"], ["mini", "text_similarity"], ["mini", "trim"]]
    assert Image.open(picture).width == plot.WIDTH
    models = json.loads(printed("--weights", folder, MINI, *asked, "--json"))["models"]
    assert [list(model["cannot_run"]) for model in models] == [["text_similarity", "trim"], []]
    assert "takes CLIP's text tower" in refused("--weights", folder, *asked)   # alone: an error


def test_a_model_that_can_run_none_of_them_shows_all_tokens(folder, printed):
    said = printed("--weights", folder, MINI, "--limit", 1, "--prune", "text_similarity", "--mode",
                   "full", "gap")
    rows = said.split("\n\n")[0].split("\n")[2:4]
    assert [line.split()[:3] for line in rows] == [
        [folder.name, "none", "100%"], ["mini", "text_similarity", "50%"]]
    assert rows[0].split()[5] == "-"


@pytest.mark.parametrize("arguments, message", [
    (["--prune", "random", "--keep", "auto"], "random cannot keep auto of 144"),
    (["--keep", "100"], "{folder}: random cannot keep 100 of 16 visual tokens: give a whole"),
    (["--prune", "text_similarity", "--mode", "gap"], "{folder}: to compare patches with words "
     "takes"),
    (["--prune", "fastv(layer=9)"], "fastv(layer=9) cannot cut before layer 9 of "),
    (["--out", "x.jsonl"], "several models have a file each, so give a folder"),
    (["--clip", "x"], "--clip is the CLIP of one model; give one of --weights at a time"),
    (["--ablate", "--plot", "x.png"], "--plot draws the --ablate of one model; give one of")])
def test_a_mistake_is_one_line_before_any_model_is_asked(
        folder, tmp_path, monkeypatch, refused, arguments: list, message: str):
    monkeypatch.chdir(tmp_path)
    said = refused("--weights", MINI, folder, "--limit", 1, *arguments)
    assert message.replace("{folder}", str(folder)) in said
    assert list(tmp_path.iterdir()) == []


def test_the_ablation_of_several_has_their_tables_only(folder, tmp_path, printed):
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    said = printed("--weights", folder, other, "--limit", 1, "--keep", 4, "--ablate",
                   "--max-new-tokens", 2)
    tables = said.strip().split("\n\n")
    assert len(tables) == 2 and all("text collides" in table for table in tables)


# ----- the table ----------------------------------------------------------------------------------


def test_models_are_named_by_their_folders_unless_two_have_one_name():
    assert compare.names_of([Path("a/mini"), Path("b/next")]) == ["mini", "next"]
    assert compare.names_of([Path("a/mini"), Path("b/mini")]) == ["a/mini", "b/mini"]


def test_no_box_is_the_highest_share_in_the_row():
    rows = {"full": row(0.9), "shifted": row(0.1, 0.25), "gap": row(0.5, 0.125)}
    line = compare.table([Outcome("mini", "random", "50%", rows)]).split("\n")[2]
    assert line.split() == ["mini", "random", "50%", "0.900", "0.850..0.950", "0.100",
                            "0.050..0.150", "0.500", "0.450..0.550", "0.250"]


# ----- the picture --------------------------------------------------------------------------------


def colour_of(mode: str) -> tuple:
    return ImageColor.getrgb(plot.line_of(mode).colour)


def count(picture: Image.Image, what: str, box: tuple) -> int:
    """How many pixels in a box have a colour, or that of a mode."""
    colour = ImageColor.getrgb(what) if what.startswith("#") else colour_of(what)
    piece = picture.crop(tuple(int(v) for v in box))
    return {found: n for n, found in piece.getcolors(piece.width * piece.height)}.get(colour, 0)


def test_each_model_has_a_panel_and_each_mode_its_mark_in_it():
    """0.9 of the axis, which ends at 1.0, is all tokens; 0.5 is GAP, 0.1 shifted."""
    models = ("mini", "mini-next", "mini-shikra", "mini-minigpt")
    found = [outcome(model, prune, full=0.9, shifted=0.1, gap=0.5)
             for model in models for prune in ("random", "trim")]
    picture = compare.draw_models(found)
    panels = [compare.panel_of(index, 4, 1.0, 2) for index in range(4)]
    assert all(a.right < b.left and a.top == b.top
               for a, b in zip(panels, panels[1:], strict=False))
    assert panels[-1].right < picture.width == plot.WIDTH
    for panel in panels:
        for y in (panel.y(0), panel.y(1)):
            for index, (mode, accuracy) in enumerate((("shifted", 0.1), ("gap", 0.5))):
                x, middle = panel.x(accuracy), y + compare.mark_at(index, 2)
                for beside in (-4, 4):
                    there = int(x + beside), int(middle + 2)
                    assert picture.getpixel(there) == colour_of(mode)
                assert count(picture, mode, (x - 9, y - 20, x + 9, y + 20)) > 60
                assert count(picture, mode, (x + 14, y - 20, panel.right, y + 20)) == 0
        title = (panel.left, panel.top - TITLE, panel.right, panel.top)
        assert count(picture, PAPER, title) > 50


def test_all_tokens_are_a_line_down_every_panel_with_their_interval_as_a_band():
    found = [outcome(model, prune, full=share, gap=0.5)
             for model, share in (("a", 0.9), ("b", 0.7)) for prune in ("random", "trim")]
    picture = compare.draw_models(found)
    for index, share in enumerate((0.9, 0.7)):
        panel = compare.panel_of(index, 2, 1.0, 2)
        for y in (panel.top + 4, panel.y(1) + 12):
            assert picture.getpixel((int(panel.x(share)), int(y))) == colour_of("full")
            at = int(panel.x(share + 0.03)), int(y)
            assert picture.getpixel(at) == ImageColor.getrgb(plot.BAND)
            assert picture.getpixel((int(panel.x(0.58)), int(y))) == ImageColor.getrgb(PAGE)


def test_a_model_with_all_tokens_alone_has_its_line_and_no_row_of_its_own():
    whole = Outcome("b", *compare.ALONE, {"full": row(0.9)})
    picture = compare.draw_models([outcome("a", full=0.9, gap=0.5), whole])
    panel = compare.panel_of(1, 2, 1.0, 1)
    assert picture.getpixel((int(panel.x(0.9)), int(panel.y(0)))) == colour_of("full")
    assert picture.height == compare.draw_models([outcome("a", full=0.9, gap=0.5)]).height
    assert compare.draw_models([whole]).width == plot.WIDTH
