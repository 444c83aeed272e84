"""Regress the StyleGAN's generator on the images of the former one: a start for its training.

    git show 2bb3dc7:ewc_gan.py > former_ewc_gan.py
    git show 2bb3dc7:data/source_stylegan.pt > former_stylegan.pt
    python data/regress_source.py former_stylegan.pt out/regressed.pt
    python pretrain_source.py --init out/regressed.pt --steps 8000 --lr 2.5e-3 --out out/source.pt

The former generator convolved with a 3x3 kernel and then enlarged its features bilinearly, and
its image was the sum of one image of each resolution.  The present one has 4x4 transposed
convolutions, and makes its image in the last layer alone.  All other layers are copied.
"""
import sys
from pathlib import Path

import torch
from torch.nn import functional as nnF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ewc_gan  # noqa: E402
import former_ewc_gan  # noqa: E402


def kernel_map():
    """The matrix [16, 9] by which a 4x4 transposed convolution is nearest to a 3x3 one and a
    bilinear enlargement, for white noise."""
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 4] = 1
    transposed, bilinear = [], []
    for kernel in torch.eye(16).view(16, 1, 1, 4, 4):
        x = nnF.conv_transpose2d(dot, kernel, stride=2, padding=1, output_padding=1)
        transposed.append(nnF.avg_pool2d(x, 2, stride=1, divisor_override=1).flatten())
    for kernel in torch.eye(9).view(9, 1, 1, 3, 3):
        x = nnF.conv2d(dot, kernel, padding=1)
        bilinear.append(nnF.interpolate(x, scale_factor=2, mode="bilinear").flatten())
    return torch.linalg.lstsq(torch.stack(transposed, 1), torch.stack(bilinear, 1)).solution


def starting_weights(old, G):
    """The former weights under their present names, with new kernels where G doubles."""
    new = {}
    for name, value in old.items():
        part, _, rest = name.partition(".")
        if part == "first":
            name = f"convs.conv4.{rest}"
        if part in ("before", "after"):
            number, _, rest = rest.partition(".")
            name = f"convs.{'up' if part == 'before' else 'conv'}{8 << int(number)}.{rest}"
            if part == "before" and rest == "weight":
                kernel = (value.flatten(2) @ kernel_map().T).unflatten(2, (4, 4))
                value = kernel * value.std() / kernel.std()
        name = name.replace("to_rgb.4.", "to_rgb.")
        if name in G.state_dict():
            new[name] = value
    return new


def main(former, checkpoint, steps=2400, lr=5e-3):
    teacher = former_ewc_gan.GAN.load(former)
    gan = ewc_gan.GAN("stylegan", 64)
    gan.to("cpu", memory_format=torch.channels_last)
    gan.G.load_state_dict(starting_weights(teacher.G_ema.state_dict(), gan.G))
    gan.G_ema.load_state_dict(gan.G.state_dict())
    gan.D.load_state_dict(teacher.D.state_dict())
    optimizer = torch.optim.Adam(gan.G.parameters(), betas=(0.5, 0.99), fused=True)
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        z = torch.randn(16, gan.z_dim, generator=random)
        with torch.no_grad():
            expected = teacher.G_ema(z)
        difference = gan.G(z) - expected
        loss = difference.square().mean() + 0.1 * difference.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, p in zip(gan.G_ema.parameters(), gan.G.parameters()):
                average.lerp_(p, 1 - decay)
        if step % 100 == 0:
            print(step, float(loss.detach()), flush=True)
    gan.save(checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:3])
