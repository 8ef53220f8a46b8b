"""LLaVA-1.6: the whole picture and tiles of it in a higher resolution, each seen by CLIP alone.

In:  a picture.  Out: the visual tokens of its base view, row by row, and then those of its tiles,
as one grid without what shows only padding; behind each row of the grid stands a newline token.

    base view     grid x grid patches of the whole picture, stretched to a square
    tiles         R rows of C patches, and a newline: R (C + 1) tokens

so N = grid^2 + R (C + 1) depends on the picture: 640 x 480 pixels are 576 + 36 * 49 = 2340 tokens.
All else is as in LLaVA-1.5, but that the decoder may be a Mistral, whose template is another.

Source: LLaVA-1.6, in the layouts of llava-hf's repositories on the hub, as transformers 5.23 reads
them.  open: with which of LLaVA's two system sentences its Vicunas were trained is not published;
here it is the one that its demo and the hub's converter use.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from nanogap.errors import NanogapError
from nanogap.image import to_pixel_values
from nanogap.llava import VICUNA, EncodedImage, LlavaConfig
from nanogap.methods.settings import settings_of
from nanogap.models.base import VLM, View
from nanogap.models.frames import Size, Tiles
from nanogap.prompt import Template
from nanogap.prune import STRATEGIES, Kept, needs_of

DOWNLOAD = ("`hf download llava-hf/llava-v1.6-mistral-7b-hf "
            "--local-dir weights/llava-v1.6-mistral-7b-hf` (15 GB)")
SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the human's questions.")
TEMPLATES = {   # by `model_type` in text_config
    "llama": replace(VICUNA, before=f"{SYSTEM} USER: "),
    "mistral": Template(before="[INST] ", after="\n{} [/INST]", where_is=VICUNA.where_is),
}
# what they leave out where it is not LLaMA's: a Mistral is a LLaMA with other numbers
MISTRAL = {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8}
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))   # (rows, columns) of tiles, as published


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    image_grid_pinpoints: tuple[Size, ...] = ()   # (height, width) of canvases; (): as published
    decoder: str = "llama"                        # or "mistral", which has a template of its own

    @property
    def pinpoints(self) -> tuple[Size, ...]:
        """(height, width) of each canvas that may be cut into tiles, pixels."""
        size = self.vision.image_size
        return self.image_grid_pinpoints or tuple((r * size, c * size) for r, c in GRIDS)


@dataclass(kw_only=True)
class Part(EncodedImage):
    """The base view, or what is left of one tile: a rectangle of patches that the tower saw."""

    index: Tensor             # (k,) which visual token each of its patches is


@dataclass(kw_only=True)
class EncodedTiles(EncodedImage):
    """A picture as base view and tiles; `features` holds a row of zeros for each newline."""

    parts: list[Part]
    row_end: Tensor           # (N,) the newline that closes the row of each token, or -1

    @property
    def n_patches(self) -> int:
        """How many visual tokens a strategy can choose from: not the newlines."""
        return sum(len(part.index) for part in self.parts)


def number(frame: Tiles, width: int, height: int, grid: int, size: int) -> tuple[Tensor, Tensor]:
    """Which visual token each patch of a picture's canvas is, and which newline closes its row.

    grid:    patches along a side of a square of `size` pixels
    returns: (rows, columns) of the canvas, -1 where a patch shows only padding; and (N,) the
             newline of each token, -1 in the base view, which has none
    """
    H, W = frame.canvas(width, height)
    canvas = torch.full((H // size * grid, W // size * grid), -1)
    shown = frame.unpadded(width, height, *canvas.shape)
    R, C = canvas[shown].shape
    tokens = grid ** 2 + torch.arange(R * (C + 1)).view(R, C + 1)             # newlines come last
    canvas[shown] = tokens[:, :C]
    row_end = tokens[:, -1:].expand(R, C + 1).flatten()
    return canvas, torch.cat([torch.full((grid ** 2,), -1), row_end])


# ----- what is kept of all parts ------------------------------------------------------------------


def shared_out(budget: int, sizes: Sequence[int]) -> list[int]:
    """Whole shares of a budget, in proportion to sizes; the largest fractions are rounded up."""
    exact = [budget * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    largest_first = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in largest_first[:budget - sum(shares)]:
        shares[i] += 1
    return shares


def shared_equally(budget: int, sizes: Sequence[int]) -> list[int]:
    """The same share for each, as published codes have it: strategies with crops=equal.

    differs: they count padding too; a part that has fewer patches leaves the rest to the others
    """
    shares = [0] * len(sizes)
    for _ in range(budget):
        shares[min((i for i, size in enumerate(sizes) if shares[i] < size),
                   key=shares.__getitem__)] += 1
    return shares


def join(chosen: list[tuple[Part, Kept]]) -> Kept:
    """What is kept of each part, as one: part after part, and what is added behind all of them."""
    ranked = torch.cat([part.index[kept.ranked.cpu()] for part, kept in chosen])       # (K,)
    features = torch.cat([part.features[kept.ranked.to(part.features.device)]
                          if kept.features is None else kept.features
                          for part, kept in chosen])                                   # (K, C)
    added = [kept.added for _, kept in chosen if kept.added is not None]
    return Kept(ranked, features, torch.cat(added) if added else None)


def close_rows(kept: Kept, row_end: Tensor) -> Kept:
    """Put the token that closes a row behind the last patch of it that was kept.

    row_end: (N,) which visual token closes the row of each, -1 where none does
    differs: the published codes of pruning for LLaVA-1.6 leave these tokens out; here they stay, as
             the other tokens that are no patches do.  They have no scores: where patches go by rank
             a row is closed behind the lowest of it
    """
    ends = row_end[kept.ranked].tolist()
    last = {end: i for i, end in enumerate(ends) if end >= 0}                 # of each row
    tokens = []                       # (visual token, row of its features; -1: zeros, a newline)
    for i, (index, end) in enumerate(zip(kept.ranked.tolist(), ends, strict=True)):
        tokens.append((index, i))
        if last.get(end) == i:
            tokens.append((end, -1))
    ranked, rows = torch.tensor(tokens).T
    features = kept.features
    if features is not None:
        features = torch.cat([features, torch.zeros_like(features[:1])])      # (K + 1, C)
        features = features[rows.to(features.device)]
    return Kept(ranked, features, kept.added)


# ----- the model ----------------------------------------------------------------------------------


class LlavaNext(VLM):
    Config = LlavaNextConfig
    download = DOWNLOAD
    template = TEMPLATES["llama"]
    pictures_alike = False
    fixed = VLM.fixed | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "use_image_newline_parameter": True}
    rename = (*VLM.rename, (r"^model\.image_newline$", "image_newline"))      # (c), (d)

    config: LlavaNextConfig

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        self.frame = Tiles(pinpoints=config.pinpoints)
        self.template = TEMPLATES[config.decoder]
        if config.decoder == "mistral":
            self.later = "[INST] {} [/INST]"
        newline = torch.empty(config.text.hidden_size)                        # (C',)
        self.image_newline = nn.Parameter(newline.normal_(std=len(newline) ** -0.5))

    @classmethod
    def complete(cls, config: dict) -> dict:
        """config.json with a Mistral's defaults, where the decoder is one."""
        text = config.get("text_config") or {}
        decoder = text.get("model_type") or "llama"
        pinpoints = config.get("image_grid_pinpoints") or ()
        return config | {
            "decoder": decoder, "image_grid_pinpoints": tuple(map(tuple, pinpoints)),
            "text_config": (MISTRAL if decoder == "mistral" else {}) | text}

    # ----- what it sees ---------------------------------------------------------------------------

    def pixel_values(self, image: Image.Image) -> Tensor:
        """A picture -> (1 + tiles, 3, S, S), the base view first, on the model's device."""
        c = self.config
        views = [to_pixel_values(view, c.image_mean, c.image_std)
                 for view in self.frame.views(image, c.vision.image_size)]
        return torch.cat(views).to(self.device, self.dtype)

    def encode_pixels(self, pixel_values: Tensor, width: int, height: int) -> EncodedTiles:
        """The base view and what is left of each tile are parts; newlines are in none of them."""
        n = self.config.vision.grid                                           # patches a side
        canvas, row_end = number(self.frame, width, height, n, self.config.vision.image_size)
        base = torch.arange(n * n).view(1, n, n)
        tiles = canvas.unflatten(1, (-1, n)).unflatten(0, (-1, n))            # (R, n, C, n)
        squares = torch.cat([base, tiles.transpose(1, 2).flatten(0, 1)])      # (1 + R C, n, n)
        if len(pixel_values) != len(squares):
            raise NanogapError(f"a picture of {width} x {height} pixels is {len(squares)} squares, "
                               f"base view and tiles, and pixel_values holds {len(pixel_values)}: "
                               "give the size of the picture that they show")
        before, after = self.vision_tower(pixel_values)                       # (1 + R C, 1 + nn, C)
        features = after.new_zeros(len(row_end), after.shape[-1])             # (N, C)
        parts = []
        for square, token in enumerate(squares):
            stays = token >= 0                                                # (n, n)
            patches = stays.flatten().nonzero()[:, 0].to(after.device)        # (k,)
            if len(patches) == 0:
                continue
            index, seen = token[stays], after[square, 1:][patches]            # (k,), (k, C)
            features[index.to(after.device)] = seen
            parts.append(Part(width, height, seen, int(stays.any(1).sum()), int(stays.any(0).sum()),
                              (before[square], after[square], patches), index=index))
        return EncodedTiles(width, height, features, 1, len(row_end), None, parts=parts,
                            row_end=row_end)

    def fields(self, image: EncodedImage, needs: Collection[str]) -> dict[str, Tensor]:
        """What the tower tells of a square, of the patches that are left of it.

        CLS is the square's own, and what it gives to patches of padding is missing.
        """
        before, after, patches = image.hidden                                 # (1 + n, C), (k,)
        with_cls = torch.cat([patches.new_zeros(1), 1 + patches])             # (1 + k,)
        stays = {"cls_attention": (slice(None), patches), "keys": patches,    # (H, k), (k, D)
                 "last_queries": with_cls, "last_keys": with_cls}             # (1 + k, C)
        fields = self.vision_tower.fields(before, after, needs)
        return {name: value[stays.get(name, ...)] for name, value in fields.items()}

    def select(self, image: EncodedImage, expression: str, prune: str, budget: int | None,
               seed: int) -> Kept:
        """Which patches a strategy keeps of each part, by its share of the budget; and newlines."""
        assert isinstance(image, EncodedTiles)
        sizes = [len(part.index) for part in image.parts]
        share_out = shared_equally if settings_of(prune).get("crops") == "equal" else shared_out
        shares = [None] * len(sizes) if budget is None else share_out(budget, sizes)
        generator = Generator().manual_seed(seed)             # one for all parts: they differ
        chosen = []
        for part, share in zip(image.parts, shares, strict=True):
            if share != 0:
                seen = self.see(part, needs_of(prune), expression)
                chosen.append((part, STRATEGIES[prune](seen, share, generator)))
        return close_rows(join(chosen), image.row_end)

    def visual_tokens(self, image: EncodedImage, kept: Kept, order: Tensor) -> Tensor:
        """Patches go through the projector, and a newline is the same vector everywhere."""
        assert isinstance(image, EncodedTiles)
        visual = super().visual_tokens(image, kept, order)                    # (K + M, C')
        indices = kept.ranked[order]                                          # (K,)
        newline = (image.row_end[indices] == indices).nonzero()[:, 0]
        visual[newline.to(visual.device)] = self.image_newline
        return visual

    # ----- where its tokens lie -------------------------------------------------------------------

    def views(self, image: EncodedImage) -> list[View]:
        """The base view, and what is left of each tile."""
        assert isinstance(image, EncodedTiles)
        return [View(part.rows, part.columns, part.index) for part in image.parts]

    def newlines(self, image: EncodedImage) -> set[int]:
        """The visual tokens that close rows, and show nothing."""
        assert isinstance(image, EncodedTiles)
        return set(image.row_end.tolist()) - {-1}

    def cells(self, image: EncodedImage) -> Tensor:
        """Which part of the picture each visual token shows: (N, 4), pixels; newlines: nothing."""
        size, n = (image.width, image.height), self.config.vision.grid
        canvas, _ = number(self.frame, *size, n, self.config.vision.image_size)
        shown = canvas >= 0                                                   # (rows, columns)
        at = torch.zeros(image.n_visual, 4)
        at[:n * n] = self.frame.cells(n, n, *size)
        at[canvas[shown]] = self.frame.canvas_cells(*canvas.shape, *size)[shown.flatten()]
        return at

    def walk(self, image: EncodedImage) -> tuple[list[str], list[str]]:
        """What becomes of a picture, for --explain."""
        c, size = self.config.vision, (image.width, image.height)
        H, W = self.frame.canvas(*size)
        _, _, width, height = self.frame.placed(*size)
        down, across = H // c.image_size, W // c.image_size
        n, N, newlines = c.grid ** 2, image.n_visual, len(self.newlines(image))
        columns = (N - n) // newlines - 1 if newlines else 0
        square = [f"{image.width} x {image.height} pixels, stretched to a base view of "
                  f"{c.image_size} x {c.image_size};",
                  f"and {width} x {height} in the middle of a black canvas of {W} x {H},",
                  f"cut into {down} rows of {across} tiles: "
                  f"pixel_values ({1 + down * across}, 3, {c.image_size}, {c.image_size})"]
        tower = ["CLIP turns patches into features, and sees every square alone",
                 f"{c.grid} x {c.grid} patches of {c.patch_size} pixels and CLS through "
                 f"{self.vision_tower.depth} of {c.num_hidden_layers} layers;",
                 f"of {down * c.grid} x {across * c.grid} patches of the tiles "
                 f"{newlines} x {columns} stay, the others show only black,",
                 f"and a newline closes each row: N = {n} + {newlines} x ({columns} + 1) = {N},",
                 f"features {tuple(image.features.shape)}, the base view first, row by row"]
        return square, tower

    # ----- its files ------------------------------------------------------------------------------

    def settings(self, dtype: str) -> dict[str, dict]:
        """The same files, with what LLaVA-1.6 adds."""
        files = super().settings(dtype)
        pinpoints = {"image_grid_pinpoints": self.config.pinpoints}
        files["config.json"] |= pinpoints
        files["config.json"]["text_config"]["model_type"] = self.config.decoder
        if self.config.decoder == "mistral":
            files["config.json"]["text_config"]["sliding_window"] = None
        files["preprocessor_config.json"] |= pinpoints | {
            "image_processor_type": "LlavaNextImageProcessor", "aspect_ratio_setting": "anyres",
            "do_pad": True}
        return files
