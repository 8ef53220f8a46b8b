"""What a model must say of itself; the method (nanogap/ground.py) takes it from there.

In:  pictures, expressions, token IDs.  Out: tensors for the decoder, and boxes in pixels.

A family of models is one file beside this one.  It says, on top of what stands here,
    frame          how a picture becomes what the tower sees, and a box pixels again (image.py)
    template       the words around the image, and the question for a box (prompt.py)
    box_format     how it says a box (prompt.py)
    encode_pixels  what it sees: N visual tokens, and which part of the picture each of them shows
    fields         what strategies may look at in these
    project        from the vision tower's channels to the decoder's
    read_config, write_config, rename
                   its files: config.json, and the names of tensors on disk (weights.py)
Letters: P tokens before the image, N visual tokens, K of them kept, M added, A tokens after it.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.checks.command import ItemError, NanogapError
from nanogap.clip import TextGuide
from nanogap.fast.decode import decode
from nanogap.fast.ground_all import ground_all
from nanogap.fast.packed import version
from nanogap.gap import Layout, lay_out
from nanogap.ground import MAX_NEW_TOKENS, EncodedImage, describe, ground
from nanogap.image import Box, Frame, ready
from nanogap.llama import Decoder, LlamaForCausalLM
from nanogap.methods.in_decoder import prefill
from nanogap.prompt import BoxFormat, Shares, Template
from nanogap.prune import Kept, View


def clock(device: torch.device) -> float:
    """Seconds, after all that the device has been asked to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def check_finite(fields: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse numbers that no strategy could rank: it is the weights that made them."""
    for name, field in fields.items():
        if not bool(field.isfinite().all()):
            raise NanogapError(f"the model sees numbers in the picture that are not finite ({name} "
                               f"in {dtype}): its weights are broken, or too large for this "
                               "precision; try --dtype float32")


def plainly(function: Callable) -> Callable:
    """Let a function make its tensors on the CPU and in float32, as if torch were fresh.

    A program may have set other defaults for its own tensors (torch.set_default_device, _dtype).
    """
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        if dtype == torch.float32 and device.type == "cpu":
            return function(*args, **kwargs)
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(dtype)
    return run


class VLM(nn.Module):
    """A vision tower, a projector and a decoder; each family fills in the rest."""

    Config: ClassVar[type]                     # its configuration, with `text` and `vision` in it
    rename: ClassVar[tuple[tuple[str, str], ...]]  # patterns: names on disk -> names of our modules
    on_disk: ClassVar[tuple[tuple[str, str], ...]]  # and the way back, to the published ones
    Tower: ClassVar[type]                      # of its configuration's `vision`
    reads_words: ClassVar[bool] = True         # whether its tower comes with one for texts
    pictures_alike: ClassVar[bool] = True      # whether all have as many visual tokens
    download: ClassVar[str]                    # the command that fetches its published weights
    special_tokens: ClassVar[tuple[str, ...]]  # behind <unk> <s> </s>; the image's comes first

    frame: Frame
    template: Template
    box_format: BoxFormat
    language_model: LlamaForCausalLM
    tokenizer: Tokenizer

    ground = plainly(ground)                   # as model.ground(image, expression, ...)
    ground_all = plainly(ground_all)           # many expressions at once
    describe = plainly(describe)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.text_guide: TextGuide | None = None   # for strategies that read the expression
        self.decoder: Decoder | None = None        # runs passes in place of the language model

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Any of them ends an answer."""
        return (self.config.eos_token, *self.config.other_ends)

    def _apply(self, fn: Callable, recurse: bool = True) -> "VLM":
        """What moves or converts the weights: .to(), .half(), .cuda() reach the text guide too."""
        if self.text_guide is not None:
            self.text_guide.clip._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def state(self) -> tuple:
        """What tells these weights from others: their precision, changes, and a number of each.

        It takes microseconds for each tensor, for no tensor is read whole.
        """
        weights = list(self.parameters())
        if self.text_guide is not None:
            weights += self.text_guide.clip.parameters()
        changes = map(version, weights)
        with torch.no_grad():
            numbers = torch.cat([w.as_strided((1,), (1,), w.storage_offset() + w.numel() // 2)
                                 for w in weights])
        return self.device, self.dtype, sum(changes), tuple(numbers.tolist())

    def clock_ms(self) -> float:
        """Milliseconds, after all that its device has been asked to do is done."""
        return 1000 * clock(self.device)

    # ----- what a family fills in -----------------------------------------------------------------

    @classmethod
    @abstractmethod
    def read_config(cls, folder: Path) -> Any:
        """config.json, and what the other files of a checkpoint add to it."""

    @abstractmethod
    def write_config(self, folder: Path, dtype: str) -> None:
        """The same files again."""

    @classmethod
    def fitted(cls, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """A tensor on disk as the model holds it: as it is, but where a family says otherwise."""
        return tensor

    @abstractmethod
    def pixel_values(self, image: Image.Image) -> Tensor:
        """A picture that is ready (image.py) -> (views, 3, S, S), on the model's device."""

    @abstractmethod
    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedImage:
        """Run the vision tower: what it sees of a picture of that size, as N visual tokens."""

    @abstractmethod
    def fields(self, image: EncodedImage, view: int, needs: Collection[str]) -> dict[str, Tensor]:
        """What strategies need to see in one of the views: see FIELDS in prune.py."""

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (K, C) -> as the decoder is fed them (K, C')."""

    @abstractmethod
    def align(self, features: Tensor) -> Tensor:
        """Visual tokens (N, C) -> in CLIP's space of images and texts (N, E)."""

    @abstractmethod
    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        """What becomes of a picture, in lines of up to 76 columns: as squares, and in the tower.

        The first line of the second is its heading.
        """

    # ----- from what a person gives to tensors ----------------------------------------------------

    def question(self, expression: str) -> str:
        """The question that the model answers with a box."""
        return self.template.question(expression)

    def answer(self, box: Shares) -> str:
        """What the model says of a box in its frame, without the end token."""
        return self.box_format.say(box)

    def encode_question(self, question: str) -> Tensor:
        """A whole question as input_ids (T,) with one image token, on the CPU."""
        if getattr(self, "tokenizer", None) is None:
            raise NanogapError("the model has no tokenizer, so it can read no question: load it "
                               "with nanogap.load, or set model.tokenizer")
        c = self.config
        ids = self.template.encode(self.tokenizer, question, c.bos_token, c.image_token)
        return torch.tensor(ids)                                              # (T,)

    def prompt(self, expression: str) -> Tensor:
        """The question about an expression as input_ids (T,) with one image token, on the CPU."""
        return self.encode_question(self.question(expression))

    @plainly
    def prepare_image(self, image: Image.Image | str | Path) -> Tensor:
        """Any picture, or the path of one -> pixel_values (views, 3, S, S)."""
        return self.pixel_values(ready(image))

    @plainly
    @torch.no_grad()
    def encode_image(self, image: Image.Image | str | Path | EncodedImage,
                     needs: Collection[str] = (), share: bool = False) -> EncodedImage:
        """Run the vision tower on a picture, once for all the questions about it.

        needs: what strategies will look at; more is computed when it is needed
        share: let the questions share the decoder's work on the image as well
        raises: NanogapError where the image was encoded by other weights, or these see NaN in it
        """
        if isinstance(image, EncodedImage):
            if image.seen_by is not None and image.seen_by != self.state():
                raise NanogapError("this image was encoded by another model, or before the weights "
                                   "changed: call model.encode_image on the picture again")
            return image
        image = ready(image)
        start = self.clock_ms()
        encoded = self.encode_pixels(self.pixel_values(image), *image.size)
        check_finite({"features": encoded.features}, self.dtype)
        self.see(encoded, set(needs) - {"text"}, "")
        return replace(encoded, vision_ms=self.clock_ms() - start, share=share,
                       seen_by=self.state())

    @torch.inference_mode(False)
    @torch.no_grad()
    def see(self, image: EncodedImage, needs: Collection[str], expression: str) -> list[View]:
        """The views of a picture, each with what a strategy needs to see and nothing else."""
        views = []
        text = {"text": self.embed_text(expression)} if "text" in needs else {}
        check_finite(text, self.dtype)
        for i, view in enumerate(image.views):
            known = view.seen.fields
            missing = set(needs) - set(known) - {"text"}
            if "projected" in missing:
                known["projected"] = self.project(view.seen.features)
            if "aligned" in missing:
                known["aligned"] = self.align(view.seen.features)
            known |= self.fields(image, i, missing)
            check_finite({name: known[name] for name in missing}, self.dtype)
            fields = {name: value for name, value in known.items() if name in needs}
            views.append(replace(view, seen=replace(view.seen, fields=fields | text)))
        return views

    def embed_text(self, expression: str) -> Tensor:
        """An expression in the space that CLIP shares with patches (E,).

        open: which words the paper gave to methods that read is not known; here the expression
        """
        return self.guide().embed(expression)

    def guide(self) -> TextGuide:
        """CLIP's text tower, which stands beside the model's own weights."""
        if self.text_guide is None:
            raise NanogapError("to compare patches with words takes CLIP's text tower, which the "
                               "model's checkpoints do not hold; get it with "
                               f"{self.clip_download()} and give it by --clip")
        return self.text_guide

    def clip_download(self) -> str:
        """The command that fetches the CLIP that the vision tower comes from."""
        raise NanogapError("this model's vision tower comes from no CLIP that is published whole: "
                           "choose a strategy that does not read the expression")

    # ----- the sequence ---------------------------------------------------------------------------

    def around_image(self, input_ids: Tensor) -> tuple[int, int]:
        """P and A: how many tokens stand before and after the one image token."""
        places = (input_ids == self.config.image_token).nonzero().flatten().tolist()
        if len(places) != 1:
            raise NanogapError(f"the prompt must hold one image token, not {len(places)}")
        return places[0], len(input_ids) - places[0] - 1

    def embed(self, input_ids: Tensor, image: EncodedImage, kept: Kept, order: Tensor) -> Tensor:
        """The prompt with what is kept in the place of its image token: (1, P + K + M + A, C').

        order: (K,) which of the kept tokens comes where, as gap.lay_out says
        """
        keep = kept.keep[order].to(image.features.device)                     # (K,)
        features = image.features[keep]                                       # (K, C)
        if kept.features is not None:
            features = kept.features[order.to(kept.features.device)]
        if kept.added is not None:
            features = torch.cat([features, kept.added])                      # (K + M, C)
        return self.splice(input_ids, self.fed(features, keep, image))

    def fed(self, features: Tensor, keep: Tensor, image: EncodedImage) -> Tensor:
        """Visual tokens (K + M, C) as the decoder is fed them (K + M, C').

        keep: (K,) which of the image's N tokens the first K are
        """
        return self.project(features)

    def splice(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Put visual tokens (K + M, C') in the image token's place: (1, P + K + M + A, C')."""
        P, _ = self.around_image(input_ids)
        embed_tokens = self.language_model.model.embed_tokens
        input_ids = input_ids.to(self.device)
        before, after = embed_tokens(input_ids[:P]), embed_tokens(input_ids[P + 1:])
        return torch.cat([before, visual, after])[None]

    @plainly
    def forward(self, input_ids: Tensor, pixel_values: Tensor, keep: Tensor | None = None,
                mode: str = "gap", size: tuple[int, int] | None = None) -> Tensor:
        """Logits (P + K + A, V) in float32 of a prompt (T,) with one image token; None keeps all.

        size: (width, height) of the picture, where the visual tokens depend on it
        """
        width, height = size or (pixel_values.shape[-1], pixel_values.shape[-2])
        image = self.encode_pixels(pixel_values.to(self.device, self.dtype), width, height)
        kept = Kept(torch.arange(image.n_visual) if keep is None else keep.cpu())
        P, A = self.around_image(input_ids)
        layout = lay_out(kept.keep, P, image.n_visual, A, mode)
        x = self.embed(input_ids, image, kept, layout.order)
        return self.language_model(x, layout.position_ids.to(self.device))[0]

    def generate(self, x: Tensor, layout: Layout,
                 max_new_tokens: int = MAX_NEW_TOKENS) -> list[int]:
        """Answer any sequence of embeddings (1, T, C), laid out in any way, greedily."""
        prompt = prefill(self.language_model, x, layout, room=max_new_tokens)
        return list(decode(prompt, max_new_tokens, self.end_tokens))

    def check_length(self, positions: int) -> None:
        """Refuse a question whose position IDs leave the range that the model was made for."""
        most = self.config.text.max_position_embeddings
        if positions > most:
            raise ItemError("the expression is too long: with the image and room for the answer "
                            f"the model would need {positions} positions and has {most}; shorten "
                            "it, or give fewer new tokens")

    # ----- boxes ----------------------------------------------------------------------------------

    def parse_box(self, text: str) -> Shares | None:
        """The first box in an answer: four numbers in [0, 1] of the model's own frame, or None."""
        return self.box_format.parse(text)

    def to_pixels(self, box: Shares, width: int, height: int) -> Box:
        """A box of the model's frame in pixels of the original image."""
        return self.frame.to_pixels(box, width, height)
