"""Our model against transformers': from stored numbers everywhere, and live where it is installed.

"The same" means that no logit differs by more than 2e-5 of the largest one, in float32, and that
the greedy words are the same.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import nanogap
from nanogap import gap, llama
from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.ground import greedy
from nanogap.image import Pad, to_pixel_values
from nanogap.models import VLM
from nanogap.prune import Kept
from nanogap.train.losses import CLIP, save_clip
from nanogap.train.scenes import scene
from nanogap.train.untrained import train_clip_tokenizer
from tests.reference.make_next import noise
from tests.reference.make_reference import (
    CASES,
    KEEP,
    NEW_TOKENS,
    OUTPUTS,
    POSITIONS,
    PROMPT,
    PRUNED,
    VOCABULARY,
    expand,
    load_theirs,
    pixel_values,
    their_answer,
    their_generate,
    their_pruned_answer,
    their_pruned_prompt,
)
from tests.tiny import draw, tiny_config, write_checkpoint

Answer = tuple[Tensor, list[int]]     # logits (T, V) of a whole prompt, and the greedy words
Layout = tuple[list[int], list[int]]  # which visual tokens are fed, in order, and all position IDs

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights" / "mini"
PUBLISHED = Path(os.environ.get("NANOGAP_PUBLISHED", ROOT / "../shared/published/llava-1.5-7b-hf"))
TOLERANCE = 2e-5

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed")
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "tokenizer.json").is_file(),
    reason="set NANOGAP_PUBLISHED to a folder with the text files of llava-hf/llava-1.5-7b-hf")


def live(test: Callable) -> Callable:
    """A test that asks transformers, whose own warnings are none of ours."""
    return pytest.mark.filterwarnings("ignore")(needs_transformers(test))


def assert_same(ours: Tensor, theirs: Tensor, largest: float | None = None) -> None:
    """No difference above 2e-5 of the largest number."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    limit = TOLERANCE * (largest or float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= limit


