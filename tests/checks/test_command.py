"""How a command ends: a lack of memory is one line that names flags which it has."""

from collections.abc import Callable

import pytest

from nanogap.checks.command import Parser, answer_for


def failing(error: Exception, *flags: str) -> Callable[[object], None]:
    """A command that has these flags, and ends in an error."""
    def command(argv: object) -> None:
        parser = Parser(prog="ask")
        for flag in flags:
            parser.add_argument(flag)
        raise error
    return command


@pytest.mark.parametrize("said", ["could not create a primitive", "can't start new thread",
                                  "DefaultCPUAllocator: can't allocate memory: you tried"])
@pytest.mark.parametrize("flags, advice", [
    (["--limit", "--dtype"], ", or take less at a time: another --dtype"), (["--base"], "")])
def test_every_library_that_lacks_memory_is_told_in_one_line(said, flags, advice, capsys):
    assert answer_for("ask", failing(RuntimeError(said), *flags), []) == 2
    assert capsys.readouterr().err == f"ask: memory ran out ({said}); end other programs{advice}\n"


def test_another_error_is_not_called_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        answer_for("ask", failing(RuntimeError("shapes cannot be multiplied")), [])
