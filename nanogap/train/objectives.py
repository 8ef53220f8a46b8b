"""What the mini model is trained to do: the losses of CLIP and of LLaVA, and the scenes they use.

In:  a batch of drawn scenes.  Out: a loss to minimise.

CLIP (arXiv 2103.00020) learns which captions are true of which scene, LLaVA (arXiv 2304.08485) the
next token of the answers, of several turns as in its own data.  Nothing here knows of pruning: in
training no token is dropped and no position ID changed.
Letters: B images, N visual tokens of an image, P tokens before them, Q conversations, T tokens,
V vocabulary, M tokens of all answers.
"""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanogap.clip import CLIP
from nanogap.models import VLM
from nanogap.prompt import DESCRIBE, encode
from nanogap.train.scenes import COLOURS, KINDS, Scene, Thing, caption, deal, draw_scene, named

# ----- data ---------------------------------------------------------------------------------------

Draw = Callable[[random.Random, int], Scene]
Prepare = Callable[[Image.Image], Tensor]
Ask = Callable[[list[Scene], random.Random], Any]
Batch = tuple[list[Tensor], list[Scene], Any]


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

    A split of `nanogap.train.scenes` is one word, so these seeds, of several words, are never a split's.
    """

    def __init__(self, seed: str, images: int, image_size: int, prepare: Prepare, ask: Ask,
                 draw: Draw = draw_scene) -> None:
        self.seed = seed
        self.images = images
        self.image_size = image_size
        self.prepare = prepare        # a model's pixel_values, on the CPU
        self.ask = ask                # what is said of the scenes: captions or conversations
        self.draw = draw

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"train {self.seed} {index}")
        scenes = []
        pixels = []
        for _ in range(self.images):
            # pictures are as large as the model sees them, or twice as large
            scene = self.draw(rng, rng.choice((1, 2)) * self.image_size)
            pixels.append(self.prepare(scene.image))                          # (views, 3, S, S)
            # from here on only the size of a picture is needed: workers need not send it
            scenes.append(replace(scene, image=Image.new("1", scene.image.size)))
        return pixels, scenes, self.ask(scenes, rng)


# ----- CLIP ---------------------------------------------------------------------------------------


def contents(things: Iterable[Thing]) -> Counter:
    """How many there are of each kind and colour.

    A caption is true of an image that holds at least what the caption names.
    """
    return Counter((thing.kind, thing.colour) for thing in things)


SINGLES = [Thing(kind, colour, (0.0, 0.0, 1.0, 1.0)) for kind in KINDS for colour in COLOURS]


def captions(scenes: list[Scene], rng: random.Random) -> tuple[list[str], list[str]]:
    """A caption for each scene, and one for each thing that there can be."""
    return ([caption(scene.things, rng) for scene in scenes],
            [caption([thing], rng) for thing in SINGLES])


def clip_loss(clip: CLIP, tokenizer: Tokenizer, batch: Batch, device: torch.device) -> Tensor:
    """CLIP's symmetric contrastive loss between B images and C captions that may be true of them.

    There is a caption for each image, which names everything in it, and one for each thing that
    there can be ("a red car").  Several are true of an image, so the targets are equal shares.
    """
    pixels, scenes, (wholes, singles) = batch
    held = [contents(scene.things) for scene in scenes]
    claims = held + [contents([thing]) for thing in SINGLES]
    truth = torch.tensor([[float(claim <= have) for claim in claims] for have in held])
    truth = truth.to(device)                                                  # (B, C)
    texts = torch.cat([text_features(clip, tokenizer, said, device)
                       for said in (wholes, singles)])                        # (C, E)
    first_views = torch.cat([views[:1] for views in pixels])                  # (B, 3, S, S)
    images = clip.image_features(first_views.to(device))                      # (B, E)
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
    later: float = 0.0             # share of the questions that come after one or two others
    hundredths: float = 1.0        # of boxes, and what is smaller
    find: float = 1.0              # the last token of a find; those before it weigh nothing
    word: float = 1.0              # tokens of short answers; all others weigh 1

    def share(self, processes: int) -> "Mixture":
        """What each of several processes asks of it."""
        boxes, finds, words, descriptions = (math.ceil(count / processes) for count in (
            self.boxes, self.finds, self.words, self.descriptions))
        return replace(self, boxes=boxes, finds=finds, words=words, descriptions=descriptions)


@dataclass(frozen=True)
class Turn:
    """A question about one of the images, and the tokens of its answer."""

    kind: str
    image: int
    question: str
    answer: list[int]              # with the end token, if whole
    weights: list[float]           # of these in the loss


@dataclass(frozen=True)
class Conversation:
    """One or more turns as the model is fed them."""

    kind: str                      # that of its only turn, or "turns"
    image: int
    tokens: list[int]              # (T,) with one image token
    weights: list[float]           # (T,) 0 for what is no answer


def conversations(model: VLM, mixture: Mixture, scenes: list[Scene],
                  rng: random.Random) -> list[Conversation]:
    """Every question once, alone or after others about the same image."""
    asked = list(chain(box_turns(model, scenes, mixture, rng),
                       word_turns(model, scenes, mixture, rng)))
    said = []
    for turn in asked:
        earlier: list[Turn] = []
        if rng.random() < mixture.later:
            others = [other for other in asked
                      if other.image == turn.image and other.kind != "find" and other is not turn]
            earlier = rng.sample(others, min(rng.randint(1, 2), len(others)))
        said.append(converse(model, [*earlier, turn]))
    return said


def converse(model: VLM, turns: Sequence[Turn]) -> Conversation:
    """Turns about an image, one behind the other in the form of the model's template."""
    tokens: list[int] = []
    weights: list[float] = []
    for turn in turns:
        if tokens:
            asked = encode(model.tokenizer, model.template.follow(turn.question))
        else:
            asked = model.encode_question(turn.question).tolist()
        tokens += asked + turn.answer
        weights += [0.0] * len(asked) + turn.weights
    return Conversation(turns[0].kind if len(turns) == 1 else "turns", turns[0].image, tokens,
                        weights)


