"""GAP in other people's programs: IDs of any dimension, a check for them, and transformers' models.

By hand, 4 x 4 patches merged 2 by 2, as Qwen-VL does: 3 tokens before the image, 4 visual tokens,
2 tokens after it.

    token       0  1  2    3  4  5  6    7  8    next
    time        0  1  2    3  3  3  3    5  6       7
    height      0  1  2    3  3  4  4    5  6       7
    width       0  1  2    3  4  3  4    5  6       7
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, arange, nn, tensor

import nanogap
from nanogap import gap
from nanogap.gap import keep_ids
from nanogap.image import Pad
from nanogap.models.llava import VICUNA
from nanogap.show.explain_ids import explain_ids
from tests.reference.make_reference import load_theirs
from tests.tiny import draw, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights" / "mini"
QWEN = tensor([[0, 1, 2, 3, 3, 3, 3, 5, 6],
               [0, 1, 2, 3, 3, 4, 4, 5, 6],
               [0, 1, 2, 3, 4, 3, 4, 5, 6]])
STAYS = tensor([0, 1, 2, 3, 4, 6, 7, 8])                    # visual tokens 0, 1 and 3 of the four
GATHERED = [[0, 1, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 3, 4, 5, 6],
            [0, 1, 2, 3, 4, 4, 5, 6]]
ALL_COMPACT = [[0, 1, 2, 3, 4, 5, 6, 7]] * 3                # the text has moved away, to 6
TIME_COMPACT = [[0, 1, 2, 3, 4, 5, 6, 7], *GATHERED[1:]]

live = pytest.mark.filterwarnings("ignore")                 # other people's warnings


# ----- IDs of any dimension -----------------------------------------------------------------------


def test_of_three_dimensions_each_token_that_stays_keeps_all_three():
    ids, next_position = keep_ids(QWEN, STAYS)
    assert ids.tolist() == GATHERED
    assert next_position == 7


def test_keeping_all_tokens_changes_nothing():
    ids, next_position = keep_ids(QWEN, arange(9))
    assert torch.equal(ids, QWEN) and next_position == 7


def test_the_answer_goes_on_behind_the_largest_id_even_where_its_token_is_dropped():
    """A grid of 2 x 4 tokens at the end: the largest ID is a width, and no text follows."""
    ids_of_all = tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1],
                         [0, 1, 1, 1, 1, 2, 2, 2, 2],
                         [0, 1, 2, 3, 4, 1, 2, 3, 4]])
    ids, next_position = keep_ids(ids_of_all, tensor([0, 1, 6]))
    assert ids.tolist() == [[0, 1, 1], [0, 1, 2], [0, 1, 2]]
    assert next_position == 5


@pytest.mark.parametrize("keep", [[9, 2, 14, 5], [15], [0, 1]])
def test_of_one_dimension_it_is_what_lay_out_says(keep: list[int]):
    layout = gap.lay_out(tensor(keep), 3, 16, 2, "gap")
    stays = torch.cat([arange(3), 3 + layout.keep, tensor([19, 20])])
    ids, next_position = keep_ids(arange(21), stays)
    assert torch.equal(ids, layout.position_ids) and next_position == layout.next_position == 21


def test_padding_on_the_left_counts_for_nothing():
    """A row of a batch is numbered as if it stood alone; what pads it may have any ID.

    Before pruning, 8 columns: two of padding, 2 tokens, 3 patches, 1 token; patches 0 and 2 stay.
    """
    ids_of_all = tensor([0, 0, 0, 1, 2, 3, 4, 5])
    stays = tensor([2, 3, 4, 6, 7])
    ids, next_position = keep_ids(ids_of_all, stays)
    assert (ids.tolist(), next_position) == ([0, 1, 2, 4, 5], 6)
    alone, alone_next = keep_ids(arange(6), tensor([0, 1, 2, 4, 5]))
    assert torch.equal(ids, alone) and next_position == alone_next


def test_several_images_each_stand_behind_all_of_the_one_before():
    """2 tokens, 4 patches, 1 token, 4 patches, 1 token; 1 and 2 of one image stay, 3 of the other.

        before   0 1 | 2 3 4 5 | 6 | 7 8 9 10 | 11 | 12
    """
    ids, next_position = keep_ids(arange(12), tensor([0, 1, 3, 4, 6, 10, 11]))
    assert (ids.tolist(), next_position) == ([0, 1, 3, 4, 6, 10, 11], 12)


def test_several_images_of_three_dimensions():
    """Two images of 2 x 2 tokens: the second begins at 4, two IDs and a token behind the first."""
    ids_of_all = tensor([[0, 1, 1, 1, 1, 3, 4, 4, 4, 4, 6],
                         [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6],
                         [0, 1, 2, 1, 2, 3, 4, 5, 4, 5, 6]])
    ids, next_position = keep_ids(ids_of_all, tensor([0, 2, 5, 8, 9, 10]))
    assert ids.tolist() == [[0, 1, 3, 4, 4, 6], [0, 1, 3, 5, 5, 6], [0, 2, 3, 4, 5, 6]]
    assert next_position == 7


# ----- the check: a case for each sentence --------------------------------------------------------

# 3 tokens, 4 x 4 patches, 2 tokens; 19 and 20 after the image, the answer at 21.  A method's
# raster indices in the order in which it feeds them, -1 for a token that it adds; the IDs that
# reach RoPE; the ID of the answer; what is said.  Who does so is told in chapters 11 and 17.
SENTENCES = {
    "FastV, SparseVLM v2, Nuwa": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 19, 20], 21,
        "kept: every patch keeps its ID; the text after them keeps its IDs; "
        "the answer begins at 21."),
    "FasterVLM, VisPruner, DivPrune": (
        [2, 5, 9, 14], [0, 1, 2, 3, 4, 5, 6, 7, 8], 9,
        "shifted: the patches are numbered 3 to 6 without gaps; the text after them begins at 7 "
        "instead of 19; the answer begins behind the last token, at 9 instead of 21."),
    "TRIM: one token more, behind": (
        [2, 5, 9, 14, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 10,
        "shifted: the patches are numbered 3 to 7 without gaps (1 of them added); the text after "
        "them begins at 8 instead of 19; the answer begins behind the last token, at 10 instead "
        "of 21."),
    "SparseVLM v1: clusters behind": (
        [2, 5, 14, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], None,
        "shifted: the patches are numbered 3 to 7 without gaps (2 of them added); "
        "the text after them begins at 8 instead of 19."),
    "VisionZip: CLS, dominant, contextual": (
        [-1, 5, 9, 2, 14], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], None,
        "permuted: the patches are numbered 3 to 7 without gaps, and not fed in the order of the "
        "image (1 of them added); the text after them begins at 8 instead of 19."),
    "PruMerge: by score, one token more": (
        [9, 2, 14, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8], None,
        "permuted: the patches are numbered 3 to 6 without gaps, and not fed in the order of the "
        "image (1 of them added); the text after them begins at 7 instead of 19."),
    "PruMerge, with GAP": (
        [2, 9, 14, -1], [0, 1, 2, 5, 12, 17, 18, 19, 20], None,
        "kept: every patch keeps its ID (1 of them added); the text after them keeps its IDs."),
    "own IDs in the order of scores": (
        [9, 2, 14, 5], [0, 1, 2, 12, 5, 17, 8, 19, 20], None,
        "ranked: every patch keeps its ID, but the patches are not fed in the order of the image, "
        "so each of them sees others than before; the text after them keeps its IDs."),
    "the patches alone renumbered": (
        [2, 5, 9, 14], [0, 1, 2, 3, 4, 5, 6, 19, 20], None,
        "shifted, text not moved: the patches are numbered 3 to 6 without gaps; "
        "the text after them keeps its IDs."),
    "the patches alone renumbered by score": (
        [9, 2, 14, 5], [0, 1, 2, 3, 4, 5, 6, 19, 20], None,
        "permuted, text not moved: the patches are numbered 3 to 6 without gaps, and not fed in "
        "the order of the image; the text after them keeps its IDs."),
    "GAP for the patches alone": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 7, 8], None,
        "text collides: every patch keeps its ID; the text after them begins at 7 instead of 19, "
        "among the IDs of the patches (5 to 17)."),
    "the text behind the last patch that stays": (
        [2, 5, 9, 13], [0, 1, 2, 5, 8, 12, 16, 17, 18], 19,
        "text moved: every patch keeps its ID; the text after them begins at 17 instead of 19; "
        "the answer begins behind the last token, at 19 instead of 21."),
    "the first patches stay": (
        [0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], None,
        "text moved: every patch keeps its ID; the text after them begins at 6 instead of 19."),
    "original IDs, and a decode loop that counts rows of the cache": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 19, 20], 9,
        "answer counted from the cache: every patch keeps its ID; the text after them keeps its "
        "IDs; the answer begins at 9, the length of the cache, instead of 21."),
    "generate of transformers 4.57": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 19, 20], 20,
        "answer repeats the last ID: every patch keeps its ID; the text after them keeps its IDs; "
        "the answer begins at 20, where the prompt's last token stands, not at 21."),
    "an answer somewhere else": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 19, 20], 30,
        "answer moved: every patch keeps its ID; the text after them keeps its IDs; "
        "the answer begins at 30 instead of 21."),
    "patches at IDs of others": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 13, 17, 19, 20], None,
        "other: the patches have other IDs than before pruning (5 to 17); "
        "the text after them keeps its IDs."),
    "text that does not count up": (
        [2, 5, 9, 14], [0, 1, 2, 5, 8, 12, 17, 19, 19], None,
        "text renumbered: every patch keeps its ID; "
        "the IDs of the text after them do not rise together any more."),
    "a mask that numbers the padding": (
        [2, 5, 9, 14], [1, 2, 3, 5, 8, 12, 17, 19, 20], None,
        "other: the text before the image has other IDs than it had before pruning."),
}


@pytest.mark.parametrize("who", SENTENCES)
def test_a_sentence_says_what_became_of_the_ids(who: str):
    keep, fed, answer, said = SENTENCES[who]
    assert explain_ids(arange(21), tensor(fed), 3, 16, 2, tensor(keep), answer) == said


# the same of M-RoPE: 1, 3 and so on of the grid above; what transformers' grid says is at the top
SENTENCES_3D = {
    "LightCompress's DivPrune": (
        [0, 1, 3], GATHERED, 7,
        "kept: every patch keeps its ID; the text after them keeps its IDs; "
        "the answer begins at 7."),
    "no position IDs given": (
        [0, 1, 3], ALL_COMPACT, 8,
        "shifted: the patches are numbered 3 to 5 without gaps; the text after them begins at 6 "
        "instead of 5; the answer begins behind the last token, at 8 instead of 7."),
    "time counted on, height and width kept": (
        [0, 1, 3], TIME_COMPACT, None,
        "time renumbered: the patches keep their IDs but for time; "
        "the text after them begins at (6, 5, 5) instead of 5."),
    "time of the patches alone": (
        [0, 1, 3], [[0, 1, 2, 3, 4, 5, 5, 6], *GATHERED[1:]], None,
        "time renumbered: the patches keep their IDs but for time; "
        "the text after them keeps its IDs."),
    "OpenVINO's CDPruner, where the last row is gone": (
        [0], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]], 6,
        "text moved: every patch keeps its ID; the text after them begins at 4 instead of 5; "
        "the answer begins behind the last token, at 6 instead of 7."),
    "rope_deltas left from the unpruned prompt": (
        [0, 1, 3], GATHERED, 6,
        "answer repeats the last ID: every patch keeps its ID; the text after them keeps its IDs; "
        "the answer begins at 6, where the prompt's last token stands, not at 7."),
    "the same, two tokens dropped": (
        [1, 2], [[0, 1, 2, 3, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 4, 3, 5, 6]], 5,
        "answer counted from the cache: every patch keeps its ID; the text after them keeps its "
        "IDs; the answer begins at 5, the length of the cache plus the unpruned prompt's "
        "rope_deltas, instead of 7."),
    "height and width in each other's place": (
        [1, 2], [[0, 1, 2, 3, 3, 5, 6], [0, 1, 2, 4, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]], None,
        "height and width renumbered: the patches keep their IDs but for height and width; "
        "the text after them keeps its IDs."),
}


@pytest.mark.parametrize("who", SENTENCES_3D)
def test_a_sentence_says_what_became_of_three_dimensions(who: str):
    keep, fed, answer, said = SENTENCES_3D[who]
    assert explain_ids(QWEN, tensor(fed), 3, 4, 2, tensor(keep), answer) == said


def test_vllms_efficient_video_sampling_lets_the_text_of_a_tall_grid_collide():
    """It lets the text go on behind the grid's width; before pruning that was the longer side.

    4 rows of 2 tokens: width 1 and 2, height 1 to 4, the text at 5; after it, at 3.
    """
    ids_of_all = tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 5],
                         [0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
                         [0, 1, 2, 1, 2, 1, 2, 1, 2, 5]])
    fed = tensor([[0, 1, 1, 1, 3], [0, 1, 3, 4, 3], [0, 2, 1, 2, 3]])
    assert explain_ids(ids_of_all, fed, 1, 8, 1, tensor([1, 4, 7])) == (
        "text collides: every patch keeps its ID; the text after them begins at 3 instead of 5, "
        "among the IDs of the patches (1 to 4).")


@pytest.mark.parametrize("fed, said", [
    ([0, 1, 2, 5, 8, 12, 17, 19, 20], "kept: "),
    ([0, 1, 2, 12, 5, 17, 8, 19, 20], "ranked: "),
    ([0, 1, 2, 5, 8, 12, 17, 7, 8], "text collides: "),
    ([0, 1, 2, 3, 4, 5, 6, 7, 8],
     "shifted: the patches are numbered 3 to 6 without gaps (or permuted: give keep to tell)"),
    ([0, 1, 2, 5, 8, 12, 99, 19, 20], "other: some patches have IDs that no patch had (5 to 99)"),
    (list(range(21)), "kept: "),
])
def test_without_keep_patches_are_told_by_their_ids(fed: list[int], said: str):
    assert explain_ids(arange(21), tensor(fed), 3, 16, 2).startswith(said)


@pytest.mark.parametrize("fed, said", [
    (GATHERED, "kept: "), (ALL_COMPACT, "shifted: "), (TIME_COMPACT, "time renumbered: ")])
def test_without_keep_patches_are_told_by_height_and_width(fed: list, said: str):
    assert explain_ids(QWEN, tensor(fed), 3, 4, 2).startswith(said)


def test_an_image_at_the_end_and_an_image_of_which_nothing_is_left():
    assert explain_ids(arange(8), tensor([0, 4, 6]), 1, 7, 0, answer=8) == (
        "kept: every patch keeps its ID; the answer begins at 8.")
    assert explain_ids(arange(8), tensor([0, 4, 6]), 1, 7, 0, answer=7) == (
        "answer moved: every patch keeps its ID; "
        "the answer begins behind the last token, at 7 instead of 8.")
    assert explain_ids(arange(6), tensor([0, 5]), 1, 4, 1).startswith("kept: ")
    assert explain_ids(arange(6), tensor([0, 1]), 1, 4, 1) == (
        "text moved: every patch keeps its ID; the text after them begins at 1 instead of 5.")


@pytest.mark.parametrize("ids_of_all, fed, keep, message", [
    (arange(20), arange(9), None, "do not belong to 3 tokens, 16 visual tokens and 2 tokens"),
    (arange(21), arange(4), None, "do not belong to 3 tokens"),
    (arange(21), torch.zeros(3, 9), None, "do not belong to 3 tokens"),
    (torch.zeros(2, 21), arange(9), None, r"give one prompt's, \(T,\) or \(3, T\)"),
    (torch.zeros(3, 1, 21), arange(9), None, r"give one prompt's, \(T,\) or \(3, T\)"),
    (arange(21), arange(9), tensor([1, 2]), "keep has 2 indices, and 4 visual tokens are fed"),
])
def test_numbers_that_do_not_fit_are_refused(ids_of_all: Tensor, fed: Tensor, keep, message: str):
    with pytest.raises(ValueError, match=message):
        explain_ids(ids_of_all, fed, 3, 16, 2, keep)


def test_the_check_can_be_copied_into_any_repository():
    """It imports torch alone."""
    text = (ROOT / "nanogap" / "explain_ids.py").read_text()
    assert re.findall(r"^(?:import|from) (\S+)", text, re.MULTILINE) == ["torch", "torch"]
    there: dict = {}
    exec(text, there)
    assert there["explain_ids"](arange(21), arange(21), 3, 16, 2).startswith("kept: ")


# ----- transformers, live: M-RoPE -----------------------------------------------------------------

IMAGE = 90                                                  # of the tiny Qwen2.5-VL's tokens
DROPPED = [0, 3, 4, 5, 10, 12, 14, 15]                      # of 4 x 4 visual tokens


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def qwen(transformers) -> nn.Module:
    """A random Qwen2.5-VL: 2 layers see, 3 layers of 64 channels read."""
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
              "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "window_size": 56,
              "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
            "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93)).eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.data = draw(parameter_name, parameter.shape, seed=0)
    return model


def asked(rows: int, columns: int) -> dict[str, Tensor]:
    """A prompt about a picture of rows x columns patches: 3 tokens, the image, 2 tokens."""
    input_ids = tensor([[5, 92, 6, *[IMAGE] * (rows * columns // 4), 93, 7]])
    return {"input_ids": input_ids, "mm_token_type_ids": (input_ids == IMAGE).int(),
            "image_grid_thw": tensor([[1, rows, columns]])}


def their_ids(qwen: nn.Module, prompt: dict[str, Tensor]) -> tuple[Tensor, int]:
    """IDs (3, T) of the unpruned prompt, and the ID of its answer's first token."""
    ids, delta = qwen.model.get_rope_index(**prompt)
    return ids[:, 0], int(delta) + ids.shape[-1]


