"""The peer of bench.py: transformers' LLaVA on the same weights, image, prompt and number of new tokens.

In:  a checkpoint's folder.  Out: times of its parts, and the tokens that it generates.

It is asked as sparingly as it can be: logits of the last token only, its own cache, no mask.
"""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from nanogap.cli import NanogapError
from nanogap.models.llava import Llava
from nanogap.weights import load


def their_class() -> type:
    """transformers' LLaVA, imported without a word."""
    try:
        import transformers
    except ImportError:
        raise NanogapError("transformers is not installed here; get it with "
                           "`pip install transformers==5.23.0`, or leave the comparison out") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.LlavaForConditionalGeneration


def load_peer(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' model, with attention as fast as it has it."""
    peer = their_class().from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    peer.generation_config.eos_token_id = None                                # as many tokens as are asked
    return peer.to(device).eval()


def prompt(model: Llava, expression: str) -> Tensor:
    """input_ids (1, P + N + A): our prompt with an image token for every patch, as transformers wants it."""
    ids, token = model.prompt(expression), model.config.image_token
    repeats = torch.where(ids == token, model.config.vision.grid ** 2, 1)
    return ids.repeat_interleave(repeats)[None].to(model.device)


def generate(peer: nn.Module, model: Llava, image: Image.Image, expression: str, new: int) -> list[int]:
    """`new` tokens by transformers' own generation, greedily."""
    ids = prompt(model, expression)
    said = peer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         pixel_values=model.prepare_image(image), max_new_tokens=new)
    return said[0, ids.shape[1]:].tolist()


def peer_times(peer: nn.Module, model: Llava, image: Image.Image, expression: str, new: int) -> dict:
    """Milliseconds of the vision tower, of the first token, of a later pass, and of all by `generate`."""
    at = [model.clock()]
    peer.model.get_image_features(pixel_values=model.prepare_image(image))
    at.append(model.clock())
    out = peer(input_ids=prompt(model, expression), pixel_values=model.prepare_image(image), use_cache=True,
               logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    token.item()
    at.append(model.clock())
    for _ in range(new - 1):
        out = peer(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()                                                          # generation looks for its end
    at.append(model.clock())
    model.tokenizer.decode(generate(peer, model, image, expression, new))
    at.append(model.clock())
    vision, first, passes, box = (after - before for before, after in zip(at, at[1:]))
    return {"vision_ms": vision, "prefill_ms": first - vision, "first_token_ms": first,
            "pass_ms": passes / max(new - 1, 1), "box_ms": box}


def agree(folder: Path, device: torch.device, dtype: str | None, image: Image.Image, expression: str,
          new: int) -> dict:
    """Are the logits of every token of the prompt highest at the same word, and the words after it the same?

    One model is loaded after the other, so that memory need hold only one.
    """
    model = load(folder, device, dtype)
    model.config = replace(model.config, eos_token=-1)
    dtype, ids, pixels = model.dtype, prompt(model, expression), model.prepare_image(image)
    ours = model(model.prompt(expression), pixels)
    said = model.ground(image, expression, mode="full", max_new_tokens=new).tokens
    model.vision_tower = model.language_model = None
    peer = load_peer(folder, device, dtype)
    theirs = peer(input_ids=ids, pixel_values=pixels).logits[0].float()
    top = theirs.argmax(-1)
    far = theirs.max(-1).values - theirs.gather(1, ours.argmax(-1)[:, None])[:, 0]   # 0 where they agree
    return {"weights": str(folder), "device": str(device), "dtype": str(dtype).removeprefix("torch."),
            "logits": len(top), "same_argmax": int((ours.argmax(-1) == top).sum()),
            "largest_difference": float((ours - theirs).abs().max()),
            "largest_logit": float(theirs.abs().max()), "theirs_over_our_choice": float(far.max()),
            "same_tokens": said == generate(peer, model, image, expression, new)}
