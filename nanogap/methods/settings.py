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
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from torch import Generator

from nanogap.errors import NanogapError
from nanogap.prune import FIELDS, STRATEGIES, Kept, Strategy, VisualTokens, needs_of

Share = NewType("Share", float)                 # from 0 to 1
Crops = Literal["proportion", "equal"]          # of LLaVA-1.6: how its parts share a budget
Question = Literal["expression", "whole"]       # which words CLIP's text tower is given
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
    for setting, value in parse(name, text).items():
        if setting not in known:
            raise NanogapError(f"{name} has no setting {setting!r}: {listed(name, known)}")
        kind, default = known[setting]
        value = convert(value, kind)
        if value is None:
            raise NanogapError(f"{name}: {setting} is not {in_words(kind)}: {listed(name, known)}")
        if value != default:
            values[setting] = value
    if not values:
        return name
    said = ",".join(f"{setting}={spelled(values[setting])}" for setting in sorted(values))
    key = f"{name}({said})"
    STRATEGIES[key] = configured(name, values)
    return key


def configured(name: str, values: Mapping[str, Any]) -> Strategy:
    """The strategy with these settings: a function with what `strategy` notes of one."""
    function, needs = STRATEGIES[name], needs_of(name)
    own = {setting: value for setting, value in values.items() if setting in arguments(function)}
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


# ----- what there is ------------------------------------------------------------------------------


def arguments(function: Strategy) -> dict[str, tuple[Any, Any]]:
    """The keyword arguments of a strategy: name -> type and default."""
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = get_type_hints(function)
    except (TypeError, ValueError, NameError):   # not every callable has a signature
        return {}
    return {p.name: (hints.get(p.name, Any), p.default)
            for p in parameters if p.kind is p.KEYWORD_ONLY}


def settings_known(name: str) -> dict[str, tuple[Any, Any]]:
    """All settings that a strategy has: name -> type and default."""
    known, needs = arguments(STRATEGIES[name]), needs_of(name)
    if "text" in needs:
        known.setdefault("question", (Question, "expression"))
    if not needs & IN_DECODER:
        known["crops"] = (Crops, "proportion")
    return known


IN_DECODER = {"attention", "value_attention", "axes"}   # fields that only a decoder layer shows


def listed(name: str, known: Mapping[str, tuple[Any, Any]]) -> str:
    """The settings of a strategy, for people."""
    told = [f"{setting} ({in_words(kind)})" for setting, (kind, _) in known.items()]
    return f"its settings are {', '.join(told)}" if told else "it has none"


# ----- reading ------------------------------------------------------------------------------------


def parse(name: str, text: str) -> dict[str, Any]:
    """ "layer=2,crops=equal" -> {"layer": 2, "crops": "equal"}.

    raises: NanogapError where it is not that
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body if len(text) < 400 else None
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        values = {word.arg: word.value.id if isinstance(word.value, ast.Name)
                  else ast.literal_eval(word.value) for word in call.keywords}
        if len(values) < len(call.keywords) or None in values:
            raise ValueError
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise NanogapError(f"{name}({text:.80}): write settings as name=value with commas between "
                           "them, such as fastv(layer=2,drop=0.5)") from None
    return {str(setting): value for setting, value in values.items()}


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
    fits = value in inner if origin is Literal else kind in (Any, type(value))
    return value if fits else None


def in_words(kind: Any) -> str:
    """A type, for people."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(in_words(one) for one in inner if one is not type(None))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, inner))
    return WORDS.get(kind, "a value")


def spelled(value: Any) -> str:
    """A value as it stands in a key."""
    return str(value).replace(" ", "").replace("'", "") if isinstance(value, list) else str(value)
