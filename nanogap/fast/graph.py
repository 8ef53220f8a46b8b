"""Decoding with CUDA graphs: a pass of the decoder is recorded once and then replayed.

In:  a language model.  Out: a `Pass` (decode.py) that gives the same logits.

A pass over one token launches about a thousand small kernels, and on a fast GPU the launches take
longer than the work.  A CUDA graph replays all of them at once, but always on the same addresses
and shapes.  So the cache has a fixed number of rows, a tensor says to which of them a pass writes,
and a mask hides the rows that are not in use.  On other devices the same code runs without a graph.
Letters: T new tokens, R rows in the cache, C channels, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogap.fast.decoder import mask_of, run
from nanogap.llama import KVCache, LlamaConfig, LlamaForCausalLM

STEP = 64   # numbers of rows are rounded up to this, so that few graphs serve many prompts


class StaticCache(KVCache):
    """A cache of which all rows are looked at; a tensor says where the next ones are written."""

    rows: Tensor              # (T,) where the next tokens are written

    def __init__(self, config: LlamaConfig, rows: int, like: Tensor) -> None:
        super().__init__(config, rows, like)
        # a hidden row is multiplied by 0, and 0 times a NaN that memory held would be NaN
        self.keys.zero_()
        self.values.zero_()

    def copy(self, other: KVCache) -> None:
        """Take over the rows of another one that are in use."""
        rows = other.lengths[0]
        self.keys[..., :rows, :] = other.keys[..., :rows, :]
        self.values[..., :rows, :] = other.values[..., :rows, :]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, D) into `rows`; return all rows (B, G, R, D)."""
        self.keys[layer].index_copy_(2, self.rows, k)
        self.values[layer].index_copy_(2, self.rows, v)
        return self.keys[layer], self.values[layer]


@dataclass
class Recording:
    """A pass over T tokens: fill in the inputs, replay, read the logits (T, V)."""

    x: Tensor                 # (1, T, C)
    position_ids: Tensor      # (T,)
    rows: Tensor              # (T,) of the cache
    alternatives: int         # so many of the last tokens do not see one another
    logits: Tensor | None = None
    graph: Any = None         # torch.cuda.CUDAGraph

    def fill_in(self, x: Tensor, position_ids: Tensor, rows: Tensor) -> None:
        """Set the inputs, at the addresses that the graph reads."""
        self.x.copy_(x)
        self.position_ids.copy_(position_ids)
        self.rows.copy_(rows)


class GraphedDecoder:
    """Runs the passes of one answer after another; each begins with a copy of the prompt's rows."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.caches: dict[int, StaticCache] = {}                              # by R
        self.recordings: dict[tuple[int, int, int], Recording] = {}   # by R, T and alternatives
        self.copied: KVCache | None = None                                    # the last one
        self.side: Any = None                                                 # the recording stream

    @torch.inference_mode()   # since it fills in tensors that were made in this mode
    def __call__(self, x: Tensor, position_ids: Tensor, cache: KVCache,
                 alternatives: int = 1) -> Tensor:
        """A pass over embeddings (1, T, C): logits (T, V), which hold until the next pass.

        cache: counts the rows; the new ones are written to the static cache alone
        """
        T = x.shape[1]
        R = STEP * math.ceil(cache.keys.shape[3] / STEP)
        if R not in self.caches:
            self.caches[R] = StaticCache(self.model.model.config, R, x)
        if cache is not self.copied:
            self.caches[R].copy(cache)
            self.copied = cache
        rows = torch.arange(T, device=x.device) + cache.lengths[0]            # (T,)
        key = (R, T, alternatives)
        if key not in self.recordings:
            self.recordings[key] = Recording(x.clone(), position_ids.clone(), rows, alternatives)
        recording = self.recordings[key]
        recording.fill_in(x, position_ids, rows)
        self.replay(recording, self.caches[R])
        cache.lengths = [length + T for length in cache.lengths]
        assert recording.logits is not None
        return recording.logits

    def replay(self, recording: Recording, cache: StaticCache) -> None:
        """Run a pass; on CUDA it is recorded first, which writes the same rows several times."""
        if recording.x.device.type != "cuda":
            self.run(recording, cache)
            return
        if recording.graph is None:
            self.record(recording, cache)
        recording.graph.replay()

    def run(self, recording: Recording, cache: StaticCache) -> None:
        """A pass over the inputs of a recording; every tensor in it depends on them alone."""
        cache.rows = recording.rows
        R, dtype = cache.keys.shape[3], recording.x.dtype
        mask = mask_of(recording.rows, R, recording.alternatives, dtype)      # (T, R)
        hidden = run(self.model.model, recording.x, recording.position_ids, cache, mask=mask)
        recording.logits = self.model.logits(hidden)[0]                       # (T, V)

    def record(self, recording: Recording, cache: StaticCache) -> None:
        """Make the graph of a pass, on a stream of its own."""
        if self.side is None:
            self.side = torch.cuda.Stream()                                   # each has a workspace
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.run(recording, cache)                                        # libraries start up
            self.run(recording, cache)
        torch.cuda.current_stream().wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.side):
            self.run(recording, cache)
        recording.graph = graph
