"""Strategies of one's own, in a file or in a program; and settings, "name(setting=value)"."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanogap import NanogapError, methods
from nanogap.methods import find
from nanogap.prune import STRATEGIES, needs_of

HEAD = "import torch\nfrom nanogap.prune import Kept\ndef last(seen, budget, generator):\n    "
LAST = "torch.arange(len(seen.features))[-budget:]"

Keeps = Callable[[str, int | None], list[int]]


@pytest.fixture
def keeps(model, picture) -> Keeps:
    """Which of 16 patches a strategy keeps."""
    return lambda name, budget: model.ground(picture, "the man", name, budget,
                                             max_new_tokens=1).keep.tolist()


def written(folder: Path, text: str, name: str = "my_method.py") -> str:
    """The name of the strategy `last` in a file with this text."""
    (folder / name).write_text(text)
    return f"{folder / name}:last"


def returning(folder: Path, kept: str = LAST, name: str = "my_method.py") -> str:
    """A strategy that returns this expression."""
    return written(folder, f"{HEAD}return Kept({kept})\n", name)


def test_a_file_may_say_what_its_strategy_needs_and_import_from_its_folder(tmp_path: Path,
                                                                          keeps: Keeps):
    """A dataclass as well: the file is a module like any other."""
    written(tmp_path, "STEP = 2\n", "helper_of_mine.py")
    name = written(tmp_path, """
from dataclasses import dataclass
from helper_of_mine import STEP
from nanogap.prune import Kept, ranked, strategy

@dataclass
class Settings:
    step: int = STEP

@strategy(needs={"cls"}, finds_budget=True)
def last(seen, budget, generator):
    return Kept(ranked(seen.features @ seen.cls, budget or Settings().step))
""")
    assert needs_of(find(name)) == {"cls"} and "last" not in STRATEGIES
    assert len(keeps(name, None)) == 2


def test_a_file_that_was_edited_is_read_again(tmp_path: Path, keeps: Keeps):
    for count in (2, 3):
        assert len(keeps(returning(tmp_path, f"torch.arange({count})" + " " * count), 4)) == count


def test_two_files_with_one_function_name_are_two_strategies(tmp_path: Path, keeps: Keeps):
    first = returning(tmp_path, name="a.py")
    second = returning(tmp_path, LAST.replace("-budget:", ":budget"), "b.py")
    assert find(first) == first and needs_of(first) == frozenset()
    assert [keeps(name, 2) for name in (first, second)] == [[14, 15], [0, 1]]


def test_a_built_in_name_is_never_anothers(tmp_path: Path, keeps: Keeps):
    text = f"{HEAD}return Kept({LAST})\n".replace("last", "random")
    name = find(written(tmp_path, text).replace(":last", ":random"))
    assert methods.code_of(name).endswith("my_method.py") and methods.code_of("random") == ""
    assert keeps(name, 2) == [14, 15] and STRATEGIES["random"] is methods.BUILT_IN["random"]


def test_what_a_strategy_changes_is_its_own_copy(tmp_path: Path, model, picture):
    image = model.encode_image(picture)
    before = image.features.clone()
    name = written(tmp_path, f"{HEAD}seen.features.zero_()\n    return Kept({LAST})\n")
    model.ground(image, "the man", name, 4, max_new_tokens=1)
    assert torch.equal(image.features, before)


@pytest.mark.parametrize("kept", ["[3, 1]", "torch.tensor([3, 1], dtype=torch.int32)",
                                  "torch.tensor([3, 1]), seen.features[:2].half()"])
def test_what_is_plainly_meant_is_taken(kept: str, tmp_path: Path, keeps: Keeps):
    assert keeps(returning(tmp_path, kept), 2) == [1, 3]


@pytest.mark.parametrize("kept, message", [
    *[(keep, f"ranked must be 1 to 2 different patches, numbered from 0 to 15; it is {told}")
      for keep, told in (("[0.5]", "1: .0.5"), ("torch.arange(3)", "3: "), ("[]", "0: "),
                         ("[7, 7]", "2: .7, 7"), ("[16]", "1: .16"), ("[[1]]", "1: ..1"))],
    ("'x'", "TypeError: .*str"),
    ("[1], seen.features", r"features must be .*; one is \(16, 32\)"),
    ("[1], added=seen.features[0]", r"features must be .* C is 32 .*; one is \(32,\)"),
    *[(wrong, f"{told}.*; mend it in .*my_method.py, line 4")
      for wrong, told in (("1 / 0", "ZeroDivisionError"), ("seen.keys", "AttributeError: .keys. "),
                          ("__import__('sys').exit(0)", "SystemExit: 0"))]])
def test_what_cannot_be_fed_is_a_line_that_says_what_came_and_where(
        kept: str, message: str, tmp_path: Path, keeps: Keeps):
    with pytest.raises(NanogapError, match=f"the strategy .*:last: {message}"):
        keeps(returning(tmp_path, kept), 2)


def test_one_that_a_program_enters_is_guarded_as_well(keeps: Keeps):
    STRATEGIES["mine"] = lambda seen, budget, generator: torch.arange(4)
    with pytest.raises(NanogapError, match="the strategy mine: it must return Kept.ranked., and "):
        keeps("mine", 4)


@pytest.mark.parametrize("text, message", [
    ("import sys\nsys.exit(3)\ndef last(): ...", "imported: SystemExit: 3; mend it in .* line 2"),
    ("from nanogap.prune import strategy\n@strategy\ndef last(): ...", "write @strategy.. with"),
    ("def last(:", "cannot be imported: SyntaxError.*line 1"), ("x = 1", "has no function 'last'"),
    ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError")])
def test_a_file_that_gives_no_strategy_is_one_line(text: str, message: str, tmp_path: Path):
    with pytest.raises(NanogapError, match=message):
        find(written(tmp_path, text))


def test_settings_have_one_way_to_be_written():
    """And the list of strategies stays as it is."""
    key = "fastv(drop=0.5,layer=2)"
    assert find("fastv( layer=2, drop=0.5 )") == key and find(key) == key
    assert not any("(" in name for name in methods.BUILT_IN)


def test_one_of_your_own_has_settings_too(tmp_path: Path, keeps: Keeps):
    """Its keyword arguments; and words of which a type is not said may be anything."""
    name = written(tmp_path, HEAD.replace("budget, generator", "budget, generator, *, step: int = 1"
                                          ", odd=0") + "return Kept([odd, odd + 2 * step])\n")
    assert keeps(f"{name}(odd=1, step=3)", 2) == [1, 7] and find(f"{name}(step=1)") == name
    name = written(tmp_path, HEAD.replace("budget, generator", "budget, generator, *, ratio=2.5")
                   + "return Kept([int(ratio)])\n")
    assert keeps(f"{name}(ratio=3.5)", 2) == [3]       # its own, and no share from 0 to 1


@pytest.mark.parametrize("spec, message", [
    ("nowhere.py:last", "there is no file"), ("best", "unknown strategy"),
    ("fastv(depth=2)", "fastv has no setting depth=2; it has layer .a whole number., "),
    ("fastv(layer=x)", "no setting layer=x"), ("vispruner(ratio=2)", "no setting ratio=2"),
    ("sparsevlm(label=65)", "label .192, 128, 96 or 64"), ("fastv(2)", "write settings as "),
    ("fastv(layer=2,layer=3)", "write settings as "),
    ("pyramiddrop(layer=2)", "no setting layer=2; it has none at all")])
def test_what_there_is_not_is_one_line(spec: str, message: str):
    with pytest.raises(NanogapError, match=message):
        find(spec)
