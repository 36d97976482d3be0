"""The method as an animation, noise -> boundary points -> mask -> image: python tests/film.py [out]

Reads points.pt and control.pt of a run of train.sh and writes assets/method.gif, one column a group.
"""
import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

root = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import pointdiff  # noqa: E402

SIDE = 192                                              # pixels of a column


def cloud_tile(points):
    """A cloud (N, 3) as dots: cup orange (z > 0), disc blue, on black."""
    tile = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(tile)
    for x, y, z in points:
        cx, cy = (x + 1) / 2 * SIDE, (y + 1) / 2 * SIDE
        pen.ellipse((cx - 1.5, cy - 1.5, cx + 1.5, cy + 1.5), fill=fairdiff.OUTLINE[2 if z > 0 else 1])
    return tile


def enlarged(picture):
    """A uint8 picture (H, W) or (H, W, 3) as large as a column."""
    return Image.fromarray(picture).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


@torch.no_grad()
def columns(out, seed):
    """For each group its name and (words, tile, milliseconds) frames; every group has as many."""
    device = torch.device("cpu")
    points, ddpm, config = pointdiff.load_points(out / "points.pt", device)
    painter, image_ddpm, look = controlnet.load_painter(out / "control.pt", "control", device)
    size = np.load(out / "data/train.npz")["mask"].shape[1:]
    for g, name in enumerate(config["groups"]):
        generator = torch.Generator().manual_seed(seed + g)
        for number in range(100):                       # the first cloud that is valid
            clouds = []
            cloud, = pointdiff.sample_clouds(points, ddpm, config, g, 1, 40, seed, number, frames=clouds)
            if pointdiff.is_valid(cloud):
                break
        mask = pointdiff.points_to_mask(cloud, size)
        code, steps = torch.tensor([g]), []
        painter.eval()
        low, high = -look["mean"] / look["std"], (255 - look["mean"]) / look["std"]
        image_ddpm.sample(painter, (1, 1, *size), code, torch.as_tensor(mask[None].astype(np.int64)),
                          controlnet.GUIDANCE, steps=16, generator=generator, clip=(low, high), frames=steps)
        grey = [(x[0, 0] * look["std"] + look["mean"]).clamp(0, 255).byte().numpy() for x in steps]
        frames = [("noise to boundary points", cloud_tile(c[0]), 90) for c in clouds]
        frames[-1] = (*frames[-1][:2], 900)
        frames += [("points to mask", enlarged(mask * np.uint8(127)), 1200)]
        frames += [("mask to image", enlarged(x), 110) for x in grey]
        frames += [("image", enlarged(grey[-1]), 1200), ("image and its mask", enlarged(fairdiff.outline(grey[-1], mask)), 2200)]
        yield name, frames


def main():
    """Write the animation."""
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    names, frames = zip(*columns(out, seed=3), strict=True)
    film, times = [], []
    for tiles in zip(*frames, strict=True):
        picture = Image.new("RGB", (len(names) * (SIDE + 4) - 4, SIDE + 40), "white")
        pen = ImageDraw.Draw(picture)
        pen.text((4, 3), tiles[0][0], fill="black", font_size=14)
        for i, (name, (_, tile, _)) in enumerate(zip(names, tiles, strict=True)):
            picture.paste(tile, (i * (SIDE + 4), 22))
            pen.text((i * (SIDE + 4) + 4, SIDE + 23), name, fill="black", font_size=13)
        film.append(picture.quantize(64))
        times.append(tiles[0][2])
    path = root / "assets/method.gif"
    film[0].save(path, save_all=True, append_images=film[1:], duration=times, loop=0, optimize=True)
    print(f"{path}: {len(film)} frames, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
