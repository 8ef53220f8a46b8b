"""GAP in a model of transformers: each sentence of README and tutorial about one, on tiny models.

Run with transformers 5.23.0 and 5.24.0; older ones than 5.18 have no `mm_encoder_outputs`, and the
tests are skipped.  Random models: two layers see, three layers of 64 channels read.

By hand, 3 tokens of text, 16 visual tokens of which 2, 5, 9 and 14 stay, 4 tokens of text:

    before     0  1  2   3 ... 18   19 20 21 22   next 23
    after      0  1  2   5 8 12 17  19 20 21 22   next 23
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, arange, nn, tensor

from nanogap.gap import keep_ids
from nanogap.show.explain_ids import catch_ids, explain_ids
from tests.tiny import draw

transformers = pytest.importorskip("transformers", minversion="5.18")

ROOT = Path(__file__).resolve().parents[2]
IMAGE, VIDEO = 90, 91                                       # of the tiny models' tokens
KEEP = tensor([2, 5, 9, 14])
FED = [0, 1, 2, 5, 8, 12, 17, 19, 20, 21, 22]
ONES = torch.ones(1, 11)                                    # a mask for them

pytestmark = pytest.mark.filterwarnings("ignore")           # other people's warnings


# ----- tiny models --------------------------------------------------------------------------------

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}
LLAMA, QWEN2 = {"model_type": "llama", **TEXT}, {"model_type": "qwen2", **TEXT}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 56,
       "num_attention_heads": 2, "patch_size": 14}
CLIP, SIGLIP = ({"model_type": f"{name}_vision_model", **VIT} for name in ("clip", "siglip"))
QWEN_VIT = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
            "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 92,
            "vision_end_token_id": 93}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TILES = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llava": {"vision_config": CLIP, "text_config": LLAMA},
    "LlavaNext": {"vision_config": CLIP, "text_config": LLAMA, **TILES},
    "LlavaOnevision": {
        "vision_config": {**SIGLIP, "vision_use_head": False}, "text_config": QWEN2,
        "vision_feature_layer": -1, **TILES},
    "InternVL": {
        "vision_config": {**VIT, "image_size": [56, 56], "patch_size": [14, 14]},
        "text_config": QWEN2, "image_token_id": IMAGE, "downsample_ratio": 0.5},
    "Qwen2_5_VL": {
        "vision_config": {**QWEN_VIT, "window_size": 56, "fullatt_block_indexes": [1],
                          "tokens_per_second": 2},
        "text_config": {**TEXT, "rope_parameters": MROPE}, **QWEN_IDS},
    "Qwen3VL": {
        "vision_config": {**QWEN_VIT, "deepstack_visual_indexes": [0, 1],
                          "num_position_embeddings": 16},
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        **QWEN_IDS},
    "Gemma3": {
        "vision_config": SIGLIP, "mm_tokens_per_image": 16,
        "text_config": {**TEXT, "sliding_window": 64, "query_pre_attn_scalar": 16, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention"]}},
    "PaliGemma": {
        "vision_config": {**SIGLIP, "projection_dim": 64}, "projection_dim": 64,
        "text_config": {"model_type": "gemma", **TEXT}},
}


def make(family: str) -> nn.Module:
    """A random model."""
    told = FAMILIES[family]
    if not family.startswith(("Qwen", "InternVL")):
        told = {**told, "image_token_index": IMAGE}         # image_token_id reads the same
    config = getattr(transformers, f"{family}Config")(**told)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = draw(name, parameter.shape, seed=0)
    return model.requires_grad_(False)


@dataclass
class Asked:
    """A prompt about a picture: 3 tokens, N of the image, 4 tokens."""

    model: nn.Module
    input_ids: Tensor          # (1, T)
    pixels: dict[str, Tensor]  # what forward takes where nothing is pruned
    ids_of_all: Tensor         # (1, T) or (3, 1, T)
    next_position: int
    seen: Any                  # what the image tower gave
    types: bool                # whether the model asks which tokens are the image's

    @property
    def N(self) -> int:
        return int((self.input_ids == IMAGE).sum())

    def prune(self, keep: Tensor) -> dict[str, Any]:
        """What the one call is given."""
        stays = torch.cat([arange(3), 3 + keep, arange(3 + self.N, self.input_ids.shape[1])])
        given = {"input_ids": self.input_ids[:, stays], "position_ids": self.ids_of_all[..., stays],
                 "mm_encoder_outputs": {"image": without_dropped(self.seen, keep)}}
        if self.types:
            given["token_type_ids"] = (given["input_ids"] == IMAGE).int()
        return given


def without_dropped(seen: Any, keep: Tensor) -> Any:
    """What an image tower gave, without the dropped tokens, in the form that the model takes."""
    tokens = seen.pooler_output
    if torch.is_tensor(tokens):                             # InternVL's tiles are one image
        fields = {"pooler_output": tokens.flatten(0, 1)[None, keep]}
    else:                                                   # one image of a list or a tuple
        fields = {"pooler_output": [tokens[0][keep]]}
    if "deepstack_features" in seen:                        # of Qwen3-VL: for its first layers
        fields["deepstack_features"] = [[layer[0][keep]] for layer in seen.deepstack_features]
    return type(seen)(**fields)


def ask(model: nn.Module, rows: int = 8, columns: int = 8, behind: tuple = (8, 9, 10, 11)) -> Asked:
    """Ask a model about noise; rows and columns of patches are told to Qwen-VL alone."""
    family = type(model).__name__.removesuffix("ForConditionalGeneration")
    qwen = family.startswith("Qwen")
    views = {"LlavaNext": (1, 3), "LlavaOnevision": (1, 3), "InternVL": (3,)}.get(family, (1,))
    shape = (rows * columns, 1176) if qwen else (*views, 3, 56, 56)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pixels = {"pixel_values": noise}
    if qwen:
        pixels["image_grid_thw"] = tensor([[1, rows, columns]])
    if family in ("LlavaNext", "LlavaOnevision"):
        pixels["image_sizes"] = tensor([[40, 60]])
    seen = model.get_image_features(**pixels)
    tokens = seen.pooler_output
    N = tokens.shape[:2].numel() if torch.is_tensor(tokens) else len(tokens[0])
    input_ids = tensor([[5, 6, 7, *[IMAGE] * N, *behind]])
    ids_of_all, next_position = arange(input_ids.shape[1])[None], input_ids.shape[1]
    types, asks_for_types = (input_ids == IMAGE).int(), "Gemma" in family
    if asks_for_types:
        pixels["token_type_ids"] = types
    if qwen:
        pixels["mm_token_type_ids"] = types
        ids_of_all, deltas = model.model.get_rope_index(
            input_ids, mm_token_type_ids=types, image_grid_thw=pixels["image_grid_thw"])
        next_position += int(deltas)
    return Asked(model, input_ids, pixels, ids_of_all, next_position, seen, asks_for_types)


@pytest.fixture(scope="module", params=FAMILIES)
def each(request: pytest.FixtureRequest) -> Asked:
    return ask(make(request.param))


@pytest.fixture(scope="module")
def llava() -> Asked:
    return ask(make("Llava"))


@pytest.fixture(scope="module")
def qwen() -> Asked:
    return ask(make("Qwen2_5_VL"))


def generate(asked: Asked, given: dict[str, Any], count: int = 6, **more: Any) -> list[int]:
    """Greedy words of one call."""
    words = asked.model.generate(**given, do_sample=False, max_new_tokens=count,
                                 min_new_tokens=count, **more)[0]
    return words[given["input_ids"].shape[1] if "input_ids" in given else 0:].tolist()


def decode(asked: Asked, given: dict[str, Any], count: int = 6) -> list[int]:
    """Greedy words of a loop that names every ID, with a mask and a cache."""
    T, said = given["position_ids"].shape[-1], []
    out = asked.model(**given, attention_mask=torch.ones(1, T), use_cache=True)
    while len(said) < count:
        logits = out.logits[0, -1].clone()
        logits[2] = -torch.inf                              # as min_new_tokens does
        place = torch.full_like(given["position_ids"][..., :1], asked.next_position + len(said))
        said.append(int(logits.argmax()))
        out = asked.model(input_ids=tensor([said[-1:]]), position_ids=place,
                          attention_mask=torch.ones(1, T + len(said)),
                          past_key_values=out.past_key_values)
    return said


def last_logits(asked: Asked, given: dict[str, Any], **more: Any) -> Tensor:
    return asked.model(**given, **more).logits[0, -1]


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


# ----- one call, all models -----------------------------------------------------------------------


def test_all_tokens_at_all_ids_are_what_the_model_makes_of_pixels(each: Asked):
    theirs = last_logits(each, {"input_ids": each.input_ids, **each.pixels})
    assert close(last_logits(each, each.prune(arange(each.N))), theirs)


def test_one_call_says_what_a_loop_says_that_names_every_id(each: Asked):
    given = each.prune(KEEP[:3])
    with catch_ids(each.model) as passes:
        words = generate(each, given)
    said = explain_ids(each.ids_of_all, passes[0], 3, each.N, 4, KEEP[:3], passes[1])
    first = each.next_position + type(each.model).__name__.startswith("PaliGemma")   # it adds 1
    assert said.startswith("kept: every patch keeps its ID; the text after them keeps its IDs; "
                           f"the answer begins at {first}")
    assert [ids.unique().tolist() for ids in passes[1:]] == [[first + t] for t in range(5)]
    assert words == decode(each, given)


def with_embeds(asked: Asked, given: dict[str, Any]) -> dict[str, Any]:
    """The same for releases before 5.18: features in the place of the embeddings of <image>."""
    x = asked.model.get_input_embeddings()(given["input_ids"])
    features = torch.cat(list(given["mm_encoder_outputs"]["image"].pooler_output))
    x = x.masked_scatter((given["input_ids"] == IMAGE)[..., None], features)
    return {"inputs_embeds": x, "position_ids": given["position_ids"]}


def test_inputs_embeds_say_the_same_but_for_what_they_lose(each: Asked):
    """Qwen3-VL's DeepStack is lost without a word; Gemma3 and PaliGemma refuse."""
    given, family = each.prune(KEEP[:3]), type(each.model).__name__
    embeds = with_embeds(each, given)
    if "Gemma" in family:
        with pytest.raises(ValueError, match="You passed `inputs_embeds` to `.generate"):
            generate(each, embeds)
        return
    mask = ONES[:, :10]
    same = close(each.model(**embeds, attention_mask=mask).logits,
                 each.model(**given, attention_mask=mask).logits)
    assert same == (not family.startswith("Qwen3"))
    assert generate(each, embeds) == generate(each, given) or not same


