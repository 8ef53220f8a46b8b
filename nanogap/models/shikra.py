"""Shikra-7B: CLIP at 224 pixels, one linear layer, and LLaMA; the image stands in a sentence.

In:  a picture in a white square of S x S pixels.  Out: one visual token for each of its patches.
Source: Shikra, arXiv 2306.15195, and shikras/shikra on GitHub, whose question for a box this is.
It publishes a difference to LLaMA-7B, of which nanogap/convert makes a folder in llava-hf's form.
"""

import re

from tokenizers import Tokenizer
from torch import nn

from nanogap.errors import NanogapError
from nanogap.llava import SYSTEM, LlavaConfig
from nanogap.models.base import VLM, Padded
from nanogap.prompt import NUMBER, BoxFormat, Template, encode

PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"


class InSentence(Template):
    """A question with the image inside: "Where is the man in the image <image>?"

    Of several `<image>` the last is the image, for an expression that spells it stands before it.
    """

    def around(self, question: str) -> tuple[str, str]:
        """The text before the image, and the text after it, without spaces, as in training."""
        first, _, second = question.rpartition("<image>")
        before, after = self.before + first, self.after.format(second)
        return before.rstrip(), after.lstrip()

    def encode(self, tokenizer: Tokenizer, question: str, bos: int, image_token: int) -> list[int]:
        """Token IDs of the whole prompt: one `image_token`, in the place of 256 patches."""
        before, after = self.around(question)
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        if start is None or end is None:
            raise NanogapError(f"the tokenizer has no {START} or no {END}, which stand around "
                               "Shikra's image; give the one that the checkpoint came with")
        return [bos, *encode(tokenizer, before), start, image_token, end,
                *encode(tokenizer, after)]


class Shikra(VLM):
    frame = Padded((255, 255, 255))
    template = InSentence(
        before=f"{SYSTEM} USER: ",
        after="{} ASSISTANT:",
        where_is=("Can you point out {} in the image <image> "
                  "and provide the coordinates of its location?"))
    box_format = BoxFormat(      # differs: its own evaluation refuses an answer of several boxes
        re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}[;\]]", re.ASCII),
        "Answer: [{:.3f},{:.3f},{:.3f},{:.3f}] .")
    download = ("`python -m nanogap.convert shikra --base weights/llama-7b "
                "--delta weights/shikra-7b-delta-v1 --clip weights/clip-vit-large-patch14 "
                "--out weights/shikra-7b`")
    clip_download = ("`hf download openai/clip-vit-large-patch14 model.safetensors config.json "
                     "tokenizer.json --local-dir weights/clip-vit-large-patch14` (1.7 GB)")
    get_clip = f"get it with {clip_download} and give it by --clip"
    special_tokens = (PATCH, START, END)
    fixed = {"model_type": "shikra", "vision_feature_select_strategy": "default"}

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.frame = Shikra.frame
        self.multi_modal_projector = nn.Linear(
            config.vision.hidden_size, config.text.hidden_size, bias=config.projector_bias)