@torch.no_grad()
def seen(qwen: nn.Module, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """pixel_values, and embeddings (T, C) of the unpruned prompt, with the image in its place."""
    pixels = torch.randn(int(prompt["image_grid_thw"].prod()), 3 * 2 * 14 * 14,
                         generator=torch.Generator().manual_seed(0))
    x = qwen.get_input_embeddings()(prompt["input_ids"][0]).clone()
    x[prompt["input_ids"][0] == IMAGE] = qwen.get_image_features(
        pixels, prompt["image_grid_thw"]).pooler_output[0]
    return pixels, x


@torch.no_grad()
def answer_without_cache(qwen: nn.Module, x: Tensor, ids: Tensor, next_position: int,
                         count: int) -> list[int]:
    """Greedy words: the whole sequence again for each of them."""
    words: list[int] = []
    while len(words) < count:
        behind = qwen.get_input_embeddings()(tensor(words, dtype=torch.long))
        places = (next_position + arange(len(words))).expand(3, -1)
        fed = torch.cat([x, behind])[None]
        logits = qwen(inputs_embeds=fed, position_ids=torch.cat([ids, places], dim=1)[:, None],
                      attention_mask=torch.ones(fed.shape[:2]), use_cache=False).logits
        words.append(int(logits[0, -1].argmax()))
    return words


def answer(model: nn.Module, x: Tensor, ids: Tensor | None, count: int = 12) -> list[int]:
    """Greedy words of one call of generate, which has a cache."""
    given = {} if ids is None else {"position_ids": ids[..., None, :]}
    return model.generate(inputs_embeds=x[None], attention_mask=torch.ones(1, len(x)), **given,
                          do_sample=False, max_new_tokens=count, min_new_tokens=count)[0].tolist()


class Watch:
    """What reaches RoPE: a list of IDs, (T,) or (3, T), one for each pass."""

    def __init__(self, model: nn.Module) -> None:
        self.ids: list[Tensor] = []
        rotary = model.model.language_model.rotary_emb
        self.handle = rotary.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: tuple, kwargs: dict, angles: object) -> None:
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        self.ids.append(ids[..., 0, :].clone())

    def __enter__(self) -> list[Tensor]:
        return self.ids

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def what_stays(n_visual: int) -> Tensor:
    """Places in the prompt `asked` of all tokens but the dropped visual ones."""
    gone = {3 + place for place in DROPPED}
    return tensor([i for i in range(3 + n_visual + 2) if i not in gone])


