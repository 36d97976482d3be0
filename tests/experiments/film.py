"""The README's animation from a finished run: python tests/experiments/film.py [out]

In three groups noise becomes points, these a mask, and noise over it an image; assets/method.gif, under 1.5 MB.
"""
import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

root = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(root))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import pointdiff  # noqa: E402

SIDE = 192                              # pixels of a picture in the film

def draw_points(points):
    """A cloud (N, 3) on white: disc blue, cup orange."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    for x, y, z in points:
        column, row = (x + 1) / 2 * SIDE, (y + 1) / 2 * SIDE
        pen.ellipse((column - 1, row - 1, column + 1, row + 1), fill=(255, 150, 20) if z > 0 else (60, 140, 230))
    return picture

def enlarge(array):
    return Image.fromarray(array.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)

def pictures_of_group(out, g):
    """The group's name and the pictures of its sampling; those to look at are held."""
    state = fairdiff.load_checkpoint(out / "points-all.pt", ("points",))
    config, generator, group = state["config"], torch.Generator().manual_seed(g), torch.tensor([g])
    net, ddpm = pointdiff.build(config)
    net.load_state_dict(state["ema"])
    inputs = []                                                         # every noisy input of a denoiser
    net.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0][0].numpy()))
    z = net.sample_prior(group, generator)
    x = ddpm.sample(net, (1, 256, 3), group, z, steps=32, eta=1.0, generator=generator)
    clouds = [cloud * config["std"] + config["mean"] for cloud in (*inputs, x[0].numpy())]
    mask = pointdiff.points_to_mask(clouds[-1], config["size"], pointdiff.SMOOTH)
    net, config = controlnet.load_generator(out / "control-all.pt", "cpu")
    inputs = []
    net.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0][0].numpy()))
    image = controlnet.sample_images(net, config, np.array([g]), mask[None], torch.device("cpu"), steps=20)
    noisy = [x[0] * config["std"] + config["mean"] for x in inputs]
    pictures = *map(draw_points, clouds), *[enlarge(127 * mask)] * 12, *map(enlarge, noisy), *[enlarge(image[0])] * 25
    return config["groups"][g], pictures

def main(out):
    """Write the animation of a run's folder."""
    names, columns = zip(*[pictures_of_group(out, g) for g in range(3)], strict=True)
    film = []
    for tiles in zip(*columns, strict=True):
        frame = Image.new("RGB", (3 * SIDE + 8, SIDE + 20), "white")
        for i, tile in enumerate(tiles):
            frame.paste(tile, (i * (SIDE + 4), 0))
            ImageDraw.Draw(frame).text((i * (SIDE + 4) + 4, SIDE + 2), names[i], "black", font_size=13)
        film.append(frame.quantize(64))
    film[0].save(root / "assets/method.gif", save_all=True, append_images=film[1:], duration=100, loop=0, optimize=True)

if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
