"""Strategies by what a person writes: "name(setting=value)", "FILE.py:NAME", "package.module:NAME".

One of your own, from a file or from your program, is handed a copy of what was seen, so it cannot
change what others see; and what it returns is checked, in lines that name it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import unwrap
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor

from nanogap.errors import NanogapError
from nanogap.methods import before, inside  # noqa: F401   they enter theirs
from nanogap.methods.settings import configure
from nanogap.prune import STRATEGIES, Kept, Strategy, VisualTokens

BUILT_IN = dict(STRATEGIES)
FILES: dict[Path, tuple[tuple[int, int], ModuleType]] = {}   # read so far: changed when, and size


def find(spec: str) -> str:
    """The key under which a strategy stands in STRATEGIES, with its settings.

    A file that has changed since is read again; one name in two files makes two strategies.
    raises: NanogapError where there is no such strategy, file, function or setting
    """
    if not isinstance(spec, str):
        raise NanogapError(f"a strategy has a name, and is not of type {type(spec).__name__}: "
                           f"choose from {', '.join(BUILT_IN)}")
    name, bracket, text = spec[:-1].rpartition("(") if spec.endswith(")") else (spec, "", "")
    if ":" in name:
        STRATEGIES[name] = guarded(name, read(name))
    elif name not in STRATEGIES:
        raise NanogapError(f"unknown strategy {name!r:.80}: choose from {', '.join(BUILT_IN)}, "
                           "or give one of your own as FILE.py:NAME")
    elif name not in BUILT_IN:
        STRATEGIES[name] = guarded(name, STRATEGIES[name])
    elif STRATEGIES[name] is not BUILT_IN[name]:
        raise NanogapError(f"{name} is a strategy that is built in: give yours another name")
    return configure(name, text) if bracket else name


def code_of(name: str) -> str:
    """The file that a strategy comes from: of those that are built in, none."""
    function = unwrap(getattr(STRATEGIES[name], "of", STRATEGIES[name]))
    if function in BUILT_IN.values():
        return ""
    return getattr(getattr(function, "__code__", None), "co_filename", "")


# ----- reading a file -----------------------------------------------------------------------------


def read(name: str) -> Strategy:
    """The function that "FILE.py:NAME" or "package.module:NAME" names."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    dotted = all(part.isidentifier() for part in file.split(".")) and path.suffix != ".py"
    with refused(file), only_entered():
        if path.is_file() and path.suffix == ".py":
            module = read_file(path.resolve())
        elif dotted and not path.is_file():
            if str(Path.cwd()) not in sys.path and "" not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(file)
        else:
            what = f"{file:.200} is no Python file" if path.is_file() else \
                f"there is no file {file:.200}"
            raise NanogapError(f"{name!r:.200}: {what}; give FILE.py:NAME")
    found = getattr(module, function, None)
    if not callable(found):
        raise NanogapError(f"{file} has no function {function!r}; give FILE.py:NAME")
    return found


def read_file(path: Path) -> ModuleType:
    """A file as a module: its folder is on the path, and it stands in sys.modules under its path.

    It is compiled here, so that nothing is written beside it, and no older code is run.
    """
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    if path in FILES and FILES[path][0] == stamp:
        return FILES[path][1]
    module = ModuleType(str(path))
    module.__file__ = str(path)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    FILES[path] = stamp, module
    return module


@contextmanager
def refused(file: str) -> Iterator[None]:
    """Say in a line why a file cannot be imported: it is the user's own, and may raise anything."""
    try:
        yield
    except NanogapError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        lines = lines_of(error, str(Path(file).resolve()))
        place = f"in line {lines[-1]}" if lines else "there"
        raise NanogapError(f"{file} cannot be imported ({reason:.300}); mend it {place}") from error


def lines_of(error: BaseException, file: str) -> list[int | None]:
    """The lines of a file that an error went through."""
    return [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]


