"""Tokenizers of the mini model, trained on its own sentences, in the form of the published ones.

In:  sentences.
Out: a LLaMA tokenizer (BPE with "▁" for a space, single digits, bytes for what is unknown), and a
     CLIP tokenizer (lower-case BPE with an end-of-word mark).
"""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from nanogap.models.saving import START_TOKENS, llama_tokenizer

IMAGE, PAD = "<image>", "<pad>"


def train_llama_tokenizer(sentences: Iterable[str], vocab_size: int,
                          special_tokens: Iterable[str] = (IMAGE, PAD)) -> Tokenizer:
    """LLaMA's kind of BPE: <unk> <s> </s>, 256 bytes, pieces, and a model's own special tokens."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁")])
    # only while learning: no piece spans two words, and digits and punctuation stand alone
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("▁", "merged_with_next"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"[^\w▁\[]"), "isolated")])
    printable = [chr(code) for code in range(32 + 1, 127)] + ["▁", "\n"]
    bytes_ = [f"<0x{code:02X}>" for code in range(256)]
    learner.train_from_iterator(sentences, BpeTrainer(
        vocab_size=vocab_size - len(START_TOKENS) - len(bytes_), initial_alphabet=printable,
        show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {piece: i for i, piece in enumerate([*START_TOKENS, *bytes_, *pieces])}
    merges = [tuple(merge) for merge in learned["merges"]]
    return llama_tokenizer(vocab, merges, special_tokens)


def train_clip_tokenizer(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """CLIP's kind of BPE, over bytes, cut to 77 tokens; the end token comes last and pads."""
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    learner = Tokenizer(BPE(end_of_word_suffix=suffix))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    learner.train_from_iterator(sentences, BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix=suffix, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + suffix for letter in alphabet]
    pieces += ["".join(merge) for merge in merges] + [start, end]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=end, end_of_word_suffix=suffix))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab[start]), (end, vocab[end])])
    tokenizer.enable_truncation(77)
    tokenizer.enable_padding(pad_id=vocab[end], pad_token=end)
    return tokenizer
