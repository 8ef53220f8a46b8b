"""One query, walked through: every shape, every position ID, every cache row, in 80 columns.

In:  a model, an image as it saw it, and the results of some modes.  Out: text on stdout.
Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it.
"""

import unicodedata
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from nanogap.checks.command import visible
from nanogap.fast.answered import Answered
from nanogap.gap import MODES
from nanogap.llava import EncodedImage
from nanogap.models import VLM

# ----- how it is set ------------------------------------------------------------------------------


def kept_grid(kept: Collection[int], view: Tensor, newlines: Collection[int] = ()) -> str:
    """The patches of a view: # for one that was kept, . for one that was dropped.

    newlines: where one stands behind the last patch of a row, / shows that it stays
    """
    lines = []
    for row in view.tolist():
        marks = ["#" if index in kept else "." for index in row]
        end = row[-1] + 1
        if end in newlines:
            marks.append("/" if end in kept else ".")
        lines.append("      " + " ".join(marks))
    return "\n".join(lines)


def ranges(numbers: Iterable[int]) -> str:
    """Consecutive numbers in short: 0..35 37 40..41."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return " ".join("..".join(map(str, run)) for run in runs)


def columns(text: str) -> int:
    """How wide a terminal shows a text: Chinese characters and most emoji take two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def wrapped(text: str, indent: int = 6, width: int = 79) -> str:
    """Break a line at spaces to stay within 80 columns; a word that is longer is broken as well."""
    lines = []
    line = ""
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


def across(names: Sequence[str], tokens: Sequence[Sequence[object]], width: int = 80) -> str:
    """A table on its side, one column for each token; where the terminal ends it goes on below.

    names:  of its rows
    tokens: for each token one cell in each row
    """
    blocks: list[list[str]] = []
    room = 0
    for token in tokens:
        cells = [str(cell) for cell in token]
        size = 1 + max(map(columns, cells))
        if size > room:
            blocks.append([f"   {name:10}" for name in names])
            room = width - 13
        room -= size
        for row, cell in enumerate(cells):
            blocks[-1][row] += " " * (size - columns(cell)) + cell
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def piece(model: VLM, token: int) -> str:
    """How the tokenizer spells a token; some models have rows for tokens that it does not know."""
    return visible(model.tokenizer.id_to_token(token) or f"<{token}>")


# ----- one query ----------------------------------------------------------------------------------


def explain(model: VLM, image: EncodedImage, expression: str, results: dict[str, Answered]) -> None:
    """Print each stage of a query with its shapes, and each mode with its IDs."""
    input_ids = model.prompt(expression)
    square, tower = model.walk(image)
    print("\n1  The image becomes a square, and the square becomes patches")
    print(*(f"   {line}" for line in square), sep="\n")
    print(f"\n2  {tower[0]}")
    print(*(f"   {line}" for line in tower[1:]), sep="\n")
    explain_pruning(model, image, results)
    P, A = model.around_image(input_ids)
    image_token = piece(model, model.config.image_token)
    print(f"\n4  The prompt: words, and one {image_token} token where the patches go")
    print(f"   P = {P} tokens before the image, A = {A} after it; "
          f"decoder width {model.config.text.hidden_size}")
    print(wrapped(" ".join(piece(model, token) for token in input_ids.tolist())))
    print("   Three numbers must not be confused: keep, the place of a patch in the image;")
    print("   the position ID, by which RoPE turns a token; and its row in the KV cache.")
    for number, (mode, result) in enumerate(results.items(), 5):
        order, visual_ids, text_ids = MODES[mode]
        print(f"\n{number}  Mode {mode}: {order} order, {visual_ids} position IDs")
        if text_ids != visual_ids:
            print(f"   and {text_ids} ones for the text after the image")
        explain_prompt(model, result, input_ids, image)
        explain_answer(model, result)


def explain_pruning(model: VLM, image: EncodedImage, results: dict[str, Answered]) -> None:
    """Print which patches were kept; all modes but full keep the same."""
    newlines, views = model.newlines(image), model.views(image)
    print("\n3  Pruning keeps some of them (#) and drops the rest (.)")
    pruned = next((result for mode, result in results.items() if mode != "full"), None)
    if pruned is None:
        print(f"   not in mode full: all {image.n_visual} {kinds(newlines)} stay")
        return
    kept = set(pruned.keep.tolist())
    told = f"{len(kept - newlines)} of {image.n_patches} patches"
    if newlines:
        told += f", and {len(kept & newlines)} of {len(newlines)} newlines (/),"
    print(f"   {told} stay:")
    for number, view in enumerate(views, 1):
        if len(views) > 1:
            print(f"   view {number} of {len(views)}")
        print(kept_grid(kept, view, newlines))
    order = "raster order" if len(views) == 1 else "the order of the prompt"
    print(f"   counted in {order} from 0 to {image.n_visual - 1} these are (keep):")
    print(wrapped(ranges(sorted(kept))))


