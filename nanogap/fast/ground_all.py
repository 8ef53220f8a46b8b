"""Many questions about one picture, in one cache."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from nanogap.ground import Result
from nanogap.llava import EncodedImage

if TYPE_CHECKING:
    from nanogap.models import VLM


def ground_all(model: "VLM", image: Image.Image | str | Path | EncodedImage,
               expressions: Iterable[str], *args: Any, **options: Any) -> list[Result]:
    """Find what each of many expressions refers to in one picture."""
    encoded = model.encode_image(image)
    return [model.ground(encoded, expression, *args, **options) for expression in expressions]
