"""REC accuracy: how often the box that the model says overlaps the true one by at least half.

    python -m nanogap.evaluate --data scenes:val --prune random --keep 50% 25% --limit 500
    python -m nanogap.evaluate --weights weights/mini weights/mini-shikra --plot models.png
    torchrun --nproc-per-node 2 -m nanogap.evaluate --data "refs(unc).p" --split val
    python -m nanogap.evaluate --score answers.jsonl --data own.jsonl

In:  weights, expressions with true boxes, and any number of strategies, budgets and modes; or the
     answers of any program.
Out: a table with 95 % intervals, on demand a picture, a JSON document, and a line for each answer.
     Several models are asked one after the other, and compared in the end (compare.py).

An answer without a box counts as wrong.  What cannot be asked (a picture that is not there or is
broken, an expression that is blank or too long) is left out, and the report says what it covers.
An image is encoded once for all that is asked about it, and what is asked under one pruning is
asked at once (nanogap/fast/ground_all.py); of the times each answer has an equal share.
"""

import argparse
import ctypes
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from nanogap import prune
from nanogap.checks.command import (
    Parser,
    answer_for,
    count_argument,
    keep_argument,
    path_argument,
    shown,
    tell,
    visible,
    whole_number,
)
from nanogap.checks.output import check_apart, check_picture, save_picture
from nanogap.errors import ItemError, NanogapError
from nanogap.evaluate import ablate, compare, journal, plot
from nanogap.evaluate.answers import read_answers
from nanogap.evaluate.refcoco import Data, Example, read_data
from nanogap.evaluate.score import PROTOCOLS, TIMES, Run, score, summary, table
from nanogap.fast.processes import gather, join
from nanogap.gap import MODES
from nanogap.ground import MAX_NEW_TOKENS, EncodedImage, Result
from nanogap.image import Box
from nanogap.methods.in_decoder import check_layer, counts, cuts_in_words, plan
from nanogap.models import MODELS, VLM
from nanogap.train.scenes import scene
from nanogap.weights import DTYPES, default_weights, load

Todo = tuple[Example, Run, tuple[str, str, Box]]
DEFAULT_MODES = ["full", "shifted", "permuted", "gap"]
TELL_EVERY = 10.0                   # seconds
FEW = 5                             # boxes, which may all lie near a corner
MOST_DRAWN = 1_000_000              # expressions about drawn scenes; they are held in memory


# ----- what is asked ------------------------------------------------------------------------------


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


def drawn_data(split: str, limit: int) -> Data:
    """The first expressions about drawn scenes; the split's name seeds them (see scenes.py)."""
    examples: list[Example] = []
    count = 0
    if limit > MOST_DRAWN:
        raise NanogapError(f"--limit {limit} is more than can be drawn; give at most {MOST_DRAWN}")
    told = time.time()
    while count < limit:
        if time.time() - told >= TELL_EVERY:
            told = time.time()
            tell(f"drawing scenes: {count} of {limit} expressions")
        number = len(examples)
        drawn = scene(split, number)
        questions = [(f"{split}/{number}/{i}", expression, drawn.things[thing].box)
                     for i, (expression, thing) in enumerate(drawn.expressions)]
        examples.append(Example(number, f"scenes:{split}/{number}", drawn.image.size,
                                partial(drawn_image, split, number), questions))
        count += len(questions)
    return Data(f"scenes:{split}", "", first(examples, limit), limit, [], {})


def drawn_image(split: str, number: int) -> Image.Image:
    """A scene drawn again, when its turn comes: all of them together would take much memory."""
    return scene(split, number).image


