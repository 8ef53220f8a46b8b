"""Decoding with CUDA graphs: a pass of the decoder is recorded once and then replayed.

A pass over one token launches about a thousand small kernels, and on a fast GPU the launches take
longer than the work.  A CUDA graph replays all of them at once, but always on the same addresses
and shapes.  So the cache has a fixed number of rows, a tensor says to which of them a pass writes,
and a mask hides the rows that are not in use.  On other devices the same code runs without a graph.
Letters: T new tokens, R rows in the cache, C channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanogap.fast.decoder import Part, run
from nanogap.llama import KVCache, LlamaConfig, LlamaModel

# a pass over so many tokens: fill in its tensors, and run it for hidden states (T, C)
Recording = tuple[Sequence[Tensor], Callable[[], Tensor]]
STEP = 64   # numbers of rows are rounded up to this, so that few graphs serve many prompts


class StaticCache(KVCache):
    """A cache of which all rows are looked at; a tensor says where the next ones are written."""

    next_rows: Tensor         # (T,)

    def __init__(self, config: LlamaConfig, rows: int, like: Tensor) -> None:
        super().__init__(config, rows, like)
        # a hidden row is multiplied by 0, and 0 times a NaN that memory held would be NaN
        self.keys.zero_()
        self.values.zero_()

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (1, G, T, D) into the next rows; return all rows (1, G, R, D)."""
        self.keys[layer].index_copy_(2, self.next_rows, k)
        self.values[layer].index_copy_(2, self.next_rows, v)
        return self.keys[layer], self.values[layer]


class GraphedDecoder:
    """Runs the passes of one answer after another; each begins with a copy of the prompt's rows."""

    def __init__(self, decoder: LlamaModel) -> None:
        self.decoder = decoder
        self.caches: dict[int, StaticCache] = {}                              # by R
        self.recordings: dict[tuple[int, int], Recording] = {}                # by R and T
        self.copied: KVCache | None = None                                    # the last one
        self.side: Any = None                                                 # the recording stream

    @torch.inference_mode()   # since it fills in tensors that were made in this mode
    def __call__(self, x: Tensor, position_ids: Tensor, part: Part) -> Tensor:
        """Tokens (1, T, C) of the only question in a cache -> hidden states, until the next pass.

        part: its cache counts the rows; the new ones are written to the static cache alone
        """
        start, T = part.cache.lengths[0], part.size
        R = STEP * math.ceil(part.cache.keys.shape[3] / STEP)
        if R not in self.caches:
            self.caches[R] = StaticCache(self.decoder.config, R, x)
        if part.cache is not self.copied:
            self.caches[R].keys[..., :start, :] = part.cache.keys[..., :start, :]
            self.caches[R].values[..., :start, :] = part.cache.values[..., :start, :]
            self.copied = part.cache
        mask = x.new_full((T, R), float("-inf"))
        mask[:, :start + T] = 0 if part.mask is None else part.mask
        inputs = [x, position_ids, torch.arange(start, start + T, device=x.device), mask]
        if (R, T) not in self.recordings:
            self.recordings[R, T] = self.record(self.caches[R], *(each.clone() for each in inputs))
        recorded, replay = self.recordings[R, T]
        for own, new in zip(recorded, inputs, strict=True):
            own.copy_(new)
        part.cache.lengths = [start + T] * len(part.cache.lengths)
        return replay()

    def record(self, cache: StaticCache, *inputs: Tensor) -> Recording:
        """Make a pass that reads these tensors; on CUDA as a graph, on a stream of its own.

        inputs: x (1, T, C), position_ids (T,), rows to write (T,), mask (T, R)
        """
        x, position_ids, rows, mask = inputs
        T = x.shape[1]

        def run_pass() -> Tensor:
            cache.next_rows = rows
            return run(self.decoder, x, position_ids, [Part(cache, T, mask)], T)

        if not x.is_cuda:
            return inputs, run_pass
        if self.side is None:
            self.side = torch.cuda.Stream()                                   # each has a workspace
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            run_pass()                                                        # libraries start up
            run_pass()
        torch.cuda.current_stream().wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.side):
            hidden = run_pass()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return inputs, replay
