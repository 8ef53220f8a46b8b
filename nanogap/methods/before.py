"""Later strategies that prune before the decoder: they enter STRATEGIES when nanogap is imported.

In:  what the vision tower saw in an image, and a budget.  Out: indices of what to keep, ranked.
Each does what its published code does; `differs:` marks where not, and why.
Letters: N patches, K kept, M tokens added, C channels, H heads, D channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nanogap import prune
from nanogap.prune import Kept, VisualTokens, ranked, strategy, without


@strategy(needs={"last_queries", "last_keys"}, finds_budget=True)
def prumerge_plus(seen: VisualTokens, budget: int | None, generator: Generator) -> Kept:
    """PruMerge's patches, and then some in even steps: PruMerge+, of the same paper.

    The steps go along the raster, not the grid, and never meet its last patch, as in the code.
    differs: where over a third are outliers the code's step is 0, and fails; here it is 1.  With a
    budget it takes some patches twice; here half go by score, half in even steps among the others
    """
    N = len(seen.features)
    scores = prune.last_attention(seen)                          # (N,)
    if budget is None:
        best = ranked(scores, prune.outliers(scores))
        others = without(best, N)
        step = max(N // len(best) // 3, 1)
        spread = others[(others % step == 0) & (others < N - 1)]
    else:
        half = budget // 2
        best = ranked(scores, budget - half)
        others = without(best, N)
        steps = torch.arange(half, device=others.device)
        spread = others[(2 * steps + 1) * len(others) // (2 * half)]
    return prune.merge(seen, torch.cat([best, spread]), scores)


@strategy(needs={"cls", "cls_attention", "keys"})
def visionzip(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """CLS, patches it attends to, and a few that gather the others: VisionZip, arXiv 2412.04467.

    CLS counts within the budget, and 10 in 64 gather: patches in even steps among those left over,
    each plus the mean of those whose keys are most like its own (a sum, so about twice as long).
    differs: the code puts CLS first; here it goes last, for it has no place in the image, and a
    budget of one is the best patch, without CLS
    """
    attention = seen.cls_attention.float().sum(0)                # (N,)
    gathering = round(budget * 10 / 64)
    best = ranked(attention, max(1, budget - 1 - gathering)).sort().values
    cls = seen.cls[None] if budget > 1 else None                 # (1, C)
    if gathering == 0:
        return Kept(best, added=cls)
    others = without(best, len(attention))
    targets = others[::len(others) // gathering][:gathering]
    keep = torch.cat([best, targets])                            # (K,)
    rest = without(keep, len(attention))                         # (N - K,)
    x = seen.features.float()                                    # (N, C)
    keys = F.normalize(seen.keys.float(), dim=-1)                # (N, D)
    target = (keys[rest] @ keys[targets].T).argmax(1)            # (N - K,) one each
    share = F.one_hot(target, gathering).T.float()               # (targets, N - K)
    means = share @ x[rest] / share.sum(1, keepdim=True).clamp(min=1)   # zero where none came
    features = torch.cat([x[best], x[targets] + means])          # (K, C)
    return Kept(keep, features.to(seen.features.dtype), cls)


@strategy(needs={"projected"})
def divprune(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """Patches as unlike each other as can be, whatever is asked: DivPrune, arXiv 2503.02175.

    The first is the farthest from its nearest neighbour, the next is always the farthest from all
    before it, by the cosine of what the decoder is fed.
    differs: in float32, where the code's half precision makes ties; no patch is taken twice
    """
    x = F.normalize(seen.projected.float(), dim=-1).nan_to_num()              # (N, C')
    distance = (1 - x @ x.T).fill_diagonal_(-math.inf)           # (N, N)
    far = distance.sort(0).values[:2][-1]                        # (N,) the least is itself
    keep = [far.argmax()]
    nearest = distance[keep[0]]                                  # (N,) -inf for those kept
    for _ in range(budget - 1):
        keep.append(nearest.argmax())
        nearest = torch.minimum(nearest, distance[keep[-1]])
    return Kept(torch.stack(keep).sort().values)


@strategy(needs={"cls_attention"})
def vispruner(seen: VisualTokens, budget: int, generator: Generator, *,
              ratio: float = 0.5) -> Kept:
    """Half by the attention of CLS, half without duplicates: VisPruner, arXiv 2412.01818.

    `ratio` is the first half's share: 0.75 is published for 64 tokens.  The others, best first, are
    split into every first and every second one; up to 8 of the first go, those most like any of the
    second; the rest is joined and split again, until the budget is met.
    differs: the code fails where it splits an odd number, or where 8 must go of fewer than 16; here
    the first group has one more, and all of it may go.  Which patches stay may depend on the last
    bit of a likeness: in float32 two right implementations differ in a fifth of the images
    """
    order = ranked(seen.cls_attention.float().mean(0), len(seen.features))      # (N,)
    best = order[:int(budget * ratio)]
    rest = order[int(budget * ratio):]
    x = F.normalize(seen.features.float(), dim=-1)               # (N, C)
    while (surplus := len(best) + len(rest) - budget) > 0:
        first = rest[::2]
        second = rest[1::2]
        likeness = (x[first] @ x[second].T).amax(1)              # one each of the first
        first = first[ranked(likeness, len(first))]
        rest = torch.cat([first[min(8, surplus):], second])
    return Kept(torch.cat([best, rest]).sort().values)


@strategy(needs={"projected", "aligned", "text"})
def cdpruner(seen: VisualTokens, budget: int, generator: Generator, *,
             question: str = "expression") -> Kept:
    """Patches unlike each other, and least like the words: CDPruner, arXiv 2506.10967.

    A determinantal point process: the volume that all kept patches span together, each as long as
    it is relevant.  Least: the published code has a minus sign, as TRIM's has.
    differs: the code reads the whole question, 77 tokens at a time, as cdpruner(question=whole)
    does here.  Of LLaVA-1.6 each part has a range of relevance of its own; there, all have one
    """
    text = seen.text[None] if question == "expression" else seen.question     # (S, E)
    aligned = F.normalize(seen.aligned.float(), dim=-1)                       # (N, E)
    relevance = -(aligned @ F.normalize(text.float(), dim=-1).T).mean(1)      # (N,)
    low, high = relevance.aminmax()
    relevance = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
    x = F.normalize(seen.projected, dim=-1).float()                           # (N, C')
    kernel = relevance[:, None] * (x @ x.T) * relevance                       # (N, N)
    return Kept(largest_volume(kernel, budget).sort().values)


def largest_volume(kernel: Tensor, budget: int) -> Tensor:
    """Greedily, indices (K,) whose part of a kernel (N, N) has the largest determinant.

    Behind its rank, where the published code would divide by zero, the best of the others follow.
    source: Chen, Zhang and Zhou 2018, Fast Greedy MAP Inference for DPPs
    """
    gain = kernel.diagonal().clone()                             # (N,) of volume, squared
    rows = kernel.new_zeros(budget, len(kernel))                 # of the Cholesky factor
    keep = []
    for i in range(budget):
        best = gain.argmax()
        rest = kernel[best] - rows[:i, best] @ rows[:i]          # (i,) x (i,N) -> (N,)
        rows[i] = torch.where(gain[best] > 1e-12, rest / gain[best].clamp(min=1e-12).sqrt(), 0)
        gain = gain - rows[i] ** 2
        gain[best] = -math.inf
        keep.append(best)
    return torch.stack(keep)


@strategy(needs={"cls_attention"})
def scope(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """Patches that CLS attends to and that cover what none has covered: SCOPE, arXiv 2510.24214.

    A patch is covered by its likeness to the most similar one kept, at least 0.  The next is the
    one that adds most cover to all patches together, times the attention of CLS.
    """
    x = F.normalize(seen.features.float(), dim=-1)               # (N, C)
    likeness = x @ x.T                                           # (N, N)
    weight = seen.cls_attention.float().sum(0)                   # (N,)
    covered = torch.zeros_like(weight)
    taken = torch.zeros_like(weight)                             # -inf for those kept
    keep = []
    for _ in range(budget):
        gain = weight * (likeness - covered).clamp(min=0).sum(1)              # (N,)
        keep.append((gain + taken).argmax())
        taken[keep[-1]] = -math.inf
        covered = torch.maximum(covered, likeness[keep[-1]])
    return Kept(torch.stack(keep).sort().values)


@strategy(needs={"projected", "cls_attention"})
def holov(seen: VisualTokens, budget: int, generator: Generator) -> Kept:
    """The patches that CLS attends to most, in each of 16 strips of the image: HoloV, 2510.02912.

    A strip's share of the budget grows with the attention that it gets, and with how unequally its
    patches are alike.  Its patches go in the order of their attention, so the code for LLaVA is
    permuted within a strip.  That for Qwen2.5-VL keeps the old IDs: mode "ranked, original".
    differs: where a strip is smaller than its share, the code feeds zeros; here fewer patches
    """
    attention = seen.cls_attention.float().mean(0)               # (N,)
    x = seen.projected.float()
    runs = [run for run in torch.arange(len(x), device=x.device).tensor_split(16) if len(run)]
    score = torch.stack([strip_score(x[run], attention[run]) for run in runs]).nan_to_num()
    weight = score / (score.sum() + 1e-6)                        # (runs,)
    shares = (weight * budget).floor().long()
    left = max(0, budget - int(shares.sum()))
    shares[ranked(weight, left)] += 1
    keep = []
    for run, share in zip(runs, shares.tolist(), strict=True):
        keep.append(run if share >= len(run) else run[ranked(attention[run], share)])
    return Kept(torch.cat(keep)[:budget])


def strip_score(x: Tensor, attention: Tensor) -> Tensor:
    """What HoloV thinks of a strip of patches (n, C') that get that much attention (n,)."""
    n = len(x)
    if n == 1:
        return attention[0]
    x = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
    alike = (x @ x.T).fill_diagonal_(0)                          # (n, n)
    mean = alike.sum(1, keepdim=True) / (n - 1)                  # (n, 1)
    spread = (alike - mean).pow(2).sum(1) / (n - 1)              # (n,) with the zero among them
    attention = 1000 * attention
    scale = attention.abs().mean() / (spread.abs().mean() + 1e-6)
    return (attention + 0.09 * spread * scale).mean()
