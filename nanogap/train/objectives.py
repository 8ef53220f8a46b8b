"""What the mini model is trained to do: the losses of CLIP and of LLaVA, and the scenes they use.

In:  a batch of drawn scenes.  Out: a loss to minimise.

CLIP (arXiv 2103.00020) learns which captions are true of which scene, LLaVA (arXiv 2304.08485) the
next token of the answers.  Nothing here knows of pruning: in training no token is dropped and no
position ID changed.
Letters: B images, N visual tokens of each, P tokens before them, Q questions of one kind, T tokens,
V vocabulary, M tokens of all answers.
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
from nanogap.image import Pad, to_pixel_values
from nanogap.models import VLM
from nanogap.prompt import DESCRIBE, encode
from nanogap.scenes import COLOURS, KINDS, Scene, Thing, caption, deal, draw_scene, named

# ----- data ---------------------------------------------------------------------------------------

Draw = Callable[[random.Random, int], Scene]
Batch = tuple[Tensor, list[Scene], random.Random]
PADDED = Pad()


def draw_single(rng: random.Random, size: int) -> Scene:
    """Draw one thing."""
    return draw_scene(rng, size, deal(rng)[:1])


def draw_alike(rng: random.Random, size: int) -> Scene:
    """Draw two to four things that are alike, each named by kind and colour.

    Four times in five they are of one kind, else of one colour.
    """
    count = rng.randint(2, 4)
    kinds = rng.sample(list(KINDS), count)
    colours = rng.sample(list(COLOURS), count)
    if rng.random() < 0.8:
        kinds = kinds[:1] * count
    else:
        colours = colours[:1] * count
    drawn = draw_scene(rng, size, list(zip(kinds, colours, strict=True)))
    names = [f"the {named(thing.kind, thing.colour)}" for thing in drawn.things]
    return replace(drawn, expressions=tuple((name, i) for i, name in enumerate(names)))


def draw_often_alike(rng: random.Random, size: int) -> Scene:
    """Draw things that are alike two times in three, else two to seven of any kind and colour."""
    return draw_alike(rng, size) if rng.random() < 2 / 3 else draw_scene(rng, size)


class Scenes(torch.utils.data.Dataset):
    """Training batches by step: item `step` is a list of freshly drawn scenes, ready for the model.

    A split of `nanogap.scenes` is one word, so these seeds, of several words, are never a split's.
    """

    def __init__(self, seed: str, images: int, image_size: int, draw: Draw = draw_scene,
                 frame: Pad = PADDED) -> None:
        self.seed = seed
        self.images = images
        self.image_size = image_size
        self.draw = draw
        self.frame = frame

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"train {self.seed} {index}")
        scenes = []
        pixels = []
        for _ in range(self.images):
            # pictures are as large as the model sees them, or twice as large
            scene = self.draw(rng, rng.choice((1, 2)) * self.image_size)
            pixels.append(to_pixel_values(self.frame.fit(scene.image, self.image_size)))
            # from here on only the size of a picture is needed: workers need not send it
            scenes.append(replace(scene, image=Image.new("1", scene.image.size)))
        return torch.cat(pixels), scenes, rng                                 # pixels (B, 3, S, S)


# ----- CLIP ---------------------------------------------------------------------------------------


def contents(things: Iterable[Thing]) -> Counter:
    """How many there are of each kind and colour.

    A caption is true of an image that holds at least what the caption names.
    """
    return Counter((thing.kind, thing.colour) for thing in things)


SINGLES = [Thing(kind, colour, (0.0, 0.0, 1.0, 1.0)) for kind in KINDS for colour in COLOURS]


def clip_loss(clip: CLIP, tokenizer: Tokenizer, batch: Batch, device: torch.device) -> Tensor:
    """CLIP's symmetric contrastive loss between B images and C captions that may be true of them.

    There is a caption for each image, which names everything in it, and one for each thing that
    there can be ("a red car").  Several are true of an image, so the targets are equal shares.
    """
    pixels, scenes, rng = batch
    wholes = [caption(scene.things, rng) for scene in scenes]
    singles = [caption([thing], rng) for thing in SINGLES]
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held])
    truth = truth.to(device)                                                  # (B, C)
    texts = torch.cat([text_features(clip, tokenizer, captions, device)
                       for captions in (wholes, singles)])                    # (C, E)
    images = clip.image_features(pixels.to(device))                           # (B, E)
    logits = clip.logit_scale.exp() * images @ texts.T                        # (B, C)
    by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
    true = truth.sum(0) > 0                                                   # (C,) of any image
    by_text = F.cross_entropy(logits.T[true], (truth / truth.sum(0)).T[true])
    return (by_image + by_text) / 2


def text_features(clip: CLIP, tokenizer: Tokenizer, texts: list[str],
                  device: torch.device) -> Tensor:
    """Texts, padded to the longest, in CLIP's space of images and texts (len(texts), E)."""
    ids = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
    return clip.text_features(torch.tensor(ids, device=device))


