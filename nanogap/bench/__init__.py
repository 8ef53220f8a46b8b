"""Speed and memory: `python -m nanogap.bench`; this picture and these questions are measured."""

from nanogap.train.scenes import scene

IMAGE = scene("bench", 0).image
QUESTIONS = [scene("bench", number).expressions[0][0] for number in range(7)]   # as in RefCOCO
EXPRESSION = QUESTIONS[0]
