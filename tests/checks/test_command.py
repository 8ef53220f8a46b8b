"""How a command ends: a lack of memory is one line that names flags which it has."""

import pytest

from nanogap.checks.command import Parser, answer_for


@pytest.mark.parametrize("said", ["could not create a primitive", "can't start new thread",
                                  "DefaultCPUAllocator: can't allocate memory: you tried"])
@pytest.mark.parametrize("flags, advice", [
    (["--limit", "--dtype"], ", or take less at a time: "), (["--base"], "end other programs")])
def test_every_library_that_lacks_memory_is_told_in_one_line(said, flags, advice, capsys):
    def command(argv: object) -> None:
        parser = Parser(prog="ask")
        for flag in flags:
            parser.add_argument(flag)
        parser.parse_args([])
        raise RuntimeError(said)

    assert answer_for("ask", command, []) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"ask: memory ran out ({said}); end other programs")
    assert line.count("\n") == 1 and advice in line
    named = [flag for flag in ("--limit", "--dtype", "--base", "--keep") if flag in line]
    assert set(named) <= set(flags)


def test_another_error_is_not_called_a_lack_of_memory():
    def command(argv: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        answer_for("ask", command, [])