# ----- what LLaVA is asked ------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """How many questions a step asks at most, and what the answers' tokens weigh in the loss."""

    boxes: int                     # where something is
    finds: int = 0                 # the same, but the answer stops at "[0.1": which thing it is
    words: int = 0                 # answered with a word
    descriptions: int = 8          # of an image
    hundredths: float = 1.0        # of boxes
    find: float = 1.0              # the last token of a find; those before it weigh nothing
    word: float = 1.0              # tokens of short answers; all others weigh 1


@dataclass
class Task:
    """Q questions of one kind about B images."""

    weights: tuple[float, ...]     # of an answer's tokens in the loss; they repeat from the first
    prompts: list[list[int]] = field(default_factory=list)       # the text after the image
    answers: list[list[int]] = field(default_factory=list)       # with the end token, if whole
    about: list[int] = field(default_factory=list)               # which of the images

    def token_weights(self) -> Tensor:
        """The weights of all tokens of the answers (M,)."""
        weights = []
        for answer in self.answers:
            weights += [weight for weight, _ in zip(cycle(self.weights), answer, strict=False)]
        return torch.tensor(weights)

    def add(self, model: VLM, question: str, answer: str, image: int,
            tokens: int | None = None) -> None:
        """Ask about an image; `tokens` cuts the answer off."""
        c = model.config
        prompt = model.template.encode(model.tokenizer, question, c.bos_token, c.image_token)
        said = encode(model.tokenizer, answer) + [c.eos_token]
        self.prompts.append(prompt[prompt.index(c.image_token) + 1:])
        self.answers.append(said[:tokens])
        self.about.append(image)


def tasks(model: VLM, scenes: list[Scene], mixture: Mixture, rng: random.Random) -> list[Task]:
    """Questions for boxes, for their first tenths, for words, and for descriptions."""
    boxes = Task((1.0, 1.0, 1.0, 1.0, mixture.hundredths, 1.0))   # "[0.12, 0.34, 0.56, 0.78]"
    finds = Task((0.0, 0.0, 0.0, mixture.find))                   # "[0.1"
    words = Task((mixture.word,))
    descriptions = Task((1.0,))
    places = [(i, expression, thing) for i, scene in enumerate(scenes)
              for expression, thing in scene.expressions]
    for task, count, tokens in ((boxes, mixture.boxes, None), (finds, mixture.finds, 4)):
        for i, expression, thing in rng.sample(places, min(count, len(places))):
            picture = scenes[i].image
            box = model.frame.from_pixels(scenes[i].things[thing].box, *picture.size)
            answer = model.box_format.say(box)
            task.add(model, model.question(expression), answer, i, tokens)
    short = [(i, question, word) for i, scene in enumerate(scenes)
             for question, word in short_questions(scene, rng)]
    for i, question, word in rng.sample(short, min(mixture.words, len(short))):
        words.add(model, question, word, i)
    for i, scene in enumerate(scenes[:mixture.descriptions]):
        descriptions.add(model, DESCRIBE, caption(scene.things, rng), i)
    return [task for task in (boxes, finds, words, descriptions) if task.about]


