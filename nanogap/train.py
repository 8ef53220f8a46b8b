"""Train the mini model from nothing: first CLIP, then LLaVA on its frozen vision tower.

    python -m nanogap.train --out weights/mini                                     one process
    torchrun --nproc-per-node 2 -m nanogap.train --out weights/mini                one per CPU core

Stage 0, CLIP (arXiv 2103.00020): a vision and a text tower learn which captions are true of which
drawn scene.  Captions name what is there and never where.
Stage 1, LLaVA (arXiv 2304.08485): the vision tower is frozen; a projector and a decoder learn to
answer LLaVA's question with LLaVA's words for a box, by next-token prediction on the answers.

Nothing in here knows of pruning: no token is ever dropped and no position ID changed in training.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from nanogap.errors import NanogapError
from nanogap.image import box_to_square, to_pixel_values
from nanogap.llama import LlamaConfig
from nanogap.llava import Llava, LlavaConfig
from nanogap.prompt import AFTER_IMAGE, BEFORE_IMAGE, encode, encode_prompt, format_box
from nanogap.scenes import COLOURS, KINDS, Scene, Thing, caption, draw_scene, scene
from nanogap.tokenizer import IMAGE, train_clip_tokenizer, train_llama_tokenizer
from nanogap.weights import save_clip, save_llava


@dataclass(frozen=True)
class Recipe:
    vision: CLIPVisionConfig
    text: CLIPTextConfig
    decoder: LlamaConfig
    projection_dim: int
    clip_steps: int
    clip_images: int          # per process and step
    clip_rate: float
    llava_steps: int
    llava_images: int         # per process and step
    llava_rate: float
    questions: int            # at most, per process and step


# Two processes on two CPU cores: LLaVA in miniature, 12 x 12 patches.
CPU = Recipe(
    vision=CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                            num_attention_heads=4, image_size=168, patch_size=14),
    text=CLIPTextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                        num_attention_heads=4, vocab_size=0),
    decoder=LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                        num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=0,
                        rms_norm_eps=1e-5, max_position_embeddings=2048),
    projection_dim=128, clip_steps=3000, clip_images=16, clip_rate=1e-3,
    llava_steps=14000, llava_images=4, llava_rate=2.5e-3, questions=36)
# One GPU: LLaVA's own geometry, 336 pixels and 24 x 24 patches, and a wider and deeper decoder.
GPU = Recipe(
    vision=replace(CPU.vision, hidden_size=192, intermediate_size=768, num_hidden_layers=6,
                   num_attention_heads=6, image_size=336),
    text=CPU.text,
    decoder=replace(CPU.decoder, hidden_size=320, intermediate_size=864, num_hidden_layers=6,
                    num_attention_heads=10, num_key_value_heads=10),
    projection_dim=128, clip_steps=6000, clip_images=128, clip_rate=1e-3,
    llava_steps=20000, llava_images=16, llava_rate=1.5e-3, questions=160)
RECIPES = {"cpu": CPU, "gpu": GPU}


TIMED = 20           # steps by which --minutes is turned into a number of steps
SAVE_EVERY = 120.0   # seconds

# ----- data ---------------------------------------------------------------------------------------


class Scenes(torch.utils.data.Dataset):
    """Training batches by step: item `step` is a list of freshly drawn scenes, ready for the model.

    A split of `nanogap.scenes` is one word, so these seeds, of several, are never a split's.
    """

    def __init__(self, seed: str, images: int, image_size: int) -> None:
        self.seed, self.images, self.image_size = seed, images, image_size

    def __getitem__(self, step: int) -> tuple[Tensor, list[Scene], random.Random]:
        rng = random.Random(f"train {self.seed} {step}")
        # pictures are drawn larger than the model sees them, as any picture is, or just as large
        scenes = [draw_scene(rng, rng.choice((168, 336))) for _ in range(self.images)]
        pixels = torch.cat([to_pixel_values(scene.image, self.image_size) for scene in scenes])
        return pixels, scenes, rng                                            # pixels (B, 3, S, S)


Batch = tuple[Tensor, list[Scene], random.Random]


# ----- stage 0: CLIP ------------------------------------------------------------------------------


def contents(things: Iterable[Thing]) -> Counter:
    """How many of which kind and colour: a caption is true of an image that holds at least as much."""
    return Counter((thing.kind, thing.colour) for thing in things)


SINGLES = [Thing(kind, colour, (0.0, 0.0, 1.0, 1.0)) for kind in KINDS for colour in COLOURS]


def clip_loss(clip: CLIP, tokenizer: Tokenizer, batch: Batch, device: torch.device) -> Tensor:
    """CLIP's symmetric contrastive loss between images and the captions that may be true of them.

    There is a caption for each image, which names all that is in it, and one for each single thing that
    there can be ("a red car").  Several are true of an image, so the targets are equal shares.
    """
    pixels, scenes, rng = batch
    wholes = [caption(scene.things, rng) for scene in scenes]
    singles = [caption([thing], rng) for thing in SINGLES]
    claims = [contents(scene.things) for scene in scenes] + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= contents(scene.things)) for claim in claims] for scene in scenes])
    truth = truth.to(device)                                                  # (B, M)
    texts = torch.cat([clip.text_features(torch.tensor([e.ids for e in tokenizer.encode_batch(some)],
                                                       device=device)) for some in (wholes, singles)])
    logits = clip.logit_scale.exp() * clip.image_features(pixels.to(device)) @ texts.T  # (B, M)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    told = truth.sum(0) > 0                                                   # captions true of any image
    by_text = F.cross_entropy(logits.T[told], (truth / truth.sum(0)).T[told])
    return (by_image + by_text) / 2


# ----- stage 1: LLaVA -----------------------------------------------------------------------------


class SharedPast:
    """Keys and values of a prefix that several sequences continue; unlike KVCache, with gradients.

    All questions about an image share the image, and all images the system sentence: each is run once.
    Sequence i of the new batch continues sequence `parents[i]` of the old one.
    """

    def __init__(self, past: "SharedPast | None" = None, parents: Tensor | None = None) -> None:
        self.past, self.parents = past, parents
        self.rows: list[tuple[Tensor, Tensor]] = []                           # per layer (B, G, R, D)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.past is not None:
            old_k, old_v = self.past.rows[layer]
            k, v = torch.cat([old_k[self.parents], k], 2), torch.cat([old_v[self.parents], v], 2)
        self.rows.append((k, v))
        return k, v


def llava_loss(model: Llava, batch: Batch, device: torch.device, questions: int) -> Tensor:
    """Next-token cross-entropy on the answers, the mean over all their tokens.

    Every question sees the system sentence, the image and itself only, at the IDs that it would have
    alone: the sequences form a tree that is run level by level.
    """
    pixels, scenes, rng = batch
    tokens, owners = [], []
    asked = [(i, *pair) for i, scene in enumerate(scenes) for pair in scene.expressions]
    for i, expression, thing in rng.sample(asked, min(questions, len(asked))):
        box = box_to_square(scenes[i].things[thing].box, *scenes[i].image.size)
        tokens.append(example(model, expression, format_box(box)))
        owners.append(i)
    image_at = tokens[0][0].index(model.config.image_token)
    shared = len(os.path.commonprefix([prompt for prompt, _ in tokens]))      # up to the expression
    decoder, embed = model.language_model.model, model.language_model.model.embed_tokens
    with torch.no_grad():
        features = model.vision_tower(pixels.to(device)).features             # (B, N, C), frozen
    prompt = torch.tensor(tokens[0][0][:shared], device=device)
    head = embed(prompt[image_at + 1:]).expand(len(scenes), -1, -1)           # "Please provide the ..."
    visual = torch.cat([model.multi_modal_projector(features), head], dim=1)
    start, middle = image_at, visual.shape[1]

    system = SharedPast()
    decoder(embed(prompt[None, :image_at]), torch.arange(start, device=device), system)
    images = SharedPast(system, torch.zeros(len(scenes), dtype=torch.long, device=device))
    decoder(visual, torch.arange(start, start + middle, device=device), images)

    rows = [prompt[shared:] + answer for prompt, answer in tokens]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)  # (Q, length)
    first = torch.tensor([len(prompt) - shared for prompt, _ in tokens], device=device)   # of the answer
    last = torch.tensor([len(row) for row in rows], device=device)
    at = torch.arange(1, length, device=device)
    answer = (at >= first[:, None]) & (at < last[:, None])                    # (Q, length - 1)
    positions = start + middle + torch.arange(length - 1, device=device)
    hidden = decoder(embed(ids[:, :-1]), positions, SharedPast(images, torch.tensor(owners, device=device)))
    return F.cross_entropy(model.language_model.lm_head(hidden[answer]).float(), ids[:, 1:][answer])


def example(model: Llava, expression: str, answer: str) -> tuple[list[int], list[int]]:
    """Token IDs of a prompt, and of its answer with the end token."""
    c = model.config
    prompt = encode_prompt(model.tokenizer, expression, c.bos_token, c.image_token)
    return prompt, encode(model.tokenizer, answer) + [c.eos_token]


# ----- the loop -----------------------------------------------------------------------------------


def initialise(model: nn.Module, depth: int) -> None:
    """Normal weights of standard deviation fan_in^-1/2, less on the residual branches; small embeddings."""
    for name, parameter in model.named_parameters():
        if "embedding.weight" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=len(parameter) ** -0.5)
        elif parameter.dim() >= 2:
            branch = name.split(".")[-2] in ("out_proj", "fc2", "o_proj", "down_proj")
            std = parameter[0].numel() ** -0.5 * ((2 * depth) ** -0.5 if branch else 1.0)
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean of the gradients over all processes, in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


@dataclass
class Progress:
    """Where training stands; saved with the weights, so that it continues after an interruption."""

    path: Path
    settings: dict
    stage: int = 0
    step: int = 0
    steps: list[int] = field(default_factory=lambda: [0, 0])
    clip: dict = field(default_factory=dict)      # weights of stage 0, once done
    state: dict = field(default_factory=dict)     # weights and optimizer of the stage under way

    KEPT = ("settings", "stage", "step", "steps", "clip", "state")

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        saved = {key: getattr(self, key) for key in self.KEPT}
        partial = self.path.with_suffix(".partial")
        torch.save(saved, partial)
        partial.replace(self.path)

    def load(self) -> None:
        """Take up where an earlier run stopped, if there is one with the same settings."""
        if not self.path.exists():
            return
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            raise NanogapError(f"{self.path} is of a training with other settings ({saved['settings']}); "
                               "delete it to start anew")
        for key in self.KEPT:
            setattr(self, key, saved[key])

    def clip_vision(self) -> dict:
        return {k.removeprefix("vision_model."): v for k, v in self.clip.items() if k.startswith("vision_model.")}


def fit(name: str, model: nn.Module, loss_of: Callable[[Batch], Tensor], data: Scenes, rate: float,
        progress: Progress, minutes: float | None, workers: int) -> None:
    """AdamW with a short warm-up and a long linear decay; prints progress, saves as it goes.

    minutes: sets the number of steps by the time that the first ones take; None takes progress.steps
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if progress.state:
        model.load_state_dict(progress.state["model"])
        optimizer.load_state_dict(progress.state["optimizer"])
    start, begun, saved, average = progress.step, time.time(), time.time(), None
    batches = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers,
                                          sampler=range(start * world + rank, sys.maxsize, world))
    for step, batch in enumerate(batches, start):
        if step == TIMED and minutes is not None and start == 0:
            chosen = torch.tensor(int(60 * minutes / (time.time() - begun) * TIMED))
            if world > 1:
                dist.broadcast(chosen, 0)
            progress.steps[progress.stage] = int(chosen)
        steps = progress.steps[progress.stage]
        if step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 200, 1.0) * (1 - step / steps)
        loss = loss_of(batch)
        loss.backward()
        if world > 1:
            average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if rank == 0 and (step + 1) % 50 == 0:
            left = (time.time() - begun) / (step + 1 - start) * (steps - step - 1)
            print(f"{name}  step {step + 1}/{steps}  loss {average:.3f}  {left / 60:.0f} min to go", flush=True)
        if rank == 0 and time.time() - saved > SAVE_EVERY:
            progress.step, saved = step + 1, time.time()
            progress.state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            progress.save()
    progress.stage, progress.step, progress.state = progress.stage + 1, 0, {}


