"""Several models beside each other: a table with a row for each, and a picture with a panel.

In:  what became of each model under each strategy and budget.  Out: text, and one picture.

A budget stands as it was asked, for half of the visual tokens is another number in each model.
In the picture all tokens are a line down the panel, with its interval as a band; below the model's
name there is a row for each strategy and budget, in it a mark for each mode (plot.py).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nanogap.checks.command import visible
from nanogap.evaluate import plot
from nanogap.evaluate.plot import RIGHT, ROW, TICKS, TITLE, WIDTH, Page, line_of
from nanogap.show.draw import shortened

MOST = 4                      # panels beside each other
NAMES, APART = 290, 48        # for strategies and budgets, and between panels; pixels
RADIUS = 7                    # of a mark
FAINT = "#9a9a9a"
ALONE = ("none", "100%")      # strategy and budget of all tokens, where nothing else was asked


class Outcome(NamedTuple):
    """What became of one model under one strategy and budget."""

    model: str
    prune: str
    keep: str                 # as it was asked
    rows: dict[str, dict]     # a row of the report for each mode; "full" is all tokens


def names_of(folders: Sequence[Path | str]) -> list[str]:
    """A name for each model: that of its folder, or the whole path where two would have one."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def outcomes(model: str, rows: Sequence[dict],
             budgets: Mapping[tuple[str, str], int | str | None]) -> list[Outcome]:
    """The rows of one model's report, put together by strategy and budget.

    budgets: what each strategy's budget that was asked is in this model, in tokens or as a share
    """
    whole = {row["mode"]: row for row in rows if row["mode"] == "full"}
    found = []
    for (prune, keep), budget in budgets.items():
        mine = {row["mode"]: row for row in rows if (row["prune"], row["keep"]) == (prune, budget)}
        if mine:
            found.append(Outcome(model, prune, keep, whole | mine))
    return found or [Outcome(model, *ALONE, whole)]