# ----- masks --------------------------------------------------------------------------------------


def test_with_no_mask_and_no_cache_a_gap_is_the_border_of_two_sequences(llava: Asked):
    """The last 4 tokens, 19 to 22, see nothing before them; a mask of ones or a cache is right.

    In generate use_cache=False drops such a mask (transformers 5.18 to 5.24).
    """
    given = llava.prune(KEEP)
    alone = last_logits(llava, {"input_ids": given["input_ids"][:, -4:]})
    right = last_logits(llava, given, attention_mask=ONES, use_cache=False)
    assert close(last_logits(llava, given, use_cache=False), alone)
    assert close(last_logits(llava, given), right) and not close(alone, right)
    wrong = generate(llava, {**given, "attention_mask": ONES}, 1, use_cache=False)
    assert wrong == [int(alone.argmax())] != generate(llava, given, 1)


def test_without_token_types_gemma3_lets_image_tokens_see_only_backwards():
    gemma = ask(make("Gemma3"))
    given = gemma.prune(KEEP)
    both_ways = gemma.model(**given, attention_mask=ONES).logits
    del given["token_type_ids"]
    assert not close(gemma.model(**given, attention_mask=ONES).logits, both_ways)


def test_ids_of_three_numbers_are_never_taken_for_packed_sequences(qwen: Asked):
    given = qwen.prune(KEEP)
    assert close(last_logits(qwen, given, use_cache=False),
                 last_logits(qwen, given, attention_mask=ONES))


