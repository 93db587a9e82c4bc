"""Real pictures without personal data: Chinese characters, one class each, told apart in a font never trained on.

python -m outsize.tests.benchmarks.characters FONTS [--held-out ukai] [--steps 900] [--sample 0.1]

FONTS is any folder that holds the fonts of FACES, as Debian's packages fonts-arphic-uming, fonts-arphic-ukai,
fonts-wqy-zenhei, fonts-wqy-microhei, fonts-noto-cjk, fonts-ipafont-gothic and fonts-ipafont-mincho install them, or as
`apt-get download` and `dpkg -x` unpack them. A small embedder is trained with the layer on most characters of all fonts
but one. Each character of that one is then looked up among all characters of the others, by the embedder and by
principal components of the pictures: characters that were trained on in other fonts, and characters that never were.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.faceid.collectives import Ranks
from ...models.faceid.embedder import SmallEmbedder
from ...models.faceid.head import ShardedMarginHead
from ...models.faceid.row_rules import RowRMS
from ...models.faceid.sampling import DENOMINATORS
from ...models.faceid.search import ArrayRows, search_rows
from ...models.faceid.tablets import TabletLayout
from ...tiler.machine import cpu_count

FACES = {
    "ipa-gothic": "ipag.ttf",
    "ipa-mincho": "ipam.ttf",
    "uming": "uming.ttc",
    "ukai": "ukai.ttc",
    "zenhei": "wqy-zenhei.ttc",
    "microhei": "wqy-microhei.ttc",
    "noto-sans": "NotoSansCJK-Regular.ttc",
    "noto-serif": "NotoSerifCJK-Regular.ttc",
}
"""Fonts drawn independently of each other."""
CHARACTERS = range(0x4E00, 0xA000)
SIZE, GLYPH = 32, 28
"""Pixels of a picture, and of a character in it."""
DIM, UNTRAINED = 128, 10
"""Numbers of a feature; every tenth character is never trained on."""


def draw_characters(path: Path, codes: Iterable[int]) -> dict[int, npt.NDArray[np.uint8]]:
    """(SIZE, SIZE) of each character that a font has."""
    font = ImageFont.truetype(path, GLYPH, layout_engine=ImageFont.Layout.BASIC)

    def draw(code: int) -> npt.NDArray[np.uint8]:
        whole, picture = Image.new("L", (2 * GLYPH, 2 * GLYPH)), Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(whole).text((GLYPH, GLYPH), chr(code), font=font, fill=255, anchor="mm")
        if box := whole.getbbox():
            # The longer side fills the picture, whatever size and place a font gives its characters.
            part = ImageOps.contain(whole.crop(box), (GLYPH, GLYPH), Image.Resampling.BILINEAR)
            picture.paste(part, ((SIZE - part.width) // 2, (SIZE - part.height) // 2))
        return np.asarray(picture)

    missing = draw(0xFFFF)  # what a font draws for what it has not
    drawn = {code: draw(code) for code in codes}
    return {code: picture for code, picture in drawn.items() if picture.any() and not np.array_equal(picture, missing)}


def load_pictures(folder: Path) -> tuple[list[str], npt.NDArray[np.uint8]]:
    """(characters that all fonts have, pictures (fonts, characters, SIZE, SIZE))."""
    drawn: list[dict[int, npt.NDArray[np.uint8]]] = []
    codes: Iterable[int] = CHARACTERS
    for file in FACES.values():
        paths = sorted(folder.rglob(file))
        if not paths:
            sys.exit(f"{folder} must hold {file}; see --help for the packages that have it")
        drawn.append(draw_characters(paths[0], codes))
        codes = sorted(drawn[-1])
        print(f"{file}: {len(codes):,} characters that the fonts so far have", file=sys.stderr, flush=True)
    return [chr(code) for code in codes], np.stack([np.stack([font[code] for code in codes]) for font in drawn])


def as_images(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """(n, 3, SIZE, SIZE) around 0."""
    grey = torch.from_numpy(pictures).float().sub_(96).div_(96)
    return grey[:, None].expand(-1, 3, -1, -1)


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved, scaled and turned a little."""
    count = len(images)
    scale = 1 + 0.1 * torch.randn(count, generator=generator).clamp(-2, 2)
    angle = 0.05 * torch.randn(count, generator=generator)
    shift = 0.06 * torch.randn((count, 2), generator=generator)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(maps, [count, 1, SIZE, SIZE], align_corners=False)
    grey = F.grid_sample(images[:, :1], grid, padding_mode="border", align_corners=False)
    return grey.expand(-1, 3, -1, -1)