@live
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_the_grid_by_hand_is_what_transformers_numbers(transformers, qwen, family: str):
    """To number tokens takes no weights: the method of each model, on the same configuration."""
    numbering = getattr(transformers, f"{family}Model")
    prompt = asked(4, 4)
    ids, delta = numbering.get_rope_index(qwen.model, **prompt)
    assert torch.equal(ids[:, 0], QWEN) and 9 + int(delta) == 7


@live
@pytest.mark.parametrize("rows, columns", [(8, 8), (4, 16), (16, 4)])
def test_a_pruned_prompt_has_a_sub_sequence_of_transformers_ids_and_the_same_answers_id(
        qwen, rows: int, columns: int):
    ids_of_all, theirs = their_ids(qwen, asked(rows, columns))
    everything, next_position = keep_ids(ids_of_all, arange(21))
    assert torch.equal(everything, ids_of_all) and next_position == theirs
    ids, next_position = keep_ids(ids_of_all, what_stays(16))
    assert next_position == theirs == 5 + max(rows, columns) // 2
    left = iter(ids_of_all.T.tolist())
    assert ids.shape == (3, 13) and all(column in left for column in ids.T.tolist())


@live
def test_the_two_images_by_hand_are_what_transformers_numbers(qwen):
    input_ids = tensor([[5, *[IMAGE] * 4, 6, *[IMAGE] * 4, 7]])
    ids, _ = qwen.model.get_rope_index(
        input_ids, mm_token_type_ids=(input_ids == IMAGE).int(),
        image_grid_thw=tensor([[1, 4, 4], [1, 4, 4]]))
    assert ids[:, 0].tolist() == [[0, 1, 1, 1, 1, 3, 4, 4, 4, 4, 6],
                                  [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6],
                                  [0, 1, 2, 1, 2, 3, 4, 5, 4, 5, 6]]


