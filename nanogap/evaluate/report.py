"""The report: a table for people, a document for programs, and a picture.

In:  what became of all that was asked.  Out: text on stdout, and a picture where one was asked for.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nanogap.checks.command import visible
from nanogap.checks.output import save_picture
from nanogap.evaluate import compare, plot
from nanogap.evaluate.ask import Budgets
from nanogap.evaluate.data import Data, doubts
from nanogap.evaluate.score import PROTOCOLS, table


class Report(NamedTuple):
    """What became of all that was asked of one model, or of one file of answers."""

    title: str                 # what was asked, in a line
    made: dict                 # how it was asked, for the document
    data: Data
    rows: list[dict]
    notes: Sequence[str] = ()  # what else has to be said above the table
    budgets: Budgets = {}      # what each budget that was asked is in the model


def print_report(args: argparse.Namespace, report: Report) -> None:
    """Print the table or the JSON document, and draw the picture."""
    if args.plot:
        save_picture("--plot", args.plot, plot.draw(plot.panels_of(report.rows)))
    if args.json:
        print(json.dumps(document(report, args.plot), allow_nan=False))
        return
    print_table(args, report)
    if args.plot:
        print(f"picture: {args.plot}")


def document(report: Report, picture: object) -> dict:
    """All that is known, for a program."""
    data = report.data
    return {**report.made, "data": data.name, "expressions": report.rows[0]["expressions"],
            "of": data.expressions, "missing_images": data.missing, "left_out": data.left_out,
            "runs": report.rows, "picture": picture and str(picture)}


def print_table(args: argparse.Namespace, report: Report) -> None:
    """The table, below what it is about."""
    boxes = [(box, example.size) for example in report.data.examples
             for *_, box in example.questions]
    for line in (report.title, PROTOCOLS[args.protocol], *covers(report.data),
                 *doubts("annotations", boxes), *report.notes,
                 *unread(args.protocol, report.rows)):
        print(visible(line))
    print(table(report.rows), *cut_off(report.rows), sep="\n")


def print_comparison(args: argparse.Namespace, reports: Sequence[Report]) -> None:
    """What is said of several models together, and then of each."""
    names = compare.names_of([report.made["weights"] for report in reports])
    found = [outcome for name, report in zip(names, reports, strict=True)
             for outcome in compare.outcomes(name, report.rows, report.budgets)]
    if args.plot:
        save_picture("--plot", args.plot, plot.draw(compare.panels_of(found)))
    if args.json:
        documents = [document(report, args.plot) for report in reports]
        print(json.dumps({"models": documents}, allow_nan=False))
        return
    count = ", ".join(dict.fromkeys(str(report.rows[0]["expressions"]) for report in reports))
    about = f"{reports[0].data.name}, {count} of {reports[0].data.expressions} expressions"
    if not args.ablate:
        print(compare.table(found), visible(f"{PROTOCOLS[args.protocol]}; {about}"), sep="\n")
    if args.plot:
        print(f"picture: {args.plot}")
    for report in reports:
        print()
        print_table(args, report)


def missing(data: Data) -> str:
    """How many images are not there, and which are the first."""
    return f"{len(data.missing)} images are missing, such as {', '.join(data.missing[:3])}"


def covers(data: Data) -> list[str]:
    """How many expressions a report is about, in a line for each reason why it is not all of them.
    """
    there = sum(len(example.questions) for example in data.examples)
    reasons = [missing(data)] if data.missing else []
    if data.left_out:
        id_, why = next(iter(data.left_out.items()))
        reasons.append(f"{len(data.left_out)} cannot be asked, such as {id_}: {why:.300}")
    return [f"covers {there} of {data.expressions} expressions: {reason}" for reason in reasons]


def unread(protocol: str, rows: Sequence[dict]) -> list[str]:
    """A word where another project's reader finds next to no box: it reads its own format only."""
    if protocol == "pixels" or not all((row["no_box"] or 0) > 0.9 for row in rows):
        return []
    return [f"protocol {protocol} reads hardly any of these answers: it is made for the format of "
            "another model"]


def cut_off(rows: Sequence[dict]) -> list[str]:
    """How many answers had no room to end: such a one is no answer without a box."""
    count = sum(round((row["cut_off"] or 0) * row["expressions"]) for row in rows)
    if not count:
        return []
    return [f"{count} of {sum(row['expressions'] for row in rows)} answers were cut off before "
            "their end; give them more room with --max-new-tokens"]


def without(data: Data, left_out: dict[str, str]) -> Data:
    """The data without the expressions that turned out to be such as cannot be asked."""
    examples = [replace(example, questions=[question for question in example.questions
                                            if question[0] not in left_out])
                for example in data.examples]
    return replace(data, examples=examples, left_out=data.left_out | left_out)