def sentences(seed: int) -> list[str]:
    """What the LLaVA tokenizer learns from: prompts and answers about a thousand scenes."""
    rng, said = random.Random(f"train {seed} words"), []
    for _ in range(1000):
        drawn = draw_scene(rng, 168)
        for expression, thing in drawn.expressions:
            box = box_to_square(drawn.things[thing].box, *drawn.image.size)
            said.append(BEFORE_IMAGE + AFTER_IMAGE.format(expression) + " " + format_box(box))
    return said


def captions(seed: int) -> list[str]:
    """What the CLIP tokenizer learns from."""
    rng = random.Random(f"train {seed} captions")
    return [caption(draw_scene(rng, 168).things, rng) for _ in range(1000)]


def train(out: Path, recipe: Recipe, device: torch.device, seed: int, steps: tuple[int, int] | None,
          minutes: float | None, workers: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    progress = Progress(out / "training.pt", {"seed": seed, "size": recipe.vision.image_size},
                        steps=list(steps or (recipe.clip_steps, recipe.llava_steps)))
    progress.load()
    torch.manual_seed(seed)
    words = train_clip_tokenizer(captions(seed), 256)
    clip = CLIP(recipe.vision, replace(recipe.text, vocab_size=words.get_vocab_size()), recipe.projection_dim)
    initialise(clip, recipe.vision.num_hidden_layers)
    clip.to(device)
    if progress.stage == 0:
        fit("CLIP ", clip, lambda batch: clip_loss(clip, words, batch, device),
            Scenes(f"{seed} clip", recipe.clip_images, recipe.vision.image_size), recipe.clip_rate,
            progress, minutes and 0.2 * minutes, workers)
        progress.clip = clip.state_dict()
        if rank == 0:
            save_clip(out / "clip_text", clip, words)
    clip.load_state_dict(progress.clip)

    tokenizer = train_llama_tokenizer(sentences(seed), 640)
    decoder = replace(recipe.decoder, vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64)
    model = Llava(LlavaConfig(decoder, recipe.vision, tokenizer.token_to_id(IMAGE)))
    model.tokenizer = tokenizer
    torch.manual_seed(seed + 1)
    initialise(model, recipe.decoder.num_hidden_layers)
    model.vision_tower.load_state_dict(progress.clip_vision())
    model.vision_tower.requires_grad_(False)
    model.to(device)
    fit("LLaVA", model, lambda batch: llava_loss(model, batch, device, recipe.questions),
        Scenes(f"{seed} llava", recipe.llava_images, recipe.vision.image_size), recipe.llava_rate,
        progress, minutes and 0.8 * minutes, workers)
    if rank == 0:
        save_llava(out, model)
        progress.path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nanogap.train", description="Train the mini model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; weights/mini is the shipped one")
    parser.add_argument("--minutes", type=float, help="as many steps as fit into so much time")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("CLIP", "LLAVA"), help="exactly so many steps")
    parser.add_argument("--recipe", choices=RECIPES, help="default: gpu where there is one, else cpu")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw (default: none but this)")
    args = parser.parse_args()
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    recipe = RECIPES[args.recipe or ("gpu" if device.type == "cuda" else "cpu")]
    train(args.out, recipe, device, args.seed, args.steps, args.minutes, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
