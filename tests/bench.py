"""Speed of every part, printed as a table: python tests/bench.py [--size 64] [--base] [--compile]

A row is the work as the project does it: bf16 autocast where the hardware has it, channels-last, fused optimizer. Its
GFLOP/s are counted by torch.utils.flop_counter and compared with the fastest matrix product measured in the same run;
"vs fp32" is the speed against plain fp32 eager PyTorch, measured beside it. On a GPU batches are those of SCALE=gpu,
TransUNet.base at 224 px is measured, too, and the peak memory. Nothing here is asserted: timings depend on the machine.
"""
import argparse
import contextlib
import io
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

os.environ["TQDM_DISABLE"] = "1"                        # bars would cut the table
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import fairness  # noqa: E402
import pointdiff  # noqa: E402
import transunet  # noqa: E402


def seconds(work, repeat, device):
    """Median seconds of one call after two warm-ups."""
    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, help="pixels a side (64, on a GPU 128)")
    parser.add_argument("--batch", type=int, help="images a step (16, on a GPU 48)")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--base", action="store_true", help="also the published TransUNet at 224 px, batch 2 (GPU: 48, always)")
    parser.add_argument("--compile", action="store_true", help="a row each for torch.compile")
    args = parser.parse_args()
    device, dtype = fairdiff.pick_device()
    gpu = device.type == "cuda"
    if gpu:
        print(torch.cuda.get_device_name(device))
    args.size, args.batch = args.size or (128 if gpu else 64), args.batch or (48 if gpu else 16)
    n = 8192 if gpu else 2048
    peaks = {}
    for name, kind in {"fp32": torch.float32, "half": dtype}.items():
        if kind is not None:
            a = torch.randn(n, n, device=device, dtype=kind)
            peaks[name] = 2 * n ** 3 / seconds(lambda a=a: a @ a, 3, device) / 1e9
    peak = peaks.get("half", peaks["fp32"])
    print("matrix product, GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()))
    print(f"{'work':<44}{'a second':>12}{'ms':>10}{'of peak':>9}{'vs fp32':>9}" + f"{'peak GiB':>10}" * gpu)

    def row(name, work, items, plain=None, compiled=None):
        with FlopCounterMode(display=False) as flops:
            work()
        reference = None
        if plain:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            reference = seconds(plain, args.repeat, device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        for label, run in ((name, work), (f"{name}, compiled", compiled if args.compile else None)):
            if run:
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                s = seconds(run, args.repeat, device)
                share = flops.get_total_flops() / s / 1e9 / peak
                ratio = f"{reference / s:>8.2f}x" if reference else " " * 9
                memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:>10.2f}" if gpu else ""
                print(f"{label:<44}{items / s:>12.1f}{1e3 * s:>10.1f}{share:>9.1%}{ratio}{memory}".rstrip(), flush=True)

    def training(net, loss, fast, compiled=False):
        """One optimizer step: as the project does it, or plain fp32 in torch's default memory layout."""
        net = net.to(device, memory_format=torch.channels_last if fast else torch.contiguous_format)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-3, fused=fast)
        called = torch.compile(net) if compiled else net

        def step():
            with fairdiff.autocast(device, dtype if fast else None):
                value = loss(called)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        return step

    def both(name, make, loss, items):
        row(name, training(make(), loss, True), items, training(make(), loss, False),
            training(make(), loss, True, True) if args.compile else None)

    ddpm, b, s = pointdiff.DDPM(), args.batch, args.size
    start = time.perf_counter()
    masks = fairdiff.make_phantom(100, s, 0)["mask"]
    per = (time.perf_counter() - start) / 100
    print(f"{f'phantom, {s} px':<44}{1 / per:>12.1f}{1e3 * per:>10.1f}")
    start = time.perf_counter()
    clouds = [pointdiff.mask_to_points(m) for m in masks]
    middle = time.perf_counter()
    for c in clouds:
        pointdiff.points_to_mask(c, s)
    there, back = (middle - start) / 100, (time.perf_counter() - middle) / 100
    print(f"{f'mask to points, {s} px':<44}{1 / there:>12.1f}{1e3 * there:>10.1f}")
    print(f"{f'points to mask, {s} px':<44}{1 / back:>12.1f}{1e3 * back:>10.1f}")

    with tempfile.TemporaryDirectory() as folder:       # the whole command: reading, both structures, all tables
        drawn = fairdiff.make_phantom(100, 224, 0)
        data = fairdiff.make_phantom(2000, 32, 0)       # for its attributes
        for key in ("image", "mask"):
            data[key] = np.concatenate([np.roll(drawn[key], i, 2) for i in range(20)])
        fairdiff.save_set(f"{folder}/set.npz", data)
        fairdiff.save_set(f"{folder}/plain.npz", data | {"mask": np.roll(data["mask"], 4, 1)})
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            fairness.main(["table", f"{folder}/set.npz", f"{folder}/plain.npz", "--out", f"{folder}/results.csv"])
        s2000 = time.perf_counter() - start
    print(f"{'fairness.py table, 2,000 images, 224 px':<44}{2000 / s2000:>12.1f}{1e3 * s2000:>10.1f}")

    x, g = torch.randn(48, 512, 3, device=device), torch.zeros(48, dtype=torch.long, device=device)
    for n in (512, 256):
        both(f"PointNet, step of 48 x {n} points", lambda: pointdiff.PointNet(3),
             lambda net, y=x[:, :n]: ddpm.loss(net, y, g, net.encode(y)[0]), 48)
    net, generator = pointdiff.PointNet(3).to(device).eval(), torch.Generator(device)
    row("PointNet, sampling 48 clouds, 32 steps", lambda: ddpm.sample(
        net, (48, 512, 3), g, net.draw_shape(g, generator), steps=32, generator=generator), 48)

    image, group = torch.rand(b, 1, s, s, device=device) * 2 - 1, torch.zeros(b, dtype=torch.long, device=device)
    mask = torch.as_tensor(masks[:b].astype(np.int64), device=device)
    patch = max(2, s // 32)
    both(f"UNet, step of {b}, {s} px", lambda: controlnet.UNet(3, patch=patch),
         lambda n: ddpm.loss(n, image, group), b)
    both(f"ControlNet, step of {b}, {s} px", lambda: controlnet.ControlNet(controlnet.UNet(3, patch=patch)),
         lambda n: ddpm.loss(n, image, group, mask), b)
    painter = controlnet.ControlNet(controlnet.UNet(3, patch=patch)).to(device, memory_format=torch.channels_last)
    row(f"ControlNet, sampling {b}, {s} px, 10 steps", lambda: controlnet.sample_images(
        painter, ddpm, {"mean": 100.0, "std": 40.0}, np.zeros(b, np.int64), masks[:b], (s, s), 10, 0, device, dtype), b)
    both(f"TransUNet compact, step of {b}, {s} px", transunet.TransUNet,
         lambda n: transunet.seg_loss(n((image + 1) / 2), mask), b)
    reader = transunet.TransUNet().to(device, memory_format=torch.channels_last)
    seen = np.zeros((b, s, s), np.uint8)
    row(f"TransUNet compact, reading {b}, {s} px", lambda: transunet.segment(reader, seen, device, dtype), b)
    if args.base or gpu:
        b = 48 if gpu else 2
        x, y = torch.rand(b, 1, 224, 224, device=device), torch.randint(3, (b, 224, 224), device=device)
        both(f"TransUNet base, step of {b}, 224 px", transunet.TransUNet.base, lambda n: transunet.seg_loss(n(x), y), b)


if __name__ == "__main__":
    main()
