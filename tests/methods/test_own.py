"""Strategies of one's own, in a file or in a program; and settings, "name(setting=value)"."""

from pathlib import Path

import pytest
import torch

from nanogap import NanogapError, methods
from nanogap.methods import find
from nanogap.prune import STRATEGIES, Kept, needs_of

PLAIN = """
import torch
from nanogap.prune import Kept

def last(seen, budget, generator):
    return Kept(torch.arange(len(seen.features))[-budget:])
"""


def written(folder: Path, text: str, name: str = "my_method.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def returning(folder: Path, kept: str) -> str:
    """A strategy that returns this expression."""
    text = PLAIN.replace("torch.arange(len(seen.features))[-budget:]", kept)
    return f"{written(folder, text)}:last"


# ----- a file -------------------------------------------------------------------------------------


def test_a_plain_function_in_a_file_is_a_strategy(tmp_path: Path, model, picture):
    name = f"{written(tmp_path, PLAIN)}:last"
    assert find(name) == name and needs_of(name) == frozenset()
    assert model.ground(picture, "the man", name, 3, max_new_tokens=1).keep.tolist() == [13, 14, 15]


def test_a_file_may_say_what_its_strategy_needs_and_import_from_its_folder(tmp_path: Path, model,
                                                                          picture):
    """A dataclass as well: the file is a module like any other."""
    written(tmp_path, "STEP = 2\n", "helper_of_mine.py")
    file = written(tmp_path, """
from dataclasses import dataclass
from helper_of_mine import STEP
from nanogap.prune import Kept, ranked, strategy

@dataclass
class Settings:
    step: int = STEP

@strategy(needs={"cls"}, finds_budget=True)
def like(seen, budget, generator):
    return Kept(ranked(seen.features @ seen.cls, budget or Settings().step))
""")
    name = f"{file}:like"
    assert needs_of(find(name)) == {"cls"} and "like" not in STRATEGIES
    assert len(model.ground(picture, "the man", name, None, max_new_tokens=1).keep) == 2


def test_a_file_that_was_edited_is_read_again(tmp_path: Path, model, picture):
    for count in (2, 3):
        name = returning(tmp_path, f"torch.arange({count})" + " " * count)
        result = model.ground(picture, "the man", name, 4, max_new_tokens=1)
        assert len(result.keep) == count


def test_two_files_with_one_function_name_are_two_strategies(tmp_path: Path, model, picture):
    """And one named like a built-in leaves that alone."""
    first = f"{written(tmp_path, PLAIN, 'a.py')}:last"
    second = f"{written(tmp_path, PLAIN.replace('[-budget:]', '[:budget]'), 'b.py')}:last"
    third = f"{written(tmp_path, PLAIN.replace('last', 'random'), 'c.py')}:random"
    built_in = STRATEGIES["random"]
    kept = [model.ground(picture, "the man", name, 2, max_new_tokens=1).keep.tolist()
            for name in (first, second, third)]
    assert kept == [[14, 15], [0, 1], [14, 15]] and STRATEGIES["random"] is built_in


def test_what_a_strategy_changes_is_its_own_copy(tmp_path: Path, model, picture):
    image = model.encode_image(picture)
    before = image.features.clone()
    name = f"{written(tmp_path, PLAIN.replace('    return', '    seen.features.zero_()' + chr(10) + '    return'))}:last"  # noqa: E501
    model.ground(image, "the man", name, 4, max_new_tokens=1)
    assert torch.equal(image.features, before)


@pytest.mark.parametrize("kept", ["[3, 1]", "torch.tensor([3, 1], dtype=torch.int32)",
                                  "torch.tensor([3, 1]), seen.features[:2].half()"])
def test_what_is_plainly_meant_is_taken(kept: str, tmp_path: Path, model, picture):
    name = returning(tmp_path, kept)
    assert model.ground(picture, "the man", name, 2, max_new_tokens=1).keep.tolist() == [1, 3]


@pytest.mark.parametrize("kept, message", [
    ("torch.tensor([0.5])", "keep is float32: it must be whole numbers"),
    ("torch.arange(3)", "keep holds 3 of at most 2 patches"),
    ("torch.tensor([], dtype=torch.long)", "keep holds 0 of at most 2"),
    ("torch.tensor([7, 7])", "in keep 7 is there twice"),
    ("torch.tensor([16])", "keep holds 16: patches go from 0 to 15"),
    ("torch.tensor([[1]])", r"keep is of shape \(1, 1\)"),
    ("'x'", "keep is no tensor, but of type str"),
    ("torch.tensor([1]), seen.features", r"features must be \(K, C\) = \(1, 32\)"),
    ("torch.tensor([1]), added=seen.features[0]", r"added must be \(M, C\) = \(any, 32\)")])
def test_what_cannot_be_fed_is_a_line_that_says_what_came_and_where(
        kept: str, message: str, tmp_path: Path, model, picture):
    name = returning(tmp_path, kept)
    with pytest.raises(NanogapError, match=f"the strategy .*:last: {message}.*; mend it in .*line"):
        model.ground(picture, "the man", name, 2, max_new_tokens=1)


@pytest.mark.parametrize("text, message", [
    ("import sys\nsys.exit(3)\ndef last(): ...", "cannot be imported .SystemExit: 3"),
    ("def last(:", "cannot be imported .SyntaxError"), ("x = 1", "has no function 'last'"),
    ("import nowhere_at_all", "cannot be imported .ModuleNotFoundError")])
def test_a_file_that_gives_no_strategy_is_one_line(text: str, message: str, tmp_path: Path):
    with pytest.raises(NanogapError, match=message):
        find(f"{written(tmp_path, text)}:last")


@pytest.mark.parametrize("body", ["raise SystemExit(0)", "1 / 0", "seen.keys"])
def test_a_strategy_that_fails_is_a_line_that_names_it(body: str, tmp_path: Path, model, picture):
    name = f"{written(tmp_path, f'def last(seen, budget, generator):{chr(10)}    {body}')}:last"
    with pytest.raises(NanogapError, match="the strategy .*:last: it fails .*, line 2"):
        model.ground(picture, "the man", name, 2, max_new_tokens=1)


@pytest.mark.parametrize("name", ["nowhere.py:last", "best", "nowhere.at_all:last"])
def test_what_is_nowhere_is_one_line(name: str):
    with pytest.raises(NanogapError, match="there is no file|unknown strategy|cannot be imported"):
        find(name)


def test_one_that_a_program_enters_is_guarded_as_well(model, picture):
    STRATEGIES["mine"] = lambda seen, budget, generator: Kept(torch.arange(99))
    with pytest.raises(NanogapError, match="the strategy mine: keep holds 99 of at most 4"):
        model.ground(picture, "the man", "mine", 4, max_new_tokens=1)


# ----- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, key", [
    ("fastv(layer=2)", "fastv(layer=2)"), ("fastv( drop=0.5, layer=2 )", "fastv(drop=0.5,layer=2)"),
    ("vispruner(ratio=0.75)", "vispruner(ratio=0.75)"), ("random", "random"),
    ("sparsevlm(label=64)", "sparsevlm(label=64)")])
