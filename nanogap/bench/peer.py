"""The other side of the comparison: transformers' model of the same weights, image and prompt.

It is given the least work that it allows: logits of the last token only, its own cache, no mask.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogap.bench import EXPRESSION, IMAGE
from nanogap.bench.machine import bytes_of
from nanogap.checks.loading import load
from nanogap.checks.reading import read_json
from nanogap.errors import NanogapError
from nanogap.llava import clock_ms
from nanogap.models import VLM

THEIRS = ("llava", "llava_next")          # by `model_type`; transformers has no others of ours


def check_peer(folder: Path) -> None:
    """Refuse a folder whose model transformers does not have, or where that is not installed."""
    try:
        import transformers
    except ImportError:
        raise NanogapError("transformers is not installed here; get it with "
                           "`pip install transformers==5.23.0`") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = read_json(folder / "config.json").get("model_type")
    if found not in THEIRS:
        raise NanogapError(f"{folder} holds a {found!r:.80} model, and transformers has only "
                           f"{' and '.join(THEIRS)}: leave --against and --agree out")


def load_peer(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, int]:
    """transformers' model, with the fastest attention that it has; its weights' bytes."""
    from transformers import AutoModelForImageTextToText
    peer: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype,
                                                            attn_implementation="sdpa")
    peer.generation_config.eos_token_id = None   # as many tokens as are asked for
    peer = peer.to(device).eval()
    return peer, bytes_of(peer)


def picture_for(model: VLM) -> dict[str, Tensor]:
    """The picture as transformers wants it: with its size, where its tokens depend on that."""
    pixel_values = model.prepare_image(IMAGE)                                 # (views, 3, S, S)
    if model.pictures_alike:
        return {"pixel_values": pixel_values}
    size = torch.tensor([[IMAGE.height, IMAGE.width]], device=model.device)
    return {"pixel_values": pixel_values[None], "image_sizes": size}


def inputs_for(model: VLM, n_visual: int | None = None) -> dict[str, Tensor]:
    """The picture and our prompt (1, P + N + A), which has an image token for each of N."""
    ids = model.prompt(EXPRESSION)                                            # (P + 1 + A,)
    N = n_visual or model.encode_image(IMAGE).n_visual
    ids = ids.repeat_interleave(torch.where(ids == model.config.image_token, N, 1))
    return {"input_ids": ids[None].to(model.device), **picture_for(model)}


def generate(peer: Any, new: int, inputs: dict[str, Tensor]) -> list[int]:
    """`new` tokens by transformers' own generation, greedily."""
    ids = inputs["input_ids"]
    said = peer.generate(**inputs, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=new)
    return said[0, ids.shape[1]:].tolist()


def peer_times(peer: Any, model: VLM, new: int) -> dict:
    """Milliseconds of the vision tower, of the first token, of a later pass, and of `generate`.

    Tokens and pixels are prepared within these times, as they are in ours.
    """
    n_visual = model.encode_image(IMAGE).n_visual
    at = [clock_ms(model.device)]
    peer.model.get_image_features(**picture_for(model))
    at.append(clock_ms(model.device))
    inputs = inputs_for(model, n_visual)
    out = peer(**inputs, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)                        # (1, 1)
    token.item()
    at.append(clock_ms(model.device))
    for _ in range(new - 1):
        name = "cache" if "cache" in out else "past_key_values"   # since 5.24, and before
        out = peer(input_ids=token, use_cache=True, **{name: out[name]})
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()                                  # as generation does to look for its end
    at.append(clock_ms(model.device))
    model.tokenizer.decode(generate(peer, new, inputs_for(model, n_visual)))
    at.append(clock_ms(model.device))
    vision, first, passes, box = (after - before for before, after in pairwise(at))
    return {"vision_ms": vision, "prefill_ms": first - vision, "first_token_ms": first,
            "pass_ms": passes / (new - 1), "box_ms": box}


def agree(folder: Path, device: torch.device, dtype: torch.dtype | None, new: int) -> dict:
    """Compare the logits of every token of the prompt, and the tokens that are generated.

    One model is loaded after the other, so memory has to hold only one at a time.
    """
    model = load(folder, device, dtype)
    model.config = replace(model.config, eos_token=-1, other_ends=())
    dtype, inputs = model.dtype, inputs_for(model)
    ours = model(model.prompt(EXPRESSION), model.prepare_image(IMAGE), size=IMAGE.size)   # (T, V)
    said = model.ground(IMAGE, EXPRESSION, mode="full", max_new_tokens=new).tokens
    del model
    peer, _ = load_peer(folder, device, dtype)
    theirs = peer(**inputs).logits[0].float()                                 # (T, V)
    our_choice = ours.argmax(-1)                                              # (T,)
    far = theirs.max(-1).values - theirs.gather(1, our_choice[:, None])[:, 0]   # 0: they agree
    return {"weights": str(folder), "device": str(device),
            "dtype": str(dtype).removeprefix("torch."), "logits": len(theirs),
            "same_argmax": int((our_choice == theirs.argmax(-1)).sum()),
            "largest_difference": float((ours - theirs).abs().max()),
            "largest_logit": float(theirs.abs().max()),
            "theirs_over_our_choice": float(far.max()),
            "same_tokens": said == generate(peer, new, inputs)}
