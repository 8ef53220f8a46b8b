"""The mini model's tokenizers have the form of the published ones."""

import json

from nanogap.train.untrained import train_clip_tokenizer
from tests.tiny import tiny_tokenizer


def test_the_file_is_built_like_llamas():
    """Prepend and replace, no pre-tokenizer, bytes for the unknown, BOS by template."""
    tokenizer = tiny_tokenizer()
    form = json.loads(tokenizer.to_str())
    assert form["normalizer"]["normalizers"] == [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    assert form["pre_tokenizer"] is None
    assert form["model"]["byte_fallback"] and form["model"]["unk_token"] == "<unk>"
    decoders = [decoder["type"] for decoder in form["decoder"]["decoders"]]
    assert decoders == ["Replace", "ByteFallback", "Fuse", "Strip"]
    last = tokenizer.get_vocab_size() - 1
    named = [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258, last - 1, last)]
    assert named == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>", "<image>", "<pad>"]
    assert tokenizer.encode("[0.12, 3").tokens == [
        "<s>", "▁[", "0", ".", "1", "2", ",", "▁", "3"]
    assert not [piece for piece in tokenizer.get_vocab() if "▁" in piece[1:]]


def test_clip_texts_start_and_end_with_marks_and_are_cut_to_77():
    tokenizer = train_clip_tokenizer(["a man in blue and a red car"] * 3, 200)
    start, end = (tokenizer.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
    assert end == start + 1 == tokenizer.get_vocab_size() - 1
    tokens = tokenizer.encode("A Man in 猫").tokens
    assert tokens[:4] == ["<|startoftext|>", "a</w>", "man</w>", "in</w>"]
    long = tokenizer.encode("a man " * 100).ids
    assert len(long) == 77 and long[0] == start and long[-1] == end
    assert [e.ids[-1] for e in tokenizer.encode_batch(["a", "a man in blue"])] == [end, end]
