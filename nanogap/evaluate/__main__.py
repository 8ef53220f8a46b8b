"""REC accuracy: how often the box that the model says overlaps the true one by at least half.

    python -m nanogap.evaluate --data scenes:val --prune random --keep 50% 25% --limit 500
    python -m nanogap.evaluate --weights weights/mini weights/mini-shikra --plot models.png
    torchrun --nproc-per-node 2 -m nanogap.evaluate --data "refs(unc).p" --split val
    python -m nanogap.evaluate --questions questions.jsonl --data scenes:val
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
from nanogap.evaluate.answers import How, read_answers, write_questions
from nanogap.evaluate.arguments import parse_arguments
from nanogap.evaluate.data import Data, drawn_data, first
from nanogap.evaluate.refcoco import read_data
from nanogap.evaluate.report import Report, missing, print_reports
from nanogap.evaluate.score import summary
from nanogap.fast.processes import gather, join
from nanogap.llava import EncodedImage
from nanogap.models import VLM


def data_asked(args: argparse.Namespace) -> Data:
    """Drawn scenes, or a file of annotations."""
    kind, _, split = args.data.partition(":")
    if kind == "scenes":
        return drawn_data(split or "val", args.limit or 500)
    data = read_data(Path(args.data), args.images, args.split, pictures=not args.score)
    if args.score and data.missing:
        raise NanogapError(f"{args.data} has no width and height of {data.missing[0]}, and the "
                           "picture is not there; give its folder with --images")
    if args.plot:
        check_picture("--plot", args.plot, *filter(None, (each.file for each in data.examples)))
    return data


def score_file(args: argparse.Namespace) -> None:
    """Score the answers of any program, and report."""
    data = data_asked(args)
    how = How(args.protocol, args.format, args.resized)
    examples = first(data.examples, args.limit)
    records, unanswered, doubts = read_answers(args.score, data, examples, how)
    rows = [summary(records, run, args.protocol) | {"unanswered": count}
            for run, count in unanswered.items()]
    asked = rows[0]["expressions"]
    notes = [f"{row['prune']}, {row['mode']}: {row['unanswered']} of {asked} expressions have no "
             "answer, and count as wrong" for row in rows if row["unanswered"]]
    made = {"score": str(args.score), "format": args.format or "llava", "protocol": args.protocol}
    title = f"{args.score}, {data.name}, {asked} expressions"
    print_reports(args, [Report(title, made, data, rows, [*doubts, *notes])])


def write_file(args: argparse.Namespace) -> None:
    """Write the questions, and say how their answers are scored."""
    same = ["--data", args.data]
    for flag in ("split", "images", "limit"):
        value = getattr(args, flag)
        if value:
            same += [f"--{flag}", str(value)]
    examples = first(data_asked(args).examples, args.limit)
    print(write_questions(args.questions, examples, same))


def check_questions(args: argparse.Namespace, data: Data, records: Sequence[dict]) -> None:
    """Refuse answers to other questions than the data's.  What was not answered may be mended."""
    asked = {id_: (example.name, expression, list(truth)) for example in data.examples
             for id_, expression, truth in example.questions}
    for record in records:
        answered = record["image"], record["expression"], record["truth"]
        if asked.get(record["id"], answered) != answered:
            raise NanogapError(f"--resume: {args.out} has an answer to {record['id']} in other "
                               "data; give that data, or a new file")


def cannot_run(args: argparse.Namespace, model: VLM, image: EncodedImage) -> dict[str, str]:
    """Which strategies a model cannot run, and why: each is asked for one token.

    raises: NanogapError where it can run none of them, or is the only model
    """
    why: dict[str, str] = {}
    for name in args.prune:
        alone = argparse.Namespace(**vars(args) | {"prune": [name]})
        try:
            runs = ask.runs_asked(alone, image, model.pictures_alike)
            ask.rehearse(model, image, runs, args.seed)
        except NanogapError as error:
            why[name] = str(error)
            if len(args.models) == 1:
                raise
    if len(why) == len(args.prune):
        raise NanogapError(f"{args.weights}: {why[args.prune[0]]}")
    return why


def ask_model(args: argparse.Namespace, data: Data, rank: int, world: int) -> Report | None:
    """Answer every expression in every run; of several processes the first one has the report."""
    model = load(args.weights, args.device, args.dtype, args.clip, pack=False)   # see ask.settings
    made = ask.settings(args, model, data)
    examples = first(data.examples, args.limit)
    earlier = journal.earlier(args.out, made)
    check_questions(args, data, earlier)
    image = ask.first_whole(model, examples)
    lacking = cannot_run(args, model, image)
    args.prune = [name for name in args.prune if name not in lacking]
    runs = ask.runs_asked(args, image, model.pictures_alike)

    done = {journal.name(record) for record in earlier}
    todo = [(example, run, question) for example in examples[rank::world] for run in runs
            for question in example.questions if (question[0], *run) not in done]
    write = journal.begin(args.out, made, rank, world)
    records: list[dict] = []
    left_out: dict[str, str] = {}
    said = ask.answers(model, todo, args, left_out)
    for record in ask.with_progress(said, len(todo), rank, world):
        write(record)
        records.append(record)
    records = earlier + gather(records, world)
    for others in gather([left_out], world):
        left_out |= others
    if rank > 0:
        return None
    journal.put_together(args.out, records)

    ids = {id_ for example in examples for id_, *_ in example.questions} - left_out.keys()
    if not ids:
        id_, why = next(iter(left_out.items()))
        raise NanogapError(f"none of the expressions can be asked, such as {id_}: {why}")
    records = [record for record in records if record["id"] in ids]
    rows = [summary(records, run, args.protocol) for run in runs]
    title = (f"{args.weights}, {data.name}, {len(ids)} expressions, seed {args.seed}, "
             f"{made['device']}, {made['dtype']}")
    made["weights"] = str(args.weights)
    if len(args.models) > 1:
        made["cannot_run"] = lacking
    notes = [f"without {name}: {why}" for name, why in lacking.items()]
    return Report(title, made, replace(data, left_out=data.left_out | left_out), rows, notes,
                  ask.budgets_asked(args, image, model.pictures_alike))


def ask_models(args: argparse.Namespace, data: Data, rank: int, world: int) -> None:
    """Ask one model after the other, and report; only one at a time is in memory."""
    reports: list[Report] = []
    several = len(args.models) > 1
    try:
        for number, (folder, out) in enumerate(zip(args.models, args.outs, strict=True), 1):
            if several and rank == 0:
                tell(f"model {number} of {len(args.models)}: {folder} ...")
            mine = argparse.Namespace(**vars(args) | {"weights": folder, "out": out})
            report = ask_model(mine, data, rank, world)
            if report is not None:                          # the first process has it
                reports.append(report)
    finally:                                                # Ctrl-C takes nothing from what is done
        if reports:
            print_reports(args, reports)


def main(argv: Sequence[str] | None) -> None:
    """Ask a model, or score what another program has answered."""
    args = parse_arguments(argv)
    if args.score:
        score_file(args)
        return
    if args.questions:
        write_file(args)
        return
    rank, world = join()
    with claim("--out", args.out) if args.out and rank == 0 else nullcontext():
        data = data_asked(args)
        if data.missing and rank == 0:
            tell(missing(data))
        try:
            ask_models(args, data, rank, world)
        except KeyboardInterrupt:
            if args.out and rank == 0:
                tell(f"stopped; the same command with --resume goes on with {args.out}")
            raise


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(answer_for("nanogap.evaluate", main, None))
