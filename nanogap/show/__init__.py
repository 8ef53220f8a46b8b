"""What people see: the picture, --explain, explain_ids, figures."""

from nanogap.fast.ground_all import Answered
from nanogap.show.draw import draw
from nanogap.show.explain_ids import explain_ids

Answered.draw = draw        # result.draw(image): answers are made below what draws them

__all__ = ["draw", "explain_ids"]
