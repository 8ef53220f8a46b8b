"""One query, walked through: every shape, every position ID, every cache row, in 80 columns.

In:  a model, a look at an image, and the results of some modes.  Out: text on stdout.
"""

from nanogap.gap import MODES
from nanogap.llava import Llava, Look, Result
from nanogap.prompt import parse_box


def kept_grid(keep: list[int], grid: int) -> str:
    """The patches as the model sees them: # for one that was kept, . for one that was dropped."""
    kept = set(keep)
    rows = [" ".join("#" if row * grid + column in kept else "." for column in range(grid)) for row in range(grid)]
    return "\n".join("      " + row for row in rows)


def ranges(numbers: list[int]) -> str:
    """Consecutive numbers in short: 0..35 37 40..41."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return " ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def wrapped(text: str, indent: int = 6, width: int = 79) -> str:
    """Break a line of words at 80 columns."""
    lines, line = [], " " * indent
    for word in text.split(" "):
        if len(line) + len(word) + 1 > width and line.strip():
            lines.append(line)
            line = " " * indent
        line += word + " "
    return "\n".join(part.rstrip() for part in [*lines, line])


def piece(model: Llava, token: int) -> str:
    """How the tokenizer spells a token; some models have rows for tokens that it does not know."""
    return (model.tokenizer.id_to_token(token) or f"<{token}>").replace("\n", "\\n")


def explain(model: Llava, look: Look, expression: str, results: dict[str, Result]) -> None:
    """Print each stage of a query with its shapes, and each mode with its IDs."""
    c, seen = model.config, look.seen
    N, grid, side = len(seen.features), seen.grid, max(look.width, look.height)
    input_ids = model.prompt(expression)
    P, A = model.around_image(input_ids)
    print("\n1  The image becomes a square, and the square becomes patches")
    print(f"   {look.width} x {look.height} pixels, padded to {side} x {side}, resized to pixel_values "
          f"(1, 3, {c.vision.image_size}, {c.vision.image_size})")
    print("\n2  CLIP turns patches into features")
    print(f"   {grid} x {grid} patches of {c.vision.patch_size} pixels and CLS through {model.vision_tower.depth} of "
          f"{c.vision.num_hidden_layers} layers:")
    print(f"   features {tuple(seen.features.shape)}, in raster order")
    pruned = next((r for mode, r in results.items() if mode != "full"), None)
    if pruned is not None:
        print("\n3  Pruning keeps some of them (#) and drops the rest (.)")
        print(f"   {len(pruned.keep)} of {N} patches stay:")
        print(kept_grid(pruned.keep.tolist(), grid))
    print("\n4  The prompt: words, and one <image> token where the patches go")
    print(f"   P = {P} tokens before the image, A = {A} after it; decoder width {c.text.hidden_size}")
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
    print("   the answer, one token a pass:   piece  position ID  cache row")
    for i, token in enumerate(result.tokens):
        row = len(ids) + i if i + 1 < len(result.tokens) else "not fed"
        print(f"      {piece(model, token):>32}  {result.next_position + i:11}  {row:>9}")
    print(f"   {result.text!r} is {parse_box(result.text)} of the square")
    print(f"   and {result.box} in pixels")
