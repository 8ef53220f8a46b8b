"""What the mini model is trained to do: the losses of both stages, and the scenes they are taken on.

In:  a batch of drawn scenes.  Out: a loss to go down.

Stage 0, CLIP (arXiv 2103.00020): which captions are true of which scene.  Stage 1, LLaVA
(arXiv 2304.08485): the next token of the answers.  Nothing in here knows of pruning: no token is ever
dropped and no position ID changed in training.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.clip import CLIP
from nanogap.image import box_to_square, to_pixel_values
from nanogap.models.llava import Llava
from nanogap.prompt import BEFORE_IMAGE, DESCRIBE, encode, encode_prompt, format_box, where_is
from nanogap.scenes import COLOURS, KINDS, Scene, Thing, caption, deal, draw_scene, named

# ----- data ---------------------------------------------------------------------------------------

Draw = Callable[[random.Random, int], Scene]


def draw_single(rng: random.Random, size: int) -> Scene:
    """Draw one thing."""
    return draw_scene(rng, size, deal(rng)[:1])


def draw_alike(rng: random.Random, size: int) -> Scene:
    """Draw two to four things, four times in five of one kind, else of one colour, and name all in full."""
    count = rng.randint(2, 4)
    kinds, colours = rng.sample(list(KINDS), count), rng.sample(list(COLOURS), count)
    alike = kinds if rng.random() < 0.8 else colours
    alike[1:] = alike[:1] * (count - 1)
    drawn = draw_scene(rng, size, list(zip(kinds, colours)))
    names = [(f"the {named(thing.kind, thing.colour)}", i) for i, thing in enumerate(drawn.things)]
    return replace(drawn, expressions=tuple(names))


def draw_often_alike(rng: random.Random, size: int) -> Scene:
    """Draw things that are alike two times in three, else two to seven of any kind and colour."""
    return draw_alike(rng, size) if rng.random() < 2 / 3 else draw_scene(rng, size)


class Scenes(torch.utils.data.Dataset):
    """Training batches by step: item `step` is a list of freshly drawn scenes, ready for the model.

    A split of `nanogap.scenes` is one word, so these seeds, of several, are never a split's.
    """

    def __init__(self, seed: str, images: int, image_size: int, draw: Draw = draw_scene) -> None:
        self.seed, self.images, self.image_size, self.draw = seed, images, image_size, draw

    def __getitem__(self, index: int) -> "Batch":
        rng = random.Random(f"train {self.seed} {index}")
        # pictures are drawn just as large as the model sees them, or twice as large
        scenes = [self.draw(rng, rng.choice((1, 2)) * self.image_size) for _ in range(self.images)]
        pixels = torch.cat([to_pixel_values(scene.image, self.image_size) for scene in scenes])
        # of the pictures only the size is asked from here on: workers need not send them
        scenes = [replace(scene, image=Image.new("1", scene.image.size)) for scene in scenes]
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
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held])
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

    siblings, mask = 1, None                                                  # the order says who sees whom

    def __init__(self, past: "SharedPast | None" = None, parents: Tensor | None = None) -> None:
        self.past, self.parents = past, parents
        self.rows: list[tuple[Tensor, Tensor]] = []                           # per layer (B, G, R, D)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.past is not None:
            old_k, old_v = self.past.rows[layer]
            k, v = torch.cat([old_k[self.parents], k], 2), torch.cat([old_v[self.parents], v], 2)
        self.rows.append((k, v))
        return k, v


@dataclass(frozen=True)
class Asked:
    """How many questions a step asks at most, and what tokens of the answers weigh in the loss."""

    boxes: int                     # where something is
    finds: int = 0                 # the same, but the answer stops at "[0.1": which thing it is
    words: int = 0                 # that a word answers
    descriptions: int = 8          # of an image
    hundredths: float = 1.0        # of boxes
    find: float = 1.0              # the last token of a find; those before it weigh nothing
    word: float = 1.0              # tokens of short answers; all others weigh 1


@dataclass
class Task:
    """Questions of one kind about B images: what stands after each image, what is to be said."""

    weights: tuple[float, ...]     # of an answer's tokens in the loss, from the first and over again
    prompts: list[list[int]] = field(default_factory=list)       # Q times the text after the image
    answers: list[list[int]] = field(default_factory=list)       # Q times the answer; if whole, with its end
    about: list[int] = field(default_factory=list)               # which of the images

    def token_weights(self) -> Tensor:
        """Of all tokens of the answers (M,)."""
        return torch.tensor([weight for answer in self.answers
                             for weight, _ in zip(cycle(self.weights), answer)])


def short_questions(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield questions that a word answers, such as LLaVA-1.5's mixture has them (VQAv2, GQA)."""
    for expression, thing in scene.expressions:
        if not {*COLOURS} & {*expression.split()}:
            yield f"What colour is the {expression.removeprefix('the ')}?", scene.things[thing].colour
    there = [(thing.kind, thing.colour) for thing in scene.things]
    for kind, colour in there:
        if [c for _, c in there].count(colour) == 1:
            yield f"What is {colour}?", kind
        other_colour, other_kind = (kind, rng.choice([*COLOURS])), (rng.choice([*KINDS]), colour)
        asked = rng.choice([(kind, colour), (kind, colour), other_colour, other_kind])
        one = caption([Thing(*asked, (0.0, 0.0, 1.0, 1.0))], rng)                 # "a red car"
        yield f"Is there {one}?", "yes" if asked in there else "no"