def first(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """As many of the images as hold the first `limit` expressions."""
    if limit is None:
        return list(examples)
    chosen: list[Example] = []
    left = limit
    for example in examples:
        if left > 0:
            chosen.append(replace(example, questions=example.questions[:left]))
            left -= len(example.questions)
    return chosen


def budgets_asked(args: argparse.Namespace, image: EncodedImage,
                  alike: bool = True) -> dict[str, int | str | None]:
    """What each budget that was asked for is in a model.

    image: any; a share of the visual tokens is a number of its
    alike: whether all pictures have as many; else a share stays one, and is a number of each
    """
    n = sum(len(view.index) for view in image.views)
    return {keep: keep if keep.endswith("%") and not alike else prune.budget_of(keep, n)
            for keep in args.keep}


def runs_asked(args: argparse.Namespace, image: EncodedImage, alike: bool = True) -> list[Run]:
    """Every (strategy, budget, mode) that was asked for, once; mode full prunes nothing.

    image, alike: as above
    """
    pruned = [mode for mode in args.mode if mode != "full"]
    whole = ["full"] if "full" in args.mode else []
    if args.ablate:
        pruned, whole = list(ablate.PRUNED), list(ablate.WHOLE)
    budgets = budgets_asked(args, image, alike).values()
    everything = image.n_visual if alike else "100%"
    runs: list[Run] = [("none", everything, mode) for mode in whole]
    runs += [(name, keep, mode) for name in args.prune for keep in budgets for mode in pruned]
    return list(dict.fromkeys(runs))


# ----- asking -------------------------------------------------------------------------------------


def ground_all(model: VLM, image: EncodedImage, expressions: Sequence[str], run: Run, seed: int,
               layer: int | None, max_new_tokens: int) -> list[Result]:
    """Ask in one of the modes."""
    name, keep, mode = run
    if mode == "full":
        return model.ground_all(image, expressions, mode=mode, max_new_tokens=max_new_tokens)
    return model.ground_all(image, expressions, name, keep, mode, seed, layer=layer,
                            max_new_tokens=max_new_tokens)


def ask(model: VLM, image: EncodedImage, expressions: Sequence[str], run: Run, seed: int,
        layer: int | None, max_new_tokens: int) -> list[dict]:
    """What the model says, and what it took."""
    if run[2] in ablate.WHOLE:
        return [ask_whole(model, image, expression, run[2], seed, max_new_tokens)
                for expression in expressions]
    results = ground_all(model, image, expressions, run, seed, layer, max_new_tokens)
    return [{"text": result.text, "box": result.box, "cut_off": result.cut_off,
             "visual_tokens": result.visual_tokens, "kept": result.keep.tolist(),
             "padding": result.padding,
             **{key: result.timings[key] for key in TIMES}} for result in results]


def ask_whole(model: VLM, image: EncodedImage, expression: str, case: str, seed: int,
              max_new_tokens: int) -> dict:
    """The same in a case of --ablate that prunes nothing."""
    text, box, cut_off = ablate.ask(model, image, expression, case, seed, max_new_tokens)
    kept = torch.arange(image.n_visual)
    return {"text": text, "box": box, "cut_off": cut_off, "visual_tokens": len(kept),
            "kept": kept.tolist(), "padding": image.padding(kept), **dict.fromkeys(TIMES)}


def ask_what_can_be(model: VLM, image: EncodedImage, expressions: Sequence[str],
                    *how: Any) -> list[dict | ItemError]:
    """The same, and in the place of an answer why one cannot be asked; then the others are alone.

    how: the other arguments of `ask`
    """
    try:
        return [*ask(model, image, expressions, *how)]
    except ItemError as error:
        if len(expressions) == 1:
            return [error]
    return [said for expression in expressions
            for said in ask_what_can_be(model, image, [expression], *how)]


def first_whole(model: VLM, examples: Sequence[Example]) -> EncodedImage:
    """The first image that can be opened."""
    for example in examples:
        try:
            return model.encode_image(example.image())
        except ItemError as error:
            why = error
    raise NanogapError(f"none of the {len(examples)} images can be opened: {why}")


def rehearse(model: VLM, image: EncodedImage, runs: Sequence[Run], seed: int,
             layer: int | None) -> None:
    """Ask for one token in each run: what cannot be asked is refused before any file is begun."""
    for run in runs:
        if run[2] in MODES:
            ground_all(model, image, ["thing"], run, seed, layer, max_new_tokens=1)


def answers(model: VLM, todo: Sequence[Todo], args: argparse.Namespace,
            left_out: dict[str, str]) -> Iterator[dict]:
    """One record for each thing to do, which come sorted by image and then by run.

    left_out: takes the expressions that cannot be asked, by their IDs, and why
    """
    encoded = None
    image: EncodedImage | str = ""                          # or why it cannot be opened
    for (_, run), group in groupby(todo, lambda each: (each[0].number, each[1])):
        asked = [*group]
        example = asked[0][0]
        if example is not encoded:
            encoded = example
            try:
                image = model.encode_image(example.image())
            except ItemError as error:
                image = str(error)
        if isinstance(image, str):
            left_out |= {id_: image for _, _, (id_, *_) in asked}
            continue
        expressions = [expression for _, _, (_, expression, _) in asked]
        answered = ask_what_can_be(model, image, expressions, run, args.seed + example.number,
                                   args.layer, args.max_new_tokens)
        for (_, _, (id_, expression, truth)), said in zip(asked, answered, strict=True):
            if isinstance(said, ItemError):
                left_out[id_] = f"{expression:.40}: {said}"
                continue
            box, iou = score(args.protocol, said["text"], said["box"], truth, image.width,
                             image.height, model.parse_box)
            yield {"id": id_, "image": example.name, "expression": expression, "mode": run[2],
                   "prune": run[0], "keep": run[1], **said, "box": box, "truth": truth,
                   "iou": iou}


def with_progress(records: Iterator[dict], total: int, rank: int, world: int) -> Iterator[dict]:
    """Say now and then on stderr how far it is; the first process speaks for all."""
    whose = f" of process 1 of {world}" if world > 1 else ""
    begun = time.time()
    told = begun
    for count, record in enumerate(records, 1):
        if rank == 0 and time.time() - told >= TELL_EVERY:
            told = time.time()
            rate = count / (told - begun)
            tell(f"{count} of {total} answers{whose}, {rate:.1f} a second, "
                 f"{(total - count) / rate / 60:.1f} min to go")
        yield record


# ----- the command line ---------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a model."""
    parser = Parser(prog="python -m nanogap.evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    found = str(default_weights()).replace("%", "%%")
    add("--weights", nargs="+", type=path_argument, metavar="DIR",
        help=f"several are compared (default: {found})")
    add("--data", default="scenes:val", metavar="FILE|scenes[:SPLIT]",
        help="drawn scenes, or annotations: refs(unc).p of RefCOCO, the JSON of MiniGPT-v2, "
             "Shikra, Qwen-VL or VLM-R1, or lines of your own, "
             '{"image", "expression", "box": [x1, y1, x2, y2] in pixels} (default: %(default)s)')
    add("--split", help="of refs(unc).p, such as val")
    add("--images", type=path_argument, metavar="DIR",
        help="COCO train2014 (default: the file's folder)")
    add("--prune", nargs="+", metavar="NAME|FILE.py:NAME",
        help=f"any of {', '.join(prune.STRATEGIES)}, or of your own (default: random)")
    add("--keep", nargs="+", type=keep_argument, metavar="N|N%|auto",
        help="default: 50%%; auto: what the strategy finds itself")
    add("--mode", nargs="+", choices=MODES, metavar="MODE",
        help=f"any of {'; '.join(MODES)} (default: the first four)")
    add("--layer", type=whole_number, metavar="K",
        help="of fastv: the decoder's layer before which it prunes, counted from 0 (default: 2 of "
             "32, and as early in others)")
    add("--max-new-tokens", type=count_argument, default=MAX_NEW_TOKENS, metavar="N",
        help="an answer is cut off there (default: %(default)s)")
    add("--clip", type=path_argument, metavar="DIR",
        help="the CLIP that the vision tower comes from, for strategies that read the expression")
    add("--ablate", action="store_true",
        help="instead of modes: IDs and order changed without pruning, then all modes that prune")
    add("--score", type=path_argument, metavar="FILE.jsonl",
        help='ask no model: score the answers of any program, lines of {"id", "box"} in pixels, '
             'or {"id", "text"}; an id is a number, from 1, of an annotation in its file, sent_id '
             "of refs(unc).p, or as --out has it, such as val/0/0 of drawn scenes")
    add("--family", choices=MODELS, help="whose format --score reads in texts (default: llava)")
    add("--protocol", choices=PROTOCOLS, default="pixels",
        help="how others count: minigpt, lmms-eval (default: %(default)s)")
    add("--limit", type=whole_number, help="expressions (default: all; 500 of drawn scenes)")
    add("--out", type=path_argument, metavar="FILE.jsonl", help="one line per answer, as it comes")
    add("--resume", action="store_true", help="go on with --out where it stopped")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--plot", type=path_argument, metavar="PICTURE", help="draw accuracy over the tokens kept")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--pack", action="store_true", help="faster on a CPU, for twice the memory")
    add("--seed", type=whole_number, default=0, help="of what is random (default: %(default)s)")
    return check_arguments(parser.parse_args(argv))


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse arguments that contradict each other, before any work is done."""
    if args.score:
        flags = ("weights", "prune", "keep", "mode", "clip", "ablate", "out", "resume")
        asked = [flag for flag in flags if getattr(args, flag)]
        if asked:
            raise NanogapError(f"--score asks no model, so --{asked[0]} has nothing to say there; "
                               "leave one of them out")
    elif args.family:
        raise NanogapError("--family says whose format --score reads; config.json says it of a "
                           "model that is asked, so leave it out")
    if args.ablate and args.mode:
        raise NanogapError("--ablate has its own modes; leave --mode out")
    if args.resume and not args.out:
        raise NanogapError("--resume needs the file to go on with: give it with --out")
    if args.limit == 0:
        raise NanogapError("--limit 0 asks nothing; give a number of expressions")
    if args.data.partition(":")[0] == "scenes" and (args.split or args.images):
        raise NanogapError("--split and --images are for annotations of RefCOCO; for drawn scenes "
                           "give --data scenes:SPLIT")
    args.models = list(dict.fromkeys(args.weights or [default_weights()]))
    args.weights = args.models[0]
    if len(args.models) > 1:
        check_several(args)
    check_apart({"--out": args.out, "--plot": args.plot})
    if args.plot:
        check_picture("--plot", args.plot)
    if args.out:
        journal.check_out(args.out, args.resume)
    names = args.prune or ["random"]
    args.prune = [prune.find(name) for name in names]
    check_layer(args.layer, args.prune)
    args.files = [name.rpartition(":")[0] for name in names if ":" in name]
    args.keep = args.keep or ["50%"]
    args.mode = args.mode or DEFAULT_MODES
    args.family = args.family or "llava"
    return args


def check_several(args: argparse.Namespace) -> None:
    """Refuse what is about one model where several are asked."""
    if args.out:
        raise NanogapError("--out holds the answers of one model; give one of --weights at a time, "
                           "each with a file of its own")
    if args.clip:
        raise NanogapError("--clip is the CLIP of one model; give one of --weights at a time, or "
                           "put each one's into its folder, as clip_text")
    if args.ablate and args.plot:
        raise NanogapError("--plot draws the --ablate of one model; give one of --weights at a "
                           "time, or leave --plot out")


def settings(args: argparse.Namespace, model: VLM, data: Data) -> dict:
    """Everything on which answers depend, besides what stands in their own line."""
    digest = fingerprint(model) if args.out else ""         # of 14 GB it takes some seconds
    made = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "weights": f"{args.weights.resolve().name} {digest}".strip(),
            "data": f"{data.name} {data.digest}".strip(), "seed": args.seed,
            "protocol": args.protocol, "layer": args.layer, "max_new_tokens": args.max_new_tokens}
    if args.files:
        code = b"".join(Path(file).read_bytes() for file in args.files)
        made["strategy file"] = hashlib.sha256(code).hexdigest()[:8]
    return made


def fingerprint(model: VLM) -> str:
    """A digest of all on which a model's answers depend: its settings, its words, all its numbers.
    """
    said: list[object] = [model.config, model.frame, model.template, model.box_format,
                          model.tokenizer.to_str()]
    parts: list[nn.Module] = [model]
    if model.text_guide:
        said += [model.text_guide.clip.text_model.config, model.text_guide.tokenizer.to_str()]
        parts.append(model.text_guide.clip)
    digest = hashlib.sha256(repr(said).encode())
    for part in parts:
        for name, value in part.state_dict().items():
            value = value.cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            size = value.nbytes                             # without NumPy, and without a copy
            digest.update((ctypes.c_char * size).from_address(value.data_ptr()))
    return digest.hexdigest()[:16]


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


# ----- the report ---------------------------------------------------------------------------------


class Report(NamedTuple):
    """What became of all that was asked."""

    title: str                 # what was asked, in a line
    made: dict                 # how it was asked, for the document
    data: Data
    rows: list[dict]
    notes: Sequence[str]       # what else has to be said above the table
    budgets: dict[str, int | str | None]   # what each budget that was asked is in the model


def print_report(args: argparse.Namespace, report: Report) -> None:
    """Print the table or the JSON document, and draw the picture."""
    if args.plot:
        save_picture("--plot", args.plot, plot.draw_rows(report.rows)
                     if plot.are_cases(report.rows) else plot.draw_panels(report.rows))
    if args.json:
        print(json.dumps(document(args, report)))
        return
    print_table(args, report)
    if args.plot:
        print(f"picture: {args.plot}")


def document(args: argparse.Namespace, report: Report) -> dict:
    """All that is known, for a program."""
    data = report.data
    return {**report.made, "data": data.name, "expressions": report.rows[0]["expressions"],
            "of": data.expressions, "missing_images": data.missing, "left_out": data.left_out,
            "runs": report.rows, "picture": args.plot and str(args.plot)}


def print_table(args: argparse.Namespace, report: Report) -> None:
    """The table, below what it is about."""
    for line in (report.title, PROTOCOLS[args.protocol], *covers(report.data),
                 *doubts(report.data), *report.notes):
        print(visible(line))
    print(table(report.rows), *cut_off(report.rows), sep="\n")


def print_comparison(args: argparse.Namespace, reports: Sequence[Report],
                     found: Sequence[compare.Outcome]) -> None:
    """What is said of several models together, after the table of each."""
    if args.plot:
        save_picture("--plot", args.plot, compare.draw_models(found))
    if args.json:
        print(json.dumps({"models": [document(args, report) for report in reports]}))
        return
    if not args.ablate:
        print(compare.table(found))
    if args.plot:
        print(f"picture: {args.plot}")


def missing(data: Data) -> str:
    """How many images are not there, and which are the first."""
    return f"{len(data.missing)} images are missing, such as {', '.join(data.missing[:3])}"


def covers(data: Data) -> list[str]:
    """How many expressions a report is about, in a line for each reason why it is not all of them.
    """
    there = sum(len(example.questions) for example in data.examples)
    asked = f"covers {there} of {data.expressions} expressions"
    lines = []
    if data.missing:
        lines.append(f"{asked}: {missing(data)}")
    if data.left_out:
        id_, why = next(iter(data.left_out.items()))
        lines.append(f"{asked}: {len(data.left_out)} cannot be asked, such as {id_}: {why:.300}")
    return lines


def doubts(data: Data) -> list[str]:
    """A word on boxes that all lie near the corner of large images: they may be no pixels."""
    corners = [max(box) for example in data.examples for *_, box in example.questions]
    sides = [min(example.size) for example in data.examples]
    for most, unit in ((100, "percent"), (1000, "thousandths")):
        if len(corners) >= FEW and max(corners) <= most and min(sides) >= 2 * most:
            return [f"no box reaches beyond {most} pixels, and no side is below {min(sides)}: if "
                    f"these are in {unit} the numbers below mean nothing, for pixels are read"]
    return []


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


def score_file(args: argparse.Namespace) -> None:
    """Score the answers of any program, and report."""
    data = data_asked(args)
    examples = first(data.examples, args.limit)
    records, left_out = read_answers(args.score, data, examples, MODELS[args.family],
                                     args.protocol)
    rows = [summary(records, run, args.protocol) | {"unanswered": count}
            for run, count in left_out.items()]
    asked = rows[0]["expressions"]
    notes = [f"{row['prune']}, {row['mode']}: {row['unanswered']} of {asked} expressions have no "
             "answer, and count as wrong" for row in rows if row["unanswered"]]
    made = {"score": str(args.score), "family": args.family, "protocol": args.protocol}
    title = f"{args.score}, {data.name}, {asked} expressions"
    print_report(args, Report(title, made, data, rows, notes, {}))


def load_asked(args: argparse.Namespace) -> VLM:
    """The model, where and in the precision in which it was asked for."""
    device, dtype = (None if value == "auto" else value for value in (args.device, args.dtype))
    return load(args.weights, device, dtype, args.clip, args.pack)


def ask_model(args: argparse.Namespace, data: Data, rank: int, world: int) -> Report | None:
    """Answer every expression in every run; of several processes the first one has the report."""
    model = load_asked(args)
    made = settings(args, model, data)
    examples = first(data.examples, args.limit)
    earlier = journal.earlier(args.out, made)
    check_questions(args, data, earlier)
    image = first_whole(model, examples)
    runs = runs_asked(args, image, model.pictures_alike)
    rehearse(model, image, runs, args.seed, args.layer)
    done = {journal.name(record) for record in earlier}
    todo = [(example, run, question) for example in examples[rank::world] for run in runs
            for question in example.questions if (question[0], *run) not in done]
    write = journal.begin(args.out, made, rank, world)
    new = []
    left_out: dict[str, str] = {}
    for record in with_progress(answers(model, todo, args, left_out), len(todo), rank, world):
        write(record)
        new.append(record)
    records = earlier + gather(new, world)
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
    notes = cut_notes(runs, image.n_visual, model, args.layer)
    return Report(title, made | {"weights": str(args.weights)}, data, rows, notes,
                  budgets_asked(args, image, model.pictures_alike))


def cut_notes(runs: Sequence[Run], n_visual: int, model: VLM, layer: int | None) -> list[str]:
    """Where those that prune in the decoder cut, a line for each budget."""
    layers = len(model.language_model.model.layers)
    asked = dict.fromkeys((name, keep) for name, keep, _ in runs if name in prune.STRATEGIES)
    notes = []
    for name, keep in asked:
        if prune.in_decoder(name) and not isinstance(keep, str):
            cuts = plan(name, n_visual, keep, layers, layer)
            notes.append(cuts_in_words(name, counts(n_visual, cuts, name == "sparsevlm"), layers))
    return notes


# ----- several models -----------------------------------------------------------------------------


def with_values(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """The same arguments, but for some of them."""
    return argparse.Namespace(**{**vars(args), **values})


def cannot_run(args: argparse.Namespace, examples: Sequence[Example]) -> dict[str, str]:
    """Which strategies a model cannot run, and why: each is asked for one token.

    raises: NanogapError that names the model, for all else that it cannot be asked
    """
    model = load_asked(args)
    image = first_whole(model, examples)
    why: dict[str, str] = {}
    try:
        runs = runs_asked(args, image, model.pictures_alike)
        rehearse(model, image, [run for run in runs if run[0] == "none"], args.seed, args.layer)
    except NanogapError as error:
        raise NanogapError(f"{args.weights}: {error}") from None
    for name in args.prune:
        try:
            rehearse(model, image, [run for run in runs if run[0] == name], args.seed, args.layer)
        except NanogapError as error:
            why[name] = str(error)
    if set(args.prune) == set(why) and not {"full"} & set(args.mode):
        raise NanogapError(f"{args.weights}: {why[args.prune[0]]}")
    return why


def ask_models(args: argparse.Namespace, data: Data, rank: int, world: int) -> None:
    """Ask one model after the other, and compare them; only one at a time is in memory.

    All are tried out first: a mistake in the last one would show after hours.
    """
    examples = first(data.examples, args.limit)
    lacking = [cannot_run(with_values(args, weights=folder), examples) for folder in args.models]
    for name in args.prune:
        if all(name in why for why in lacking):
            raise NanogapError(lacking[0][name])
    reports, found = [], []
    names = compare.names_of(args.models)
    for i, (folder, name, why) in enumerate(zip(args.models, names, lacking, strict=True), 1):
        if rank == 0:
            tell(f"model {i} of {len(names)}: {folder}")
        mine = with_values(args, weights=folder, prune=[p for p in args.prune if p not in why])
        report = ask_model(mine, data, rank, world)
        if report is None:                                  # the first process has it
            continue
        report = report._replace(made=report.made | {"cannot_run": why},
                                 notes=[*left_out_notes(why), *report.notes])
        reports.append(report)
        found += compare.outcomes(name, report.rows, mine.prune, report.budgets)
        if not args.json:
            print_table(args, report)
            print(flush=True)
    if rank == 0:
        print_comparison(args, reports, found)


def left_out_notes(why: dict[str, str]) -> list[str]:
    """A line for each reason why a model is not asked under some strategies."""
    reasons: dict[str, list[str]] = {}
    for name, reason in why.items():
        reasons.setdefault(reason, []).append(name)
    return [f"without {', '.join(names)}: {reason}" for reason, names in reasons.items()]


# ----- the command --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None) -> None:
    """Ask a model, or score what another program has answered."""
    args = parse_arguments(argv)
    if args.score:
        score_file(args)
        return
    rank, world = join()
    with journal.own(args.out if rank == 0 else None):
        if args.out and rank == 0:
            journal.check_out(args.out, args.resume)        # another run may just have ended
        data = data_asked(args)
        if data.missing and rank == 0:
            tell(missing(data))
        if len(args.models) > 1:
            ask_models(args, data, rank, world)
            return
        report = ask_model(args, data, rank, world)
        if report is not None:
            print_report(args, report)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(answer_for("nanogap.evaluate", main, None))
