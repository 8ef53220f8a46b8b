"""Several models beside each other: what became of each under each strategy and budget.

A budget stands as it was asked, for half of the visual tokens is another number in each model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from nanogap.checks.command import visible
from nanogap.evaluate.plot import Panel
from nanogap.evaluate.score import Budget

CAPTION = ("Acc@0.5 with 95 % intervals; no box: the highest share of answers without a box in any "
           "mode of the row")


def names_of(folders: Sequence[Path | str]) -> list[str]:
    """A name for each model: that of its folder, or the whole path where two would have one."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def panel_of(model: str, rows: Sequence[dict],
             budgets: Mapping[str, tuple[str, Budget]]) -> Panel:
    """The rows of one model's report, put together by what was asked, as in "trim 50%"."""
    panel = Panel(model, [row for row in rows if row["mode"] == "full"], {})
    for label, asked in budgets.items():
        marks = {row["mode"]: row for row in rows if (row["prune"], row["keep"]) == asked}
        if marks:
            panel.rows[label] = marks
    return panel


def table(panels: Sequence[Panel]) -> str:
    """A row for each model under each strategy and budget, all models of one together."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.rows))
    rows: list[tuple[str, str, dict[str, dict]]] = []
    for label in labels or ["none 100%"]:
        for panel in panels:
            if label in panel.rows or not labels:
                whole = {row["mode"]: row for row in panel.whole}
                rows.append((panel.title, label, whole | panel.rows.get(label, {})))
    modes = list(dict.fromkeys(mode for *_, found in rows for mode in found))

    lines = [["model", "prune", "keep",
              *("all tokens" if mode == "full" else mode for mode in modes), "no box"]]
    for model, label, found in rows:
        shares = ["{accuracy:.3f} {low:.3f}..{high:.3f}".format_map(found[mode])
                  if mode in found else "-" for mode in modes]
        most = max(row["no_box"] for row in found.values())
        lines.append([model, *label.rsplit(" ", 1), *shares, f"{most:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join([CAPTION, *(visible(line.rstrip()) for line in padded)])
