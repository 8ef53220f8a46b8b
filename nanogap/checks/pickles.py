"""Pickles: looked through before anything is built of them.

In:  the bytes of a pickle.  Out: nothing, or a ValueError that says what is wrong with it.

A pickle is a program for a stack.  A short one can nest tuples so deep that to hash them ends the
process, or ask for gigabytes.  Here the program is followed with numbers in place of objects: how
deep each is nested.  Nothing is built, and nothing that it names is called.
"""

import pickletools
from typing import BinaryIO

DEEPEST = 64                    # levels of objects in objects; a state_dict has four
MOST = 10_000_000               # steps
MARK = -1
IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")   # nobody hashes these
PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
GETS = ("GET", "BINGET", "LONG_BINGET")


def look_through(file: BinaryIO, deepest: int = DEEPEST, most: int = MOST) -> None:
    """Follow one pickle up to its end.

    file:   where it begins; afterwards it stands behind it
    raises: ValueError where it is broken, nested too deep, too long, or asks for too much memory
    """
    stack: list[int] = []                     # how deep each object is nested
    memo: dict[int, int] = {}
    try:
        for step, (code, value, _) in enumerate(pickletools.genops(file)):
            if step > most:
                raise ValueError(f"it has more than {most} steps")
            if code.name in PUTS:
                place = len(memo) if code.name == "MEMOIZE" else value
                if not isinstance(place, int) or not 0 <= place <= step:
                    raise ValueError("it remembers an object at a place that no such file has")
                memo[place] = stack[-1]
            elif code.name in GETS:
                stack.append(memo[value])     # type: ignore[index]
            elif code.name == "DUP":
                stack.append(stack[-1])
            else:
                follow(code, stack)
            if stack and stack[-1] > deepest:
                raise ValueError(f"it nests objects more than {deepest} deep")
    except (LookupError, OverflowError, MemoryError) as error:
        raise ValueError(f"it is no whole pickle: {error}") from None


def follow(code: pickletools.OpcodeInfo, stack: list[int]) -> None:
    """One step: what it takes from the stack, and how deep what it leaves is nested."""
    before, taken = code.stack_before, []
    if pickletools.markobject in before:
        before = before[:before.index(pickletools.markobject)]
        while stack[-1] != MARK:
            taken.append(stack.pop())
        stack.pop()
    for _ in before:
        taken.append(stack.pop())
    if code.name == "MARK":
        stack.append(MARK)
    elif code.name in IN_PLACE:
        stack.append(taken[-1])
    else:
        stack += [1 + max(taken, default=0)] * len(code.stack_after)
