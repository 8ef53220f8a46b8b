"""The JSON document of a query, and the table, which shows the same numbers."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanogap.checks.command import visible
from nanogap.checks.loading import HERE
from nanogap.fast.ground_all import Answered
from nanogap.image import Box, iou
from nanogap.methods.in_decoder import cuts_in_words
from nanogap.models import VLM
from nanogap.show.draw import agreement
from nanogap.train.scenes import scene_of, words_never_taught


def true_box(image: str | Path, expression: str) -> Box | None:
    """In pixels, where the picture is a drawn scene and the expression one of its own."""
    drawn = scene_of(image)
    boxes = {text: drawn.things[i].box for text, i in drawn.expressions} if drawn else {}
    return boxes.get(" ".join(expression.split()))


def report(args: Namespace, model: VLM, keep: int | None, results: Mapping[str, Answered]) -> dict:
    """The JSON document; args: those of run.py; keep: the strategy's budget."""
    return {
        "image": args.image,
        "expression": args.expression,
        "weights": str(args.weights),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prune": args.prune,
        "keep": keep,
        "seed": args.seed,
        "true_box": true_box(args.image, args.expression),
        "runs": [{
            "mode": mode,
            "visual_tokens": result.visual_tokens,
            "box": [round(v, 2) for v in result.box] if result.box else None,
            "text": result.text,
            "cut_off": result.cut_off,
            "iou_with_full": agreement(result, results.get("full")),
            "position_ids": [int(result.position_ids[0]), int(result.position_ids[-1])],
            "next_position": result.next_position,
            "timings": result.timings,
            "kv_bytes": result.kv_bytes,
            "kept": result.keep.tolist(),
        } for mode, result in results.items()],
        "picture": str(args.out),
    }


def print_heading(document: dict) -> None:
    """What answers, and what it knows."""
    weights = Path(document["weights"])
    print(f"{weights} on {document['device']}, {document['dtype']}")
    if weights.resolve().parent == HERE and weights.name.startswith("mini"):
        print("These weights know drawn scenes only; "
              "for photographs see \"Real weights\" in README.md.")
        unknown = words_never_taught(document["expression"])
        if unknown:
            print(f"They were never taught {', '.join(map(json.dumps, unknown))}, "
                  "so the box is a guess; README.md names the words that they know.")


def print_table(document: dict) -> None:
    """A line for each mode, and what all have in common."""
    runs, truth = document["runs"], document["true_box"]
    width = max(8, *(len(run["mode"]) for run in runs))
    print(f"{'mode':{width}} tokens  position IDs {'box (pixels)':22} IoU with full "
          "prefill  decode  KV MB  words")
    for run in runs:
        match = "" if run["iou_with_full"] is None else f"{run['iou_with_full']:.2f}"
        ids = "{}..{}".format(*run["position_ids"])
        times = run["timings"]
        print(f"{run['mode']:{width}} {run['visual_tokens']:6g}  {ids:12} "
              f"{in_pixels(run['box']):22} {match:>13}{times['prefill_ms']:5.0f} ms"
              f"{times['decode_ms']:5.0f} ms {run['kv_bytes'] / 2 ** 20:6.1f}  "
              f"{visible(run['text'])}")
    told = f"The image was encoded once ({runs[0]['timings']['vision_ms']:.0f} ms)."
    if any(run["mode"] == "full" for run in runs):
        told += "  IoU is with the box of the full run, which may be wrong itself."
    print(told)
    if truth:
        with_truth = [f"{run['mode']} {iou(run['box'], truth) if run['box'] else 0:.2f}"
                      for run in runs]
        print(f"The true box of this drawn scene is {in_pixels(truth)}; "
              f"IoU with it: {', '.join(with_truth)}.")


def in_pixels(box: Sequence[float] | None) -> str:
    """A box in whole pixels."""
    return ", ".join(f"{v:.0f}" for v in box) if box else "-"


def print_notes(model: VLM, results: Mapping[str, Answered]) -> None:
    """Where the decoder cuts, and which answers have no end."""
    cut = next((result for result in results.values() if result.cuts), None)
    if cut is not None:
        print(cuts_in_words(cut.prune, cut.cuts, len(model.language_model.model.layers)) + ".")
    for mode, result in results.items():
        if result.cut_off:
            print(f"{mode}: the answer was cut off before its end; give it more room than "
                  f"--max-new-tokens {len(result.tokens)}.")
