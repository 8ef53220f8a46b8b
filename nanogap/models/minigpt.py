"""MiniGPT-v2: EVA's vision tower, four neighbours to one token, one linear layer, Llama-2-chat.

In:  a picture, stretched to a square of S x S pixels.
Out: one visual token for every four patches that stand side by side in a row.

    patches      32 x 32    of 14 x 14 pixels; the position table is interpolated from 16 x 16
    tokens       32 x 8     each the channels of four patches, one behind the other: 4 x 1408
    llama_proj   5632 -> 4096

Strategies see the tokens.  What the tower says of patches, such as how much CLS attends to each, is
the mean over a token's four; CLS is compared with a token as four times the same.
It is published in three pieces, of which nanogap/convert makes one folder.  The tokenizer has no
image token: its ID is that behind the last embedding.
Source: MiniGPT-v2, arXiv 2310.09478; Vision-CAIR/MiniGPT-4.
Letters: N visual tokens, C channels of a patch, C' of the decoder, H heads, D head dim.
"""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from nanogap.clip import CLIPText
from nanogap.errors import NanogapError
from nanogap.llama import LlamaForCausalLM
from nanogap.llava import EncodedImage, LlavaConfig
from nanogap.models.base import VLM, Stretch
from nanogap.models.eva import VIT_G_14, EvaTower
from nanogap.prompt import BoxFormat, Shares, Template

MEMBERS = 4     # patches of one row that make a token


class WithoutBlanks(BoxFormat):
    """The authors read an answer without its blanks and <unk>."""
    def parse(self, text: str) -> Shares | None:
        return super().parse(text.replace("<unk>", "").replace(" ", ""))


@dataclass(frozen=True)
class MiniGPTConfig(LlavaConfig):
    vision_feature_layer: int = -1         # there is no other choice

    def __post_init__(self) -> None:
        if self.vision.grid % MEMBERS:
            raise NanogapError(f"config.json: image_size {self.vision.image_size} makes "
                               f"{self.vision.grid} patches to a row, and MiniGPT-v2 makes one "
                               f"token of every {MEMBERS} of them: give a multiple of {MEMBERS}")


def mean_of_four(patches: Tensor, dim: int) -> Tensor:
    """The mean over the four members of each token, along the dimension of the patches."""
    return patches.unflatten(dim, (-1, MEMBERS)).mean(dim + 1)


class MiniGPT(VLM):
    Config = MiniGPTConfig
    Tower = EvaTower
    later = "[INST] {} [/INST]"
    download = ("`python -m nanogap.convert minigpt-v2 --base weights/llama-2-7b-chat-hf "
                "--vision eva_vit_g.pth --checkpoint minigptv2_checkpoint.pth "
                "--out weights/minigpt-v2`")
    frame = Stretch()
    template = Template(
        before="[INST] <Img>",
        after="</Img> {} [/INST]",
        where_is="[refer] give me the location of {}",
        starts=2)   # the tokenizer adds a BOS, and the published evaluation's prompt has one in it
    box_format = WithoutBlanks(
        re.compile(r"\{" + 4 * r"<([0-9]{1,3})>" + r"\}"), "{{<{}><{}><{}><{}>}}", whole=100)
    special_tokens = ("<ImageHere>",)      # of a model that is trained here
    fixed = {"model_type": "minigpt_v2"}
    rename = ((r"^visual_encoder\.", "vision_tower."), (r"^llama_model\.", "language_model."))
    on_disk = ((r"^vision_tower\.", "visual_encoder."), (r"^language_model\.", "llama_model."))

    def __init__(self, config: MiniGPTConfig) -> None:
        nn.Module.__init__(self)               # none of LLaVA's modules but the decoder
        self.config, self.text_guide = config, None
        C = config.vision.hidden_size
        self.vision_tower = EvaTower(config.vision)
        # never trained; torch computes it in float32 and rounds once, as the original does
        self.ln_vision = nn.LayerNorm(C, eps=1e-5).requires_grad_(False)
        self.llama_proj = nn.Linear(MEMBERS * C, config.text.hidden_size)
        self.language_model = LlamaForCausalLM(config.text)

    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedImage:
        """What it sees: grid x grid / 4 tokens; CLS is left out."""
        before, after = self.vision_tower(pixel_values)                       # (1, 1 + 4 N, C) each
        seen = self.ln_vision(after[0])                                       # (1 + 4 N, C)
        features = seen[1:].unflatten(0, (-1, MEMBERS)).flatten(1)            # (N, 4 C)
        rows = self.config.vision.grid
        return EncodedImage(width, height, features, rows, rows // MEMBERS, (before[0], seen[0]))

    def fields(self, image: EncodedImage, needs: Collection[str]) -> dict[str, Tensor]:
        """What strategies may need to see, token by token: see FIELDS in prune.py."""
        before, cls = image.hidden                                            # (1 + 4 N, C), (C,)
        fields = self.vision_tower.fields(before)
        fields["cls"] = cls.repeat(MEMBERS)                                   # (4 C,)
        fields["cls_attention"] = mean_of_four(fields["cls_attention"], 1)    # (H, N)
        fields["keys"] = mean_of_four(fields["keys"], 0)                      # (N, D)
        for name in ("last_queries", "last_keys"):
            first, patches = fields[name][:1], fields[name][1:]
            fields[name] = torch.cat([first, mean_of_four(patches, 0)])       # (1 + N, C)
        return fields

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (K, 4 C) -> as the decoder is fed them (K, C')."""
        return self.llama_proj(features)

    def guide(self) -> CLIPText:
        raise NanogapError("MiniGPT-v2 has no text tower; choose a strategy that does not read the "
                           "expression, such as cls_attention")

    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        (_, resized), (_, *tower) = super().walk(image)
        square = [f"{image.width} x {image.height} pixels, stretched to a square,", resized]
        return square, ["EVA turns patches into features, and four of a row into one token", *tower,
                        f"below, {image.rows} x {image.columns} tokens are called patches"]

    @classmethod
    def complete(cls, config: dict) -> dict:
        """config.json with EVA's sizes, where it leaves them out."""
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
        rows = text.get("vocab_size") or 32000
        return {"image_token_index": rows} | config | {"vision_config": asdict(VIT_G_14) | vision}

    def settings(self, dtype: str) -> dict[str, dict]:
        files = super().settings(dtype)
        config = files["config.json"]
        config["vision_config"] |= {"model_type": "eva_vit_g", "hidden_act": "gelu"}
        keys = ("model_type", "image_token_index", "text_config", "vision_config", "torch_dtype")
        return {"config.json": {key: config[key] for key in keys},
                "generation_config.json": files["generation_config.json"]}