def assert_same_answer(ours: Answer, theirs: Answer) -> None:
    """The same logits and words."""
    assert_same(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def assert_stored(ours: Answer, places: list[int], expected: dict) -> None:
    """Logits of some positions, and the words, are those that were stored."""
    logits = ours[0][places]
    assert_same(logits[:, VOCABULARY], expected["sample"], expected["largest"])
    assert_same(logits.double().abs().sum(-1),
                torch.tensor(expected["absolute_sums"], dtype=torch.double))
    assert ours[1] == expected["words"]


@torch.no_grad()
def our_answer(model: VLM, prompt: list[int], pixels: Tensor, keep: list[int] | None = None,
               mode: str = "full", new_tokens: int = NEW_TOKENS, by_hand: Layout | None = None,
               size: tuple[int, int] | None = None) -> Answer:
    """Logits (T, V) of the whole prompt, and the greedy words after it.

    by_hand: how the prompt is to be laid out
    """
    input_ids = torch.tensor(prompt)
    size = size or (pixels.shape[-1], pixels.shape[-2])
    image = model.encode_pixels(pixels, *size)
    kept = Kept(torch.arange(image.n_visual) if keep is None else torch.tensor(keep))
    P, A = model.around_image(input_ids)
    layout = gap.lay_out(kept.ranked, P, image.n_visual, A, mode)
    if by_hand:
        assert (layout.kept.tolist(), layout.position_ids.tolist()) == by_hand
        assert layout.next_position == by_hand[1][-1] + 1
    x = model.embed(input_ids, image, kept, layout.order)                     # (1, T, C)
    logits = model(input_ids, pixels, None if keep is None else kept.ranked, mode, size)
    return logits, greedy(model, x, layout, new_tokens).tokens


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(OUTPUTS.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_tiny_checkpoint_gives_the_logits_and_words_that_transformers_gave(
        name: str, stored: dict, tmp_path: Path):
    """Patch features are those of the last layer but one, without CLS."""
    layout, shards, seed, differs = CASES[name]
    write_checkpoint(tmp_path, tiny_config(**differs), layout, shards, seed)
    model, expected = nanogap.load(tmp_path, "cpu"), stored["cases"][name]
    features = model.encode_pixels(pixel_values(), 56, 56).features
    assert features.shape == (16, 32)
    assert_same(features[[0, 7, 15], :6], expected["features"])
    assert_stored(our_answer(model, PROMPT, pixel_values()), POSITIONS, expected)


@pytest.mark.parametrize("mode", PRUNED)
def test_a_pruned_prompt_gives_what_transformers_gave_at_position_ids_written_by_hand(
        mode: str, stored: dict, tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path), "cpu")
    answer = our_answer(model, PROMPT, pixel_values(), KEEP, mode, by_hand=PRUNED[mode])
    assert len(answer[0]) == 5 + 4 + 6
    assert_stored(answer, [5, 14], stored["pruned"][mode])


@pytest.fixture(scope="module", params=["tiny", "mini"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(ours, theirs, prompt, pixels, keep): a tiny checkpoint, and the mini model, read twice."""
    if request.param == "tiny":
        folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
        return nanogap.load(folder, "cpu"), load_theirs(folder), PROMPT, pixel_values(), KEEP
    ours = nanogap.load(MINI, "cpu", "float32")
    picture = scene("test", 0, 168)
    patches = ours.config.vision.grid ** 2
    keep = random.Random(0).sample(range(patches), patches // 4)
    prompt = ours.prompt("the man on the left").tolist()
    return ours, load_theirs(MINI), prompt, ours.prepare_image(picture.image), keep


@live
def test_every_logit_and_every_word_is_that_of_transformers(pair):
    ours, theirs, prompt, pixels, _ = pair
    input_ids = expand(prompt, ours.config.image_token, ours.config.vision.grid ** 2)
    assert_same_answer(our_answer(ours, prompt, pixels, new_tokens=32),
                       their_answer(theirs, input_ids, pixels, 32))


def by_hand(ours: VLM, prompt: list[int], keep: list[int], mode: str) -> Layout:
    """In which order patches are fed in a mode, and all position IDs, without nanogap.gap."""
    P, N = prompt.index(ours.config.image_token), ours.config.vision.grid ** 2
    order = keep if mode == "permuted" else sorted(keep)
    if mode == "gap":
        visual = [P + patch for patch in order]
        return order, [*range(P), *visual, *range(P + N, N + len(prompt) - 1)]
    return order, list(range(len(prompt) - 1 + len(keep)))


@live
@pytest.mark.parametrize("mode", ["gap", "shifted", "permuted"])
def test_a_pruned_prompt_is_what_transformers_makes_of_the_same_tokens_at_the_same_ids(
        pair, mode: str):
    ours, theirs, prompt, pixels, keep = pair
    layout = by_hand(ours, prompt, keep, mode)
    assert_same_answer(our_answer(ours, prompt, pixels, keep, mode, 32, layout),
                       their_pruned_answer(theirs, prompt, pixels, *layout, 32))


def recorded(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[list[int]]:
    """The position IDs that a function of RoPE is given from now on, pass by pass."""
    passes: list[list[int]] = []
    rope: Callable = getattr(owner, name)

    def record(*args: object, **kwargs: object) -> object:
        passes.extend(value.flatten().tolist() for value in [*args, *kwargs.values()]
                      if isinstance(value, Tensor) and not value.is_floating_point())
        return rope(*args, **kwargs)

    monkeypatch.setattr(owner, name, record)
    return passes


@live
def test_generate_of_transformers_counts_on_from_the_last_position_id(pair, monkeypatch):
    """GAP for a model of transformers is one call: what README.md says of 5.23.0 and 5.24.0.

    The prompt is read at its own IDs, with gaps between them, and token t of the answer at the last
    ID + 1 + t, whatever the length of the cache.  For older versions there is README.md's loop:
    every new token at the next ID, in a cache that is passed along.  The words are ours.
    """
    ours, theirs, prompt, pixels, keep = pair
    order, ids = by_hand(ours, prompt, keep, "gap")
    x = their_pruned_prompt(theirs, prompt, pixels, order)
    passes = recorded(monkeypatch, theirs.model.language_model.rotary_emb, "forward")
    words = their_generate(theirs, x, ids, 32)
    expected = [ids, *([ids[-1] + 1 + t] for t in range(len(words) - 1))]
    assert len(words) > 8 and ids[-1] + 1 > len(ids)                          # there are gaps
    assert passes == expected
    passes.clear()
    _, looped = their_pruned_answer(theirs, prompt, pixels, order, ids, 32)
    assert (passes, looped) == (expected, words)
    our_passes = recorded(monkeypatch, llama, "rope_angles")
    _, our_words = our_answer(ours, prompt, pixels, keep, "gap", new_tokens=32)
    assert our_passes[1:] == expected                                         # [0]: logits alone
    assert our_words == words


@live
@pytest.mark.parametrize("differs", [
    {}, {"num_key_value_heads": 2}, {"rope_theta": 1000.0}, {"rms_norm_eps": 0.1}, {"head_dim": 24},
    {"tie_word_embeddings": True}], ids=lambda differs: " ".join(differs) or "plain")
@pytest.mark.parametrize("layout", ["a", "d"])
def test_what_transformers_saves_again_gives_the_same_logits_bit_for_bit(
        layout: str, differs: dict, tmp_path: Path):
    first = write_checkpoint(tmp_path / "first", tiny_config(**differs), layout, 2)
    load_theirs(first).save_pretrained(tmp_path / "again", max_shard_size="200KB")
    shutil.copy(first / "tokenizer.json", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    rope = config["text_config"]["rope_parameters"]
    assert rope == {"rope_theta": differs.get("rope_theta", 10000.0), "rope_type": "default"}
    before, after = (nanogap.load(folder, "cpu")(torch.tensor(PROMPT), pixel_values())
                     for folder in (first, tmp_path / "again"))
    assert torch.equal(before, after)


@live
@pytest.mark.parametrize("width, height", [(640, 427), (300, 501), (97, 64), (40, 41), (336, 336)])
def test_pixel_values_are_those_of_the_processor_that_pads(width: int, height: int):
    """The one of LLaVA's checkpoints crops, and so sees another picture."""
    from transformers import LlavaImageProcessorPil
    pads = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = pads(noise(width, height), return_tensors="pt")["pixel_values"]
    ours = to_pixel_values(Pad().fit(noise(width, height), 336))
    assert ours.shape == (1, 3, 336, 336)
    assert float((ours - expected).abs().max()) <= 1e-6


@live
def test_both_towers_of_clip_give_the_features_of_transformers(tmp_path: Path):
    from transformers import CLIPModel
    words = train_clip_tokenizer(["a red car", "the man on the left", "two dogs"], 560)
    clip = CLIP(CLIPVisionConfig(32, 64, 3, 2, image_size=56, patch_size=14),
                CLIPTextConfig(48, 96, 2, 3, 77, words.get_vocab_size()), projection_dim=24)
    for name, parameter in clip.requires_grad_(False).named_parameters():
        parameter.copy_(draw(name, parameter.shape, seed=0))
    clip.tokenizer = words
    save_clip(tmp_path, clip, torch.float32)
    theirs = CLIPModel.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(2)) * 4 - 2
    texts = words.encode_batch(["the man on the left", "A red car, two dogs and more", "dog"])
    input_ids = torch.tensor([text.ids for text in texts])
    out = theirs(input_ids=input_ids, pixel_values=pixels)
    assert_same(clip.image_features(pixels), out.image_embeds)
    assert_same(clip.text_features(input_ids), out.text_embeds)
    assert float(clip.logit_scale) == float(theirs.logit_scale)


@live
def test_words_and_patches_stand_in_the_space_of_transformers():
    """What TRIM compares: text_embeds, and patches after post_layernorm and projection, raw."""
    from transformers import CLIPModel
    model = nanogap.load(MINI, "cpu", "float32")
    image = model.encode_image(ROOT / "image.jpg")
    seen = model.see(image, {"text", "aligned"}, "the man on the left")
    theirs = CLIPModel.from_pretrained(MINI / "clip_text", dtype=torch.float32).eval()
    theirs.requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(MINI / "clip_text" / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("the man on the left").ids])
    text = theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output)[0]
    out = theirs.vision_model(model.prepare_image(ROOT / "image.jpg"), output_hidden_states=True)
    patches = theirs.vision_model.post_layernorm(out.hidden_states[-2][0, 1:])
    assert_same(seen.text, text)
    assert_same(seen.aligned, theirs.visual_projection(patches))
