"""tokenizer.json: taken where it is a LLaMA's or a CLIP's, and nothing else is built.

In:  a checkpoint's folder, and how many embeddings its model has; or a LLaMA's pieces and merges.
Out: a tokenizer.

The library builds whatever a file asks for, patterns and padding without end included, and ends
the process over some of it.  So the file is looked through first: every part of it has a kind that
these tables hold, with the settings that they hold.
Source: the tokenizer.json of llava-hf/llava-1.5-7b-hf and openai/clip-vit-large-patch14-336, and
what transformers 5.23 writes in their place.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from nanogap.checks.config import one_line, parse_json, printable, read_text
from nanogap.errors import NanogapError

YES_OR_NO = (True, False)
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_PATTERNS = tuple({"Regex": pattern} for pattern in (
    CLIP_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + CLIP_WORDS))
# kind -> setting -> the values that it may have
NORMALIZERS: dict[str, dict[str, tuple]] = {
    "Prepend": {"prepend": ("▁",)},
    "Replace": {"pattern": ({"String": " "}, {"Regex": r"\s+"}), "content": ("▁", " ")},
    "NFC": {}, "Lowercase": {}}
SPLITTERS: dict[str, dict[str, tuple]] = {
    "Metaspace": {"replacement": ("▁",), "str_rep": ("▁",), "add_prefix_space": YES_OR_NO,
                  "prepend_scheme": ("first", "always", "never"), "split": YES_OR_NO},
    "Split": {"pattern": CLIP_PATTERNS, "behavior": ("Removed",), "invert": (True,)},
    "ByteLevel": {"add_prefix_space": YES_OR_NO, "trim_offsets": YES_OR_NO,
                  "use_regex": YES_OR_NO},
    "Whitespace": {}}
DECODERS: dict[str, dict[str, tuple]] = {
    "Replace": {"pattern": ({"String": "▁"},), "content": (" ",)},
    "ByteFallback": {}, "Fuse": {},
    "Strip": {"content": (" ",), "start": (0, 1), "stop": (0,)},
    "Metaspace": SPLITTERS["Metaspace"], "ByteLevel": SPLITTERS["ByteLevel"]}
MODEL: dict[str, tuple] = {
    "dropout": (None, 0), "unk_token": (None, str), "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, "", "</w>"), "fuse_unk": YES_OR_NO, "byte_fallback": YES_OR_NO,
    "ignore_merges": YES_OR_NO, "vocab": (dict,), "merges": (list,)}
ADDED: dict[str, tuple] = {
    "id": (int,), "content": (str,), "single_word": YES_OR_NO, "lstrip": YES_OR_NO,
    "rstrip": YES_OR_NO, "normalized": YES_OR_NO, "special": YES_OR_NO}
SPECIAL = "SpecialToken"
WHOLE = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
         "post_processor", "decoder", "model")
START_TOKENS = ("<unk>", "<s>", "</s>")   # IDs 0, 1, 2 of a LLaMA
MOST_PARTS = 8                        # of a sequence; the longest that is published has four


def read_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """tokenizer.json, refused where it is missing, broken, of another kind, or too large.

    rows: of the embeddings.  Padding and truncation, which are left over from training, are put
    aside: a question is one text, and the model says how long it may be.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise NanogapError(f"{folder} has no tokenizer.json; {instead(folder)}")
    text = read_text(path)
    whole = parse_json(path, text)
    check(path, whole, rows)
    if whole.get("truncation") or whole.get("padding"):
        text = json.dumps(whole | {"truncation": None, "padding": None})
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:    # bare Exceptions, and panics, which are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise NanogapError(f"{path} cannot be read ({one_line(error)}); get it from where it was "
                           "made") from None
    for token in whole.get("added_tokens") or ():   # the library numbers anew where it has a gap
        check_rows(path, tokenizer.token_to_id(token["content"]) or 0, rows)
    return tokenizer


def instead(folder: Path) -> str:
    """What to do where there is no tokenizer.json."""
    for name in ("tokenizer.model", "vocab.json"):
        if (folder / name).exists():
            return (f"it has an older library's {name}: write a new one from it with "
                    "`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of "
                    "transformers")
    return "download it again, whole"


def llama_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]],
                    special_tokens: Iterable[str]) -> Tokenizer:
    """LLaMA's tokenizer, as the hub has it: BPE with "▁" for a space, and bytes for the unknown.

    special_tokens: a model's own, behind all pieces
    """
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    added = (*START_TOKENS, *special_tokens)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


# ----- what it may hold ---------------------------------------------------------------------------


def refuse(path: Path, what: str, found: object, why: str) -> NoReturn:
    """A tokenizer that is whole, and none of those that are read here."""
    raise NanogapError(f"{path}: {what} is {printable(str(found))!r:.80}, and {why}; give the "
                       "tokenizer.json that the checkpoint was published with")


def check(path: Path, whole: dict, rows: int) -> None:
    """Refuse what neither a LLaMA's tokenizer nor a CLIP's has, before anything is built."""
    unknown = [key for key in whole if key not in WHOLE]
    if unknown or whole.get("version") != "1.0":
        found = printable(unknown[0]) if unknown else "version"
        refuse(path, found, whole.get(unknown[0] if unknown else "version"),
               "only files of version 1.0 are read here: a newer library wrote this one")
    model = whole.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else model
    if kind != "BPE":
        refuse(path, "model", kind, "LLaMA and CLIP have a 'BPE'")
    check_part(path, "model", model, {"BPE": MODEL}, "BPE")
    check_part(path, "normalizer", whole.get("normalizer"), NORMALIZERS)
    check_part(path, "pre_tokenizer", whole.get("pre_tokenizer"), SPLITTERS)
    check_part(path, "decoder", whole.get("decoder"), DECODERS)
    added = whole.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > rows:
        refuse(path, "added_tokens", added, "it is a list, no longer than the embeddings")
    for token in added:
        check_part(path, "added_tokens", token, {"added token": ADDED}, "added token")
    if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
        refuse(path, "model", "without pieces", "LLaMA and CLIP have a vocab and merges")
    check_ids(path, model["vocab"], added, rows)
    check_post_processor(path, whole.get("post_processor"), rows)


