"""Make one folder that `nanogap.load` reads of the pieces in which a model is published.

    python -m nanogap.convert shikra --base weights/llama-7b --delta weights/shikra-7b-delta-v1 \
        --clip weights/clip-vit-large-patch14 --out weights/shikra-7b
"""

import inspect
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nanogap.checks.command import Parser, answer_for, one_line, path_argument
from nanogap.checks.loading import snapshot
from nanogap.checks.output import new_folder
from nanogap.checks.silent import silent
from nanogap.convert.recipes import Recipe, llava, minigpt_v2, shikra
from nanogap.convert.sentencepiece import read_llama_tokenizer
from nanogap.convert.tensors import write_tensors
from nanogap.errors import NanogapError
from nanogap.models import MODELS
from nanogap.models.base import write_json
from nanogap.models.saving import our_name
from nanogap.weights import read_config

HELP = {"base": "folder of LLaVA's own layout, or of the language model",
        "delta": "folder of the difference to it",
        "clip": "folder of the CLIP that the vision tower comes from",
        "vision": "eva_vit_g.pth", "checkpoint": "minigptv2_checkpoint.pth"}
# each asks for its arguments by flags of their names
RECIPES: dict[str, Callable] = {"llava": llava, "shikra": shikra, "minigpt-v2": minigpt_v2}


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, and make one folder of the pieces."""
    parser = Parser(prog="python -m nanogap.convert", description=(__doc__ or "").split("\n")[0])
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    for name, make in RECIPES.items():
        one = models.add_parser(name, help=(make.__doc__ or "").split("\n")[0])
        for piece in inspect.signature(make).parameters.values():
            one.add_argument(f"--{piece.name}", type=path_argument, help=HELP[piece.name],
                             required=piece.default is piece.empty)
        one.add_argument("--out", type=path_argument, required=True,
                         help="folder to write; it must not exist, or be empty")
    args = vars(parser.parse_args(argv))
    make, out = RECIPES[args.pop("model")], args.pop("out")
    pieces = {name: snapshot(path) for name, path in args.items() if path is not None}
    write(make(**pieces), out)
    print(f"{out} is done; ask it with `python run.py image.jpg \"the man on the left\" "
          f"--weights {shlex.quote(str(out))}`")


def write(recipe: Recipe, out: Path) -> None:
    """Make what a recipe says; all of it is looked through before the first number is read."""
    settings, pieces, make = recipe
    source = pieces[0].path
    family = MODELS[settings["model_type"]]
    with new_folder("--out", out) as folder:
        write_json(folder / "config.json", settings)
        try:
            silent(folder)
            config = read_config(folder, family)
        except NanogapError as error:
            raise NanogapError(f"{source}: {error}") from None
        special = family.special_tokens if config.text.vocab_size > config.image_token else ()
        tokenizer = read_llama_tokenizer(source / "tokenizer.model", special)
        tokens = tokenizer.get_vocab_size(with_added_tokens=False)
        if tokens != config.image_token:
            raise NanogapError(f"{source / 'tokenizer.model'} has {tokens} tokens, and the "
                               f"embeddings have rows for {config.image_token}; give the one of "
                               "this model")
        with torch.device("meta"):
            model = family(config)
        try:
            empty = dict(make(*(piece.empty() for piece in pieces)))
            model.load_state_dict({our_name(name, model.rename): tensor
                                   for name, tensor in empty.items()}, assign=True)
        except RuntimeError as error:        # torch's, on names and shapes
            raise NanogapError("the pieces are not whole, or belong to different models "
                               f"({one_line(error)}); get those of one model again") from None
        model.write_config(folder, config.dtype.removeprefix("torch."))
        tokenizer.save(str(folder / "tokenizer.json"))
        write_tensors(folder / "model.safetensors", empty, make(*pieces))


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.convert", command, None))
