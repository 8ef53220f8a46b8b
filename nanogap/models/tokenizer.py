"""LLaMA's tokenizer, as the hub has it: BPE with "▁" for a space, and bytes for the unknown.

In:  pieces and merges.  Out: a tokenizer that is written as tokenizer.json.
Source: the tokenizer.json of llava-hf/llava-1.5-7b-hf.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

START_TOKENS = ("<unk>", "<s>", "</s>")   # IDs 0, 1, 2 of a LLaMA


def llama_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]],
                    special_tokens: Iterable[str]) -> Tokenizer:
    """special_tokens: a model's own, behind all pieces."""
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