def short_questions(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield questions with one word for an answer, as in LLaVA-1.5's own mixture (VQAv2, GQA)."""
    for expression, thing in scene.expressions:
        if not {*COLOURS} & {*expression.split()}:
            question = f"What colour is the {expression.removeprefix('the ')}?"
            yield question, scene.things[thing].colour
    there = [(thing.kind, thing.colour) for thing in scene.things]
    for kind, colour in there:
        if [c for _, c in there].count(colour) == 1:
            yield f"What is {colour}?", kind
        other_colour = (kind, rng.choice([*COLOURS]))
        other_kind = (rng.choice([*KINDS]), colour)
        asked = rng.choice([(kind, colour), (kind, colour), other_colour, other_kind])
        one = caption([Thing(*asked, (0.0, 0.0, 1.0, 1.0))], rng)             # "a red car"
        yield f"Is there {one}?", "yes" if asked in there else "no"


# ----- LLaVA --------------------------------------------------------------------------------------


class SharedPast:
    """Rows of a prefix that several sequences continue; unlike a KVCache's, with gradients.

    All questions about an image share the image, and all images share the system sentence: each is
    run once.  Sequence i of the new batch continues sequence `parents[i]` of the old one.
    """

    lengths: list[int]   # rows in use, per layer

    def __init__(self, layers: int, past: "SharedPast | None" = None,
                 parents: Tensor | None = None) -> None:
        self.past = past
        self.parents = parents
        self.lengths = [0] * layers
        if past is not None:
            self.lengths = list(past.lengths)
        self.rows: list[tuple[Tensor, Tensor]] = []   # (B, G, R, D) each, per layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, D) behind the rows of the past; return all rows (B, G, R, D)."""
        if self.past is not None:
            old_k, old_v = self.past.rows[layer]
            k = torch.cat([old_k[self.parents], k], dim=2)                    # (B, G, R, D)
            v = torch.cat([old_v[self.parents], v], dim=2)
        self.rows.append((k, v))
        self.lengths[layer] = k.shape[2]
        return k, v

    def below(self, parents: Tensor) -> "SharedPast":
        """A past for sequences that continue this one."""
        return SharedPast(len(self.lengths), self, parents)

    @property
    def sequences(self) -> int:
        """B: how many sequences there are."""
        return len(self.rows[0][0])


def read_answers(model: VLM, task: Task, past: SharedPast, start: int) -> tuple[Tensor, Tensor]:
    """The logits (M, V) of all tokens of the answers, and which tokens they should be (M,).

    past: the images, and what stands before them; start: the position ID that comes next
    """
    decoder, device = model.language_model.model, model.device
    # what all questions begin with is run once for each image
    shared = len(os.path.commonprefix([prompt[:-1] for prompt in task.prompts]))
    head = torch.tensor(task.prompts[0][:shared], device=device)              # (shared,)
    below_head = past.below(torch.arange(past.sequences, device=device))
    x = decoder.embed_tokens(head).expand(past.sequences, -1, -1)             # (B, shared, C)
    decoder(x, start + torch.arange(shared, device=device), below_head)
    # and then the rest of each question, with its answer
    rows = [prompt[shared:] + answer
            for prompt, answer in zip(task.prompts, task.answers, strict=True)]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    tokens = tokens.to(device)                                                # (Q, T)
    first = torch.tensor([len(prompt) - shared for prompt in task.prompts], device=device)
    last = torch.tensor([len(row) for row in rows], device=device)
    at = torch.arange(1, tokens.shape[1], device=device)                      # (T - 1,)
    in_answer = (at >= first[:, None]) & (at < last[:, None])                 # (Q, T - 1)
    below_questions = below_head.below(torch.tensor(task.about, device=device))
    x = decoder.embed_tokens(tokens[:, :-1])                                  # (Q, T - 1, C)
    hidden = decoder(x, start + shared + at - 1, below_questions)             # (Q, T - 1, C)
    return model.language_model.logits(hidden[in_answer]), tokens[:, 1:][in_answer]


def llava_loss(model: VLM, batch: Batch, device: torch.device, mixture: Mixture) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens.

    Every question sees only the system sentence, its image and itself, at the position IDs that it
    would have alone.  So the sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    """
    pixels, scenes, rng = batch
    decoder = model.language_model.model
    with torch.no_grad():                                                     # the tower is frozen
        _, hidden = model.get_submodule("vision_tower")(pixels.to(device))    # (B, 1 + N, C)
        features = hidden[:, 1:]                                              # (B, N, C)
    words = [model.config.bos_token, *encode(model.tokenizer, model.template.before)]
    system = torch.tensor(words, device=device)                               # (P,)
    P, N = len(system), features.shape[1]
    below_system = SharedPast(len(decoder.layers))
    decoder(decoder.embed_tokens(system)[None], torch.arange(P, device=device), below_system)
    below_image = below_system.below(torch.zeros(len(scenes), dtype=torch.long, device=device))
    decoder(model.project(features), P + torch.arange(N, device=device), below_image)
    questions = tasks(model, scenes, mixture, rng)
    read = [read_answers(model, task, below_image, P + N) for task in questions]
    logits = torch.cat([logits for logits, _ in read])                        # (M, V)
    targets = torch.cat([targets for _, targets in read])                     # (M,)
    weights = torch.cat([task.token_weights() for task in questions]).to(device)
    losses = F.cross_entropy(logits, targets, reduction="none")               # (M,)
    return (losses * weights).sum() / weights.sum()
