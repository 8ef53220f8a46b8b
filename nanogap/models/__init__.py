"""One file for each published model; `MODELS` says which config.json is whose."""

from nanogap.models.base import VLM, clock, plainly
from nanogap.models.llava import Llava

MODELS: dict[str, type[VLM]] = {   # by `model_type` in config.json
    "llava": Llava,
}

__all__ = ["MODELS", "VLM", "clock", "plainly"]