def box_turns(model: VLM, scenes: list[Scene], mixture: Mixture,
              rng: random.Random) -> Iterator[Turn]:
    """Questions for boxes, and for the first tokens of boxes."""
    places = [(i, expression, thing) for i, scene in enumerate(scenes)
              for expression, thing in scene.expressions]
    for kind, count in (("box", mixture.boxes), ("find", mixture.finds)):
        for i, expression, thing in rng.sample(places, min(count, len(places))):
            box = model.frame.from_pixels(scenes[i].things[thing].box, *scenes[i].image.size)
            answer = encode(model.tokenizer, model.answer(box)) + [model.config.eos_token]
            places_of = decimal_places([model.tokenizer.decode([token]) for token in answer])
            weights = [mixture.hundredths if place > 1 else 1.0 for place in places_of]
            if kind == "find":
                tenth = places_of.index(1)
                answer, weights = answer[:tenth + 1], [0.0] * tenth + [mixture.find]
            yield Turn(kind, i, model.question(expression), answer, weights)


def decimal_places(tokens: Sequence[str]) -> list[int]:
    """Which place of a number each token of a box is: 1 for tenths, 2 hundredths; 0 for the rest.

    In "[0.12" these are the digits behind the point, in "{<12>" (of a hundred) both; the only digit
    of "{<7>" counts as tenths.
    """
    text = "".join(tokens)
    places = [0] * (len(text) + 1)
    for number in re.finditer(r"(?:\d+\.)?(\d+)", text):
        for place, at in enumerate(range(*number.span(1)), 1):
            places[at] = place
    return [places[at] for at in accumulate(map(len, tokens[:-1]), initial=0)]


def word_turns(model: VLM, scenes: list[Scene], mixture: Mixture,
               rng: random.Random) -> Iterator[Turn]:
    """Questions that a word answers, and for descriptions."""
    short = [(i, question, word) for i, scene in enumerate(scenes)
             for question, word in short_questions(scene, rng)]
    said = [("word", i, question, word, mixture.word)
            for i, question, word in rng.sample(short, min(mixture.words, len(short)))]
    said += [("description", i, DESCRIBE, caption(scene.things, rng), 1.0)
             for i, scene in enumerate(scenes[:mixture.descriptions])]
    for kind, i, question, text, weight in said:
        answer = encode(model.tokenizer, text) + [model.config.eos_token]
        yield Turn(kind, i, question, answer, [weight] * len(answer))


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


def llava_loss(model: VLM, batch: Batch, device: torch.device) -> Tensor:
    """Next-token cross-entropy on the answers, the weighted mean over all their tokens."""
    pixels, scenes, said = batch
    with torch.no_grad():                                                     # the tower is frozen
        seen = [model.encode_pixels(views.to(device), *scene.image.size)
                for views, scene in zip(pixels, scenes, strict=True)]
    visual = [model.fed(image.features, torch.arange(image.n_visual), image) for image in seen]
    read = read_sharing if can_share(model, said) else read_whole
    logits, targets, weights = read(model, said, visual)
    losses = F.cross_entropy(logits, targets, reduction="none")               # (M,)
    return (losses * weights).sum() / weights.sum()