def test_a_sliding_window_counts_rows():
    """With a window of 4 rows ID 17 sees 5, 8, 12 and 17, where it saw 14 to 17 before pruning."""
    text = transformers.MistralConfig(**TEXT, sliding_window=4, attn_implementation="eager")
    model = transformers.MistralForCausalLM(text).eval()
    weights = model(input_ids=tensor([FED]), position_ids=tensor([FED]), output_attentions=True,
                    attention_mask=ONES).attentions[0][0, 0]
    assert [FED[i] for i in weights[6].nonzero().flatten().tolist()] == [5, 8, 12, 17]


# ----- the answer, and what comes behind it -------------------------------------------------------


def test_a_second_question_behind_a_cache_needs_its_ids_again(llava: Asked):
    """By default it gets the rows of the cache; with the IDs of the whole prompt it is right."""
    given, more = llava.prune(KEEP), tensor([[12, 13, 14]])
    both = {"input_ids": torch.cat([given["input_ids"], more], 1),
            "attention_mask": torch.ones(1, 14)}
    right = tensor([[*FED, 23, 24, 25]])
    said = []
    for ids in ({}, {"position_ids": right}):
        cache = transformers.DynamicCache()
        llava.model(**given, attention_mask=ONES, past_key_values=cache)
        with catch_ids(llava.model) as passes:
            generate(llava, {**both, **ids}, 2, past_key_values=cache)
        fed = torch.cat([tensor([FED]), passes[0][:, -3:]], 1)
        said.append(explain_ids(arange(26), fed, 3, 16, 7, KEEP, passes[1]))
    assert said[0].startswith(
        "text counted from the cache: every patch keeps its ID; at place 11 the text goes on at "
        "11, the number of tokens before it, instead of 23; the answer begins at 14, ")
    assert said[1].startswith("kept: ") and said[1].endswith("the answer begins at 26.")


