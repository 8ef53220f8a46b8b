"""Our model against transformers': from stored numbers everywhere, and live where it is installed.

"The same" means that no logit differs by more than 2e-5 of the largest one, in float32, and that
the greedy words are the same.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

import nanogap
from nanogap import gap, llama
from nanogap.clip import CLIPTextConfig, CLIPVisionConfig
from nanogap.ground import greedy
from nanogap.image import Pad, to_pixel_values
from nanogap.models import VLM
from nanogap.prune import Kept
from nanogap.train.clip import CLIP, save_clip
from nanogap.train.scenes import scene
from nanogap.train.tokenizer import train_clip_tokenizer
from nanogap.weights import VIT_B_32, known, read_json, read_tensors
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
    their_features,
    their_generate,
    their_pruned_answer,
    their_pruned_prompt,
)
from tests.tiny import IMAGE_TOKEN, LAYOUTS, draw, tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights" / "mini"
PUBLISHED = Path(os.environ.get("NANOGAP_PUBLISHED", ROOT / "../shared/published/llava-1.5-7b-hf"))
TOLERANCE = 2e-5

live = pytest.mark.filterwarnings("ignore")   # the other library's warnings are none of ours
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "tokenizer.json").is_file(),
    reason="set NANOGAP_PUBLISHED to a folder with the text files of llava-hf/llava-1.5-7b-hf")


def assert_same(ours: Tensor, theirs: Tensor, largest: float | None = None) -> None:
    """No difference above 2e-5 of the largest number."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    limit = TOLERANCE * (largest or float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= limit


def assert_stored(logits: Tensor, words: list[int], expected: dict) -> None:
    """Logits of some positions, and the words, are those that were stored."""
    assert_same(logits[:, VOCABULARY], expected["sample"], expected["largest"])
    assert_same(logits.double().abs().sum(-1),
                torch.tensor(expected["absolute_sums"], dtype=torch.double))
    assert words == expected["words"]


@torch.no_grad()
def our_answer(model: VLM, prompt: list[int], pixels: Tensor, keep: list[int] | None = None,
               mode: str = "full", new_tokens: int = NEW_TOKENS,
               size: tuple[int, int] | None = None) -> tuple[Tensor, list[int]]:
    """Logits (T, V) of the whole prompt, and the greedy words after it."""
    input_ids = torch.tensor(prompt)
    size = size or (pixels.shape[-1], pixels.shape[-2])
    image = model.encode_pixels(pixels, *size)
    kept = Kept(torch.arange(image.n_visual) if keep is None else torch.tensor(keep))
    P, A = model.around_image(input_ids)
    layout = gap.lay_out(kept.ranked, P, image.n_visual, A, mode)
    x = model.embed(input_ids, image, kept, layout.order)                     # (1, T, C)
    logits = model(input_ids, pixels, None if keep is None else kept.ranked, mode, size)
    return logits, greedy(model, x, layout, new_tokens).tokens


def our_features(model: VLM, pixels: Tensor) -> Tensor:
    """Patch features (N, C) before the projector."""
    with torch.no_grad():
        return model.encode_pixels(pixels, pixels.shape[-1], pixels.shape[-2]).features


# ----- stored numbers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(OUTPUTS.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_tiny_checkpoint_gives_the_logits_and_words_that_transformers_gave(
        name: str, stored: dict, tmp_path: Path):
    layout, shards, seed, differs = CASES[name]
    write_checkpoint(tmp_path, tiny_config(**differs), layout, shards, seed)
    model = nanogap.load(tmp_path, "cpu")
    logits, words = our_answer(model, PROMPT, pixel_values())
    assert_stored(logits[POSITIONS], words, stored["cases"][name])


def test_patch_features_are_those_of_the_second_to_last_layer_without_cls(
        stored: dict, tmp_path: Path):
    features = our_features(nanogap.load(write_checkpoint(tmp_path), "cpu"), pixel_values())
    assert features.shape == (16, 32)
    assert_same(features[[0, 7, 15], :6], stored["cases"]["layout a"]["features"])


@pytest.mark.parametrize("mode", PRUNED)
def test_a_pruned_prompt_gives_what_transformers_gave_at_position_ids_written_by_hand(
        mode: str, stored: dict, tmp_path: Path):
    model = nanogap.load(write_checkpoint(tmp_path), "cpu")
    logits, words = our_answer(model, PROMPT, pixel_values(), KEEP, mode)
    assert logits.shape == (5 + 4 + 6, 640)
    assert_stored(logits[[5, 14]], words, stored["pruned"][mode])
    order, by_hand = PRUNED[mode]
    layout = gap.lay_out(torch.tensor(KEEP), 5, 16, 6, mode)
    assert layout.kept.tolist() == order
    assert (layout.position_ids.tolist(), layout.next_position) == (by_hand, by_hand[-1] + 1)


