"""One file for each published model; `MODELS` says which config.json is whose."""

from nanogap.models.base import VLM, clock, plainly
from nanogap.models.llava import Llava
from nanogap.models.llava_next import LlavaNext
from nanogap.models.minigpt import MiniGPT
from nanogap.models.shikra import Shikra

MODELS: dict[str, type[VLM]] = {   # by `model_type` in config.json
    "llava": Llava,
    "llava_next": LlavaNext,
    "shikra": Shikra,
    "minigpt_v2": MiniGPT,
}

__all__ = ["MODELS", "VLM", "clock", "plainly"]
