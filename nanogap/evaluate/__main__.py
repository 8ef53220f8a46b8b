"""REC accuracy: how often the box that the model says overlaps the true one by at least half.

    python -m nanogap.evaluate --data scenes:val --prune random --keep 50% 25% --limit 500
    python -m nanogap.evaluate --weights weights/mini weights/mini-shikra --plot models.png
    torchrun --nproc-per-node 2 -m nanogap.evaluate --data "refs(unc).p" --split val
    python -m nanogap.evaluate --score answers.jsonl --data own.jsonl --format qwen2-vl

An answer without a box counts as wrong.  What cannot be asked (a picture that is not there or is
broken, an expression that is blank or too long) is left out, and the report says what it covers.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from nanogap.checks.command import answer_for, tell
from nanogap.checks.loading import load
from nanogap.checks.output import check_picture, claim
from nanogap.errors import NanogapError
from nanogap.evaluate import ask, journal
from nanogap.evaluate.answers import read_answers
from nanogap.evaluate.arguments import parse_arguments
from nanogap.evaluate.data import Data, drawn_data, first, read_data
from nanogap.evaluate.report import Report, covers, print_reports
from nanogap.evaluate.score import run_of, summary
from nanogap.fast.processes import gather, join, joined


def data_asked(args: argparse.Namespace) -> Data:
    """Drawn scenes, or a file of annotations."""
    kind, _, split = args.data.partition(":")
    if kind == "scenes":
        return drawn_data(split or "val", args.limit or 500)
    data = read_data(Path(args.data), args.images, args.split, pictures=not args.score)
    if args.plot:
        check_picture("--plot", args.plot, *(each.file for each in data.examples if each.file))
    return data


def score_file(args: argparse.Namespace) -> None:
    """Score the answers of any program, and report."""
    data = data_asked(args)
    records, unanswered = read_answers(args, data, first(data.examples, args.limit))
    rows = [summary(records, run, args.protocol) | {"unanswered": count}
            for run, count in unanswered.items()]
    asked = rows[0]["expressions"]
    notes = [f"{row['prune']}, {row['mode']}: {row['unanswered']} of {asked} expressions have no "
             "answer, and count as wrong" for row in rows if row["unanswered"]]
    made = {"score": str(args.score), "format": args.format or "llava", "protocol": args.protocol}
    title = f"{args.score}, {data.name}, {asked} expressions"
    print_reports(args, [Report(args.score.name, title, made, data, rows, notes)])


def ask_model(args: argparse.Namespace, name: str, data: Data) -> Report | None:
    """Answer every expression in every run; of several processes the first one has the report."""
    rank, world = joined()
    folder, out = args.models[name], args.outs[name]
    model = load(folder, args.device, args.dtype, args.clip, args.pack)
    examples = first(data.examples, args.limit)
    runs, cannot_run = ask.plan(args, model, ask.first_whole(model, examples))
    made = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "weights": str(folder), "data": data.name, "seed": args.seed,
            "protocol": args.protocol, "max_new_tokens": args.max_new_tokens}
    settings = made | ask.identified(folder, args.clip, args.prune) if out else {}
    records, write = journal.go_on(out, settings)
    asked: dict[str, list] = {id_: [expression, list(truth)] for example in examples
                              for id_, expression, truth in example.questions}
    for record in records:
        answered = [record["expression"], record["truth"]]
        if asked.get(record["id"], answered) != answered:
            raise NanogapError(f"--resume: {out} answers {record['id']} of other data; give that "
                               "data, or a new file")
    done = {(record["id"], run_of(record)) for record in records}
    todo = [example for example in examples[rank::world]
            if any((id_, run) not in done for id_, *_ in example.questions for run in runs)]
    left_out: dict[str, str] = {}
    said = []
    for example in ask.with_progress(todo):
        new = {run: [question for question in example.questions if (question[0], run) not in done]
               for run in runs}
        for record in ask.answers(model, example, new, args, left_out):
            write(record)
            said.append(record)
    for part in gather([{"said": said, "left_out": left_out}], world):
        records += part["said"]
        left_out |= part["left_out"]
    if rank > 0:
        return None

    ids = asked.keys() - left_out.keys()
    if not ids:
        id_, why = next(iter(left_out.items()))
        raise NanogapError(f"none of the expressions can be asked, such as {id_}: {why}")
    records = [record for record in records if record["id"] in ids]
    rows = [summary(records, run, args.protocol) for run in runs]
    title = (f"{folder}, {data.name}, {len(ids)} expressions, seed {args.seed}, "
             f"{made['device']}, {made['dtype']}")
    notes = [f"without {strategy}: {why}" for strategy, why in cannot_run.items()]
    data = replace(data, left_out=data.left_out | left_out)
    return Report(name, title, made | {"cannot_run": cannot_run}, data, rows, notes)


def ask_models(args: argparse.Namespace) -> None:
    """Ask one model after the other, and report; only one at a time is in memory."""
    rank, _ = join()
    reports: list[Report] = []
    with claim("--out", args.out) if args.out and rank == 0 else nullcontext():
        data = data_asked(args)
        if rank == 0:
            for line in covers(data):
                tell(line)
        try:
            for number, (name, folder) in enumerate(args.models.items(), 1):
                if len(args.models) > 1 and rank == 0:
                    tell(f"model {number} of {len(args.models)}: {folder} ...")
                report = ask_model(args, name, data)
                if report is not None:                      # the first process has it
                    reports.append(report)
        except KeyboardInterrupt:
            if args.out and rank == 0:
                tell(f"stopped; the same command with --resume goes on with {args.out}")
            raise
        finally:                                            # Ctrl-C takes nothing from what is done
            if reports:
                print_reports(args, reports)


def main(argv: Sequence[str] | None) -> None:
    """Ask a model, or score what another program has answered."""
    args = parse_arguments(argv)
    if args.score:
        score_file(args)
    else:
        ask_models(args)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(answer_for("nanogap.evaluate", main, None))