def test_behind_a_prompt_that_ends_with_its_image_generate_and_forward_disagree(qwen: Asked):
    """The last token fed is at (3, 5, 6): generate goes on from it, forward behind the largest."""
    asked = ask(qwen.model, behind=())
    given = asked.prune(tensor([2, 5, 11]))
    assert given["position_ids"][:, 0, -1].tolist() == [3, 5, 6] and asked.next_position == 7
    with catch_ids(qwen.model) as passes:
        generate(asked, given, 2)
    said = explain_ids(asked.ids_of_all, passes[0], 3, 16, 0, [2, 5, 11], passes[1])
    assert said == (
        "answer moved: every patch keeps its ID; the answer begins at (4, 6, 7), behind the last "
        "token, instead of 7, or (4, 7, 7) where programs count from the last token.")


def test_rope_deltas_of_another_picture_number_what_has_no_ids(qwen: Asked):
    """Forward passes after a picture of 16 x 16 patches, whose 64 tokens take up 8 IDs."""
    other = ask(qwen.model, 16, 16)
    x = qwen.model.get_input_embeddings()(qwen.input_ids)
    given = qwen.prune(KEEP)
    qwen.model(input_ids=other.input_ids, **other.pixels)
    with catch_ids(qwen.model) as passes:
        qwen.model(inputs_embeds=x)
        out = qwen.model(**given, attention_mask=ONES)
        qwen.model(input_ids=tensor([[7]]), past_key_values=out.past_key_values)
    assert passes[0][0, 0, :3].tolist() == [-56, -55, -54]
    assert passes[2].unique().tolist() == [-45] and qwen.next_position == 11


def test_a_row_that_is_padded_on_the_left_says_what_it_says_alone(llava: Asked):
    rows = [with_embeds(llava, llava.prune(keep)) for keep in (KEEP, tensor([0, 11]))]
    alone = [generate(llava, row) for row in rows]
    x, ids = rows[1]["inputs_embeds"], rows[1]["position_ids"]
    together = llava.model.generate(
        inputs_embeds=torch.cat([rows[0]["inputs_embeds"],
                                 torch.cat([torch.zeros(1, 2, 64), x], 1)]),
        position_ids=torch.cat([rows[0]["position_ids"], torch.cat([tensor([[1, 1]]), ids], 1)]),
        attention_mask=tensor([[1] * 11, [0] * 2 + [1] * 9]),
        do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert together.tolist() == alone and alone[0] != alone[1]


# ----- how Qwen-VL and others number --------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(4, 16), (16, 4)])
def test_a_pruned_prompt_has_columns_of_get_rope_index_and_the_same_answers_id(
        qwen: Asked, rows: int, columns: int):
    asked = ask(qwen.model, rows, columns)
    ids_of_all = asked.ids_of_all[:, 0]
    stays = torch.cat([arange(3), 3 + KEEP, arange(19, 23)])
    ids, next_position = keep_ids(ids_of_all, stays)
    assert next_position == asked.next_position == 3 + max(rows, columns) // 2 + 4
    assert torch.equal(ids, asked.prune(KEEP)["position_ids"][:, 0])
    pruned = asked.prune(KEEP)["input_ids"]            # is not to be numbered once more
    with pytest.raises(RuntimeError, match="must match the existing size"):
        qwen.model.model.get_rope_index(pruned, mm_token_type_ids=(pruned == IMAGE).int(),
                                        image_grid_thw=asked.pixels["image_grid_thw"])


def test_the_text_behind_a_video_begins_inside_it(qwen: Asked):
    """Transformers 5.3 on: 12 pairs of frames, a second apart, each of 2 x 2 tokens.

    Their times run from 2 to 24, the text goes on at 4, and the answer, by rope_deltas, at 25.
    """
    input_ids = tensor([[5, 6, *[VIDEO] * 48, 7, 8]])
    ids, deltas = qwen.model.model.get_rope_index(
        input_ids, mm_token_type_ids=2 * (input_ids == VIDEO).int(),
        video_grid_thw=tensor([[12, 4, 4]]), second_per_grid_ts=tensor([1.0]))
    assert (int(ids.max()), ids[0, 0, -2:].tolist(), 52 + int(deltas)) == (24, [4, 5], 25)
    for answer, said in ((25, "25"), (6, "6, behind the last token (behind the largest ID: 25)")):
        assert explain_ids(ids, ids, 2, 48, 2, answer=answer).endswith(f"begins at {said}.")


def test_longrope_follows_the_largest_id_not_the_number_of_rows():
    """Gathered IDs beyond the limit of 16 take the long factors, renumbered ones the short."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8, "factor": 4.0}
    config = transformers.Phi3Config(**TEXT, rope_parameters=rope, max_position_embeddings=64,
                                     original_max_position_embeddings=16)
    rotary = transformers.Phi3Model(config).rotary_emb
    x = torch.zeros(1, 3, 64)
    gathered, renumbered = (rotary(x, tensor([ids]))[0][0, 1] for ids in ([0, 1, 20], [0, 1, 2]))
    assert not close(gathered, renumbered)
