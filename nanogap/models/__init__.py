"""One file for each published model; they enter MODELS of nanogap/weights.py, by config.json."""

from nanogap.models.base import VLM
from nanogap.models.llava_next import LlavaNext
from nanogap.models.minigpt import MiniGPT
from nanogap.models.shikra import Shikra
from nanogap.weights import MODELS as OF_THE_LESSON

MODELS: dict[str, type[VLM]] = {   # by `model_type` in config.json
    "llava": VLM,
    "llava_next": LlavaNext,
    "shikra": Shikra,
    "minigpt_v2": MiniGPT,
}
OF_THE_LESSON.update(MODELS)

__all__ = ["MODELS", "VLM"]