@live
def test_transformers_cannot_number_a_prompt_that_is_pruned_already(qwen):
    """Why a program numbers first and prunes afterwards: the grid no longer fits the tokens."""
    prompt = asked(8, 8)
    stays = what_stays(16)
    for name in ("input_ids", "mm_token_type_ids"):
        prompt[name] = prompt[name][:, stays]
    with pytest.raises(RuntimeError, match="must match the existing size"):
        qwen.model.get_rope_index(**prompt)


@live
def test_all_visual_tokens_at_all_ids_are_what_qwen_makes_of_pixels(qwen):
    prompt = asked(8, 8)
    ids, _ = their_ids(qwen, prompt)
    pixels, x = seen(qwen, prompt)
    mask = torch.ones(1, len(x))
    with torch.no_grad():
        expected = qwen(**prompt, pixel_values=pixels, attention_mask=mask).logits
        logits = qwen(inputs_embeds=x[None], position_ids=ids[:, None], attention_mask=mask).logits
    assert float((logits - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@live
def test_a_pruned_qwen_says_the_same_with_a_cache_and_without_one(qwen):
    prompt, stays = asked(8, 8), what_stays(16)
    ids, next_position = keep_ids(their_ids(qwen, prompt)[0], stays)
    x = seen(qwen, prompt)[1][stays]
    with Watch(qwen) as passes:
        words = answer(qwen, x, ids)
    assert words == answer_without_cache(qwen, x, ids, next_position, len(words))
    assert len(set(words)) > 4                              # not one word over and over
    assert torch.equal(passes[0], ids) and len(passes) == len(words)
    assert [p.flatten().tolist() for p in passes[1:]] == [
        [next_position + t] * 3 for t in range(len(words) - 1)]
    wrong = answer_without_cache(qwen, x, ids, len(x), len(words))          # rows of the cache
    assert words != wrong


@live
def test_each_way_to_number_gives_other_logits(qwen):
    """The three dimensions count, each of them, and so does what is done to them."""
    prompt, stays = asked(8, 8), what_stays(16)
    ids, _ = keep_ids(their_ids(qwen, prompt)[0], stays)
    compact = arange(len(stays)).expand(3, -1)
    ways = {"gathered": ids, "all compact": compact,
            "time compact": torch.stack([compact[0], ids[1], ids[2]]),
            "height compact": torch.stack([ids[0], compact[1], ids[2]]),
            "width compact": torch.stack([ids[0], ids[1], compact[2]])}
    x = seen(qwen, prompt)[1][stays][None]
    with torch.no_grad():
        last = [qwen(inputs_embeds=x, position_ids=way[:, None],
                     attention_mask=torch.ones(x.shape[:2])).logits[0, -1] for way in ways.values()]
    gaps = [float((a - b).abs().max()) for i, a in enumerate(last) for b in last[:i]]
    assert min(gaps) > 1e-3 * float(last[0].abs().max())    # 50 times what rounding may do


@live
def test_a_qwen_that_is_given_no_ids_renumbers_all_three_dimensions(qwen):
    prompt, stays = asked(8, 8), what_stays(16)
    ids_of_all, _ = their_ids(qwen, prompt)
    with Watch(qwen) as passes:
        answer(qwen, seen(qwen, prompt)[1][stays], None, 2)
    keep = stays[3:-2] - 3
    said = explain_ids(ids_of_all, passes[0], 3, 16, 2, keep, int(passes[1].max()))
    assert said == (
        "shifted: the patches are numbered 3 to 10 without gaps; the text after them begins at 11 "
        "instead of 7; the answer begins behind the last token, at 13 instead of 9.")


@live
@torch.no_grad()
def test_a_loop_that_gives_ids_to_the_prompt_alone_answers_too_early(qwen):
    """The unpruned prompt's rope_deltas are still there, and are added to the cache's length."""
    prompt, stays = asked(8, 8), what_stays(16)
    pixels, x = seen(qwen, prompt)
    ids_of_all, _ = their_ids(qwen, prompt)
    ids, _ = keep_ids(ids_of_all, stays)
    qwen(**prompt, pixel_values=pixels, attention_mask=torch.ones(1, len(x)))
    with Watch(qwen) as passes:
        out = qwen(inputs_embeds=x[stays][None], position_ids=ids[:, None], use_cache=True)
        qwen(input_ids=tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)
    said = explain_ids(ids_of_all, passes[0], 3, 16, 2, stays[3:-2] - 3, int(passes[1].max()))
    assert said == (
        "answer counted from the cache: every patch keeps its ID; the text after them keeps its "
        "IDs; the answer begins at 1, the length of the cache plus the unpruned prompt's "
        "rope_deltas, instead of 9.")


@live
def test_a_row_that_is_padded_on_the_left_says_what_it_says_alone(qwen):
    prompt = asked(8, 8)
    ids_of_all, _ = their_ids(qwen, prompt)
    x = seen(qwen, prompt)[1]
    rows = [what_stays(16), tensor([0, 1, 2, 4, 9, 19, 20])]
    alone = [answer(qwen, x[stays], keep_ids(ids_of_all, stays)[0]) for stays in rows]
    longest = max(map(len, rows))
    fed, ids = torch.zeros(2, longest, 64), torch.zeros(3, 2, longest, dtype=torch.long)
    mask = torch.zeros(2, longest, dtype=torch.long)
    for row, stays in enumerate(rows):
        fed[row, -len(stays):] = x[stays]
        ids[:, row, -len(stays):] = keep_ids(ids_of_all, stays)[0]
        mask[row, -len(stays):] = 1
    together = qwen.generate(inputs_embeds=fed, position_ids=ids, attention_mask=mask,
                             do_sample=False, max_new_tokens=12, min_new_tokens=12)
    assert alone[0] != alone[1]
    assert together.tolist() == alone


# ----- transformers, live: LLaVA, as README.md does it --------------------------------------------

README = (ROOT / "README.md").read_text()
SECTION = README.partition("\n## In your own code\n")[2].partition("\n## ")[0]
ONE_CALL, LOOP = (re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL) + ["", ""])[:2]


class InFloat32:
    """LlavaForConditionalGeneration, read in the numbers that we compute in."""

    from_pretrained = staticmethod(lambda folder: load_theirs(Path(folder)))


@pytest.fixture(scope="module", params=["tiny", "mini"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny":
        return write_checkpoint(tmp_path_factory.mktemp("tiny"))
    if not (MINI / "model.safetensors").is_file():
        pytest.skip("weights/mini is not there")
    return MINI


@pytest.fixture(scope="module")
def example(transformers, folder: Path) -> dict:
    """The names that the one call leaves behind, and what reached RoPE while it ran."""
    question = VICUNA.question("the man on the left")
    names = {"torch": torch, "gap": gap, "Pad": Pad, "folder": str(folder),
             "AutoProcessor": transformers.AutoProcessor, "image": Image.open(ROOT / "image.jpg"),
             "LlavaForConditionalGeneration": InFloat32, "printed": [],
             "prompt": VICUNA.before + "<image>" + VICUNA.after.format(question)}
    names["print"] = names["printed"].append
    torch.manual_seed(0)
    for statement in ast.parse(ONE_CALL).body:
        exec(ast.unparse(statement), names)
        if "model" in names and "watch" not in names:
            names["watch"] = Watch(names["model"])
    names["passes"] = list(names["watch"].ids)
    names["watch"].ids.clear()
    return names


@live
def test_the_one_call_of_the_readme_says_what_nanogap_says_at_the_same_ids(example: dict):
    ours = nanogap.load(Path(example["folder"]), "cpu", "float32")
    layout, passes = example["layout"], example["passes"]
    result = ours.ground(example["image"], "the man on the left", keep=layout.keep, mode="gap",
                         max_new_tokens=32)
    assert example["words"].tolist() == result.tokens
    assert example["printed"] == [result.text]
    assert passes[0].tolist() == result.position_ids.tolist()
    assert [p.tolist() for p in passes[1:]] == [
        [result.next_position + t] for t in range(len(result.tokens) - 1)]


@live
def test_the_loop_of_the_readme_says_the_same_as_the_one_call(example: dict):
    example["watch"].ids.clear()
    with torch.no_grad():
        exec(LOOP, example)
    said, passes = example["said"], example["watch"].ids
    assert said == example["words"].tolist()
    assert passes[0].tolist() == example["layout"].position_ids.tolist()
    assert [p.tolist() for p in passes[1:]] == [
        [example["layout"].next_position + t] for t in range(len(said))]


@live
def test_without_position_ids_the_one_call_renumbers(example: dict):
    layout = example["layout"]
    P, N, A = layout.P, layout.N, layout.A
    example["watch"].ids.clear()
    answer(example["model"], example["x"][0], None, 2)
    fed, following = example["watch"].ids
    said = explain_ids(arange(P + N + A), fed, P, N, A, layout.keep, int(following))
    assert said.startswith(f"shifted: the patches are numbered {P} to {P + N // 2 - 1} without")
    assert said.endswith(f"at {P + N // 2 + A} instead of {P + N + A}.")
    example["watch"].ids.clear()
    answer(example["model"], example["x"][0], layout.position_ids, 2)
    fed, following = example["watch"].ids
    said = explain_ids(arange(P + N + A), fed, P, N, A, layout.keep, int(following))
    assert said.startswith("kept: ")


def test_the_one_call_is_about_ten_lines():
    assert 10 <= len(ast.parse(ONE_CALL).body) <= 11 and len(ONE_CALL.splitlines()) <= 12