def tasks(model: Llava, scenes: list[Scene], asked: Asked, rng: random.Random) -> list[Task]:
    """Questions for boxes, for their first tenths, for words, and for descriptions of the first scenes."""
    c, words, descriptions = model.config, Task((asked.word,)), Task((1.0,))
    finds = Task((0.0, 0.0, 0.0, asked.find))                                 # "[0.1"
    boxes = Task((1.0, 1.0, 1.0, 1.0, asked.hundredths, 1.0))                 # "[0.12, 0.34, 0.56, 0.78]"

    def add(task: Task, question: str, answer: str, i: int, tokens: int | None = None) -> None:
        prompt = encode_prompt(model.tokenizer, question, c.bos_token, c.image_token)
        task.prompts.append(prompt[prompt.index(c.image_token) + 1:])
        task.answers.append((encode(model.tokenizer, answer) + [c.eos_token])[:tokens])
        task.about.append(i)

    every = [(i, *told) for i, scene in enumerate(scenes) for told in scene.expressions]
    for task, count, tokens in ((boxes, asked.boxes, None), (finds, asked.finds, 4)):
        for i, expression, thing in rng.sample(every, min(count, len(every))):
            box = box_to_square(scenes[i].things[thing].box, *scenes[i].image.size)
            add(task, where_is(expression), format_box(box), i, tokens)
    every = [(i, *told) for i, scene in enumerate(scenes) for told in short_questions(scene, rng)]
    for i, question, word in rng.sample(every, min(asked.words, len(every))):
        add(words, question, word, i)
    for i, scene in enumerate(scenes[:asked.descriptions]):
        add(descriptions, DESCRIBE, caption(scene.things, rng), i)
    return [task for task in (boxes, finds, words, descriptions) if task.about]


def read_answers(model: Llava, task: Task, past: SharedPast, start: int) -> tuple[Tensor, Tensor]:
    """The logits (M, V) of all tokens of the answers, and which tokens they should be (M,).

    past: the images, and what stands before them; start: the position ID that comes next
    """
    decoder, device = model.language_model.model, model.device
    shared = len(os.path.commonprefix([prompt[:-1] for prompt in task.prompts]))
    head = torch.tensor(task.prompts[0][:shared], device=device)
    below_head = SharedPast(past, torch.arange(len(past.rows[0][0]), device=device))
    decoder(decoder.embed_tokens(head).expand(len(past.rows[0][0]), -1, -1),
            start + torch.arange(shared, device=device), below_head)

    rows = [prompt[shared:] + answer for prompt, answer in zip(task.prompts, task.answers)]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    first = torch.tensor([len(prompt) - shared for prompt in task.prompts], device=device)
    last = torch.tensor([len(row) for row in rows], device=device)
    at = torch.arange(1, tokens.shape[1], device=device)
    in_answer = (at >= first[:, None]) & (at < last[:, None])                 # (Q, T - 1)
    below_questions = SharedPast(below_head, torch.tensor(task.about, device=device))
    hidden = decoder(decoder.embed_tokens(tokens[:, :-1]), start + shared + at - 1, below_questions)
    return model.language_model.lm_head(hidden[in_answer]).float(), tokens[:, 1:][in_answer]


def llava_loss(model: Llava, batch: Batch, device: torch.device, asked: Asked) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens.

    Every question sees the system sentence, its image and itself only, at the position IDs that it would
    have alone; so the sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    """
    pixels, scenes, rng = batch
    decoder = model.language_model.model
    with torch.no_grad():
        features = model.vision_tower(pixels.to(device)).features             # (B, N, C), frozen
    system = torch.tensor(encode(model.tokenizer, BEFORE_IMAGE), device=device)
    system = torch.cat([system.new_tensor([model.config.bos_token]), system])
    P, N = len(system), features.shape[1]
    below_system = SharedPast()
    decoder(decoder.embed_tokens(system)[None], torch.arange(P, device=device), below_system)
    below_image = SharedPast(below_system, torch.zeros(len(scenes), dtype=torch.long, device=device))
    decoder(model.multi_modal_projector(features), P + torch.arange(N, device=device), below_image)
    questions = tasks(model, scenes, asked, rng)
    logits, targets = zip(*(read_answers(model, task, below_image, P + N) for task in questions))
    weights = torch.cat([task.token_weights() for task in questions]).to(device)
    losses = F.cross_entropy(torch.cat(logits), torch.cat(targets), reduction="none")
    return (losses * weights).sum() / weights.sum()
