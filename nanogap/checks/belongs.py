"""Do the files of a folder belong together?  Tensors, tokenizer, and the CLIP of a vision tower.

In:  a folder, and the model that was loaded from it.
Out: nothing, or what is another checkpoint's: all of it fits, and answers would be wrong.
"""

from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from nanogap import weights
from nanogap.checks.explain import GET, look_through
from nanogap.checks.silent import OF_OTHERS, OTHER_CHAT
from nanogap.clip import CLIPText
from nanogap.errors import NanogapError
from nanogap.llava import Llava

SAMPLE = 1024        # numbers of each matrix by which two vision towers are compared
FARTHEST = 0.3       # of the sum of their norms; those of two trainings are 0.7 apart


def check_belonging(folder: Path, model: Llava, clip: Path | None) -> None:
    """Refuse a folder whose parts are of different checkpoints, though they fit.

    clip: the folder of the text tower that was loaded with it
    """
    look_through(folder, GET)            # an adapter beside the model, or whole numbers as weights
    check_tokenizer(folder, model)
    guide = model.text_guide
    for tokenizer in [model.tokenizer, *([guide.tokenizer] if guide else [])]:
        tokenizer.no_padding()           # left over from training: a question is one text
        tokenizer.no_truncation()
    if clip is not None and guide is not None:
        check_guide(clip, model, guide)


def check_rows(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    """An ID without an embedding could not be looked up."""
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise NanogapError(f"{path} has more tokens than the model has embeddings "
                           f"({rows}): it belongs to another checkpoint")


def check_tokenizer(folder: Path, model: Llava) -> None:
    """Refuse an image token that words could spell, and the words of another chat template.

    A prompt might hold the one twice; the others may be there without their template.
    """
    path, tokenizer, image = folder / "tokenizer.json", model.tokenizer, model.config.image_token
    check_rows(path, tokenizer, model.config.text.vocab_size)
    added = tokenizer.get_added_tokens_decoder()
    pieces = tokenizer.get_vocab(with_added_tokens=False).values()
    if (image == model.config.bos_token or image in pieces
            or image in added and not added[image].special):
        raise NanogapError(f"config.json: image_token_index is {image}, which stands for "
                           f"{tokenizer.id_to_token(image)!r:.80} in {path}, so a prompt could "
                           "hold it twice; give the tokenizer.json that the checkpoint was "
                           "published with")
    for token in added.values():
        if OF_OTHERS.fullmatch(token.content):
            raise NanogapError(f"{path} holds {token.content}, a word of {OTHER_CHAT}; give its "
                               "own checkpoint")


def check_guide(folder: Path, model: Llava, guide: CLIPText) -> None:
    """Refuse a CLIP that the vision tower does not come from: each matrix's beginning is compared.

    Precisions may differ, and the tower may have been trained a little with the rest.
    """
    path = folder / "tokenizer.json"
    check_rows(path, guide.tokenizer, guide.text_model.config.vocab_size)
    ids, end = guide.tokenizer.encode("a").ids, max(guide.tokenizer.get_vocab().values())
    if len(ids) < 3 or ids[-1] != end or ids.count(end) > 1:
        raise NanogapError(f"{path} makes {ids} of a text, and CLIP reads it at its end token, "
                           "the highest ID; give the one that the CLIP was published with")
    theirs = {name: value for name, value in weights.read_tensors(folder)
              if name.startswith("vision_model.")}
    for name, ours in model.get_submodule("vision_tower").named_parameters():
        other = theirs.get(f"vision_model.{name}")
        if ours.dim() > 1 and (other is None or not alike(ours, other)):
            raise NanogapError(f"{folder} is not the CLIP that the vision tower comes from ({name} "
                               f"differs); get that with {model.clip_download}")


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices begin alike."""
    if a.shape != b.shape:
        return False
    a, b = (matrix.flatten()[:SAMPLE].cpu().float() for matrix in (a, b))
    return bool((a - b).norm() <= FARTHEST * (a.norm() + b.norm()))
