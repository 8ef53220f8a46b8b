"""REC accuracy: how often the box that the model says overlaps the true one by at least half.

    python -m nanogap.evaluate --data scenes:val --prune random --keep 50% 25% --limit 500
    torchrun --nproc-per-node 2 -m nanogap.evaluate --data "refs(unc).p" --split val

In:  weights, expressions with true boxes, and any number of strategies, budgets and modes.
Out: a table with 95 % intervals, on demand a picture, a JSON document, and a line for each answer.

An answer without a box counts as wrong.  An image is encoded once for all that is asked about it,
and what is asked under one pruning shares what the decoder made of the image.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from nanogap.evaluate import ablate
from nanogap.evaluate import journal
from nanogap.evaluate import plot
from nanogap.cli import Parser, answer_for, keep_argument, tokens_to_keep, whole_number
from nanogap.cli import NanogapError
from nanogap.in_decoder import CUT
from nanogap.gap import MODES
from nanogap.image import Box
from nanogap.models.llava import Llava, Look
from nanogap.draw import check_picture, save_picture
from nanogap.prune import STRATEGIES
from nanogap.evaluate.refcoco import Data, Example, read_data
from nanogap.scenes import scene
from nanogap.evaluate.score import PROTOCOLS, TIMES, score, summary, table
from nanogap.weights import DTYPES, load

Run = tuple[str, int | None, str]   # strategy, budget (None: the strategy's own), mode
Todo = tuple[Example, Run, tuple[str, str, Box]]
TELL_EVERY = 10.0                   # seconds


# ----- what is asked ------------------------------------------------------------------------------


def data_asked(args: argparse.Namespace) -> Data:
    """Drawn scenes, or a file of annotations."""
    kind, _, split = args.data.partition(":")
    if kind == "scenes":
        return drawn_data(split or "val", args.limit or 500)
    return read_data(Path(args.data), args.images, args.split)


def drawn_data(split: str, limit: int) -> Data:
    """The first expressions about drawn scenes; the split's name seeds them (see scenes.py)."""
    examples, count = [], 0
    while count < limit:
        number = len(examples)
        drawn = scene(split, number)
        questions = [(f"{split}/{number}/{i}", expression, drawn.things[thing].box)
                     for i, (expression, thing) in enumerate(drawn.expressions)]
        examples.append(Example(number, partial(drawn_image, split, number), questions))
        count += len(questions)
    return Data(f"scenes:{split}", "", first(examples, limit), limit, [])


def drawn_image(split: str, number: int) -> Image.Image:
    """A scene drawn again, when its turn comes: all of them together would take much memory."""
    return scene(split, number).image


