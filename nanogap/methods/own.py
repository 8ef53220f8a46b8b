"""Strategies by what a person writes: "name(setting=value)", or "FILE.py:NAME".

A setting is a keyword argument of the strategy's function, whose default stands there.  Two are
not: `crops` of all that prune before the decoder, and `question` of all that read.
One of your own, from a file or your program, sees a copy, and what it returns is checked.
"""

import ast
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial, wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Generator, Tensor

from nanogap.errors import NanogapError
from nanogap.methods import before  # noqa: F401   it enters its own
from nanogap.methods.in_decoder import COUNTING, prunes_there
from nanogap.prune import FIELDS, STRATEGIES, Kept, Strategy, VisualTokens, needs_of

BUILT_IN = dict(STRATEGIES)
FIELDS["question"] = "(S, E)      the whole question there, a row for every 77 tokens"
ANYTHING = "anything", lambda value: True
SHARE = "a share from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {   # what each may be
    "layer": ("a whole number", lambda value: type(value) is int),
    "drop": SHARE,
    "ratio": SHARE,
    "label": ("192, 128, 96 or 64", lambda value: value in (192, 128, 96, 64)),
    "question": ("expression or whole", lambda value: value in ("expression", "whole")),
    "crops": ("proportion or equal", lambda value: value in ("proportion", "equal")),
}


def find(spec: str) -> str:
    """The key of a strategy in STRATEGIES, with its settings; NanogapError where there is none."""
    name, bracket, text = spec[:-1].rpartition("(") if spec.endswith(")") else (spec, "", "")
    if ":" in name:
        STRATEGIES[name] = guarded(name, read(name))
    elif name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r:.80}: choose from {', '.join(BUILT_IN)}, "
                           "or give one of your own as FILE.py:NAME")
    elif STRATEGIES[name] is not BUILT_IN.get(name):
        STRATEGIES[name] = guarded(name, STRATEGIES[name])
    return configure(name, text) if bracket else name


def configure(name: str, text: str) -> str:
    """Enter a strategy with settings; returns its key, with those that differ from the defaults."""
    function, needs = STRATEGIES[name], needs_of(name)
    arguments = inspect.signature(function).parameters.values()
    own = {each.name: each.default for each in arguments if each.kind is each.KEYWORD_ONLY}
    defaults = dict(own)
    if "text" in needs:
        defaults["question"] = "expression"
    if not prunes_there(name):
        defaults["crops"] = "proportion"
    yours = {} if function is BUILT_IN.get(name) else dict.fromkeys(own, ANYTHING)
    kinds = {each: yours.get(each) or KINDS[each] for each in defaults}
    said = parse(name, text)
    for setting, value in said.items():
        if setting not in kinds or not kinds[setting][1](value):
            known = ", ".join(f"{each} ({words})" for each, (words, _) in kinds.items())
            raise NanogapError(f"{name} has no setting {setting}={value!s:.80}; it has "
                               f"{known or 'none at all'}")
    values = {setting: said[setting] for setting in sorted(said)
              if said[setting] != defaults[setting]}
    if not values:
        return name
    if values.get("question") == "whole":
        needs = needs - {"text"} | {"question"}
    counts = "attention" in needs and not COUNTING.isdisjoint(values)
    run = partial(function, **{setting: values[setting] for setting in own if setting in values})
    vars(run).update(needs=needs, settings=values, __wrapped__=function,
                     finds_budget=counts or getattr(function, "finds_budget", False))
    pairs = ",".join(f"{setting}={value}" for setting, value in values.items())
    key = f"{name}({pairs})"
    STRATEGIES[key] = run
    return key


def parse(name: str, text: str) -> dict[str, Any]:
    """ "layer=2,crops=equal" -> {"layer": 2, "crops": "equal"}."""
    try:
        call: Any = ast.parse(f"f({text})", mode="eval").body
        if call.args or len({word.arg for word in call.keywords}) < len(call.keywords):
            raise ValueError
        return {str(word.arg): word.value.id if isinstance(word.value, ast.Name)
                else ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, TypeError):
        raise NanogapError(f"{name}({text:.80}): write settings as name=value with commas between "
                           "them, such as fastv(layer=2,drop=0.5)") from None