def train(pictures: npt.NDArray[np.uint8], options: argparse.Namespace) -> SmallEmbedder:
    """An embedder for pictures (fonts, characters, SIZE, SIZE): a class for each character."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    fonts, classes = pictures.shape[:2]
    rule = RowRMS(lr=options.head_lr)
    head = ShardedMarginHead(
        classes,
        DIM,
        margin="cosface",
        scale=32.0,
        rule=rule,
        sample=options.sample,
        denominator=options.denominator,
    )
    embedder = SmallEmbedder(DIM)
    optimiser = torch.optim.AdamW(embedder.parameters(), lr=options.lr, weight_decay=0.05)
    began, mean = time.perf_counter(), 0.0
    for step in range(options.steps):
        share = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimiser.param_groups[0]["lr"], rule.lr = options.lr * share, options.head_lr * share
        labels = torch.randint(0, classes, (options.batch,), generator=generator)
        chosen = torch.randint(0, fonts, (options.batch,), generator=generator)
        images = vary(as_images(pictures[chosen.numpy(), labels.numpy()]), generator)
        loss = head(embedder(images), labels)
        optimiser.zero_grad()
        loss.backward()
        if not head.skipped:
            nn.utils.clip_grad_norm_(embedder.parameters(), 5.0)
            optimiser.step()
        value = float(loss.detach())
        mean = value if not step else 0.98 * mean + 0.02 * value
        if (step + 1) % max(1, options.steps // 20) == 0:
            spent = time.perf_counter() - began
            left = spent / (step + 1) * (options.steps - step - 1)
            line = f"step {step + 1} of {options.steps}: loss {mean:.3f}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
    return embedder


@torch.no_grad()
def embed(embedder: SmallEmbedder, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(n, DIM) of length 1."""
    parts = [pictures[start : start + 512] for start in range(0, len(pictures), 512)]
    return torch.cat([F.normalize(embedder(as_images(part))) for part in parts]).numpy()


def project(pictures: npt.NDArray[np.uint8], *of: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], ...]:
    """Each of `of` in the first DIM principal components of pictures, at length 1."""
    flat = torch.from_numpy(pictures.reshape(len(pictures), -1)).float()
    mean = flat.mean(dim=0)
    directions = torch.linalg.eigh((flat - mean).T @ (flat - mean))[1][:, -DIM:]
    return tuple(
        F.normalize((torch.from_numpy(part.reshape(len(part), -1)).float() - mean) @ directions).numpy() for part in of
    )


def find_hits(gallery: npt.NDArray[np.float32], queries: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Of each character whether the nearest row is one of its own; the gallery has all characters, font after font."""
    owners = np.tile(np.arange(len(queries)), len(gallery) // len(queries))
    layout = TabletLayout(classes=len(gallery))
    rows = ArrayRows(gallery, owners)
    best = search_rows(rows, queries, 1, layout, ranks=Ranks.of(None), threads=cpu_count())
    return best.owners[:, 0] == np.arange(len(queries))


def main() -> None:
    """Print rank-1 of the embedder and of principal components."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", type=Path)
    parser.add_argument("--held-out", choices=FACES, default="ukai")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--head-lr", type=float, default=0.1)
    parser.add_argument("--sample", type=float, default=1.0)
    parser.add_argument("--denominator", choices=DENOMINATORS, default="corrected")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(cpu_count())
    characters, pictures = load_pictures(options.fonts)
    held_out = list(FACES).index(options.held_out)
    others = np.delete(pictures, held_out, axis=0)
    untrained = np.arange(len(characters)) % UNTRAINED == 0
    seen = others[:, ~untrained]
    print(f"{len(characters):,} characters in all {len(FACES)} fonts, {seen.shape[1]:,} trained on", file=sys.stderr)
    queries, gallery = pictures[held_out], others.reshape(-1, SIZE, SIZE)
    gallery_pca, queries_pca = project(seen.reshape(-1, SIZE, SIZE), gallery, queries)
    hits = {f"{DIM} principal components": find_hits(gallery_pca, queries_pca)}
    began = time.perf_counter()
    embedder = train(seen, options)
    seconds = time.perf_counter() - began
    hits[f"embedder, {options.steps} steps in {seconds:.0f} s"] = find_hits(
        embed(embedder, gallery), embed(embedder, queries)
    )
    print(f"| {options.held_out} among {len(gallery):,} pictures | characters trained on | never |\n|---|---|---|")
    for name, found in hits.items():
        print(f"| {name} | {100 * found[~untrained].mean():.1f} % | {100 * found[untrained].mean():.1f} % |")


if __name__ == "__main__":
    main()