def first(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """As many of the images as hold the first `limit` expressions."""
    chosen, left = [], sum(len(e.questions) for e in examples) if limit is None else limit
    for example in examples:
        if left > 0:
            chosen.append(Example(example.number, example.image, example.questions[:left]))
            left -= len(example.questions)
    return chosen


def runs_asked(args: argparse.Namespace, n_visual: int) -> list[Run]:
    """Every (strategy, budget, mode) that was asked for, once; mode full prunes nothing."""
    budgets = [tokens_to_keep(keep, n_visual) for keep in args.keep]
    modes = [mode for mode in args.mode if mode != "full"]
    runs: list[Run] = [("none", n_visual, "full")] if "full" in args.mode else []
    if args.ablate:
        runs, modes = [("none", n_visual, name) for name in ablate.WHOLE], list(ablate.PRUNED)
    runs += [(prune, keep, mode) for prune in args.prune for keep in budgets for mode in modes]
    return list(dict.fromkeys(runs))


def ask(model: Llava, look: Look, expression: str, run: Run, seed: int) -> dict:
    """What the model says, and what it took."""
    prune, keep, mode = run
    if mode not in MODES:
        text, box = ablate.ask(model, look, expression, prune, keep, mode, seed)
        return {"text": text, "box": box, "visual_tokens": keep} | dict.fromkeys(TIMES)
    result = model.ground(look, expression, prune, keep, mode, seed)
    return {"text": result.text, "box": result.box, "visual_tokens": result.visual_tokens,
            **{key: result.timings[key] for key in TIMES}}


def rehearse(model: Llava, example: Example, runs: Sequence[Run], seed: int) -> None:
    """Ask for one token in each run: what cannot be asked is refused before any file is begun."""
    look = model.look(example.image())
    for prune, keep, mode in runs:
        if mode in MODES:
            model.ground(look, example.questions[0][1], prune, keep, mode, seed, max_new_tokens=1)


# ----- asking -------------------------------------------------------------------------------------


def answers(model: Llava, todo: Sequence[Todo], seed: int, protocol: str) -> Iterator[dict]:
    """One record for each thing to do, which come sorted by image and then by run."""
    looked_at, look = None, None
    for example, run, (id_, expression, truth) in todo:
        if example is not looked_at:
            looked_at, look = example, model.look(example.image(), share=True)
        said = ask(model, look, expression, run, seed + example.number)
        box, overlap = score(protocol, said["text"], said["box"], truth, look.width, look.height)
        yield {"id": id_, "expression": expression, "mode": run[2], "prune": run[0], "keep": run[1],
               **said, "box": box, "truth": truth, "iou": overlap}


def with_progress(records: Iterator[dict], total: int, rank: int, world: int) -> Iterator[dict]:
    """Say now and then on stderr how far it is; the first process speaks for all."""
    whose = f" of process 1 of {world}" if world > 1 else ""
    begun = told = time.time()
    for count, record in enumerate(records, 1):
        if rank == 0 and time.time() - told >= TELL_EVERY:
            told = time.time()
            rate = count / (told - begun)
            print(f"{count} of {total} answers{whose}, {rate:.1f} a second, "
                  f"{(total - count) / rate / 60:.1f} min to go", file=sys.stderr, flush=True)
        yield record


# ----- the command --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a model."""
    parser = Parser(prog="python -m nanogap.evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=Path("weights/mini"), metavar="DIR",
        help="default: %(default)s")
    add("--data", default="scenes:val", metavar="FILE|scenes[:SPLIT]",
        help="drawn scenes, or annotations of RefCOCO: refs(unc).p, or the JSON of MiniGPT-v2, "
             "Shikra, Qwen-VL or VLM-R1 (default: %(default)s)")
    add("--split", help="of refs(unc).p, such as val")
    add("--images", type=Path, metavar="DIR", help="COCO train2014 (default: the file's folder)")
    add("--prune", nargs="+", choices=STRATEGIES, default=["random"], metavar="NAME",
        help=f"any of {', '.join(STRATEGIES)} (default: random)")
    add("--keep", nargs="+", type=keep_argument, default=["50%"], metavar="N|N%|auto",
        help="default: 50%%; auto: what the strategy finds itself")
    add("--mode", nargs="+", choices=MODES, metavar="MODE", help="default: all four")
    add("--layer", type=whole_number, metavar="K", default=CUT,
        help="of fastv: the decoder's layer before which it prunes (default: %(default)s)")
    add("--clip", type=Path, metavar="DIR",
        help="the CLIP that the vision tower comes from, for strategies that read the expression")
    add("--ablate", action="store_true", help="instead of modes: every order of tokens and IDs")
    add("--protocol", choices=PROTOCOLS, default="pixels",
        help="how others count: minigpt, lmms-eval (default: %(default)s)")
    add("--limit", type=whole_number, help="expressions (default: all; 500 of drawn scenes)")
    add("--out", type=Path, metavar="FILE.jsonl", help="one line per answer, as it comes")
    add("--resume", action="store_true", help="go on with --out where it stopped")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--plot", type=Path, metavar="PICTURE", help="draw accuracy over the tokens kept")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--seed", type=whole_number, default=0, help="of what is random (default: %(default)s)")
    return check(parser.parse_args(argv))