def test_settings_have_one_way_to_be_written(spec: str, key: str):
    assert find(spec) == key and find(key) == key


@pytest.mark.parametrize("spec, message", [
    ("fastv(depth=2)", "fastv.*depth"), ("random(layer=2)", "random"), ("fastv(layer=x)", "layer"),
    ("vispruner(ratio=2)", "ratio"), ("sparsevlm(label=65)", "label"),
    ("sparsevlm(layers=[])", "layers is not a list of whole numbers")])
def test_a_setting_that_there_is_not_is_one_line(spec: str, message: str, model, picture):
    with pytest.raises(NanogapError, match=message):
        model.ground(picture, "the man", spec, "50%", max_new_tokens=1)


def test_settings_leave_the_list_of_strategies_alone():
    find("vispruner(ratio=0.75)")
    assert "vispruner(ratio=0.75)" not in methods.BUILT_IN


def test_a_module_on_the_path_is_named_with_dots(tmp_path: Path, model, picture, monkeypatch):
    (tmp_path / "my_package").mkdir()
    written(tmp_path / "my_package", PLAIN, "one.py")
    monkeypatch.syspath_prepend(tmp_path)
    name = "my_package.one:last"
    assert methods.code_of(find(name)) == str(tmp_path / "my_package/one.py")
    assert model.ground(picture, "the man", name, 2, max_new_tokens=1).keep.tolist() == [14, 15]


def test_a_built_in_name_is_never_anothers(tmp_path: Path):
    name = find(f"{written(tmp_path, PLAIN.replace('last', 'random'))}:random")
    assert methods.code_of(name).endswith("my_method.py") and methods.code_of("random") == ""
    assert STRATEGIES["random"] is methods.BUILT_IN["random"]
    STRATEGIES["random"] = STRATEGIES[name]
    with pytest.raises(NanogapError, match="random is a strategy that is built in: give yours"):
        find("random")
