"""The table of a query: a line for each mode, and what the numbers do not say.

In:  the JSON document of run.py, which holds the same numbers.  Out: text on stdout.
"""

import re
from collections.abc import Mapping, Sequence

from nanogap.checks.command import visible
from nanogap.fast.answered import Answered
from nanogap.image import iou
from nanogap.methods.in_decoder import cuts_in_words
from nanogap.models import VLM
from nanogap.show.draw import shortened
from nanogap.show.explain import columns

WORDS = 36       # columns for them: the longest box of a model is 35


def print_table(document: dict, box_pattern: re.Pattern[str]) -> None:
    """A line for each mode, and what all have in common.

    box_pattern: of a box in the model's words
    """
    runs = document["runs"]
    width = max(8, *(len(run["mode"]) for run in runs))
    print(f"{'mode':{width}} tokens  position IDs {'box (pixels)':22} IoU with full "
          "prefill  decode  KV MB  words")
    for run in runs:
        match = "" if run["iou_with_full"] is None else f"{run['iou_with_full']:.2f}"
        first, last = run["position_ids"]
        times = "".join(f"{run['timings'][key]:5.0f} ms" for key in ("prefill_ms", "decode_ms"))
        numbers = (f"{run['mode']:{width}} {run['visual_tokens']:6g}  {f'{first}..{last}':12} "
                   f"{in_pixels(run['box']):22} {match:>13}{times} "
                   f"{run['kv_bytes'] / 2 ** 20:6.1f}  ")
        print((numbers + words(visible(run["text"]), box_pattern)).rstrip())
    told = f"The image was encoded once ({runs[0]['timings']['vision_ms']:.0f} ms)."
    if any(run["mode"] == "full" for run in runs):
        told += "  IoU is with the box of the full run, which may be wrong itself."
    print(told)
    truth = document["true_box"]
    if truth is not None:
        with_truth = [f"{run['mode']} {iou(run['box'], truth) if run['box'] else 0:.2f}"
                      for run in runs]
        print(f"The true box of this drawn scene is {in_pixels(truth)}; "
              f"IoU with it: {', '.join(with_truth)}.")


def in_pixels(box: Sequence[float] | None) -> str:
    """A box in whole pixels."""
    return ", ".join(f"{v:.0f}" for v in box) if box else "-"


def words(text: str, box_pattern: re.Pattern[str]) -> str:
    """What the model said, cut to the column's width; a box in it stays whole."""
    box = box_pattern.search(text)
    if box is None or columns(text) <= WORDS:
        return shortened(text, WORDS, columns)
    room = max(3, WORDS - 4 - columns(box[0]))
    before = shortened(text[:box.start()], room, columns)
    return f"{before} {box[0]}".lstrip() + ("..." if text[box.end():] else "")


def print_notes(model: VLM, results: Mapping[str, Answered]) -> None:
    """Where the decoder cuts, and which answers have no end."""
    cut = next((result for result in results.values() if result.cuts), None)
    if cut is not None:
        print(cuts_in_words(cut.prune, cut.cuts, len(model.language_model.model.layers)) + ".")
    for mode, result in results.items():
        if result.cut_off:
            print(f"{mode}: the answer was cut off before its end, at {len(result.tokens)} tokens; "
                  "give it more room with --max-new-tokens.")
