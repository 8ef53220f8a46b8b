"""One query, walked through: every shape, every position ID, every cache row, in 80 columns.

In:  a model, a look at an image, and the results of some modes.  Out: text on stdout.
"""

import unicodedata

from nanogap.gap import MODES
from nanogap.llava import Llava, Look, Result
from nanogap.prompt import parse_box


def kept_grid(keep: list[int], grid: int) -> str:
    """The patches as the model sees them: # for one that was kept, . for one that was dropped."""
    kept = set(keep)
    marks = ["#" if index in kept else "." for index in range(grid * grid)]
    return "\n".join("      " + " ".join(marks[at:at + grid]) for at in range(0, grid * grid, grid))


def ranges(numbers: list[int]) -> str:
    """Consecutive numbers in short: 0..35 37 40..41."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return " ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def columns(text: str) -> int:
    """How wide a terminal shows a text: Chinese characters and most emoji take two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def wrapped(text: str, indent: int = 6, width: int = 79) -> str:
    """Break a line at spaces to stay within 80 columns; a word that is longer is broken as well."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and columns(line + word) > width - indent:
            lines.append(line)
            line = ""
        for letter in word:
            if columns(line + letter) > width - indent:
                lines.append(line)
                line = ""
            line += letter
        line += " "
    return "\n".join(" " * indent + part.rstrip() for part in [*lines, line])


def visible(text: str) -> str:
    """A text with line breaks and all else that does not print spelled out, as in "\\n"."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def piece(model: Llava, token: int) -> str:
    """How the tokenizer spells a token; some models have rows for tokens that it does not know."""
    return visible(model.tokenizer.id_to_token(token) or f"<{token}>")


def explain(model: Llava, look: Look, expression: str, results: dict[str, Result]) -> None:
    """Print each stage of a query with its shapes, and each mode with its IDs."""
    c, seen = model.config, look.seen
    N, grid, side = len(seen.features), seen.grid, max(look.width, look.height)
    input_ids = model.prompt(expression)
    P, A = model.around_image(input_ids)
    print("\n1  The image becomes a square, and the square becomes patches")
    print(f"   {look.width} x {look.height} pixels, padded to {side} x {side},")
    print(f"   resized to pixel_values (1, 3, {c.vision.image_size}, {c.vision.image_size})")
    print("\n2  CLIP turns patches into features")
    print(f"   {grid} x {grid} patches of {c.vision.patch_size} pixels and CLS through "
          f"{model.vision_tower.depth} of {c.vision.num_hidden_layers} layers:")
    print(f"   features {tuple(seen.features.shape)}, in raster order")
    pruned = next((r for mode, r in results.items() if mode != "full"), None)
    print("\n3  Pruning keeps some of them (#) and drops the rest (.)")
    if pruned is None:
        print(f"   not in mode full: all {N} patches stay")
    else:
        print(f"   {len(pruned.keep)} of {N} patches stay:")
        print(kept_grid(pruned.keep.tolist(), grid))
    print("\n4  The prompt: words, and one <image> token where the patches go")
    print(f"   P = {P} tokens before the image, A = {A} after it; "
          f"decoder width {c.text.hidden_size}")
    print(wrapped(" ".join(piece(model, i) for i in input_ids.tolist())))
    for number, (mode, result) in enumerate(results.items(), 5):
        explain_mode(model, number, mode, result, P, A)


def explain_mode(model: Llava, number: int, mode: str, result: Result, P: int, A: int) -> None:
    """Print how one mode feeds the tokens, and what the model answers."""
    K, ids = len(result.keep), result.position_ids.tolist()
    order, kind = MODES[mode]
    print(f"\n{number}  Mode {mode}: {order} order, {kind} position IDs")
    print(f"   embeddings (1, {len(ids)}, {model.config.text.hidden_size}), "
          f"cache rows 0..{len(ids) - 1}, always dense")
    print("   raster indices of the patches in the sequence:")
    print(wrapped(ranges(result.keep.tolist())))
    print(f"   position IDs of the {P} tokens before: {ranges(ids[:P])}")
    print(f"   position IDs of the {K} patches:")
    print(wrapped(ranges(ids[P:P + K])))
    print(f"   position IDs of the {A} tokens after: {ranges(ids[P + K:])}")
    print("   the answer, one token a pass:  piece  position ID  cache row")
    for i, token in enumerate(result.tokens):
        row = len(ids) + i if i + 1 < len(result.tokens) else "not fed"
        print(f"      {piece(model, token):>32}  {result.next_position + i:11}  {row:>9}")
    print("   in words:")
    print(wrapped(visible(result.text)))
    print(f"   as fractions of the square: {parse_box(result.text) or 'no box'}")
    pixels = result.box and tuple(round(v, 1) for v in result.box)
    print(f"   in pixels of the image: {pixels or 'no box'}")
