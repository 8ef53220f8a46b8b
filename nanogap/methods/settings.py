"""Settings of a strategy, written behind its name: "fastv(layer=2,drop=0.5)".

In:  the name of a strategy, and settings.  Out: the key under which it stands in STRATEGIES with
them: sorted, and without those that say what holds anyway.

A setting is a keyword argument of the strategy's function; its type and its default stand there.
Two settings are not: `crops` of all that prune before the decoder, and `question` of all that read.
"""

import ast
import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin

from torch import Generator

from nanogap.errors import NanogapError
from nanogap.prune import FIELDS, STRATEGIES, Kept, Strategy, VisualTokens, needs_of

Share = NewType("Share", float)                 # from 0 to 1
Crops = Literal["proportion", "equal"]          # of LLaVA-1.6: how its parts share a budget
Question = Literal["expression", "whole"]       # which words CLIP's text tower is given
IN_DECODER = {"attention", "value_attention", "axes"}   # fields that only a decoder layer shows
COUNTING = {"drop", "ratios", "label"}          # in the decoder they say how many tokens stay
WORDS = {int: "a whole number", float: "a number", Share: "a share from 0 to 1", str: "a word",
         bool: "True or False", list[int]: "a list of whole numbers",
         list[Share]: "a list of shares from 0 to 1"}

FIELDS["question"] = "(S, E)      the whole question there, a row for every 77 tokens"


def settings_of(name: str) -> dict[str, Any]:
    """What differs from the defaults in a strategy that stands in STRATEGIES."""
    return getattr(STRATEGIES[name], "settings", {})


def base_of(name: str) -> str:
    """The name without its settings."""
    return name.partition("(")[0] if settings_of(name) else name


def configure(name: str, text: str) -> str:
    """Enter a strategy with settings, "layer=2,drop=0.5"; returns the key under which it stands.

    raises: NanogapError for settings that it does not have, or of another type
    """
    known, values = settings_known(name), {}
    for setting, said in parse(name, text).items():
        kind, default = known.get(setting, (None, None))
        value = convert(said, kind)
        if value is None:
            told = ", ".join(f"{each} ({in_words(kind)})" for each, (kind, _) in known.items())
            raise NanogapError(f"{name} has no setting {setting}={said!s:.80}; it has "
                               f"{told or 'none at all'}")
        if value != default:
            values[setting] = value
    if not values:
        return name
    pairs = ",".join(f"{setting}={values[setting]}" for setting in sorted(values))
    key = f"{name}({pairs.replace(', ', ',')})"
    STRATEGIES[key] = configured(name, values)
    return key


def configured(name: str, values: Mapping[str, Any]) -> Strategy:
    """The strategy with these settings: a function with what `strategy` notes of one."""
    function, needs = STRATEGIES[name], needs_of(name)
    arguments = inspect.signature(function).parameters
    own = {setting: value for setting, value in values.items() if setting in arguments}
    whole = values.get("question") == "whole"
    if whole:
        needs = needs - {"text"} | {"question"}

    def run(seen: VisualTokens, budget: Any, generator: Generator) -> Kept:
        if whole and "question" not in own:     # one that reads a single row
            seen = replace(seen, fields=seen.fields | {"text": seen.question[0]})
        return function(seen, budget, generator, **own)

    counts = "attention" in needs and not COUNTING.isdisjoint(values)
    finds_budget = counts or getattr(function, "finds_budget", False)
    run.__dict__.update(needs=needs, finds_budget=finds_budget, settings=dict(values), of=function)
    return run


def settings_known(name: str) -> dict[str, tuple[Any, Any]]:
    """All settings that a strategy has: name -> type and default."""
    parameters = inspect.signature(STRATEGIES[name], eval_str=True).parameters.values()
    known = {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "text" in needs_of(name):
        known.setdefault("question", (Question, "expression"))
    if not needs_of(name) & IN_DECODER:
        known["crops"] = (Crops, "proportion")
    return known


def parse(name: str, text: str) -> dict[str, Any]:
    """ "layer=2,crops=equal" -> {"layer": 2, "crops": "equal"}."""
    try:
        call: Any = ast.parse(f"f({text})", mode="eval").body
        values = {str(word.arg): word.value.id if isinstance(word.value, ast.Name)
                  else ast.literal_eval(word.value) for word in call.keywords}
        if call.args or len(values) < len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError, TypeError):
        raise NanogapError(f"{name}({text:.80}): write settings as name=value with commas between "
                           "them, such as fastv(layer=2,drop=0.5)") from None
    return values


def convert(value: Any, kind: Any) -> Any:
    """A value as its setting holds it; None where it is of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = [convert(value, one) for one in inner]
        return next((one for one in found if one is not None), None)
    if origin is list and isinstance(value, list) and value:
        items = [convert(item, inner[0]) for item in value]
        return None if None in items else items
    if kind in (float, Share) and type(value) in (int, float):
        return float(value) if kind is float or 0 <= value <= 1 else None
    if origin is Literal:
        return value if value in inner else None
    return value if kind in (type(value), Any, inspect.Parameter.empty) else None


def in_words(kind: Any) -> str:
    """A type, for people."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(in_words(one) for one in inner if one is not type(None))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, inner))
    return WORDS.get(kind, "a value")
