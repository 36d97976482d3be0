"""The README's animation and pictures from a finished run: python tests/experiments/film.py [out]

Three groups side by side: noise becomes boundary points, the points a mask, noise over the mask an image. Writes
assets/method.gif, under 1.5 MB, and copies assets/phantom.png and assets/synthetic.png from the run.
"""
import pathlib
import shutil
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

class Recorder(torch.nn.Module):
    """A denoiser that keeps every noisy input it is given."""
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.frames = []

    def forward(self, x, *condition):
        self.frames.append(x.cpu().numpy())
        return self.net(x, *condition)

def draw_points(points):
    """A cloud (N, 3) on white: disc blue, cup orange."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    for x, y, z in points:
        column, row = (x + 1) / 2 * SIDE, (y + 1) / 2 * SIDE
        pen.ellipse((column - 1, row - 1, column + 1, row + 1), fill=(255, 150, 20) if z > 0 else (60, 140, 230))
    return picture

def enlarge(array):
    """A grey array (H, W) as a picture of the film's size."""
    return Image.fromarray(array.astype(np.uint8)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)

def frames_of_group(out, g, seed):
    """The group's name and the pictures (caption, picture, milliseconds) of its sampling."""
    device, state = torch.device("cpu"), fairdiff.load_checkpoint(out / "points-all.pt", ("points",))
    config = state["config"]
    net, ddpm = pointdiff.build(config)
    net.load_state_dict(state["ema"])
    generator, group = torch.Generator().manual_seed(seed + g), torch.tensor([g])
    recorder = Recorder(net)
    x = ddpm.sample(recorder, (1, config["points"], 3), group, net.sample_prior(group, generator), steps=32, generator=generator)
    frames, std, mean = [], np.array(config["std"]), np.array(config["mean"])
    for noisy in [*recorder.frames[::2], x.numpy()]:
        frames.append(("noise becomes points", draw_points(noisy[0] * std + mean), 80))
    mask = pointdiff.points_to_mask(x[0].numpy() * std + mean, config["size"], pointdiff.SMOOTH)
    frames.append(("the points are a mask", enlarge(127 * mask), 1200))
    net, ddpm, config = controlnet.load_generator(out / "control-all.pt", device)
    recorder = Recorder(net)
    image = controlnet.sample_images(recorder, ddpm, config, np.array([g]), mask[None], device, 20, seed)
    for noisy in recorder.frames:
        frames.append(("noise over the mask becomes an image",
                       enlarge((noisy[0, 0] * config["std"] + config["mean"]).clip(0, 255)), 120))
    frames.append(("the image of the mask", enlarge(image[0]), 2500))
    return config["groups"][g], frames

def main():
    """Write the animation and copy the pictures."""
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    columns = [frames_of_group(out, g, seed=3) for g in range(3)]
    film, times = [], []
    for tiles in zip(*(frames for _, frames in columns), strict=True):
        picture = Image.new("RGB", (len(columns) * (SIDE + 4) - 4, SIDE + 40), "white")
        pen = ImageDraw.Draw(picture)
        pen.text((4, 3), tiles[0][0], "black", font_size=14)
        for i, (_, tile, _) in enumerate(tiles):
            picture.paste(tile, (i * (SIDE + 4), 22))
            pen.text((i * (SIDE + 4) + 4, SIDE + 23), columns[i][0], "black", font_size=13)
        film.append(picture.quantize(64))
        times.append(tiles[0][2])
    path = root / "assets/method.gif"
    film[0].save(path, save_all=True, append_images=film[1:], duration=times, loop=0, optimize=True)
    shutil.copy(out / "data/train.npz.png", root / "assets/phantom.png")
    shutil.copy(out / "synthetic-all.npz.png", root / "assets/synthetic.png")
    print(f"{path}: {len(film)} frames, {path.stat().st_size / 1e6:.2f} MB")

if __name__ == "__main__":
    main()
