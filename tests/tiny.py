"""Tiny checkpoints for the tests: random, but real files in every published layout of LLaVA.

Each tensor has a generator of its own, seeded by its name, so the numbers are the same on every
machine, and large enough that logits differ clearly from token to token and place to place.
"""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer
from torch import Tensor

from nanogap.clip import CLIPVisionConfig
from nanogap.llama import LlamaConfig
from nanogap.llava import LlavaConfig
from nanogap.models import MODELS, VLM
from nanogap.models.llava_next import LlavaNext, LlavaNextConfig
from nanogap.models.saving import our_name, save
from nanogap.train.untrained import train_llama_tokenizer
from nanogap.weights import load

IMAGE_TOKEN = 560          # <image> in the tiny tokenizer; 561 is <pad>

NEWER = ((r"^language_model\.lm_head\.", "lm_head."),
         (r"^language_model\.model\.", "model.language_model."),
         (r"^multi_modal_projector\.", "model.multi_modal_projector."),
         (r"^image_newline$", "model.image_newline"))
PUBLISHED = {   # from our names, which are layout (b), to those of the others
    "a": ((r"^vision_tower\.", "vision_tower.vision_model."),),
    "b": (),
    "c": (*NEWER, (r"^vision_tower\.", "model.vision_tower.vision_model.")),
    "d": (*NEWER, (r"^vision_tower\.", "model.vision_tower.")),
}
LAYOUTS = tuple(PUBLISHED)


def tiny_config(**text: object) -> LlavaConfig:
    """56 x 56 pixels are 4 x 4 patches; 3 layers of 32 channels see, 3 layers of 64 channels read.

    text: what shall differ in the decoder, such as num_key_value_heads=2
    """
    vision = CLIPVisionConfig(32, 64, 3, 2, image_size=56, patch_size=14)
    decoder = LlamaConfig(64, 128, 3, 4, 4, head_dim=16, vocab_size=640, rms_norm_eps=1e-5,
                          max_position_embeddings=512)
    return LlavaConfig(replace(decoder, **text), vision, image_token=IMAGE_TOKEN)


def tiny_next_config(decoder: str = "llama", **text: object) -> LlavaNextConfig:
    """The same for LLaVA-1.6, whose tiles of 56 x 56 pixels make canvases in the published shapes.

    decoder: "llama" or "mistral"
    """
    like = tiny_config(**text)
    return LlavaNextConfig(like.text, like.vision, like.image_token, decoder=decoder)


def family_of(config: LlavaConfig) -> type[VLM]:
    """Which model a configuration is of."""
    return LlavaNext if isinstance(config, LlavaNextConfig) else VLM


@cache
def tokenizer_of(family: str) -> Tokenizer:
    """LLaMA's kind of tokenizer, of at most 560 pieces, trained on a family's own prompt."""
    kind = MODELS[family]
    sentences = []
    for thing in ("the man on the left", "a red car behind the tall tree",
                  "woman with a blue umbrella", "small brown dog next to the bench",
                  "the second cup from the right", "yellow house above"):
        before, after = kind.template.around(kind.template.question(thing))
        sentences.append(f"{before}{after} {kind.box_format.say((0.12, 0.34, 0.56, 0.78))}")
    return train_llama_tokenizer(sentences, IMAGE_TOKEN, kind.special_tokens)


def tiny_tokenizer() -> Tokenizer:
    """LLaVA's."""
    return tokenizer_of("llava")


def tiny_model(family: str) -> VLM:
    """A random model of any family: views of 4 x 4 patches, or for MiniGPT-v2 of 8 x 2 tokens."""
    kind, tokenizer, like = MODELS[family], tokenizer_of(family), tiny_config()
    vision = replace(like.vision, image_size=112) if family == "minigpt_v2" else like.vision
    model = kind(kind.Config(like.text, vision, tokenizer.token_to_id(kind.special_tokens[0])))
    model.load_state_dict({name: draw(name, value.shape, 0)
                           for name, value in model.state_dict().items()})
    model.tokenizer = tokenizer
    return model.requires_grad_(False)


def draw(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The tensor of that name: uniform, so large that signals stay about as large as they came."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    x = (torch.rand(shape, generator=generator) * 2 - 1) * 3 ** 0.5           # standard deviation 1
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * x
    if name.endswith("bias"):
        return 0.2 * x
    if len(shape) == 1 or "embedding.weight" in name and "patch" not in name:
        return 0.5 * x
    if "embed_tokens" in name:
        return x
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.5   # attention that looks somewhere
    return gain * x / math.prod(shape[1:]) ** 0.5


def tiny_tensors(config: LlavaConfig, layout: str = "a", seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a checkpoint under the names of a layout."""
    with torch.device("meta"):
        model = family_of(config)(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tensors = {name: draw(name, shape, seed) for name, shape in shapes.items()}
    if config.text.tie_word_embeddings:
        del tensors["language_model.lm_head.weight"]
    return {our_name(name, PUBLISHED[layout]): value for name, value in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, as it is told."""
    specs = {name: TensorSpec(
        dtype=str(value.dtype).removeprefix("torch."), shape=list(value.shape),
        data_ptr=value.data_ptr(), data_len=value.nbytes) for name, value in tensors.items()}
    serialize_file(specs, path, metadata={"format": "pt"})


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int,
                 name: str = "model.safetensors",
                 write: Callable[[Path, dict[str, Tensor]], None] = write_tensors) -> None:
    """One file, or shards such as model-0000N-of-0000M.safetensors and their index."""
    if shards == 1:
        return write(folder / name, tensors)
    (stem, kind), names = name.split("."), list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{kind}"
        part = names[len(names) * shard // shards: len(names) * (shard + 1) // shards]
        write(folder / file, {key: tensors[key] for key in part})
        weight_map |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def write_checkpoint(folder: Path, config: LlavaConfig | None = None, layout: str = "a",
                     shards: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A whole checkpoint; the project's own writer makes its configs."""
    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        family_of(config)(config).write_config(folder, str(dtype).removeprefix("torch."))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tensors = tiny_tensors(config, layout, seed)
    write_shards(folder, {name: value.to(dtype) for name, value in tensors.items()}, shards)
    return folder


def write_finder(folder: Path, out: Path, answer: str) -> Path:
    """A checkpoint that answers every question with a text, one token, and stops.

    folder: of a tiny one, which it is made of
    """
    model = load(folder, "cpu", "float32")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    spelled = json.loads(model.tokenizer.to_str())
    token = spelled["model"]["vocab"][answer] = model.config.text.vocab_size - 1
    model.tokenizer = Tokenizer.from_str(json.dumps(spelled))
    decoder, head = model.language_model.model, model.language_model.lm_head.weight
    decoder.norm.weight.fill_(1)
    embed = decoder.embed_tokens.weight
    head.zero_()
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for step, (said, following) in enumerate([(int(model.prompt("x")[-1]), token), (token, 2)]):
        embed[said] = torch.eye(embed.shape[1])[step]
        head[following, step] = 1
    save(out, model, torch.float32)
    return out


def lines_of(err: str) -> int:
    """How many lines a command said on stderr, but for progress, which ends in " ..."."""
    return sum(not line.endswith(" ...") for line in err.splitlines())