def read_whole(model: VLM, said: Sequence[Conversation],
               visual: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Run each conversation as it would run alone, all side by side.

    visual:  of each image, as the decoder is fed them (N, C')
    returns: of the tokens of all answers, the logits (M, V), which tokens they should be (M,), and
             what they weigh (M,)
    """
    image_token, decoder = model.config.image_token, model.language_model.model
    rows, row_weights = [], []
    for one in said:
        at, N = one.tokens.index(image_token), len(visual[one.image])
        rows.append(one.tokens[:at] + N * [image_token] + one.tokens[at + 1:])
        row_weights.append(one.weights[:at] + N * [0.0] + one.weights[at + 1:])
    tokens, weights = padded(rows, model.device), padded(row_weights, model.device)   # (Q, T)
    fed = tokens[:, :-1]
    in_image = (fed == image_token)[..., None]                                # (Q, T - 1, 1)
    x = decoder.embed_tokens(fed).masked_scatter(
        in_image, torch.cat([visual[one.image] for one in said]))             # (Q, T - 1, C')
    hidden = decoder(x, torch.arange(fed.shape[1], device=model.device))
    wanted = weights[:, 1:] > 0
    return (model.language_model.logits(hidden[wanted]), tokens[:, 1:][wanted],
            weights[:, 1:][wanted])


def padded(rows: Sequence[list], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, with zeros behind them."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


# ----- the same, faster on a CPU ------------------------------------------------------------------


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


def can_share(model: VLM, said: Sequence[Conversation]) -> bool:
    """Whether all that is said begins alike, up to the image.

    On a GPU a step costs by the number of operations, and whole conversations take fewest.
    """
    before = {tuple(one.tokens[:one.tokens.index(model.config.image_token)]) for one in said}
    return model.device.type == "cpu" and len(before) == 1


def read_sharing(model: VLM, said: Sequence[Conversation],
                 visual: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `read_whole` returns, in another order; what several sequences share is run once.

    Every conversation sees only the system sentence, its image and itself, at the position IDs that
    it would have alone.  So the sequences form a tree, and each level of it is run once:
    [system sentence] -> [image] -> ["Please provide ... describes:"] -> [expression, answer].
    """
    decoder, device = model.language_model.model, model.device
    P = said[0].tokens.index(model.config.image_token)
    system = torch.tensor(said[0].tokens[:P], device=device)                  # (P,)
    below_system = SharedPast(len(decoder.layers))
    decoder(decoder.embed_tokens(system)[None], torch.arange(P, device=device), below_system)
    read = []
    for N in dict.fromkeys(map(len, visual)):                                 # images of one length
        images = [i for i, features in enumerate(visual) if len(features) == N]
        below_image = below_system.below(torch.zeros(len(images), dtype=torch.long, device=device))
        x = torch.stack([visual[i] for i in images])                          # (B, N, C')
        decoder(x, P + torch.arange(N, device=device), below_image)
        about = [replace(one, image=images.index(one.image)) for one in said if one.image in images]
        for kind in dict.fromkeys(one.kind for one in about):
            of_kind = [one for one in about if one.kind == kind]
            read.append(read_kind(model, of_kind, below_image, P, P + N))
    logits, targets, weights = zip(*read, strict=True)
    return torch.cat(logits), torch.cat(targets), torch.cat(weights)


def first_weighted(one: Conversation) -> int:
    """Where in its tokens the first stands that counts in the loss."""
    return next(at for at, weight in enumerate(one.weights) if weight > 0)


def read_kind(model: VLM, said: Sequence[Conversation], past: SharedPast, P: int,
              start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Conversations of one kind below their images; see `read_whole` for what it returns.

    past: the images, and the P tokens before them; start: the position ID that comes next
    """
    decoder, device = model.language_model.model, model.device
    # what all questions begin with is run once for each image; the token before the first one that
    # counts must stay in the rest, for its logits foretell it (commonprefix takes any sequences)
    texts = [one.tokens[P + 1:] for one in said]
    shared = min(len(os.path.commonprefix(texts)), *(first_weighted(one) - P - 2 for one in said))
    head = torch.tensor(texts[0][:shared], device=device)                     # (shared,)
    below_head = past.below(torch.arange(past.sequences, device=device))
    x = decoder.embed_tokens(head).expand(past.sequences, -1, -1)             # (B, shared, C')
    decoder(x, start + torch.arange(shared, device=device), below_head)
    # and then the rest of each
    tokens = padded([text[shared:] for text in texts], device)                # (Q, T)
    weights = padded([one.weights[P + 1 + shared:] for one in said], device)
    at = torch.arange(tokens.shape[1] - 1, device=device)
    about = torch.tensor([one.image for one in said], device=device)
    hidden = decoder(decoder.embed_tokens(tokens[:, :-1]), start + shared + at,
                     below_head.below(about))                                 # (Q, T - 1, C')
    wanted = weights[:, 1:] > 0
    return (model.language_model.logits(hidden[wanted]), tokens[:, 1:][wanted],
            weights[:, 1:][wanted])