@contextmanager
def only_entered() -> Iterator[None]:
    """A file's decorators note what is needed; they enter nothing, and replace nothing."""
    known = dict(STRATEGIES)
    try:
        yield
    finally:
        STRATEGIES.clear()
        STRATEGIES.update(known)


# ----- running it ---------------------------------------------------------------------------------


def guarded(name: str, function: Strategy) -> Strategy:
    """The strategy as it is run: on a copy, and what goes wrong in it is a line that names it."""
    if hasattr(function, "guarded") or hasattr(function, "settings"):
        return function

    def wrong(what: str, line: int | None = None) -> NoReturn:
        code = getattr(unwrap(function), "__code__", None)
        place = f"{code.co_filename}, line {line or code.co_firstlineno}" if code else \
            "the file that it comes from"
        raise NanogapError(f"the strategy {name}: {what}; mend it in {place}")

    @wraps(function)
    def run(seen: VisualTokens, budget: Any, generator: Generator, **settings: Any) -> Kept:
        copy = VisualTokens(seen.features.clone(), seen.rows, seen.columns,
                            {field: value.clone() for field, value in seen.fields.items()})
        try:
            kept = function(copy, budget, generator, **settings)
        except (NanogapError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            code = getattr(unwrap(function), "__code__", None)
            lines = lines_of(error, code.co_filename) if code else []
            reason = f"{type(error).__name__}: {error}"
            wrong(f"it fails ({reason:.300})", lines[-1] if lines else None)
        return checked(kept, seen.features, budget, wrong)

    run.__dict__["guarded"] = True
    return run


def checked(kept: Any, seen: Tensor, budget: int | None, wrong: Callable[[str], NoReturn]) -> Kept:
    """What a strategy returned, as a model can be fed it: lists and other dtypes are converted.

    seen: (N, C) features that it was shown
    """
    if not isinstance(kept, Kept):
        wrong(f"it must return Kept(ranked), and this is of type {type(kept).__name__}")
    N, C = seen.shape
    ranked = tensor(kept.ranked, "keep", wrong)
    if ranked.is_floating_point() or ranked.dtype in (torch.bool, torch.complex64):
        wrong(f"keep is {str(ranked.dtype).removeprefix('torch.')}: it must be whole numbers, the "
              "indices of patches")
    ranked = ranked.long()
    if ranked.dim() != 1:
        wrong(f"keep is of shape {tuple(ranked.shape)}: it must be (K,)")
    most = budget or N
    if not 1 <= len(ranked) <= most:
        wrong(f"keep holds {len(ranked)} of at most {most} patches, and must hold one or more")
    outside = ranked[(ranked < 0) | (ranked >= N)]
    if len(outside):
        wrong(f"keep holds {int(outside[0])}: patches go from 0 to {N - 1}")
    values, times = ranked.unique(return_counts=True)
    if len(values) < len(ranked):
        wrong(f"in keep {int(values[times > 1][0])} is there twice")
    rows: dict[str, Tensor | None] = {}
    for part, form in (("features", f"(K, C) = ({len(ranked)}, {C}), a row for each of keep"),
                       ("added", f"(M, C) = (any, {C}), a row for each token")):
        given = getattr(kept, part)
        rows[part] = value = None if given is None else tensor(given, part, wrong).to(seen)
        if value is not None and (value.dim() != 2 or value.shape[1] != C
                                  or part == "features" and len(value) != len(ranked)):
            wrong(f"{part} must be {form}; they are {tuple(value.shape)}")
    return Kept(ranked, rows["features"], rows["added"])


def tensor(value: Any, part: str, wrong: Callable[[str], NoReturn]) -> Tensor:
    """A tensor, dense; or what plainly is one, such as a list of numbers."""
    try:
        return torch.as_tensor(value).to_dense()
    except (TypeError, ValueError, RuntimeError):
        wrong(f"{part} is no tensor, but of type {type(value).__name__}")