def runs_of(found: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Every strategy and budget, in the order in which they first come."""
    return list(dict.fromkeys((each.prune, each.keep) for each in found))


def modes_of(found: Sequence[Outcome]) -> list[str]:
    """All modes, all tokens first."""
    modes = dict.fromkeys(mode for each in found for mode in each.rows)
    return sorted(modes, key=lambda mode: mode != "full")


def table(found: Sequence[Outcome]) -> str:
    """A row for each model under each strategy and budget, all models of one together."""
    modes = modes_of(found)
    lines = [["model", "prune", "keep",
              *("all tokens" if mode == "full" else mode for mode in modes), "no box"]]
    runs = runs_of(found)
    for each in sorted(found, key=lambda each: runs.index((each.prune, each.keep))):
        shares = [share(each.rows[mode]) if mode in each.rows else "-" for mode in modes]
        most = max(row["no_box"] for row in each.rows.values())
        lines.append([each.model, each.prune, each.keep, *shares, f"{most:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    caption = ("Acc@0.5 with 95 % intervals; no box: the highest share of answers without a box "
               "in any mode of the row")
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join([caption, *(visible(line.rstrip()) for line in padded)])


def share(row: dict) -> str:
    """Accuracy and its interval."""
    return f"{row['accuracy']:.3f} {row['low']:.3f}..{row['high']:.3f}"


# ----- the picture --------------------------------------------------------------------------------


class Panel(NamedTuple):
    """Where the panel of a model lies on the page, and what its axis ranges over."""

    left: float
    right: float
    top: float
    bottom: float
    accuracy: float           # at the right; 0 is at the left

    def x(self, accuracy: float) -> float:
        return self.left + (self.right - self.left) * accuracy / self.accuracy

    def y(self, row: int) -> float:
        """The middle of a row."""
        return self.top + ROW * (row + 0.5)


def panel_of(index: int, panels: int, accuracy: float, rows: int) -> Panel:
    """The place of a panel among others; where they do not fit beside each other, also below."""
    columns = math.ceil(panels / math.ceil(panels / MOST))
    width = (WIDTH - NAMES - RIGHT - APART * (columns - 1)) / columns
    left = NAMES + (width + APART) * (index % columns)
    top = plot.TOP + TITLE + (TITLE + ROW * rows + TICKS) * (index // columns)
    return Panel(left, left + width, top, top + ROW * rows, accuracy)


def draw_models(found: Sequence[Outcome]) -> Image.Image:
    """A panel for each model, a row in it for each strategy and budget."""
    modes = modes_of(found)
    runs = [run for run in runs_of(found) if run != ALONE] or [ALONE]
    models = {each.model: each.rows.get("full") for each in found}
    by_run = {(each.model, each.prune, each.keep): each.rows for each in found}
    top = plot.top_of([row for each in found for row in each.rows.values()])
    panels = [panel_of(index, len(models), top, len(runs)) for index in range(len(models))]
    bottom = panels[-1].bottom + TICKS
    page = Page(bottom + ROW * (len(modes) + 2))
    for panel, (model, whole) in zip(panels, models.items(), strict=True):
        if panel.left == NAMES:
            draw_names(page, panel, runs)
        draw_frame(page, panel, model, whole)
        for index, run in enumerate(runs):
            draw_outcome(page, panel, panel.y(index), by_run.get((model, *run)), modes)
    names = {mode: "full: all tokens" if mode == "full" else mode for mode in modes}
    return page.legend(names, bottom)


def draw_names(page: Page, panel: Panel, runs: Sequence[tuple[str, str]]) -> None:
    """Strategies, each once below a thin line, and budgets, at the left of a line of panels."""
    before = None
    for index, (prune, keep) in enumerate(runs):
        y = panel.y(index)
        if prune != before:
            page.pen.line((20, y - ROW // 2, WIDTH - RIGHT, y - ROW // 2), plot.BAND)
            page.text(20, y, shortened(prune.rpartition(":")[2], NAMES - 110, page.width), "lm")
        page.text(NAMES - 20, y, keep, "rm")
        before = prune


def draw_frame(page: Page, panel: Panel, model: str, whole: dict | None) -> None:
    """The name of a model, a grid of accuracies, and all tokens if they were asked."""
    if whole:
        page.pen.rectangle((panel.x(whole["low"]), panel.top, panel.x(whole["high"]),
                            panel.bottom), plot.BAND)
    marks = plot.ticks(panel.accuracy)
    width = panel.right - panel.left
    named = marks if width / len(marks) > 50 else marks[::2]
    for accuracy in marks:
        x = panel.x(accuracy)
        page.pen.line((x, panel.top, x, panel.bottom), plot.GRID)
        if accuracy in named:
            page.text(x, panel.bottom + 10, f"{accuracy:.1f}", "mt")
    if whole:
        x = panel.x(whole["accuracy"])
        page.stroke((x, panel.top), (x, panel.bottom), line_of("full"))
    page.text(panel.left, panel.top - 12, shortened(model, width + APART - 10, page.width), "ls")


def draw_outcome(page: Page, panel: Panel, middle: float, rows: dict[str, dict] | None,
                 modes: Sequence[str]) -> None:
    """A mark and its interval for each mode that prunes, one below the other."""
    if rows is None:
        page.text(panel.left + 12, middle, "left out", "lm", FAINT)
        return
    pruned = [mode for mode in modes if mode != "full"]
    for index, mode in enumerate(pruned):
        if mode in rows:
            row, style = rows[mode], line_of(mode)
            y = middle + mark_at(index, len(pruned))
            page.pen.line((panel.x(row["low"]), y, panel.x(row["high"]), y), style.colour, 3)
            page.marker((panel.x(row["accuracy"]), y), style, RADIUS)


def mark_at(index: int, modes: int) -> float:
    """How far below the middle of its row a mode has its mark, in pixels."""
    return min(10, 24 / max(modes - 1, 1)) * (index - (modes - 1) / 2)
