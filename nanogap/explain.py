"""One query, walked through: every shape, every position ID, every cache row, in 80 columns.

In:  a model, a look at an image, and the results of some modes.  Out: text on stdout.
"""

import unicodedata

from torch import Tensor

from nanogap.gap import MODES
from nanogap.models.llava import Llava, Look, Result
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


def across(rows: dict[str, list[object]], width: int = 80) -> str:
    """A table on its side, one column for each token; where the terminal ends it goes on below."""
    blocks, room = [], 0
    for column in zip(*rows.values()):
        size = 1 + max(columns(str(cell)) for cell in column)
        if size > room:
            blocks.append([f"   {name:10}" for name in rows])
            room = width - 13
        room -= size
        blocks[-1] = [line + " " * (size - columns(str(cell))) + str(cell)
                      for line, cell in zip(blocks[-1], column)]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


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
    print(f"   features {tuple(seen.features.shape)}, in raster order: row by row")
    pruned = next((r for mode, r in results.items() if mode != "full"), None)
    print("\n3  Pruning keeps some of them (#) and drops the rest (.)")
    if pruned is None:
        print(f"   not in mode full: all {N} patches stay")
    else:
        print(f"   {len(pruned.keep)} of {N} patches stay:")
        print(kept_grid(pruned.keep.tolist(), grid))
        print(f"   counted in raster order from 0 to {N - 1} these are (keep):")
        print(wrapped(ranges(sorted(pruned.keep.tolist()))))
    print("\n4  The prompt: words, and one <image> token where the patches go")
    print(f"   P = {P} tokens before the image, A = {A} after it; "
          f"decoder width {c.text.hidden_size}")
    print(wrapped(" ".join(piece(model, i) for i in input_ids.tolist())))
    print("   Three numbers must not be confused: keep, the place of a patch in the image;")
    print("   the position ID, by which RoPE turns a token; and its row in the KV cache.")
    for number, (mode, result) in enumerate(results.items(), 5):
        order, kind = MODES[mode]
        print(f"\n{number}  Mode {mode}: {order} order, {kind} position IDs")
        explain_prompt(model, result, input_ids, N)
        explain_answer(model, result)


def explain_prompt(model: Llava, result: Result, input_ids: Tensor, N: int) -> None:
    """Print what one mode feeds: all position IDs, and the tokens at either end of each part."""
    keep, ids = result.keep.tolist(), result.position_ids.tolist()
    P, A = model.around_image(input_ids)
    K, M = len(keep), len(ids) - P - len(keep) - A                            # M were added
    shape = f"(1, {len(ids)}, {model.config.text.hidden_size})"
    if result.visual_tokens == K + M:
        print(f"   embeddings {shape} at cache rows 0..{len(ids) - 1}: rows have no gaps")
    else:
        print(f"   {model.fastv_layer} layers read the whole sequence, all {N} patches; "
              "behind FastV's cut it is")
        print(f"   {shape} at cache rows 0..{len(ids) - 1}, and all below is about that part")
    added = f" + M = {M} added" if M else ""
    print(f"   position IDs: P = {P} tokens | K = {K} patches{added} | A = {A} tokens")
    parts = ids[:P], ids[P:P + K + M], ids[P + K + M:]
    print(wrapped(" | ".join(ranges(part) for part in parts)))
    words = [(piece(model, i)[:20], i, "") for i in input_ids.tolist()]
    before = [(*word, at) for at, word in enumerate(words[:P])]
    patches = [("patch", "", k, P + k) for k in keep] + [("added", "", "", "")] * M
    after = [(*word, P + N + at) for at, word in enumerate(words[P + 1:])]
    table = [(*token, ids[row], row) for row, token in enumerate(before + patches + after)]
    ends = {0, 1, P - 1, P, P + 1, P + 2, P + K - 1, P + K + M - 1, P + K + M, len(ids) - 1}
    shown = []
    for row in sorted(ends):
        shown += [("..",) * 6] * (row > 0 and row - 1 not in ends) + [table[row]]
    names = ("token", "token ID", "keep", "ID before", "ID now", "cache row")
    print(across(dict(zip(names, map(list, zip(*shown))))))


def explain_answer(model: Llava, result: Result) -> None:
    """Print what the model answers, token by token, and the box in it."""
    tokens, rows = result.tokens, len(result.position_ids)
    ids = list(range(result.next_position, result.next_position + len(tokens)))
    print(f"   the answer: {len(tokens)} tokens in {result.timings['passes']} more passes "
          "of the decoder, the last never fed")
    print(across({"token": [piece(model, i)[:20] for i in tokens], "token ID": tokens,
                  "ID now": ids, "cache row": [*range(rows, rows + len(tokens) - 1), "-"]}))
    print("   in words, in fractions of the square, in pixels of the image:")
    print(wrapped(visible(result.text)))
    print(f"      {parse_box(result.text) or 'no box'}")
    print(f"      {result.box and tuple(round(v, 1) for v in result.box) or 'no box'}")
