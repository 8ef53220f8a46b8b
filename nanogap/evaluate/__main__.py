"""REC accuracy: how often the box that the model says overlaps the true one by at least half.

    python -m nanogap.evaluate --data scenes:val --prune random --keep 50% 25% --limit 500
    python -m nanogap.evaluate --weights weights/mini weights/mini-shikra --plot models.png
    torchrun --nproc-per-node 2 -m nanogap.evaluate --data "refs(unc).p" --split val
    python -m nanogap.evaluate --questions questions.jsonl --data scenes:val
    python -m nanogap.evaluate --score answers.jsonl --data own.jsonl --format qwen2-vl

In:  weights, expressions with true boxes, and any number of strategies, budgets and modes; or the
     answers of any program.
Out: a table with 95 % intervals, on demand a picture, a JSON document, and a line for each answer.
     Several models are asked one after the other, and compared (compare.py).

An answer without a box counts as wrong.  What cannot be asked (a picture that is not there or is
broken, an expression that is blank or too long) is left out, and the report says what it covers.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from nanogap.checks.command import answer_for, shown, tell
from nanogap.checks.loading import load
from nanogap.checks.output import claim
from nanogap.errors import NanogapError
from nanogap.evaluate import ask, journal
from nanogap.evaluate.answers import How, read_answers, write_questions
from nanogap.evaluate.arguments import check_outs, outs_of, parse_arguments
from nanogap.evaluate.data import Data, Example, drawn_data, first
from nanogap.evaluate.refcoco import read_data
from nanogap.evaluate.report import Report, missing, print_comparison, print_report, without
from nanogap.evaluate.score import Run, summary
from nanogap.fast.processes import gather, join
from nanogap.methods import in_decoder
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
    return data


# ----- without a model ----------------------------------------------------------------------------


def score_file(args: argparse.Namespace, data: Data, examples: Sequence[Example]) -> None:
    """Score the answers of any program, and report."""
    how = How(args.protocol, args.format, args.resized)
    scored = read_answers(args.score, data, examples, how)
    rows = [summary(scored.records, run, args.protocol) | {"unanswered": count}
            for run, count in scored.unanswered.items()]
    asked = rows[0]["expressions"]
    notes = [f"{row['prune']}, {row['mode']}: {row['unanswered']} of {asked} expressions have no "
             "answer, and count as wrong" for row in rows if row["unanswered"]]
    made = {"score": str(args.score), "format": args.format or "llava", "protocol": args.protocol}
    title = f"{args.score}, {data.name}, {asked} expressions"
    print_report(args, Report(title, made, data, rows, [*scored.notes, *notes]))


def ask_nobody(args: argparse.Namespace) -> None:
    """Score a file, or write one of questions."""
    data = data_asked(args)
    examples = first(data.examples, args.limit)
    if args.score:
        score_file(args, data, examples)
        return
    same = ["--data", args.data]
    for flag in ("split", "images", "limit"):
        value = getattr(args, flag)
        same += [f"--{flag}", str(value)] if value else []
    print(write_questions(args.questions, examples, same))


# ----- one model ----------------------------------------------------------------------------------


def load_asked(args: argparse.Namespace) -> VLM:
    """The model, where and in the precision in which it was asked for."""
    device, dtype = (None if value == "auto" else value for value in (args.device, args.dtype))
    return load(args.weights, device, dtype, args.clip, pack=False)       # see ask.settings


def check_questions(args: argparse.Namespace, data: Data, records: Sequence[dict]) -> None:
    """Refuse answers to other questions than the data's.  What was not answered may be mended."""
    asked = {id_: (example.name, expression, list(truth)) for example in data.examples
             for id_, expression, truth in example.questions}
    for record in records:
        answered = record["image"], record["expression"], record["truth"]
        if asked.get(record["id"], answered) != answered:
            raise NanogapError(f"--resume: {args.out} has an answer to {record['id']} in other "
                               f"data, {shown(answered)} and not {shown(asked[record['id']])}; "
                               "give that data, or a new file")


def ask_model(args: argparse.Namespace, data: Data, rank: int, world: int) -> Report | None:
    """Answer every expression in every run; of several processes the first one has the report."""
    model = load_asked(args)
    made = ask.settings(args, model, data)
    examples = first(data.examples, args.limit)
    earlier = journal.earlier(args.out, made)
    check_questions(args, data, earlier)
    image = ask.first_whole(model, examples)
    runs = ask.runs_asked(args, image, model.pictures_alike)
    ask.rehearse(model, image, runs, args.seed)
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
    data = without(data, left_out)
    ids = {id_ for example in examples for id_, *_ in example.questions} - left_out.keys()
    if not ids:
        raise NanogapError("none of the expressions can be asked, such as "
                           "{}: {}".format(*next(iter(left_out.items()))))
    records = [record for record in records if record["id"] in ids]
    rows = [summary(records, run, args.protocol) for run in runs]
    title = (f"{args.weights}, {data.name}, {rows[0]['expressions']} expressions, "
             f"seed {args.seed}, {made['device']}, {made['dtype']}")
    budgets = ask.budgets_asked(args, image, model.pictures_alike)
    return Report(title, made | {"weights": str(args.weights)}, data, rows,
                  cut_notes(runs, image.n_visual, model), budgets)


