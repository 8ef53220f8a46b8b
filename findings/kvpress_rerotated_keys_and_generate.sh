#!/bin/sh
# kvpress 0.5.5 (transformers 5.2.0, torch 2.13.0): KeyRerotationPress renumbers the keys that it
# keeps, 0 to K - 1.  The package's pipeline knows that and lets the text behind them go on at K.
# model.generate inside `with press(model)`, which its README names as another way, goes on at the
# prompt's length, so a gap of all dropped tokens lies between the keys and the answer.
# Expected: the answer goes on at K in both, as presses that do not renumber go on at the same ID
# in both; or a warning.
# Seen: of 12 tokens 6 are kept; the pipeline goes on at ID 6 and generate at 12.
# What to do: use the pipeline, or a loop that gives position_ids from cache.get_seq_length() on.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.2.0 kvpress==0.5.5 >&2
cat > "$folder/check.py" <<'EOF'
import torch
from kvpress import KeyRerotationPress, KnormPress, KVPressTextGenerationPipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

names = ["<unk>", "<s>", *(f"w{i}" for i in range(2, 64))]
words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
words.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4)).eval()
model.generation_config.eos_token_id = None
seen = []
model.model.rotary_emb.register_forward_pre_hook(
    lambda module, args, kwargs: seen.append([*args, *kwargs.values()][1].flatten().tolist()),
    with_kwargs=True)


def behind(run):
    """The position IDs of each pass behind the prompt of 12 tokens."""
    seen.clear()
    run()
    assert seen[0] == list(range(12)), seen
    return [row[0] for row in seen[1:3]]


def compare(make):
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    text = " ".join(f"w{i}" for i in range(10, 21))         # the pipeline puts <s> before it
    ids = torch.tensor([[1, *range(10, 21)]])
    piped = behind(lambda: pipeline(text, question="w30", press=make(), max_new_tokens=2))

    def generate():
        with torch.no_grad(), make()(model):
            model.generate(ids, max_new_tokens=3, do_sample=False)

    return piped, behind(generate)


plain = compare(lambda: KnormPress(0.5))
renumbered = compare(lambda: KeyRerotationPress(KnormPress(0.5)))
print("KnormPress          pipeline", plain[0], "generate", plain[1])
print("KeyRerotationPress  pipeline", renumbered[0], "generate", renumbered[1])
assert plain == ([12, 13], [12, 13]), plain
assert renumbered == ([6, 7], [12, 13]), renumbered
EOF
"$folder/venv/bin/python" -W ignore "$folder/check.py"
