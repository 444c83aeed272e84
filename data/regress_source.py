"""Bring the former StyleGAN source to the present generator.

    git show a7146c4:ewc_gan.py > former_ewc_gan.py
    git show a7146c4:data/source_stylegan.pt > former_stylegan.pt
    python data/regress_source.py former_stylegan.pt out/source_stylegan.pt

The former generator doubled its features with 4x4 transposed convolutions, each followed by the
sum of 2x2 pixels: together a 5x5 transposed convolution, from which the present one starts.  Only
its normalisation differs, which 800 steps of regression on the former one's images make up for.
"""
import sys
from pathlib import Path

import torch
from torch.nn import functional as nnF

sys.path[:0] = [".", str(Path(__file__).resolve().parent.parent)]
import ewc_gan  # noqa: E402
import former_ewc_gan  # noqa: E402


def starting_weights(old, new):
    """The former weights, with 5x5 kernels where G doubles."""
    result = {}
    for name, value in old.items():
        if "up64.weight" in name:                   # the present one is followed by a mean, too
            value = nnF.pad(value, [0, 1, 0, 1])
        elif value.shape != new[name].shape:
            kernels = value.flatten(0, 1)[:, None]
            summed = nnF.conv2d(kernels, torch.ones(1, 1, 2, 2), padding=1)
            value = summed[:, 0].unflatten(0, value.shape[:2])
        result[name] = value.clone()
    return result


def features(D, x):
    """What the convolutions of D at 32, 16 and 8 pixels make of images x."""
    result = []
    for layer in list(D.layers)[:6]:
        x = layer(x)
        if isinstance(layer, torch.nn.LeakyReLU):
            result.append(x)
    return result


def loss_of(D, x, expected):
    loss = (x - expected).square().mean()
    loss = loss + 0.1 * (x - expected).abs().mean()
    with torch.no_grad():
        wanted = features(D, expected)
    parts = zip(features(D, x), wanted)
    return loss + 0.03 * sum((a - b).abs().mean() / b.abs().mean() for a, b in parts)


def main(former, checkpoint, steps=800, lr=2e-3):
    teacher = former_ewc_gan.GAN.load(former)
    torch.manual_seed(0)
    gan = ewc_gan.GAN("stylegan", 64)
    start = starting_weights(teacher.G_ema.state_dict(), gan.G.state_dict())
    gan.G.load_state_dict(start)
    gan.G_ema.load_state_dict(start)
    gan.D.load_state_dict(teacher.D.state_dict())
    gan.to("cpu", memory_format=torch.channels_last)
    teacher.D.requires_grad_(False)
    optimizer = torch.optim.Adam(gan.G.parameters(), betas=(0.5, 0.99), fused=True)
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        z = torch.randn(8, gan.z_dim, generator=random)
        with torch.no_grad():
            expected = teacher.G_ema(z)
        loss = loss_of(teacher.D, gan.G(z), expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, p in zip(gan.G_ema.parameters(), gan.G.parameters()):
                average.lerp_(p, 1 - decay)
        if step % 100 == 0:
            print(step, f"{loss.item():.4f}", flush=True)
    saved = torch.load(former, weights_only=True)
    gan.save(checkpoint, settings=saved["settings"], step=saved["step"])


if __name__ == "__main__":
    main(*sys.argv[1:])
