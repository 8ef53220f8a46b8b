"""Several models beside each other: what became of each under each strategy and budget.

A budget stands as it was asked, for half of the visual tokens is another number in each model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nanogap.checks.command import visible
from nanogap.evaluate.plot import Panel

CAPTION = ("Acc@0.5 with 95 % intervals; no box: the highest share of answers without a box in any "
           "mode of the row")


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
    return found or [Outcome(model, "none", "100%", whole)]


def table(found: Sequence[Outcome]) -> str:
    """A row for each model under each strategy and budget, all models of one together."""
    modes = list(dict.fromkeys(mode for each in found for mode in each.rows))
    lines = [["model", "prune", "keep",
              *("all tokens" if mode == "full" else mode for mode in modes), "no box"]]
    runs = list(dict.fromkeys((each.prune, each.keep) for each in found))
    for each in sorted(found, key=lambda each: runs.index((each.prune, each.keep))):
        shares = [share(each.rows[mode]) if mode in each.rows else "-" for mode in modes]
        most = max(row["no_box"] for row in each.rows.values())
        lines.append([each.model, each.prune, each.keep, *shares, f"{most:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join([CAPTION, *(visible(line.rstrip()) for line in padded)])


def share(row: dict) -> str:
    """Accuracy and its interval."""
    return f"{row['accuracy']:.3f} {row['low']:.3f}..{row['high']:.3f}"


def panels_of(found: Sequence[Outcome]) -> list[Panel]:
    """A panel for each model, in it a row for each strategy and budget."""
    panels: dict[str, Panel] = {}
    for each in found:
        marks = dict(each.rows)
        whole = marks.pop("full", None)
        panel = panels.setdefault(each.model, Panel(each.model, [whole] if whole else [], {}))
        if marks:
            panel.rows[f"{each.prune} {each.keep}"] = marks
    return list(panels.values())
