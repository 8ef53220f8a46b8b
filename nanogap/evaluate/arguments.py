"""The command line of the evaluation: arguments that do not contradict each other."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nanogap import methods
from nanogap.checks.command import (
    ListStrategies,
    Parser,
    add_model_arguments,
    count_argument,
    keep_argument,
    path_argument,
)
from nanogap.checks.loading import default_weights, folder_of
from nanogap.checks.output import check_folder, check_picture
from nanogap.errors import NanogapError
from nanogap.evaluate import ablate, journal
from nanogap.evaluate.answers import FORMATS
from nanogap.evaluate.score import PROTOCOLS
from nanogap.gap import MODES
from nanogap.prune import STRATEGIES

ABOUT = "REC accuracy: how often the box that the model says is the true one, by at least half"
OF_A_MODEL = ("weights", "prune", "keep", "mode", "clip", "ablate", "out", "resume")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without a model."""
    parser = Parser(prog="python -m nanogap.evaluate", description=ABOUT)
    add = parser.add_argument
    add("--weights", nargs="+", type=path_argument, metavar="DIR",
        help="several are compared (default: llava-1.5-7b-hf if it is there, or else mini)")
    add("--data", default="scenes:val", metavar="FILE|scenes[:SPLIT]",
        help="drawn scenes, or annotations: RefCOCO's refs(unc).p, the JSON of several projects, "
             'or lines of {"image", "expression", "box": [x1, y1, x2, y2] in pixels} '
             "(default: %(default)s)")
    add("--split", help="of refs(unc).p, such as val")
    add("--images", type=path_argument, metavar="DIR",
        help="COCO train2014 (default: the file's folder)")
    add("--prune", nargs="+", action=ListStrategies, metavar="NAME|FILE.py:NAME",
        help=f"any of {', '.join(STRATEGIES)}, or of your own; settings stand behind the name, "
             '"vispruner(ratio=0.75)"; list: what each does (default: random)')
    add("--keep", nargs="+", type=keep_argument, metavar="N|N%|auto",
        help="visual tokens, or a share of them (default: 50%%); auto: what the strategy finds")
    add("--mode", nargs="+", choices=MODES, metavar="MODE",
        help=f"any of {'; '.join(MODES)} (default: the first four)")
    add("--ablate", action="store_true",
        help="instead of modes: IDs and order changed without pruning, then all modes that prune")
    add("--score", type=path_argument, metavar="FILE.jsonl",
        help='ask no model: score the answers of any program, lines of {"id", "text"}, or {"id", '
             '"box"} in pixels; ids count annotations from 1, or are sent_id, or as in --out')
    add("--format", "--family", choices=FORMATS,
        help="how boxes stand in the texts that --score reads (default: llava)")
    add("--protocol", choices=PROTOCOLS, default="pixels",
        help="whose way to read an answer and to count it (default: %(default)s)")
    add("--limit", type=count_argument, help="expressions (default: all; 500 of drawn scenes)")
    add("--out", type=path_argument, metavar="FILE.jsonl|DIR",
        help="one line per answer, as it comes; of several models a file each in a folder")
    add("--resume", action="store_true", help="go on with --out where it stopped")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--plot", type=path_argument, metavar="PICTURE", help="draw the accuracies")
    add_model_arguments(parser)
    return check_arguments(parser.parse_args(argv))


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse those that contradict each other, and fill in those that were left out.

    returns: them, with `models`, folders by name, and `outs`, the file of answers of each
    """
    folders = list(dict.fromkeys(args.weights or [default_weights()]))
    of_a_model = [flag for flag in OF_A_MODEL if getattr(args, flag)]
    args.models = {folder.absolute().name: folder for folder in folders}
    if len(args.models) < len(folders):                      # two have one name
        args.models = {str(folder): folder for folder in folders}
    mistakes = [
        (args.score and of_a_model,
         f"--score asks no model, so --{', --'.join(of_a_model)} has nothing to say there"),
        (args.format and not args.score,
         "--format says how --score reads answers; a model has its own, so leave it out"),
        (args.data.partition(":")[0] == "scenes" and (args.split or args.images),
         "--split and --images are for annotations; for drawn scenes give --data scenes:SPLIT"),
        (args.score and not args.score.is_file(), f"--score {args.score} is no file of answers"),
        (args.data.partition(":")[0] != "scenes" and not Path(args.data).is_file(),
         f"--data {args.data} is no file; give scenes:val or annotations of RefCOCO"),
        (args.ablate and args.mode, "--ablate has its own modes; leave --mode out"),
        (args.resume and not args.out, "--resume goes on with --out; give that file as well"),
        (args.plot and args.plot == args.out, "--out and --plot are the same file; give two")]
    # the first is loaded at once
    mistakes += [(not (folder_of(folder) / "config.json").is_file(),
                  f"--weights {folder} holds no config.json; give the folder of a checkpoint")
                 for folder in folders[1:]]
    for is_made, message in mistakes:
        if is_made:
            raise NanogapError(message)
    args.device = None if args.device == "auto" else args.device
    args.dtype = None if args.dtype == "auto" else args.dtype
    if args.plot:
        check_picture("--plot", args.plot)
    args.outs = dict.fromkeys(args.models, args.out)
    if args.out and len(folders) > 1:
        check_folder("--out", args.out)
        args.outs = {name: args.out / f"{name.strip('/').replace('/', '_')}.jsonl"
                     for name in args.models}
    for file in filter(None, args.outs.values()):
        journal.check_out(file, args.resume)
    args.prune = list(dict.fromkeys(methods.find(name) for name in args.prune or ["random"]))
    budgets = [int(keep) if keep.isdigit() else keep for keep in args.keep or ["50%"]]
    args.keep = list(dict.fromkeys(budgets))
    args.mode = list(dict.fromkeys(args.mode or list(MODES)[:4]))
    if args.ablate:
        args.mode = [*ablate.WHOLE, *ablate.PRUNED]
    return args
