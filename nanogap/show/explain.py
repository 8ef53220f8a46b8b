"""One query, walked through: every shape, every position ID, every cache row, in 80 columns.

Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it.
"""

from collections.abc import Iterable
from textwrap import wrap

from torch import Tensor

from nanogap.checks.command import visible
from nanogap.fast.ground_all import Answered
from nanogap.gap import MODES
from nanogap.llava import EncodedImage
from nanogap.methods.in_decoder import cuts_in_words
from nanogap.models import VLM


def explain(model: VLM, image: EncodedImage, expression: str, results: dict[str, Answered]) -> None:
    """Print each stage of a query with its shapes, and each mode with its IDs."""
    input_ids = model.prompt(expression)
    square, tower = model.walk(image)
    stage(1, "The image becomes a square, and the square becomes patches", *square)
    stage(2, *tower)
    stage(3, "Pruning keeps some of them (#) and drops the rest (.)")
    explain_pruning(model, image, results)
    P, A = model.around_image(input_ids)
    image_token = piece(model, model.config.image_token)
    stage(4, f"The prompt: words, and one {image_token} token where the patches go",
          f"P = {P} tokens before the image, A = {A} after it; "
          f"decoder width {model.config.text.hidden_size}")
    print_wrapped(" ".join(piece(model, token) for token in input_ids.tolist()))
    tell("Three numbers must not be confused: keep, the place of a patch in the image;",
         "the position ID, by which RoPE turns a token; and its row in the KV cache.")
    for number, (mode, result) in enumerate(results.items(), 5):
        order, visual_ids, text_ids = MODES[mode]
        stage(number, f"Mode {mode}: {order} order, {visual_ids} position IDs")
        if text_ids != visual_ids:
            tell(f"and {text_ids} ones for the text after the image")
        explain_prompt(model, result, input_ids, image)
        explain_answer(model, result)


def explain_pruning(model: VLM, image: EncodedImage, results: dict[str, Answered]) -> None:
    """Print which patches were kept; all modes but full keep the same."""
    newlines, views = model.newlines(image), model.views(image)
    pruned = next((result for mode, result in results.items() if mode != "full"), None)
    if pruned is None:
        tell(f"not in mode full: all {image.n_visual} visual tokens stay")
        return
    kept = set(pruned.keep.tolist())
    told = f"{len(kept - newlines)} of {image.n_patches} patches"
    if newlines:
        told += f", and {len(kept & newlines)} of {len(newlines)} newlines (/),"
    tell(f"{told} stay:")
    for number, view in enumerate(views, 1):
        if len(views) > 1:
            tell(f"view {number} of {len(views)}")
        for row in view.tolist():
            if row[-1] + 1 in newlines:              # it closes the row
                row.append(row[-1] + 1)
            tell("   " + " ".join("." if index not in kept else "/" if index in newlines else "#"
                                  for index in row))
    order = "raster order" if len(views) == 1 else "the order of the prompt"
    tell(f"counted in {order} from 0 to {image.n_visual - 1} these are (keep):")
    print_wrapped(ranges(sorted(kept)))


def explain_prompt(model: VLM, result: Answered, input_ids: Tensor, image: EncodedImage) -> None:
    """Print what one mode feeds: all position IDs, and the tokens at either end of each part."""
    ids, keep = result.position_ids.tolist(), result.keep.tolist()
    P, A = model.around_image(input_ids)
    N, K = image.n_visual, len(keep)
    M = len(ids) - P - K - A
    if result.cuts:
        layers = len(model.language_model.model.layers)
        print_wrapped(f"{cuts_in_words(result.prune, result.cuts, layers)}; behind the last cut:")
    tell(f"embeddings (1, {len(ids)}, {model.config.text.hidden_size}) at cache rows "
         f"0..{len(ids) - 1}: rows have no gaps")
    added = f" + M = {M} added" if M else ""
    tell(f"position IDs: P = {P} tokens | K = {K} kept{added} | A = {A} tokens")
    parts = ids[:P], ids[P:P + K + M], ids[P + K + M:]
    print_wrapped(" | ".join(ranges(part) for part in parts))
    newlines = model.newlines(image)
    text = [(piece(model, token), token, "") for token in input_ids.tolist()]
    tokens = [*text[:P],
              *(("newline" if index in newlines else "patch", "", index) for index in keep),
              *[("added", "", "")] * M, *text[P + 1:]]
    before = [*range(P), *(P + index for index in keep), *[""] * M, *range(P + N, P + N + A)]
    ends = {0, 1, P - 1, P, P + 1, P + 2, P + K - 1, P + K + M - 1, P + K + M, len(ids) - 1}
    print_row("token", "token ID", "keep", "ID before", "ID now", "cache row")
    for row, token in enumerate(tokens):
        if row in ends:
            print_row(*token, before[row], ids[row], row)
        elif row - 1 in ends:
            print_row("..")


def explain_answer(model: VLM, result: Answered) -> None:
    """Print what the model answers, token by token, and the box in it."""
    last = len(result.tokens) - 1
    tell(f"the answer: {last + 1} tokens in {result.timings['passes']} more passes of the decoder, "
         "the last never fed")
    for t, token in enumerate(result.tokens):
        row = len(result.position_ids) + t if t < last else "-"
        print_row(piece(model, token), token, "", "", result.next_position + t, row)
    tell("in words, in fractions of the square, in pixels of the image:")
    print_wrapped(visible(result.text))
    box = "no box" if result.box is None else tuple(round(v, 1) for v in result.box)
    tell(f"   {model.parse_box(result.text) or 'no box'}", f"   {box}")


# ----- how it is set ------------------------------------------------------------------------------


def stage(number: int, title: str, *lines: str) -> None:
    print(f"\n{number}  {title}")
    tell(*lines)


def tell(*lines: str) -> None:
    for line in lines:
        print(f"   {line}")


def print_wrapped(text: str) -> None:
    for line in wrap(text, 73, break_on_hyphens=False):
        tell(f"   {line}")


def print_row(token: str, *numbers: object) -> None:
    print((f"   {token[:20]:20}" + "".join(f"{number!s:>11}" for number in numbers)).rstrip())


def piece(model: VLM, token: int) -> str:
    """How the tokenizer spells a token; some models have rows for tokens that it does not know."""
    return visible(model.tokenizer.id_to_token(token) or f"<{token}>")


def ranges(numbers: Iterable[int]) -> str:
    """Consecutive numbers in short: 0..35 37 40..41."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return " ".join("..".join(map(str, run)) for run in runs)
