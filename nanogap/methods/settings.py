"""Settings of a strategy, written behind its name: "fastv(layer=2,drop=0.5)".

In:  the name of a strategy, and settings.  Out: the key under which it stands in STRATEGIES with
them: sorted, and without those that say what holds anyway.

A setting is a keyword argument of the strategy's function, whose default stands there.
Two are not: `crops` of all that prune before the decoder, and `question` of all that read.
"""

import ast
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from nanogap.errors import NanogapError
from nanogap.prune import FIELDS, STRATEGIES, needs_of

IN_DECODER = {"attention", "value_attention", "axes"}   # fields that only a decoder layer shows
COUNTING = {"drop", "ratios", "label"}          # in the decoder they say how many tokens stay
FIELDS["question"] = "(S, E)      the whole question there, a row for every 77 tokens"


def is_whole(value: Any) -> bool:
    return type(value) is int


def is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def is_list(of: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(of, value))


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {   # what each may be; your own, anything
    "layer": ("a whole number", is_whole),
    "layers": ("a list of whole numbers", partial(is_list, is_whole)),
    "drop": ("a share from 0 to 1", is_share),
    "ratio": ("a share from 0 to 1", is_share),
    "ratios": ("a list of shares from 0 to 1", partial(is_list, is_share)),
    "label": ("192, 128, 96 or 64", lambda value: value in (192, 128, 96, 64)),
    "question": ("expression or whole", lambda value: value in ("expression", "whole")),
    "crops": ("proportion or equal", lambda value: value in ("proportion", "equal")),
}


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
    function, needs = STRATEGIES[name], needs_of(name)
    arguments = inspect.signature(function).parameters.values()
    own = {each.name: each.default for each in arguments if each.kind is each.KEYWORD_ONLY}
    defaults = dict(own)
    if "text" in needs:
        defaults["question"] = "expression"
    if not needs & IN_DECODER:
        defaults["crops"] = "proportion"
    kinds = KINDS
    if not function.__module__.startswith("nanogap."):
        kinds = {each: kind for each, kind in KINDS.items() if each not in own}
    said = parse(name, text)
    for setting, value in said.items():
        if setting not in defaults or setting in kinds and not kinds[setting][1](value):
            known = [f"{each} ({kinds[each][0]})" if each in kinds else each for each in defaults]
            raise NanogapError(f"{name} has no setting {setting}={value!s:.80}; it has "
                               f"{', '.join(known) or 'none at all'}")
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
    key = f"{name}({pairs.replace(', ', ',')})"
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
