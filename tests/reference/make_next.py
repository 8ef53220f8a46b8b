"""What transformers makes of pictures for LLaVA-1.6: writes next.json beside this file.

run:  pip install transformers==5.23.0 && python -m tests.reference.make_next

Of pictures of several shapes: how many visual tokens each has, samples of the pixels of the hub's
own processor and of the logits, and the greedy words.  test_reference_next.py reads it.
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from nanogap.models.llava_next import GRIDS
from tests.reference.make_reference import (
    NEW_TOKENS,
    PROMPT,
    expand,
    load_theirs,
    rounded,
    summary,
    their_answer,
    their_pruned_answer,
    write_outputs,
)
from tests.tiny import IMAGE_TOKEN, tiny_next_config, write_checkpoint

OUTPUTS = Path(__file__).with_name("next.json")
S = 56                           # pixels along a side of a tile

CASES = {   # name: (size of the picture, decoder, layout, what differs in the decoder)
    "wide": ((100, 60), "llama", "a", {}),
    "tall": ((60, 100), "llama", "b", {}),
    "square": ((56, 56), "llama", "c", {}),
    "small": ((20, 11), "llama", "d", {}),
    "odd": ((113, 97), "llama", "a", {}),
    "very wide": ((300, 57), "llama", "a", {}),
    "very tall": ((33, 140), "llama", "a", {}),
    "a Mistral": ((100, 60), "mistral", "a", {"num_key_value_heads": 2, "rope_theta": 1e6}),
    "another Mistral": ((60, 100), "mistral", "d", {"num_key_value_heads": 2, "rope_theta": 1e6}),
}

# 100 x 60 pixels are 52 tokens: see test_llava_next.py.  What is kept: patches of the base view and
# of three tiles, the most important first, each row closed behind the last of its patches.  The
# unpruned prompt has IDs 0 to 4 before the image, 5 to 56 in it and 57 to 62 after it.
KEEP = [29, 5, 17, 18, 24, 30, 33, 50, 51]
PRUNED = {
    "gap": ([5, 17, 18, 24, 29, 30, 33, 50, 51],
            [0, 1, 2, 3, 4, 10, 22, 23, 29, 34, 35, 38, 55, 56, 57, 58, 59, 60, 61, 62]),
    "shifted": ([5, 17, 18, 24, 29, 30, 33, 50, 51], list(range(20))),
    "permuted": (KEEP, list(range(20))),
}


def noise(width: int, height: int) -> Image.Image:
    """Coarse and fine detail, as a photograph has it."""
    draws = random.Random(f"{width} x {height}")
    coarse = Image.frombytes("RGB", (9, 7), draws.randbytes(9 * 7 * 3)).resize((width, height))
    fine = Image.frombytes("RGB", (width, height), draws.randbytes(width * height * 3))
    return Image.blend(coarse, fine, 0.3)


def their_picture(image: Image.Image, size: int = S) -> dict[str, Tensor]:
    """pixel_values (1, views, 3, size, size) of the processor, and the (height, width) it saw."""
    from transformers import LlavaNextImageProcessorPil
    processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[rows * size, columns * size] for rows, columns in GRIDS],
        size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    found = processor(image, return_tensors="pt")
    return {name: found[name] for name in ("pixel_values", "image_sizes")}


def asked(theirs: torch.nn.Module,
          image: Image.Image) -> tuple[int, dict[str, Tensor], Tensor, list[int]]:
    """N; the picture as the processor has it; and what `their_answer` returns."""
    picture = their_picture(image)
    N = len(theirs.model.get_image_features(**picture).pooler_output[0])
    logits, words = their_answer(theirs, expand(PROMPT, IMAGE_TOKEN, N), picture["pixel_values"],
                                 NEW_TOKENS, image_sizes=picture["image_sizes"])
    return N, picture, logits, words


def places(T: int) -> list[int]:
    """Which of T positions are stored."""
    return [5, 20, T // 2, T - 7, T - 1]


def sample(pixels: Tensor) -> Tensor:
    """Some of the pixels (views, 3, S, S): of each view the sum of each colour."""
    return pixels.double().sum((2, 3))


def main() -> None:
    outputs: dict[str, dict] = {"cases": {}, "pruned": {}}
    with TemporaryDirectory() as temporary:
        for name, (size, decoder, layout, differs) in CASES.items():
            config = tiny_next_config(decoder, **differs)
            theirs = load_theirs(write_checkpoint(Path(temporary) / name, config, layout))
            N, picture, *answer = asked(theirs, noise(*size))
            pixels = rounded(sample(picture["pixel_values"][0]))
            outputs["cases"][name] = {"N": N} | summary(
                answer, places(len(answer[0])), pixels=pixels)
        theirs = load_theirs(Path(temporary) / "wide")
        picture = their_picture(noise(100, 60))
        for mode, (order, ids) in PRUNED.items():
            answer = their_pruned_answer(
                theirs, PROMPT, picture["pixel_values"], order, ids, NEW_TOKENS,
                image_sizes=picture["image_sizes"])
            outputs["pruned"][mode] = summary(answer, [5, 19])
    write_outputs(OUTPUTS, outputs)


if __name__ == "__main__":
    main()
