"""What transformers makes of the tiny checkpoints: writes outputs.json beside this file.

run:  pip install transformers==5.23.0 && python -m tests.reference.make_reference

In:  the checkpoints of tests/tiny.py, one prompt and one image, all of them drawn from fixed seeds.
Out: samples of logits and features, and the greedy words: with these the agreement is tested where
     transformers is not installed.  Where it is, tests ask the functions below about more.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from nanogap.llama import LlamaConfig
from tests.tiny import IMAGE_TOKEN, tiny_config, write_checkpoint

Answer = tuple[Tensor, list[int]]     # logits (T, V) of a whole prompt, and the greedy words

OUTPUTS = Path(__file__).with_name("outputs.json")

CASES = {   # name: (layout, shards, seed, what differs in the decoder)
    "layout a": ("a", 1, 0, {}),
    "layout b": ("b", 1, 1, {}),
    "layout c": ("c", 2, 2, {}),
    "layout d": ("d", 2, 3, {}),
    "two key-value heads": ("a", 1, 4, {"num_key_value_heads": 2}),
    "heads of 24 channels": ("a", 1, 5, {"head_dim": 24}),
    "RoPE base 1000": ("a", 1, 6, {"rope_theta": 1000.0}),
    "RMSNorm epsilon 0.1": ("a", 1, 7, {"rms_norm_eps": 0.1}),
    "tied embeddings": ("c", 1, 8, {"tie_word_embeddings": True}),
}

PROMPT = [1, 319, 400, 77, 512, IMAGE_TOKEN, 35, 36, 500, 9, 301, 88]        # P = 5, A = 6
POSITIONS = [3, 5, 20, 26]       # of 5 + 16 + 6 tokens: text, first and last patch, last word
VOCABULARY = list(range(0, 640, 54))
NEW_TOKENS = 10
END = 2

# The 4 kept patches, the most important first; for each mode the order in which they are fed, and
# the position IDs, by hand: unpruned, the text before the image has 0 to 4, its patches 5 to 20 and
# the text after it 21 to 26
KEEP = [9, 2, 14, 5]
PRUNED = {
    "gap": ([2, 5, 9, 14], [0, 1, 2, 3, 4, 7, 10, 14, 19, 21, 22, 23, 24, 25, 26]),
    "shifted": ([2, 5, 9, 14], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
    "permuted": ([9, 2, 14, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
}


def noise(size: int) -> Tensor:
    """An image (1, 3, size, size) of noise, in the range of CLIP's normalised pixels."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 4 - 2


pixel_values = partial(noise, 56)                         # (1, 3, 56, 56)


def load_theirs(folder: Path) -> torch.nn.Module:
    """transformers' LLaVA of either kind in float32, with attention written out."""
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)


def expand(prompt: Sequence[int], image_token: int, patches: int) -> Tensor:
    """input_ids (1, P + N + A): as many image tokens as patches, which is how transformers asks."""
    place = list(prompt).index(image_token)
    return torch.tensor([[*prompt[:place], *[image_token] * patches, *prompt[place + 1:]]])


def their_answer(theirs: torch.nn.Module, input_ids: Tensor, pixels: Tensor, new_tokens: int,
                 **more: Tensor) -> Answer:
    """Logits of the whole prompt with the image; more: what else is said of the picture."""
    asked = {"input_ids": input_ids, "pixel_values": pixels,
             "attention_mask": torch.ones_like(input_ids), **more}
    logits = theirs(**asked).logits[0]
    words = theirs.generate(**asked, do_sample=False, max_new_tokens=new_tokens)
    return logits, words[0, input_ids.shape[1]:].tolist()


def spliced(embed: torch.nn.Module, prompt: Sequence[int], image_token: int,
            visual: Tensor) -> Tensor:
    """Embeddings (1, P + K + A, C) of a prompt with visual tokens (K, C) in its image's place."""
    place = list(prompt).index(image_token)
    before, after = embed(torch.tensor(prompt[:place])), embed(torch.tensor(prompt[place + 1:]))
    return torch.cat([before, visual, after])[None]


def their_pruned_prompt(theirs: torch.nn.Module, prompt: Sequence[int], pixels: Tensor,
                        order: Sequence[int], **more: Tensor) -> Tensor:
    """Embeddings (1, P + K + A, C) of the prompt with the patches `order` in place of its image."""
    visual = theirs.model.get_image_features(pixel_values=pixels, **more).pooler_output[0]
    return spliced(theirs.model.language_model.embed_tokens, prompt, theirs.config.image_token_id,
                   visual[list(order)])