def test_the_stored_numbers_differ_from_case_to_case_and_from_mode_to_mode(stored: dict):
    outputs = [*stored["cases"].values(), *stored["pruned"].values()]
    sums = [output["absolute_sums"][-1] for output in outputs]
    assert len(sums) == 12 and len(set(sums)) == 12


# ----- transformers, live -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["tiny", "mini"])
def pair(request: pytest.FixtureRequest, transformers, tmp_path_factory: pytest.TempPathFactory):
    """(ours, theirs, prompt, pixels, keep): a tiny checkpoint, and the mini model, read twice."""
    if request.param == "tiny":
        folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
        return nanogap.load(folder, "cpu"), load_theirs(folder), PROMPT, pixel_values(), KEEP
    if not (MINI / "model.safetensors").is_file():
        pytest.skip("weights/mini is not there")
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
    logits, words = our_answer(ours, prompt, pixels, new_tokens=32)
    expected, expected_words = their_answer(theirs, input_ids, pixels, 32)
    assert_same(logits, expected)
    assert words == expected_words


@live
def test_every_patch_feature_is_that_of_transformers(pair):
    ours, theirs, _, pixels, _ = pair
    assert_same(our_features(ours, pixels), their_features(theirs, pixels))


def by_hand(ours: VLM, prompt: list[int], keep: list[int],
            mode: str) -> tuple[list[int], list[int]]:
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
    order, ids = by_hand(ours, prompt, keep, mode)
    logits, words = our_answer(ours, prompt, pixels, keep, mode, new_tokens=32)
    expected, expected_words = their_pruned_answer(theirs, prompt, pixels, order, ids, 32)
    assert_same(logits, expected)
    assert words == expected_words


