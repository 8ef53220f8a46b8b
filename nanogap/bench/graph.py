"""Decoding on CUDA without the processor in the way: a pass of the decoder as one recorded graph.

In:  a language model.  Out: a `Decoder` (generate.py) that gives the same logits.

A pass over one token launches some thousand small kernels, and on a fast GPU the launches take longer
than the work.  A CUDA graph replays all of them at once, but always on the same addresses and shapes.
So the cache is one of a fixed number of rows, new rows are written where a tensor says, and all rows
are looked at through a mask that lets through those in use.  Elsewhere the same is run without a graph.
Letters: T new tokens, S of them siblings (1: none), R rows in the cache, C channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogap.llama import KVCache, LlamaForCausalLM, mask_of

STEP = 64   # numbers of rows are rounded up to this, so that few graphs serve many prompts


class StaticCache(KVCache):
    """A cache whose rows in use are known to the device alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys.zero_()
        self.values.zero_()   # whatever memory held is multiplied by 0, and 0 x NaN would be NaN

    def point(self, rows: Tensor) -> None:
        """Write the next tokens to these rows (T,)."""
        self.rows = rows
        self.mask = mask_of(rows, self.keys.shape[3], self.siblings, self.keys.dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.rows, k)
        self.values[layer].index_copy_(2, self.rows, v)
        return self.keys[layer], self.values[layer]


@dataclass
class Recording:
    """A pass over T tokens: fill in the inputs, replay, read the logits (1, T, V)."""

    x: Tensor                 # (1, T, C)
    position_ids: Tensor      # (T,)
    rows: Tensor              # (T,) of the cache
    logits: Tensor | None = None
    graph: Any = None


class GraphedDecoder:
    """Runs the passes of one answer after another; the prompt's rows are copied at the first of each."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.caches: dict[int, StaticCache] = {}                              # by R
        self.recordings: dict[tuple[int, int, int], Recording] = {}           # by R, T and S
        self.read: KVCache | None = None                                      # the one copied last
        self.side: Any = None                                                 # the stream that records

    @torch.inference_mode()                                                   # what it fills in was made so
    def __call__(self, x: Tensor, position_ids: Tensor, cache: KVCache, last: int = 0) -> Tensor:
        """A pass over embeddings (1, T, C); the logits (1, last, V) hold until the next one.

        cache: counts the rows; the new ones are written to the static cache alone
        """
        T, R = x.shape[1], -(-cache.keys.shape[3] // STEP) * STEP
        if R not in self.caches:
            self.caches[R] = StaticCache(self.model.model.config, R, x)
        if cache is not self.read:
            self.caches[R].copy(cache)
            self.read = cache
        rows = torch.arange(T, device=x.device) + cache.lengths[0]
        key = R, T, cache.siblings
        if key not in self.recordings:
            self.recordings[key] = Recording(x.clone(), position_ids.clone(), rows)
        recording, self.caches[R].siblings = self.recordings[key], cache.siblings
        recording.x.copy_(x)
        recording.position_ids.copy_(position_ids)
        recording.rows.copy_(rows)
        self.replay(recording, self.caches[R])
        cache.drop(-T)
        return recording.logits[:, -last:]

    def replay(self, recording: Recording, cache: StaticCache) -> None:
        """Run a pass; record it first where there is CUDA: that writes the same rows three times over."""
        def run() -> None:
            cache.point(recording.rows)
            recording.logits = self.model(recording.x, recording.position_ids, cache)

        if recording.x.device.type != "cuda":
            return run()
        if recording.graph is None:
            self.side = self.side or torch.cuda.Stream()                      # one: each has a workspace
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                run()                                                         # libraries set themselves up
                run()
            torch.cuda.current_stream().wait_stream(self.side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.side):
                run()
            recording.graph = graph
        recording.graph.replay()