def check_part(path: Path, what: str, part: Any, kinds: dict[str, dict[str, tuple]],
               kind: str | None = None) -> None:
    """A part of a known kind with known settings, or a sequence of such."""
    if part is None:
        return
    found = kind or (part.get("type") if isinstance(part, dict) else part)
    if found == "Sequence" and "Sequence" not in kinds:
        inner = next((value for key, value in part.items() if key != "type"), None)
        if not isinstance(inner, list) or len(part) > 2 or len(inner) > MOST_PARTS:
            refuse(path, what, found, f"a sequence has up to {MOST_PARTS} parts")
        for one in inner:
            check_part(path, what, one, kinds | {"Sequence": {}})
        return
    if not isinstance(part, dict) or not isinstance(found, str) or found not in kinds:
        refuse(path, what, found, f"nanogap reads {', '.join(kinds)}")
    for key, value in part.items():
        allowed = ("BPE", found) if key == "type" else kinds[found].get(key, ())
        if not any(fits(value, one) for one in allowed):
            refuse(path, f"{what}.{printable(key)}", value,
                   f"nanogap reads {' or '.join(map(name_of, allowed)) or 'no such key'}")


def fits(value: object, allowed: object) -> bool:
    """Whether it is the value, or of the type; True is no 1 here."""
    if isinstance(allowed, type):
        return type(value) is allowed
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def name_of(allowed: object) -> str:
    """How a message names what a setting may be."""
    return allowed.__name__ if isinstance(allowed, type) else ascii(allowed)


def check_ids(path: Path, vocab: dict, added: list[dict], rows: int) -> None:
    """Every piece has an ID of its own, and every ID an embedding."""
    ids = list(vocab.values())
    if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        refuse(path, "model.vocab", f"{len(ids)} pieces", "each wants an ID of its own")
    if any(token.get("id", -1) < 0 or not token.get("content") for token in added):
        refuse(path, "added_tokens", "one without a name or an ID", "each wants both")
    check_rows(path, max([*ids, *(token["id"] for token in added)], default=0), rows)


def check_rows(path: Path, highest: int, rows: int) -> None:
    """An ID without an embedding could not be looked up."""
    if highest >= rows:
        raise NanogapError(f"{path} has more tokens than the model has embeddings "
                           f"({rows}): it belongs to another checkpoint")


def check_post_processor(path: Path, part: Any, rows: int) -> None:
    """What the special tokens around a text are: their IDs have embeddings too."""
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "TemplateProcessing":
        named = part.get("special_tokens")
        named = named if isinstance(named, dict) else {}
        ids = [one for token in named.values() for one in
               (token.get("ids") if isinstance(token, dict) else None) or [None]]
        check_template(path, part, named)
    elif kind == "RobertaProcessing":
        pairs = [part.get("cls"), part.get("sep")]
        ids = [pair[1] if isinstance(pair, list) and len(pair) == 2 else None for pair in pairs]
    elif kind == "ByteLevel":
        return check_part(path, "post_processor", part, SPLITTERS)
    else:
        refuse(path, "post_processor", kind, "nanogap reads TemplateProcessing, RobertaProcessing")
    if not all(type(i) is int and 0 <= i < rows for i in ids):
        refuse(path, "post_processor", ids, f"the model has embeddings 0 to {rows - 1}")


def check_template(path: Path, part: dict, named: dict) -> None:
    """A template puts tokens around a text, each of which the same part says the IDs of."""
    for key in ("single", "pair"):
        pieces = part.get(key)
        for piece in pieces if isinstance(pieces, list) else [pieces]:
            token = piece.get(SPECIAL) if isinstance(piece, dict) else {"id": None}
            if token is not None and (not isinstance(token, dict) or token.get("id") not in named):
                refuse(path, f"post_processor.{key}", piece, "it says no ID of that token")


# ----- what the model asks of it ------------------------------------------------------------------


def check_image_token(path: Path, tokenizer: Tokenizer, image: int, bos: int) -> None:
    """Refuse an image token that words could spell: a prompt might hold it twice."""
    taken = tokenizer.id_to_token(image)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    if image == bos or (taken and image not in special) or image in pieces.values():
        raise NanogapError(f"config.json: image_token_index is {image}, which stands for "
                           f"{taken!r:.80} in {path}, so a prompt could hold it twice; give the "
                           "tokenizer.json that the checkpoint was published with")


def check_clip_ends(path: Path, tokenizer: Tokenizer, end: object) -> None:
    """CLIP reads a text at the highest ID, so that must be its end token, and stand there once.

    end: eos_token_id of config.json; 2 stands for the highest ID in older files
    """
    ids = tokenizer.encode("a").ids
    if len(ids) < 3 or ids[-1] != max(tokenizer.get_vocab().values()) or ids.count(ids[-1]) > 1:
        refuse(path, "post_processor", ids, "CLIP reads a text at its end token, the highest ID")
    if end not in (None, 2, ids[-1]):
        raise NanogapError(f"config.json: eos_token_id is {end!r:.80}, and {path} ends a text with "
                           f"{ids[-1]}; they belong to different checkpoints")
