"""One query, walked through: every shape, every position ID, every cache row, in 80 columns.

Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it.
"""

from collections.abc import Collection, Iterable, Sequence
from textwrap import fill

from torch import Tensor

from nanogap.checks.command import visible
from nanogap.fast.answered import Answered
from nanogap.gap import MODES
from nanogap.llava import EncodedImage
from nanogap.models import VLM


def explain(model: VLM, image: EncodedImage, expression: str, results: dict[str, Answered]) -> None:
    """Print each stage of a query with its shapes, and each mode with its IDs."""
    input_ids = model.prompt(expression)
    square, tower = model.walk(image)
    print("\n1  The image becomes a square, and the square becomes patches")
    print(*(f"   {line}" for line in square), sep="\n")
    print(f"\n2  {tower[0]}")
    print(*(f"   {line}" for line in tower[1:]), sep="\n")
    print("\n3  Pruning keeps some of them (#) and drops the rest (.)")
    explain_pruning(model, image, results)
    P, A = model.around_image(input_ids)
    image_token = piece(model, model.config.image_token)
    print(f"\n4  The prompt: words, and one {image_token} token where the patches go")
    print(f"   P = {P} tokens before the image, A = {A} after it; "
          f"decoder width {model.config.text.hidden_size}")
    print_wrapped(" ".join(piece(model, token) for token in input_ids.tolist()))
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
    print_wrapped(ranges(sorted(kept)))


def explain_prompt(model: VLM, result: Answered, input_ids: Tensor, image: EncodedImage) -> None:
    """Print what one mode feeds: all position IDs, and the tokens at either end of each part."""
    ids = result.position_ids.tolist()
    P, A = model.around_image(input_ids)
    K = len(result.keep)
    M = len(ids) - P - K - A
    said = kinds(model.newlines(image))
    shape = f"(1, {len(ids)}, {model.config.text.hidden_size})"
    if not result.cuts:
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
    print_wrapped(" | ".join(ranges(part) for part in parts))
    places = [*range(P), *(P + index for index in result.keep.tolist()), *[None] * M,
              *range(P + image.n_visual, P + image.n_visual + A)]             # before pruning
    ends = {0, 1, P - 1, P, P + 1, P + 2, P + K - 1, P + K + M - 1, P + K + M, len(ids) - 1}
    shown: list[Sequence] = []
    for row in sorted(ends):
        if row and row - 1 not in ends:
            shown.append([".."] * 6)
        shown.append([*token_at(places[row], model, input_ids, image), ids[row], row])
    print_across(["token", "token ID", "keep", "ID before", "ID now", "cache row"], shown)


def token_at(place: int | None, model: VLM, input_ids: Tensor, image: EncodedImage) -> list:
    """Name, token ID, keep and position ID of the token at a place of the unpruned prompt."""
    if place is None:
        return ["added", "", "", ""]
    P, _ = model.around_image(input_ids)
    index = place - P
    if 0 <= index < image.n_visual:
        return ["newline" if index in model.newlines(image) else "patch", "", index, place]
    token = int(input_ids[place if index < 0 else place - image.n_visual + 1])
    return [piece(model, token)[:20], token, "", place]


def explain_answer(model: VLM, result: Answered) -> None:
    """Print what the model answers, token by token, and the box in it."""
    tokens = result.tokens
    rows = len(result.position_ids)
    print(f"   the answer: {len(tokens)} tokens in {result.timings['passes']} more passes "
          "of the decoder, the last never fed")
    print_across(["token", "token ID", "ID now", "cache row"],
                 [(piece(model, token)[:20], token, result.next_position + t,
                   rows + t if t < len(tokens) - 1 else "-") for t, token in enumerate(tokens)])
    print("   in words, in fractions of the square, in pixels of the image:")
    print_wrapped(visible(result.text))
    print(f"      {model.parse_box(result.text) or 'no box'}")
    box = "no box" if result.box is None else tuple(round(v, 1) for v in result.box)
    print(f"      {box}")


# ----- how it is set ------------------------------------------------------------------------------


def piece(model: VLM, token: int) -> str:
    """How the tokenizer spells a token; some models have rows for tokens that it does not know."""
    return visible(model.tokenizer.id_to_token(token) or f"<{token}>")


def kinds(newlines: Collection[int]) -> str:
    """What visual tokens there are."""
    return "patches and newlines" if newlines else "patches"


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


def print_wrapped(text: str) -> None:
    """Print words in as many lines as they need."""
    indent = " " * 6
    print(fill(text, 79, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False))


def print_across(names: Sequence[str], tokens: Sequence[Sequence[object]]) -> None:
    """Print a table on its side, a column for each token; where a line ends it goes on below.

    names:  of its rows
    tokens: for each token one cell in each row
    """
    lines = [f"   {name:10}" for name in names]
    for token in tokens:
        width = max(len(str(cell)) for cell in token)
        if len(lines[0]) + 1 + width > 80:
            print(*(line.rstrip() for line in lines), "", sep="\n")
            lines = [f"   {name:10}" for name in names]
        lines = [f"{line} {cell!s:>{width}}" for line, cell in zip(lines, token, strict=True)]
    print(*(line.rstrip() for line in lines), sep="\n")