def cut_notes(runs: Sequence[Run], n_visual: int, model: VLM) -> list[str]:
    """Where those that prune in the decoder cut, a line for each budget."""
    layers = len(model.language_model.model.layers)
    notes = []
    for name, keep in dict.fromkeys((name, keep) for name, keep, _ in runs if name != "none"):
        if in_decoder.prunes_there(name) and not isinstance(keep, str):
            cuts = in_decoder.plan(name, n_visual, keep, layers)
            left = in_decoder.counts(name, n_visual, cuts)
            notes.append(in_decoder.cuts_in_words(name, left, layers))
    return notes


# ----- several models -----------------------------------------------------------------------------


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """In here a refusal names its model."""
    try:
        yield
    except NanogapError as error:
        said = str(error)
        raise NanogapError(said if str(folder) in said else f"{folder}: {said}") from None


def cannot_run(args: argparse.Namespace, examples: Sequence[Example]) -> dict[str, str]:
    """Which strategies a model cannot run, and why: each is asked for one token.

    raises: NanogapError that names the model, for all else that it cannot be asked
    """
    why: dict[str, str] = {}
    with named(args.weights):
        model = load_asked(args)
        image = ask.first_whole(model, examples)
        runs = ask.runs_asked(args, image, model.pictures_alike)
        ask.rehearse(model, image, [run for run in runs if run[0] == "none"], args.seed)
        for name in args.prune:
            try:
                ask.rehearse(model, image, [run for run in runs if run[0] == name], args.seed)
            except NanogapError as error:
                why[name] = str(error)
        if set(args.prune) == set(why) and "full" not in args.mode:
            raise NanogapError(why[args.prune[0]])
    return why


def ask_models(args: argparse.Namespace, data: Data, rank: int, world: int) -> None:
    """Ask one model after the other, and compare them; only one at a time is in memory.

    All are tried out first: a mistake in the last one would show after hours.  What Ctrl-C leaves
    undone takes nothing from what is done.
    """
    examples = first(data.examples, args.limit)
    lacking = [cannot_run(argparse.Namespace(**vars(args) | {"weights": folder}), examples)
               for folder in args.models]
    for name in args.prune:
        if all(name in why for why in lacking):
            raise NanogapError(lacking[0][name])
    reports: list[Report] = []
    outs = outs_of(args)
    try:
        for i, (folder, out, why) in enumerate(zip(args.models, outs, lacking, strict=True), 1):
            if rank == 0:
                tell(f"model {i} of {len(outs)}: {folder} ...")
            mine = argparse.Namespace(**vars(args) | {
                "weights": folder, "out": out,
                "prune": [name for name in args.prune if name not in why]})
            with named(folder):
                report = ask_model(mine, data, rank, world)
            if report is not None:                          # the first process has it
                reports.append(report._replace(made=report.made | {"cannot_run": why},
                                               notes=[*left_out_notes(why), *report.notes]))
    finally:
        if reports:
            print_comparison(args, reports)


def left_out_notes(why: dict[str, str]) -> list[str]:
    """A line for each reason why a model is not asked under some strategies."""
    reasons: dict[str, list[str]] = {}
    for name, reason in why.items():
        reasons.setdefault(reason, []).append(name)
    return [f"without {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def main(argv: Sequence[str] | None) -> None:
    """Ask a model, or score what another program has answered."""
    args = parse_arguments(argv)
    if args.score or args.questions:
        ask_nobody(args)
        return
    rank, world = join()
    with claim("--out", args.out) if args.out and rank == 0 else nullcontext():
        if rank == 0:
            check_outs(args)                                # another run may just have ended
        data = data_asked(args)
        if data.missing and rank == 0:
            tell(missing(data))
        try:
            if len(args.models) > 1:
                ask_models(args, data, rank, world)
            elif report := ask_model(args, data, rank, world):
                print_report(args, report)
        except KeyboardInterrupt:
            if args.out and rank == 0:
                tell(f"stopped; the same command with --resume goes on with {args.out}")
            raise


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(answer_for("nanogap.evaluate", main, None))
