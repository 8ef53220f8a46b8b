"""The report: a table for people, a document for programs, and a picture."""

import argparse
import json
from collections.abc import Sequence
from typing import NamedTuple

from nanogap.checks.command import visible
from nanogap.checks.output import save_picture
from nanogap.evaluate import plot
from nanogap.evaluate.data import Data
from nanogap.evaluate.score import PROTOCOLS, table

CAPTION = ("Acc@0.5 with 95 % intervals; no box: the highest share of answers without a box in any "
           "mode of the row")


class Report(NamedTuple):
    """What became of all that was asked of one model, or of one file of answers."""

    name: str                  # of the model, or of the file
    title: str                 # what was asked, in a line
    made: dict                 # how it was asked, for the document
    data: Data
    rows: list[dict]
    notes: list[str]           # what else has to be said above the table


def print_reports(args: argparse.Namespace, reports: Sequence[Report]) -> None:
    """Draw the picture, and print the tables or the JSON document; several models are compared."""
    several = len(args.models) > 1
    if args.plot:
        save_picture("--plot", args.plot, plot.draw({each.name: each.rows for each in reports}))
    if args.json:
        documents = [document(report, args.plot) for report in reports]
        print(json.dumps({"models": documents} if several else documents[0], allow_nan=False))
        return
    if several and not args.ablate:
        data = reports[0].data
        counts = ", ".join(dict.fromkeys(str(report.rows[0]["expressions"]) for report in reports))
        print(comparison(reports))
        print(visible(f"{PROTOCOLS[args.protocol]}; {data.name}, {counts} of {data.expressions} "
                      "expressions"))
    for report in reports:
        if several:
            print()
        print_table(args, report)
    if args.plot:
        print(f"picture: {args.plot}")


def comparison(reports: Sequence[Report]) -> str:
    """A row for each model under each strategy and budget, all models of one together."""
    panels = [plot.put_together(report.rows) for report in reports]
    labels = list(dict.fromkeys(label for panel in panels for label in panel))
    modes = list(dict.fromkeys(row["mode"] for report in reports for row in report.rows))
    lines = [["model", "prune", "keep",
              *("all tokens" if mode == "full" else mode for mode in modes), "no box"]]
    for label in labels:
        for report, panel in zip(reports, panels, strict=True):
            if label in panel:
                found = panel[label]
                shares = ["{accuracy:.3f} {low:.3f}..{high:.3f}".format_map(found[mode])
                          if mode in found else "-" for mode in modes]
                most = max(row["no_box"] for row in found.values())
                lines.append([report.name, *label.rsplit(" ", 1), *shares, f"{most:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join([CAPTION, *(visible(line.rstrip()) for line in padded)])


def document(report: Report, picture: object) -> dict:
    """All that is known, for a program."""
    data = report.data
    return {**report.made, "data": data.name, "expressions": report.rows[0]["expressions"],
            "of": data.expressions, "missing_images": data.missing, "left_out": data.left_out,
            "runs": report.rows, "picture": picture and str(picture)}


def print_table(args: argparse.Namespace, report: Report) -> None:
    """The table, below what it is about and above what spoils it."""
    rows = report.rows
    lines = [report.title, PROTOCOLS[args.protocol], *covers(report.data), *report.notes]
    own = args.protocol == "pixels" and not args.score
    if not own and all((row["no_box"] or 0) > 0.9 for row in rows):
        lines.append("hardly any of these answers can be read as a box: they may want another "
                     "format (--format), or another --protocol")
    for line in lines:
        print(visible(line))
    print(table(rows))
    cut_off = sum(round((row["cut_off"] or 0) * row["expressions"]) for row in rows)
    if cut_off:
        print(f"{cut_off} of {sum(row['expressions'] for row in rows)} answers were cut off before "
              "their end; give them more room with --max-new-tokens")


def covers(data: Data) -> list[str]:
    """How many expressions a report is about, and a reason why it is not all of them."""
    there = sum(id_ not in data.left_out for example in data.examples
                for id_, *_ in example.questions)
    reasons = []
    if data.missing:
        first = ", ".join(data.missing[:3])
        reasons.append(f"{len(data.missing)} images are missing, such as {first}")
    if data.left_out:
        id_, why = next(iter(data.left_out.items()))
        reasons.append(f"{len(data.left_out)} cannot be asked, such as {id_}: {why:.300}")
    return [f"covers {there} of {data.expressions} expressions: {reason}" for reason in reasons]
