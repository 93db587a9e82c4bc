"""Real pictures without personal data: Chinese characters, one class each, told apart in a font never trained on.

python -m outsize.tests.benchmarks.characters FONTS FOLDER [--held-out ukai] [--steps 3000] [words for face train]

FONTS is any folder that holds the fonts of FACES, as Debian's packages fonts-arphic-uming, fonts-arphic-ukai,
fonts-wqy-zenhei, fonts-wqy-microhei, fonts-noto-cjk, fonts-ipafont-gothic and fonts-ipafont-mincho install them, or as
`apt-get download` and `dpkg -x` unpack them. `outsize face train` trains on most characters of all fonts but one. Each
character of that one is then looked up among all characters of the others, by the embedder and by principal components
of the pictures: characters that were trained on in other fonts, and characters that never were.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ...models.faceid.base.collectives import Ranks
from ...models.faceid.embedder.file import Embedder, load_embedder
from ...models.faceid.gallery.search import ArrayRows, search_rows
from ...models.faceid.layer.tablets import TabletLayout
from ...tiler.system.machine import cpu_count

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
LIST = "characters.csv"
RECIPE = ("--size", SIZE, "--dim", DIM, "--held-out", 0, "--augment", "crop=0.2,colour")
"""Mirrored a character is none, so without flips."""


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


def write_pictures(folder: Path, characters: list[str], pictures: npt.NDArray[np.uint8]) -> None:
    """A list for `face train` of pictures (fonts, characters, SIZE, SIZE): a class for each character."""
    lines = ["path,label"]
    for font, of_font in enumerate(pictures):
        (folder / str(font)).mkdir(parents=True, exist_ok=True)
        for character, picture in zip(characters, of_font, strict=True):
            path = f"{font}/{ord(character):x}.png"
            Image.fromarray(picture).convert("RGB").save(folder / path, compress_level=1)
            lines.append(f"{path},U+{ord(character):X}")
    (folder / LIST).write_text("\n".join(lines) + "\n")


@torch.no_grad()
def embed(embedder: Embedder, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(n, DIM) of length 1."""
    found: list[Tensor] = []
    for start in range(0, len(pictures), 512):
        grey = torch.from_numpy(pictures[start : start + 512])
        found.append(F.normalize(embedder.embed(grey[..., None].expand(-1, -1, -1, 3).contiguous())))
    return torch.cat(found).numpy()


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
    parser.add_argument("folder", type=Path, help="for the pictures and the training; a stopped one goes on")
    parser.add_argument("--held-out", choices=FACES, default="ukai")
    parser.add_argument("--steps", type=int, default=3000)
    options, words = parser.parse_known_args()
    characters, pictures = load_pictures(options.fonts)
    held_out = list(FACES).index(options.held_out)
    others = np.delete(pictures, held_out, axis=0)
    untrained = np.arange(len(characters)) % UNTRAINED == 0
    seen = others[:, ~untrained]
    print(f"{len(characters):,} characters in all {len(FACES)} fonts, {seen.shape[1]:,} trained on", file=sys.stderr)
    queries, gallery = pictures[held_out], others.reshape(-1, SIZE, SIZE)
    gallery_pca, queries_pca = project(seen.reshape(-1, SIZE, SIZE), gallery, queries)
    hits = {f"{DIM} principal components": find_hits(gallery_pca, queries_pca)}
    source = options.folder / "pictures" / LIST
    if not source.exists():
        write_pictures(
            source.parent, [c for c, left_out in zip(characters, untrained, strict=True) if not left_out], seen
        )
    run = options.folder / "training"
    command = [sys.executable, "-m", "outsize", "face", "train", run, "--faces", source, "--steps", options.steps]
    subprocess.run(list(map(str, [*command, *RECIPE, *words])), check=True)
    embedder = load_embedder(run)
    hits[f"embedder, {options.steps:,} steps"] = find_hits(embed(embedder, gallery), embed(embedder, queries))
    print(f"| {options.held_out} among {len(gallery):,} pictures | characters trained on | never |\n|---|---|---|")
    for name, found in hits.items():
        print(f"| {name} | {100 * found[~untrained].mean():.1f} % | {100 * found[untrained].mean():.1f} % |")


if __name__ == "__main__":
    main()