def check(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse arguments that contradict each other, before any work is done."""
    if args.ablate and (args.mode or "auto" in args.keep or set(args.prune) - {*ablate.RANKINGS}):
        raise NanogapError("--ablate has its own modes, needs budgets, and takes the strategies "
                           f"{' and '.join(ablate.RANKINGS)}; leave the others out")
    if args.resume and not args.out:
        raise NanogapError("--resume needs the file to go on with: give it with --out")
    if args.limit == 0:
        raise NanogapError("--limit 0 asks nothing; give a number of expressions")
    if args.data.partition(":")[0] == "scenes" and (args.split or args.images):
        raise NanogapError("--split and --images are for annotations of RefCOCO; for drawn scenes "
                           "give --data scenes:SPLIT")
    if args.plot:
        check_picture("--plot", args.plot)
    if args.out:
        journal.check_out(args.out, args.resume)
    args.mode = args.mode or list(MODES)
    return args


def settings(args: argparse.Namespace, model: Llava, data: Data) -> dict:
    """Everything on which answers depend, besides what stands in their own line."""
    parts = [model.vision_tower, model.multi_modal_projector, model.language_model]
    parts += [model.text_guide.clip] if model.text_guide else []
    numbers = [p.flatten()[:64].tolist() for part in parts for p in part.parameters()]
    digest = hashlib.sha256(repr(numbers).encode()).hexdigest()[:8]
    return {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "weights": f"{args.weights.resolve().name} {digest}",
            "data": f"{data.name} {data.digest}".strip(), "seed": args.seed,
            "protocol": args.protocol, "layer": args.layer}


def report(args: argparse.Namespace, made: dict, data: Data, rows: list[dict]) -> None:
    """Print the table or the JSON document, and draw the picture."""
    asked = rows[0]["expressions"]
    if args.json:
        print(json.dumps({**made, "weights": str(args.weights), "data": data.name,
                          "expressions": asked, "of": data.expressions,
                          "missing_images": data.missing, "runs": rows,
                          "picture": args.plot and str(args.plot)}))
    else:
        print(f"{args.weights}, {data.name}, {asked} expressions, seed {args.seed}, "
              f"{made['device']}, {made['dtype']}\n{PROTOCOLS[args.protocol]}")
        if data.missing:
            print(f"covers {sum(len(e.questions) for e in data.examples)} of {data.expressions} "
                  f"expressions: {missing(data)}")
        print(table(rows))
    if args.plot:
        draw = plot.draw_rows if args.ablate else plot.draw_panels
        save_picture("--plot", args.plot, draw(rows))
        print(f"picture: {args.plot}", file=sys.stderr if args.json else sys.stdout)


def missing(data: Data) -> str:
    """How many images are not there, and which are the first."""
    return f"{len(data.missing)} images are missing, such as {', '.join(data.missing[:3])}"


def command(argv: Sequence[str] | None) -> None:
    """Answer every expression in every run, and report."""
    args = parse(argv)
    rank, world = journal.join()
    data = data_asked(args)
    if data.missing and rank == 0:
        print(missing(data), file=sys.stderr)
    asked = [None if value == "auto" else value for value in (args.device, args.dtype)]
    model = load(args.weights, *asked, args.clip)
    model.fastv_layer = args.layer
    made, runs = settings(args, model, data), runs_asked(args, model.config.vision.grid ** 2)
    examples = first(data.examples, args.limit)
    earlier = journal.earlier(args.out, made)
    rehearse(model, examples[0], runs, args.seed)
    done = {journal.name(record) for record in earlier}
    todo = [(example, run, question) for example in examples[rank::world] for run in runs
            for question in example.questions if (question[0], *run) not in done]
    write, new = journal.begin(args.out, made, rank, world), []
    found = answers(model, todo, args.seed, args.protocol)
    for record in with_progress(found, len(todo), rank, world):
        write(record)
        new.append(record)
    records = earlier + journal.gather(new, world)
    if rank == 0:
        journal.put_together(args.out, records)
        ids = {id_ for example in examples for id_, *_ in example.questions}
        records = [record for record in records if record["id"] in ids]
        report(args, made, data, [summary(records, run, args.protocol) for run in runs])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(answer_for("nanogap.evaluate", command, None))
