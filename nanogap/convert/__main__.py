"""Make one folder that `nanogap.load` reads of the pieces in which a model is published.

    python -m nanogap.convert llava --base weights/llava-v1.5-7b \
        --clip weights/clip-vit-large-patch14-336 --out weights/llava
    python -m nanogap.convert shikra --base weights/llama-7b --delta weights/shikra-7b-delta-v1 \
        --clip weights/clip-vit-large-patch14 --out weights/shikra-7b
    python -m nanogap.convert minigpt-v2 --base weights/llama-2-7b-chat-hf \
        --vision eva_vit_g.pth --checkpoint minigptv2_checkpoint.pth --out weights/minigpt-v2

In:  folders in the form in which their authors publish them, pickles among them.
Out: config.json, tokenizer.json and safetensors under the names of the hub; transformers reads a
     LLaVA's as well.

All pieces are looked through before anything is written: names, shapes, the tokenizer.  Then one
tensor after the other is made and written, and the folder takes its name when it is whole.
"""

import inspect
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nanogap.checks.command import Parser, answer_for, path_argument
from nanogap.checks.explain import fits
from nanogap.checks.output import CLAIM, check_folder, claim, whole_checkpoint
from nanogap.checks.reading import printable, write_json
from nanogap.checks.silent import silent
from nanogap.convert.minigpt import minigpt_v2
from nanogap.convert.recipes import Recipe, llava
from nanogap.convert.shards import check_room, write_parts
from nanogap.convert.shikra import shikra
from nanogap.errors import NanogapError
from nanogap.models import MODELS, VLM
from nanogap.models.saving import our_name
from nanogap.weights import read_config

HELP = {
    "base": "folder of LLaVA's own layout, or of the language model",
    "delta": "folder of the difference to it",
    "clip": "folder of the CLIP that the vision tower comes from",
    "vision": "eva_vit_g.pth",
    "checkpoint": "minigptv2_checkpoint.pth"}
# each asks for its arguments by flags of their names
RECIPES: dict[str, Callable[..., Recipe]] = {
    "llava": llava, "shikra": shikra, "minigpt-v2": minigpt_v2}


def convert(recipe: Recipe, out: Path) -> int:
    """Write what a recipe makes; returns how many numbers the model has.

    raises: NanogapError where the pieces do not go together, or `out` cannot be written
    """
    with whole_checkpoint("--out", out) as folder:
        model = empty_model(recipe, folder)
        check_parts(recipe, model)
        check_room("--out", folder, recipe.parts)
        write_parts(folder, recipe.parts)
        return sum(parameter.numel() for parameter in model.parameters())


def empty_model(recipe: Recipe, folder: Path) -> VLM:
    """The model without its numbers; what it writes around them is written, and read back."""
    family = MODELS[recipe.config["model_type"]]
    write_json(folder / "config.json", recipe.config)
    try:
        silent(folder)
        config = read_config(folder, family)
    except NanogapError as error:
        raise NanogapError(f"{recipe.pieces[''].path}: {error}") from None
    with torch.device("meta"):
        model = family(config)
    model.tokenizer = recipe.tokenizer
    model.write_config(folder, str(recipe.dtype).removeprefix("torch."))
    model.tokenizer.save(str(folder / "tokenizer.json"))
    return model


def check_parts(recipe: Recipe, model: VLM) -> None:
    """Every part belongs to the model and has its shape, and none is missing."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing = set(expected)
    for name, part in recipe.parts.items():
        ours = our_name(name, model.rename)
        if ours not in expected:
            raise NanogapError(f"{part.source} is not a part of this model; give the piece that "
                               "was published for it")
        if part.shape != expected[ours] and not fits(model, ours, part.shape):
            raise NanogapError(f"{part.source} is {list(part.shape)}, and config.json makes it "
                               f"{list(expected[ours])}: the pieces belong to different models")
        missing.discard(ours)
    if missing:
        name = our_name(next(ours for ours in expected if ours in missing), model.on_disk)
        piece = recipe.pieces[max(filter(name.startswith, recipe.pieces), key=len)]
        raise NanogapError(f"{piece.path} lacks {len(missing)} of {len(expected)} tensors, such "
                           f"as {printable(name)}; get it whole with {piece.download}")


def command(argv: Sequence[str] | None) -> None:
    """Check the arguments, look through the pieces, and write the folder."""
    parser = Parser(prog="python -m nanogap.convert",
                    description="Make one folder of the pieces in which a model is published.")
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    for name, make in RECIPES.items():
        one = models.add_parser(name, help=(make.__doc__ or "").split("\n")[0])
        for piece in inspect.signature(make).parameters.values():
            one.add_argument(f"--{piece.name}", type=path_argument, help=HELP[piece.name],
                             required=piece.default is piece.empty)
        one.add_argument("--out", type=path_argument, required=True,
                         help="folder to write; it must not exist, or be empty")
    args = vars(parser.parse_args(argv))
    name, out = args.pop("model"), args.pop("out")
    new = not out.exists()
    check_folder("--out", out)
    if any(path.name != CLAIM and path.suffix != ".partial" for path in out.iterdir()):
        raise NanogapError(f"--out {out} has files in it already, and they are not overwritten; "
                           "give a new folder, or move them away")
    try:
        with claim("--out", out):
            recipe = RECIPES[name](**args)
            numbers = convert(recipe, out)
    finally:
        if new and not any(out.iterdir()):
            out.rmdir()
    weights = shlex.quote(str(out))
    print(f"{out} is done: {len(recipe.parts)} tensors, {numbers} parameters; "
          f'ask it with `python run.py image.jpg "the man on the left" --weights {weights}`')


if __name__ == "__main__":
    sys.exit(answer_for("nanogap.convert", command, None))
