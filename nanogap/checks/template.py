"""Which chat template was a checkpoint trained with?  nanogap asks in its model's own only.

In:  a checkpoint's folder, and how the model's own template speaks.
Out: nothing, or the file that holds another one.
Source: the places in which transformers 5.23 looks for a template.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogap.checks.reading import optional, read_bytes, text_of
from nanogap.errors import NanogapError


@dataclass(frozen=True)
class Chat:
    """The chat template that a model was trained with, as far as others can be told from it."""

    name: str                  # whose it is
    turns: tuple[str, ...]     # the words that mark whose turn it is; the first must be there
    systems: tuple[str, ...] = ()   # one of these may stand before the first question, or none


# what any chat template says: names in Jinja are text in quotes as well
SAYS = {"user", "assistant", "system", "role", "content", "type", "text", "image", "default", "s"}
TAG = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)


def check_template(folder: Path, chat: Chat) -> None:
    """Refuse a checkpoint that was trained with another chat template than the model's."""
    for file, template in templates(folder):
        said = spoken(template)
        for system in chat.systems:
            said = said.replace(system, " ")
        words = set(re.findall(r"[^\W\d_]+", said))
        if chat.turns[0] not in words or words - SAYS - set(chat.turns):
            raise NanogapError(
                f"{folder / file} holds another chat template than {chat.name}'s, and nanogap asks "
                "in that only: a model that was trained with another would answer worse; if this "
                "one was not, take the template away")
        return                               # the first is the one that transformers would take


def templates(folder: Path) -> Iterator[tuple[str, str]]:
    """The chat templates of a checkpoint, in the order in which transformers looks for them."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        yield jinja.name, text_of(jinja, read_bytes(jinja))
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = optional(folder / file).get("chat_template")
        if isinstance(found, list):          # several, by name
            found = {part.get("name"): part.get("template") for part in found
                     if isinstance(part, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            yield file, found


def spoken(template: str) -> str:
    """The text in a template: what stands outside its tags, and in quotes within them."""
    said = [TAG.sub(" ", template)]
    for tag in TAG.findall(template):
        speaks = tag.startswith("{{") and "raise_exception" not in tag
        if speaks or re.match(r"\{%-?\s*set\b", tag):
            said += [first or second for first, second in QUOTED.findall(tag)]
    return " ".join(said).replace("\\n", " ")