def code_of(name: str) -> str:
    """The file that a strategy comes from: of those that are built in, none."""
    function = inspect.unwrap(STRATEGIES[name])
    code = None if function in BUILT_IN.values() else getattr(function, "__code__", None)
    return code.co_filename if code else ""


@contextmanager
def in_a_line(what: str, file: str) -> Iterator[None]:
    """What goes wrong in a person's own code may be anything; say it, and where to mend it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [each.lineno for each in extract_tb(error.__traceback__) if each.filename == file]
        told = f"{error}" if isinstance(error, NanogapError) else f"{type(error).__name__}: {error}"
        place = f"; mend it in {file}, line {lines[-1]}" if lines else ""
        raise NanogapError(f"{what}: {told:.400}{place}") from error


def read(name: str) -> Strategy:
    """The function that "FILE.py:NAME" names."""
    file, _, function = name.rpartition(":")
    path, known = Path(file).resolve(), dict(STRATEGIES)
    if not path.is_file():
        raise NanogapError(f"{name!r:.200}: there is no file {file:.200}; give FILE.py:NAME")
    try:
        with in_a_line(f"{file} cannot be imported", str(path)):
            found = read_file(path, path.stat().st_mtime_ns).get(function)
    finally:               # its decorators note what is needed; they enter and replace nothing
        STRATEGIES.clear()
        STRATEGIES.update(known)
    if not callable(found):
        raise NanogapError(f"{file} has no function {function!r}; give FILE.py:NAME")
    return found


@cache
def read_file(path: Path, changed: int) -> dict[str, Any]:
    """What a file defines.  changed: when, so that a file that was edited is read again."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))     # for what it imports from beside it
    return runpy.run_path(str(path))


def guarded(name: str, function: Strategy) -> Strategy:
    """The strategy as it is run: on a copy, and what goes wrong in it is a line that names it."""
    if hasattr(function, "guarded"):
        return function

    @wraps(function)
    def run(seen: VisualTokens, budget: Any, generator: Generator, **settings: Any) -> Kept:
        fields = {field: value.clone() for field, value in seen.fields.items()}
        copy = replace(seen, features=seen.features.clone(), fields=fields)
        with in_a_line(f"the strategy {name}", code_of(name)):
            return checked(function(copy, budget, generator, **settings), seen.features, budget)

    run.__dict__["guarded"] = True
    return run


def checked(kept: Any, seen: Tensor, budget: int | None) -> Kept:
    """What a strategy returned, as a model can be fed it: lists and other dtypes are converted.

    seen: (N, C) features that it was shown
    """
    if not isinstance(kept, Kept):
        raise NanogapError(f"it must return Kept(ranked), and this is a {type(kept).__name__}")
    N, C = seen.shape
    ranked = torch.as_tensor(kept.ranked)
    patches, most = ranked.flatten().tolist(), budget or N
    different = len(set(patches) & set(range(N))) == len(patches)
    if ranked.dim() != 1 or not different or not 1 <= len(patches) <= most:
        raise NanogapError(f"ranked must be 1 to {most} different patches, numbered from 0 to "
                           f"{N - 1}; it is {len(patches)}: {ranked.tolist()!s:.60}")
    features, added = (None if rows is None else torch.as_tensor(rows).to(seen)
                       for rows in (kept.features, kept.added))
    for rows, form in ((features, (len(patches), C)), (added, (kept.n_added, C))):
        if rows is not None and rows.shape != form:
            raise NanogapError(f"features must be (K, C), and added (M, C), where C is {C} and K "
                               f"is {len(patches)} here; one is {tuple(rows.shape)}")
    return Kept(ranked.long(), features, added)