@contextmanager
def their_positions(theirs: torch.nn.Module) -> Iterator[list[list[int]]]:
    """The position IDs that their RoPE is given, pass by pass."""
    passes: list[list[int]] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        passes.append(ids.flatten().tolist())

    rope = theirs.model.language_model.rotary_emb
    hook = rope.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def our_positions(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The position IDs that our RoPE is given from now on, pass by pass."""
    passes: list[list[int]] = []
    angles: Callable = llama.rope_angles

    def record(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        passes.append(position_ids.flatten().tolist())
        return angles(position_ids, head_dim, theta)

    monkeypatch.setattr(llama, "rope_angles", record)
    return passes


@live
def test_generate_of_transformers_counts_on_from_the_last_position_id(pair, monkeypatch):
    """GAP for a model of transformers is one call: what README.md says of 5.23.0 and 5.24.0.

    The prompt is read at its own IDs, with gaps between them, and token t of the answer at the last
    ID + 1 + t, whatever the length of the cache; the words are ours.
    """
    ours, theirs, prompt, pixels, keep = pair
    order, ids = by_hand(ours, prompt, keep, "gap")
    x = their_pruned_prompt(theirs, prompt, pixels, order)
    with their_positions(theirs) as passes:
        words = their_generate(theirs, x, ids, 32)
    assert len(words) > 8 and ids[-1] + 1 > len(ids)                          # there are gaps
    assert passes == [ids, *([ids[-1] + 1 + t] for t in range(len(words) - 1))]
    our_passes = our_positions(monkeypatch)
    _, our_words = our_answer(ours, prompt, pixels, keep, "gap", new_tokens=32)
    assert our_passes[1:] == passes                                           # [0]: logits alone
    assert our_words == words


@live
def test_the_loop_for_older_versions_of_transformers_is_the_one_call(pair):
    """README.md's loop: every new token at the next ID, in a cache that is passed along."""
    ours, theirs, prompt, pixels, keep = pair
    order, ids = by_hand(ours, prompt, keep, "gap")
    with their_positions(theirs) as passes:
        _, words = their_pruned_answer(theirs, prompt, pixels, order, ids, 32)
    assert passes == [ids, *([ids[-1] + 1 + t] for t in range(len(words) - 1))]
    x = their_pruned_prompt(theirs, prompt, pixels, order)
    assert their_generate(theirs, x, ids, 32) == words


@live
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_read_every_layout_single_and_sharded(
        transformers, layout: str, shards: int, tmp_path: Path):
    folder = write_checkpoint(tmp_path, layout=layout, shards=shards)
    logits, words = our_answer(nanogap.load(folder, "cpu"), PROMPT, pixel_values())
    expected, expected_words = their_answer(load_theirs(folder), expand(PROMPT, IMAGE_TOKEN, 16),
                                            pixel_values(), NEW_TOKENS)
    assert_same(logits, expected)
    assert words == expected_words


@live
@pytest.mark.parametrize("differs", [
    {}, {"num_key_value_heads": 2}, {"rope_theta": 1000.0}, {"rms_norm_eps": 0.1}, {"head_dim": 24},
    {"tie_word_embeddings": True}], ids=lambda differs: " ".join(differs) or "plain")
@pytest.mark.parametrize("layout", ["a", "d"])
def test_what_transformers_saves_again_gives_the_same_logits_bit_for_bit(
        transformers, layout: str, differs: dict, tmp_path: Path):
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
def test_what_is_seen_and_said_in_bfloat16_is_close_to_transformers_in_bfloat16(pair):
    ours, theirs, prompt, pixels, _ = pair
    input_ids = expand(prompt, ours.config.image_token, ours.config.vision.grid ** 2)
    ours, theirs, pixels = deepcopy(ours).bfloat16(), deepcopy(theirs).bfloat16(), pixels.bfloat16()
    logits, _ = our_answer(ours, prompt, pixels)
    expected, _ = their_answer(theirs, input_ids, pixels, 1)
    assert float((logits - expected.float()).abs().mean()) <= 0.02 * float(expected.abs().max())


# ----- pixels -------------------------------------------------------------------------------------


def noise(width: int, height: int) -> Image.Image:
    """A photograph's worth of detail, coarse and fine, from a fixed seed."""
    draws = random.Random(f"{width} x {height}")
    coarse = Image.frombytes("RGB", (9, 7), draws.randbytes(9 * 7 * 3)).resize((width, height))
    fine = Image.frombytes("RGB", (width, height), draws.randbytes(width * height * 3))
    return Image.blend(coarse, fine, 0.3)


@live
@pytest.mark.parametrize("width, height", [(640, 427), (300, 501), (97, 64), (40, 41), (336, 336)])
def test_pixel_values_are_those_of_the_processor_that_pads(transformers, width: int, height: int):
    pads = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = pads(noise(width, height), return_tensors="pt")["pixel_values"]
    ours = to_pixel_values(Pad().fit(noise(width, height), 336))
    assert ours.shape == (1, 3, 336, 336)
    assert float((ours - expected).abs().max()) <= 1e-6


@live
def test_the_processor_that_crops_sees_another_picture(transformers):
    crops = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = crops(noise(640, 427), return_tensors="pt")["pixel_values"]
    ours = to_pixel_values(Pad().fit(noise(640, 427), 336))
    assert float((ours - expected).abs().mean()) > 0.1


# ----- CLIP with its text tower -------------------------------------------------------------------


def load_clip(folder: Path) -> CLIP:
    """Both towers, as save_clip wrote them."""
    config = read_json(folder / "config.json")
    clip = CLIP(replace(VIT_B_32, **known(CLIPVisionConfig, config["vision_config"])),
                CLIPTextConfig(**known(CLIPTextConfig, config["text_config"])),
                config["projection_dim"])
    clip.load_state_dict({name: value.float() for name, value in read_tensors(folder)})
    return clip


@pytest.fixture(scope="module", params=["tiny", "mini"])
def clip_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "mini":
        if not (MINI / "clip_text" / "model.safetensors").is_file():
            pytest.skip("weights/mini/clip_text is not there")
        return MINI / "clip_text"
    folder = tmp_path_factory.mktemp("clip")
    words = train_clip_tokenizer(["a red car", "the man on the left", "two dogs"], 560)
    text = CLIPTextConfig(48, 96, 2, 3, 77, words.get_vocab_size())
    vision = CLIPVisionConfig(32, 64, 3, 2, image_size=56, patch_size=14)
    clip = CLIP(vision, text, projection_dim=24)
    for name, parameter in clip.named_parameters():
        parameter.data = draw(name, parameter.shape, seed=0)
    save_clip(folder, clip, words, torch.float32)
    return folder


@live
def test_both_towers_of_clip_give_the_features_of_transformers(transformers, clip_folder: Path):
    ours = load_clip(clip_folder)
    theirs = transformers.CLIPModel.from_pretrained(
        clip_folder, dtype=torch.float32, attn_implementation="eager").eval()
    size = ours.vision_model.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 4 - 2
    tokenizer = Tokenizer.from_file(str(clip_folder / "tokenizer.json"))
    texts = tokenizer.encode_batch(["the man on the left", "A red car, two dogs and more", "dog"])
    input_ids = torch.tensor([text.ids for text in texts])
    with torch.no_grad():
        out = theirs(input_ids=input_ids, pixel_values=pixels)
        assert_same(ours.image_features(pixels), out.image_embeds)
        assert_same(ours.text_features(input_ids), out.text_embeds)
        assert float(ours.logit_scale) == float(theirs.logit_scale)


@live
def test_words_and_patches_stand_in_the_space_of_transformers(transformers):
    """What TRIM compares: text_embeds, and patches after post_layernorm and projection, raw."""
    folder = MINI / "clip_text"
    model = nanogap.load(MINI, "cpu", "float32")
    image = model.encode_image(ROOT / "image.jpg")
    seen = model.see(image, {"text", "aligned"}, "the man on the left")
    theirs = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("the man on the left").ids])
    with torch.no_grad():
        text = theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output)[0]
        out = theirs.vision_model(model.prepare_image(ROOT / "image.jpg"),
                                  output_hidden_states=True)
        patches = theirs.vision_model.post_layernorm(out.hidden_states[-2][0, 1:])
        assert_same(seen.text, text)
        assert_same(seen.aligned, theirs.visual_projection(patches))
