"""Speed of every part, as a table: python tests/experiments/bench.py [--compiled]

Every row is the work as the project does it, with the batch of the scale that runs here. Its GFLOP/s, counted by torch,
are compared with a matrix product, its time with the same work in fp32. OMP_NUM_THREADS=1: one core, as at SCALE=cpu.
"""
import pathlib
import sys

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import controlnet  # noqa: E402
import fairdiff  # noqa: E402
import pointdiff  # noqa: E402
import transunet  # noqa: E402

def seconds(work):
    """Median seconds of one call, after warm-ups; it waits for a GPU to end."""
    return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).blocked_autorange().median

def bench(compiled=False):
    """Print the table; compiled: training steps go through torch.compile."""
    device, _ = fairdiff.setup("auto")
    batch, size = (48, 128) if device.type == "cuda" else (8, 64)
    with fairdiff.autocast(device):
        a = torch.randn(4096, 4096, device=device)
        peak = 2 * 4096 ** 3 / seconds(lambda: a @ a) / 1e9
    print(f"{device}, {torch.get_num_threads()} threads, matrix product {peak:.0f} GFLOP/s")
    print(f"{'work':<40}{'a second':>10}{'ms':>10}{'of peak':>9}{'x fp32':>9}")
    mixed = fairdiff.autocast
    def row(name, items, work, net=None):
        with FlopCounterMode(display=False) as flops:
            work()
        if compiled and net:                            # it cannot be counted after this
            net.compile()
        s = seconds(work)
        share = flops.get_total_flops() / s / 1e9 / peak
        for module in (fairdiff, controlnet, transunet):
            module.autocast = lambda device: torch.autocast(device.type, enabled=False)     # fp32
        speedup = seconds(work) / s
        for module in (fairdiff, controlnet, transunet):
            module.autocast = mixed
        print(f"{name:<40}{items / s:>10.1f}{1000 * s:>10.1f}{share:>9.1%}{speedup:>9.2f}", flush=True)
    def training(name, items, net, loss, optimizer=lambda p: torch.optim.AdamW(p, 1e-3)):
        net = net.to(device)
        optimizer = optimizer([p for p in net.parameters() if p.requires_grad])
        def step():
            with fairdiff.autocast(device):
                value = loss(net)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        row(name, items, step, net)
    masks = fairdiff.make_phantom(batch, size, 0)["mask"]
    ddpm, x = pointdiff.DDPM(), torch.randn(16, 192, 3, device=device)
    group, t = torch.zeros(48, dtype=torch.long, device=device), 20 * torch.arange(48, device=device)
    training("PointNet, step of 16 x 192 points", 16, pointdiff.PointNet(3),
             lambda net: ddpm.loss(net, x, t[:16], group[:16], net.encode(x)[0]), lambda p: pointdiff.Muon(p, 1e-3))
    net = pointdiff.PointNet(3).to(device)
    row("PointNet, sampling 16 clouds, 32 steps", 16, lambda: fairdiff.autocast(device)(ddpm.sample)(
        net, (16, 256, 3), group[:16], steps=32, eta=1.0, generator=torch.Generator(device)))
    image = torch.randn(batch, 1, size, size, device=device)
    mask = torch.as_tensor(masks, device=device).long()
    training(f"ControlNet, step of {batch}, {size} px", batch, controlnet.ControlNet(controlnet.UNet(3)),
             lambda net: ddpm.loss(net, image, t[:batch], group[:batch], mask), lambda p: pointdiff.Muon(p, 1e-3))
    net = controlnet.ControlNet(controlnet.UNet(3)).to(device)
    row(f"ControlNet, sampling {batch}, 8 steps", batch, lambda: controlnet.sample_images(
        net, {"mean": 100.0, "std": 40.0}, np.zeros(batch, int), masks, device))
    config = {"base": False, "width": 16, "groups": ["all"], "method": "plain"}
    training(f"TransUNet compact, step of {batch}, {size} px", batch, transunet.build(config, device),
             lambda net: transunet.seg_loss(net(image), mask))
    net = transunet.build(config, device)
    row(f"TransUNet compact, predicting 100, {size} px", 100,
        lambda: transunet.predict_masks(net, np.zeros((100, size, size), np.uint8), device))
    n = batch if device.type == "cuda" else 2
    image, mask = torch.rand(n, 1, 224, 224, device=device), torch.zeros(n, 224, 224, dtype=torch.long, device=device)
    training(f"TransUNet base, step of {n}, 224 px", n, transunet.build(config | {"base": True}, device),
             lambda net: transunet.seg_loss(net(image), mask))

if __name__ == "__main__":
    sys.exit(fairdiff.command_line(bench, argv=["bench", *sys.argv[1:]]))