def their_generate(theirs: torch.nn.Module, x: Tensor, position_ids: Sequence[int],
                   new_tokens: int) -> list[int]:
    """The greedy words after embeddings (1, T, C) at the position IDs given, in one call.

    transformers 5.23.0 and 5.24.0 count on from the last ID; `answer_at` is for older ones.
    """
    words = theirs.generate(
        inputs_embeds=x, position_ids=torch.tensor([position_ids]),
        attention_mask=torch.ones(x.shape[:2], dtype=torch.long), max_new_tokens=new_tokens,
        do_sample=False)
    return words[0].tolist()


def answer_at(decoder: torch.nn.Module, head: torch.nn.Module, x: Tensor,
              position_ids: Sequence[int], new_tokens: int) -> Answer:
    """Logits (T, V) of embeddings (1, T, C) at the position IDs given, and the greedy words.

    With a cache: without one, and without a mask, transformers takes a gap in the position IDs for
    the border between two packed sequences, and lets neither side see the other.  The cache is
    passed by place: its name is `past_key_values` up to 5.23, and `cache` from 5.24 on.
    """
    from transformers import DynamicCache
    cache = DynamicCache(config=decoder.config)
    out = decoder(None, None, torch.tensor([position_ids]), cache, x)
    logits = head(out.last_hidden_state)[0]                                   # (T, V)
    words = [int(logits[-1].argmax())]
    position = position_ids[-1]
    while len(words) < new_tokens and words[-1] != END:
        position += 1
        out = decoder(torch.tensor([words[-1:]]), None, torch.tensor([[position]]), cache)
        words.append(int(head(out.last_hidden_state)[0, -1].argmax()))
    return logits, words


def their_pruned_answer(theirs: torch.nn.Module, prompt: Sequence[int], pixels: Tensor,
                        order: Sequence[int], position_ids: Sequence[int], new_tokens: int,
                        **more: Tensor) -> Answer:
    """Logits (T, V) of a pruned prompt at the position IDs given, and the greedy words after it."""
    x = their_pruned_prompt(theirs, prompt, pixels, order, **more)            # (1, T, C)
    return answer_at(theirs.model.language_model, theirs.lm_head, x, position_ids, new_tokens)


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in state.items()
            if name.startswith(prefix)}


def answer_of_parts(state: dict[str, Tensor], config: LlamaConfig, prompt: Sequence[int],
                    image_token: int, visual: Tensor, position_ids: Sequence[int],
                    new_tokens: int) -> Answer:
    """What a LLaMA of these tensors says of visual tokens (K, C) in a prompt at these IDs."""
    import transformers
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **asdict(config), attn_implementation="eager")).eval().requires_grad_(False)
    decoder.load_state_dict(state, strict=True)
    x = spliced(decoder.model.embed_tokens, prompt, image_token, visual)
    return answer_at(decoder.model, decoder.lm_head, x, position_ids, new_tokens)


# ----- what is stored -----------------------------------------------------------------------------


def rounded(values: Tensor) -> list:
    """Nested lists of numbers with 8 significant digits."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda x: float(f"{float(x):.8g}"))


def summary(answer: Answer, positions: Sequence[int], **more: list) -> dict:
    """What is stored of logits (T, V) and words: of each position some logits, and a sum of all."""
    logits, words = answer
    return {"largest": rounded(logits.abs().max()),
            "sample": rounded(logits[positions][:, VOCABULARY]),
            "absolute_sums": rounded(logits[positions].double().abs().sum(-1)),
            **more, "words": words}


def main() -> None:
    outputs = {"cases": {}, "pruned": {}}
    pixels, input_ids = pixel_values(), expand(PROMPT, IMAGE_TOKEN, 16)
    with TemporaryDirectory() as temporary:
        for name, (layout, shards, seed, differs) in CASES.items():
            folder, config = Path(temporary) / name, tiny_config(**differs)
            theirs = load_theirs(write_checkpoint(folder, config, layout, shards, seed))
            answer = their_answer(theirs, input_ids, pixels, NEW_TOKENS)
            seen = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            features = rounded(seen[0, 1:][[0, 7, 15], :6])                   # without CLS
            outputs["cases"][name] = summary(answer, POSITIONS) | {"features": features}
        theirs = load_theirs(Path(temporary) / "layout a")
        for mode, (order, ids) in PRUNED.items():
            answer = their_pruned_answer(theirs, PROMPT, pixels, order, ids, NEW_TOKENS)
            outputs["pruned"][mode] = summary(answer, [5, 14])
    write_outputs(OUTPUTS, outputs)


def write_outputs(path: Path, outputs: dict[str, dict]) -> None:
    """A line for each answer."""
    import transformers
    groups = [f' "transformers": {json.dumps(transformers.__version__)}']
    for group, answers in outputs.items():
        rows = [f"  {json.dumps(name)}: {json.dumps(answer)}" for name, answer in answers.items()]
        groups.append(f' "{group}": {{\n' + ",\n".join(rows) + "\n }")
    path.write_text("{\n" + ",\n".join(groups) + "\n}\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