def kinds(newlines: Collection[int]) -> str:
    """What visual tokens there are."""
    return "patches and newlines" if newlines else "patches"


def explain_prompt(model: VLM, result: Answered, input_ids: Tensor, image: EncodedImage) -> None:
    """Print what one mode feeds: all position IDs, and the tokens at either end of each part."""
    ids = result.position_ids.tolist()
    P, A = model.around_image(input_ids)
    K = len(result.keep)
    M = len(ids) - P - K - A
    said = kinds(model.newlines(image))
    shape = f"(1, {len(ids)}, {model.config.text.hidden_size})"
    if result.visual_tokens == K + M:
        print(f"   embeddings {shape} at cache rows 0..{len(ids) - 1}: rows have no gaps")
    else:
        layers = len(model.language_model.model.layers)
        print(f"   the first {result.cuts[0][0]} of {layers} layers read the whole sequence, "
              f"all {image.n_visual} {said};")
        for layer, count in result.cuts:
            print(f"   before layer {layer}, counted from 0, it is cut to {count} visual tokens;")
        print(f"   behind the last cut it is {shape} at cache rows 0..{len(ids) - 1},")
        print("   and all below is about that part")
    added = f" + M = {M} added" if M else ""
    print(f"   position IDs: P = {P} tokens | K = {K} {said}{added} | A = {A} tokens")
    parts = ids[:P], ids[P:P + K + M], ids[P + K + M:]
    print(wrapped(" | ".join(ranges(part) for part in parts)))
    names = ("token", "token ID", "keep", "ID before", "ID now", "cache row")
    tokens = prompt_tokens(model, result, input_ids, image, M)
    shown: list[tuple] = []
    last = -1
    for row in ends_of_parts(P, K, M, A):
        if row > last + 1:
            shown.append(("..",) * len(names))
        shown.append((*tokens[row], ids[row], row))
        last = row
    print(across(names, shown))


def prompt_tokens(model: VLM, result: Answered, input_ids: Tensor, image: EncodedImage,
                  n_added: int) -> list[tuple]:
    """Each token of what was fed: its name, token ID, keep, and position ID before pruning."""
    P, _ = model.around_image(input_ids)
    newlines = model.newlines(image)
    text = [(piece(model, token)[:20], token, "") for token in input_ids.tolist()]
    before = [(*token, place) for place, token in enumerate(text[:P])]
    kept = [("newline" if index in newlines else "patch", "", index, P + index)
            for index in result.keep.tolist()]
    added = [("added", "", "", "") for _ in range(n_added)]
    after = [(*token, place) for place, token in enumerate(text[P + 1:], P + image.n_visual)]
    return [*before, *kept, *added, *after]


def ends_of_parts(P: int, K: int, M: int, A: int) -> list[int]:
    """The rows at either end of [before | kept | added | after], each once and in order."""
    before = {0, 1, P - 1}
    kept = {P, P + 1, P + 2, P + K - 1}
    added = {P + K + M - 1}
    after = {P + K + M, P + K + M + A - 1}
    return sorted(before | kept | added | after)


def explain_answer(model: VLM, result: Answered) -> None:
    """Print what the model answers, token by token, and the box in it."""
    tokens = result.tokens
    rows = len(result.position_ids)
    print(f"   the answer: {len(tokens)} tokens in {result.timings['passes']} more passes "
          "of the decoder, the last never fed")
    shown = [(piece(model, token)[:20], token, result.next_position + t,
              rows + t if t < len(tokens) - 1 else "-") for t, token in enumerate(tokens)]
    print(across(("token", "token ID", "ID now", "cache row"), shown))
    print("   in words, in fractions of the square, in pixels of the image:")
    print(wrapped(visible(result.text)))
    print(f"      {model.parse_box(result.text) or 'no box'}")
    box = "no box" if result.box is None else tuple(round(v, 1) for v in result.box)
    print(f"      {box}")
