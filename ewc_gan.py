"""Few-shot image generation with Elastic Weight Consolidation (EWC), in one file.

    python ewc_gan.py --target data/10shot                   # adapt the shipped source to ten shots
    python ewc_gan.py --target DIR --source CKPT --out DIR    # your images, your source
    python ewc_gan.py --target DIR --method ewc finetune l2 freezed --seed 0 1 2 --reference DIR
    python ewc_gan.py --checkpoint out/10shot/adapted.pt --generate 500 --out DIR

The method is that of Li, Zhang, Lu and Shechtman, "Few-shot Image Generation with Elastic Weight
Consolidation" (NeurIPS 2020, arXiv 2012.02780).  A GAN learns a large source domain.  The Fisher
information says how much each weight of its generator G matters, with the discriminator D frozen
as the judge.  Then G is trained on about ten target images, and weights that matter are held back:

    L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2

so that the images take the look of the target and keep the variety of the source.

What differs from the paper: F is capped and divided by its mean before it is used (--method raw
leaves it as it is); theta_S is the moving average of the source G; networks of a million weights
at 64 pixels where the paper uses a StyleGAN at 256; a drawn source domain; no noise inputs in G; D
sees shifted images and learns more slowly than G; the shots are mirrored at random.

The sections follow the paper: images, networks, losses, training step, source model, importance of
weights, adaptation, weight changes; then measures, and what belongs to no method: the running of a
training, files, pictures, command line.  The method itself is short: train_step, fisher_diagonal,
ewc_penalty, adapt.  The markers "BEGIN SOLUTION" say what the assignments in README.md take out.
"""
import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import json
import math
import os
import pickletools
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as nnF      # F is the Fisher information, as in the paper
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
from torchvision.transforms.functional import normalize, to_pil_image
from torchvision.utils import make_grid

HERE = Path(__file__).resolve().parent
SOURCE = "data/source_dcgan.pt"             # the default: it adapts better than the StyleGAN


class UserError(Exception):
    """Something the user can mend: main() prints its one line and exits with code 2."""


# --------------------------------------------------------------------------------------------------
# Settings: every hyperparameter of both trainings, in one place.  The paper's own are not known to
# us; these were chosen on the embedded domain.
# --------------------------------------------------------------------------------------------------
@dataclass
class Settings:
    """Hyperparameters of one training; the defaults adapt a DCGAN to ten images."""
    steps: int = 2400            # the look is there after 400; outlines and eyes take longer
    batch_size: int = 4          # a larger batch of ten shots only repeats them
    lr: float = 1e-3             # of Adam, for G
    d_lr_ratio: float = 0.1      # D's learning rate over G's: slow, or D knows the shots by heart
    lr_decay: float = 0.0        # if set, lr / sqrt(1 + step / lr_decay): fast first, then finer
    beta1: float = 0.5           # DCGAN's value: less momentum, as G and D chase each other
    beta2: float = 0.99
    r1_gamma: float = 0.3        # weight of the R1 penalty on D: with more, D sees no details
    r1_every: int = 16           # R1 is costly and changes slowly: every 16th step, 16-fold
    ema: float = 0.999           # largest decay of G's moving average; at step t: 1 - 9 / (10 + t)
    flip: bool = True            # mirrored images are images of the same domain
    shift: float = 0.0625        # D sees images moved by up to this part of their size
    method: str = "ewc"          # one of METHODS
    lam: float = 2.5e-3          # lambda, the strength of EWC; 0 is plain fine-tuning
    fisher_samples: int = 256    # N of the Fisher estimate
    seed: int = 0


METHODS = {"ewc": "weights are held back, each by its scaled Fisher information",
           "raw": "as ewc, by the Fisher information as it is, whose scale changes with the source",
           "l2": "all weights are held back alike, as hard as by ewc in sum",
           "finetune": "no weight is held back: lambda = 0",
           "freezed": "no weight is held back, D's lower layers are frozen (Mo et al. 2020)"}

LAM = {"ewc": Settings.lam, "raw": 100.0, "l2": Settings.lam}      # default lambda, where it counts

ADAPT = {"dcgan": Settings(),
         "stylegan": Settings(lr=2.5e-3, beta1=0.0, r1_gamma=0.1)}

# Pretraining sees thousands of images: larger batches and rates, D as fast as G, no penalty.
PRETRAIN = {
    "dcgan": Settings(steps=24000, batch_size=16, lr=2e-3, d_lr_ratio=1.0, lr_decay=3000.0,
                      r1_gamma=1.0, shift=0.0, lam=0.0),
    "stylegan": Settings(steps=60000, batch_size=16, lr=5e-3, d_lr_ratio=1.0, lr_decay=3000.0,
                         r1_gamma=0.1, beta1=0.0, shift=0.0, lam=0.0),
}


# --------------------------------------------------------------------------------------------------
# Images: the paper's source domain (thousands) and target domain (ten or fewer), read alike
# --------------------------------------------------------------------------------------------------
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_image(path, resolution):
    """One image file as uint8 [R, R, 3]: upright, on white, centre-cropped to a square, resized."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)        # phones store "turn me" beside the pixels
            if image.mode.startswith("I"):               # 16 bits: convert() would clip, not scale
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("integers of more than 16 bits")
                image = Image.fromarray((values // 257).astype("uint8"))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no agreed range")
            image = image.convert("RGB")
    except Exception as error:                           # damaged files raise anything in Pillow
        raise UserError(f"{path}: not an image that can be read ({error}); mend or remove it")
    if min(image.size) < 8:
        raise UserError(f"{path}: {image.width}x{image.height} pixels; at least 8x8 are needed")
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))


def read_folder(folder, resolution, allocate=np.empty):
    """Every image below a folder, in the order of their names, as uint8 [N, 3, R, R].

    allocate  a function of shape and dtype: makes the array that the pixels are kept in
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted((path for path in folder.rglob("*")
                    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
                    and not any(part[0] == "." for part in path.relative_to(folder).parts)),
                   key=lambda path: path.as_posix())         # alike on every system
    if not paths:
        raise UserError(f"{folder}: no images in it or below it "
                        f"({' '.join(sorted(IMAGE_SUFFIXES))})")
    pixels = allocate((len(paths), 3, resolution, resolution), np.uint8)

    def read(i):
        pixels[i] = read_image(paths[i], resolution).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:                       # Pillow decodes outside Python's lock
        list(pool.map(read, range(len(paths))))              # the first error comes out here
    return torch.from_numpy(pixels)


def to_float(images):
    """uint8 0..255 -> float -1..1; floats are taken to be in -1..1 already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def load_images(folder, resolution):
    """Load every image below a folder: float [N, 3, R, R] in [-1, 1], in the order of their names.

    Any size and mode (RGBA on white, greyscale, palette, 16-bit, CMYK), nested folders, turned by
    EXIF; hidden files are left out.  Raises UserError where the folder is missing or empty, or a
    file cannot be read.
    """
    return to_float(read_folder(folder, resolution))


# --------------------------------------------------------------------------------------------------
# Networks: the paper's two, made small: the DCGAN of its analysis of weight changes and the
# StyleGAN of its main experiments, each about a million weights at 64x64.  In both, once a source
# is loaded, G(z) depends on its z alone, and in eval mode D(x) on its x alone: the Fisher
# information is a mean over single samples, and must not change with what else is in the batch.
# --------------------------------------------------------------------------------------------------
RESOLUTIONS = (32, 64, 128, 256)
G_WIDTHS = {"dcgan": [192, 128, 96, 64, 32, 16], "stylegan": [128, 128, 96, 48, 24, 12, 8]}
D_WIDTHS = [256, 128, 64, 32, 16, 8]


def widths(arch, resolution):
    """Channels of G at 4, 8, 16, ... pixels, and of D from half the resolution down to 4."""
    stages = int(math.log2(resolution)) - 2                        # 64 pixels: 4, 8, 16, 32
    return G_WIDTHS[arch][:stages + (arch == "stylegan")], D_WIDTHS[:stages][::-1]


class DCGANGenerator(nn.Module):
    """z [N, z_dim] -> image [N, 3, R, R] in (-1, 1): a DCGAN (Radford et al. 2016), five layers at
    64 pixels.

    BatchNorm lives on batch statistics while the source is pretrained.  From then on it is kept in
    eval mode, where it is a fixed scale and shift of each channel.
    """
    def __init__(self, z_dim, channels):
        super().__init__()
        layers = {"conv4": nn.ConvTranspose2d(z_dim, channels[0], 4, bias=False)}       # 1 -> 4
        for i, (c_in, c_out) in enumerate(zip(channels, channels[1:] + [3])):
            layers[f"norm{4 << i}"], layers[f"relu{4 << i}"] = nn.BatchNorm2d(c_in), nn.ReLU()
            layers[f"conv{8 << i}"] = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=c_out == 3)
        for name, layer in layers.items():
            self.add_module(name, layer)
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, 0, 0.02)

    def forward(self, z):
        x = z[:, :, None, None]                                             # [N, z_dim, 1, 1]
        for layer in self.children():
            x = layer(x)                                                    # [N, C, 4, 4], doubling
        return torch.tanh(x)


class DCGANDiscriminator(nn.Module):
    """image [N, 3, R, R] -> logit [N].  No BatchNorm: D must judge each image by itself."""
    def __init__(self, channels):
        super().__init__()
        layers = []
        for c_in, c_out in zip([3] + channels, channels):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1), nn.LeakyReLU(0.2)]              # halves
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4))             # 4 -> 1
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, 0.2)
                nn.init.zeros_(module.bias)

    def lower(self):
        """The layers near the image, down to 8x8 features: those that FreezeD freezes."""
        return self.layers[:-3]

    def forward(self, x):
        return self.layers(x).flatten()


class EqualizedLinear(nn.Module):
    """Linear layer with equalised learning rate (Karras et al. 2018): weights are stored as N(0, 1)
    and scaled as they are used, so that Adam's steps are alike in every layer.  EWC acts on the
    stored weights: F and theta are those of `weight`, not of `weight * scale`.  (The mapping
    network's are N(0, 100^2), used times 0.01: it learns a hundred times more slowly.)"""
    def __init__(self, d_in, d_out, bias=0.0, gain=1.0, lr_multiplier=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((d_out,), bias / lr_multiplier))
        self.scale, self.lr_multiplier = gain * lr_multiplier / math.sqrt(d_in), lr_multiplier

    def forward(self, x):
        return nnF.linear(x, self.weight * self.scale, self.bias * self.lr_multiplier)


class EqualizedConv(nn.Module):
    """Convolution with equalised learning rate; He's gain, for a leaky ReLU follows."""
    def __init__(self, c_in, c_out, size, stride=1, padding=0, gain=math.sqrt(2)):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, size, size))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.scale, self.stride, self.padding = gain / math.sqrt(c_in * size**2), stride, padding

    def forward(self, x):
        return nnF.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class ModulatedConv(nn.Module):
    """x [N, I, H, W], w [N, w_dim] -> [N, O, H, W]: a convolution whose input channels are scaled
    by a style s(w) (Karras et al. 2020).

    Demodulation divides each output channel by the norm that its weights have after the scaling.
    Both are done on the activations, which is equal to doing it on a weight per image, and cheaper.
    """
    def __init__(self, c_in, c_out, size, w_dim, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, size, size))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.style = EqualizedLinear(w_dim, c_in, bias=1.0)
        self.scale, self.padding = 1 / math.sqrt(c_in * size**2), size // 2
        self.demodulate = demodulate

    def forward(self, x, w):
        s, weight = self.style(w), self.weight * self.scale                 # [N, I], [O, I, k, k]
        x = nnF.conv2d(x * s[:, :, None, None], weight, padding=self.padding)   # [N, O, H, W]
        if self.demodulate:
            norm = (s.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()  # [N, O]
            x = x * (math.sqrt(2) * norm)[:, :, None, None].to(x.dtype)     # bf16 under autocast
        return x + self.bias[:, None, None].to(x.dtype)


def upsample(x):
    """[N, C, H, W] -> [N, C, 2H, 2W]"""
    return nnF.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class StyleGANGenerator(nn.Module):
    """z [N, z_dim] -> image [N, 3, R, R], about -1..1: StyleGAN-lite (after Karras et al. 2020).

    Mapping network, learned constant, modulated 3x3 convolutions, sum of RGB skips.  No noise
    inputs: an image is a function of its z alone, so what becomes of a z can be seen, and F is a
    mean over z and nothing else.
    """
    def __init__(self, z_dim, channels, mapping_layers=4):
        super().__init__()
        self.mapping = nn.ModuleList(
            EqualizedLinear(z_dim, z_dim, gain=math.sqrt(2), lr_multiplier=0.01)
            for _ in range(mapping_layers))
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        pairs = list(zip(channels, channels[1:]))
        self.first = ModulatedConv(channels[0], channels[0], 3, z_dim)
        self.before = nn.ModuleList(ModulatedConv(i, o, 3, z_dim) for i, o in pairs)
        self.after = nn.ModuleList(ModulatedConv(o, o, 3, z_dim) for _, o in pairs)
        self.to_rgb = nn.ModuleList(ModulatedConv(c, 3, 1, z_dim, False) for c in channels)

    def forward(self, z):
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()       # [N, z_dim], on a sphere
        for layer in self.mapping:
            w = nnF.leaky_relu(layer(w), 0.2)                               # [N, z_dim]
        x = self.constant.expand(len(z), -1, -1, -1)                        # [N, C, 4, 4]
        x = nnF.leaky_relu(self.first(x, w), 0.2)
        image = self.to_rgb[0](x, w)                                        # [N, 3, 4, 4]
        for before, after, to_rgb in zip(self.before, self.after, self.to_rgb[1:]):
            x = nnF.leaky_relu(upsample(before(x, w)), 0.2)                 # [N, C', 2H, 2W]
            x = nnF.leaky_relu(after(x, w), 0.2)
            image = upsample(image) + to_rgb(x, w)                          # [N, 3, 2H, 2W]
        return image


class MinibatchStd(nn.Module):
    """Append one channel: the mean standard deviation inside groups of images, which tells D that a
    batch lacks variety (Karras et al. 2018).  In eval mode its running mean stands in, as in
    BatchNorm, so that D judges one image by itself when the Fisher information is measured."""
    def __init__(self, group=4):
        super().__init__()
        self.group = group
        self.register_buffer("running_std", torch.zeros(()))

    def forward(self, x):
        n, _, height, width = x.shape                                           # [N, C, H, W]
        group = max(g for g in range(1, self.group + 1) if n % g == 0)
        if group == 1 or not self.training:                                     # nothing to compare
            return torch.cat([x, self.running_std.to(x.dtype).expand(n, 1, height, width)], 1)
        variance = x.float().unflatten(0, (group, -1)).var(0, unbiased=False)    # [N/g, C, H, W]
        std = (variance + 1e-8).sqrt().mean((1, 2, 3))                          # [N/g]
        with torch.no_grad():
            self.running_std.lerp_(std.mean(), 0.01)
        std = std.repeat(group)[:, None, None, None].to(x.dtype)
        return torch.cat([x, std.expand(n, 1, height, width)], 1)


class ResidualBlock(nn.Module):
    """Halve the resolution: a strided convolution beside an averaged skip, scaled to variance 1."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.main = EqualizedConv(c_in, c_out, 4, 2, 1)
        self.skip = EqualizedConv(c_in, c_out, 1, gain=1.0)

    def forward(self, x):
        main = nnF.leaky_relu(self.main(x), 0.2)                        # [N, C', H/2, W/2]
        return (main + self.skip(nnF.avg_pool2d(x, 2))) * math.sqrt(0.5)


class StyleGANDiscriminator(nn.Module):
    """image [N, 3, R, R] -> logit [N]: residual, with minibatch standard deviation."""
    def __init__(self, channels):
        super().__init__()
        c = channels
        self.stem = EqualizedConv(3, c[0], 4, 2, 1)                                     # R -> R/2
        self.blocks = nn.Sequential(*(ResidualBlock(i, o) for i, o in zip(c, c[1:])))   # R/2 -> 4
        self.minibatch_std = MinibatchStd()
        self.last = EqualizedConv(c[-1] + 1, 64, 3, padding=1)
        self.hidden = EqualizedLinear(64 * 16, 128, gain=math.sqrt(2))
        self.out = EqualizedLinear(128, 1)

    def lower(self):
        """The layers near the image, down to 8x8 features: those that FreezeD freezes."""
        return nn.ModuleList([self.stem, *self.blocks[:-1]])

    def forward(self, x):
        x = self.blocks(nnF.leaky_relu(self.stem(x), 0.2))                  # [N, C, 4, 4]
        x = nnF.leaky_relu(self.last(self.minibatch_std(x)), 0.2)           # [N, 64, 4, 4]
        return self.out(nnF.leaky_relu(self.hidden(x.flatten(1)), 0.2)).flatten()


FAMILIES = {"dcgan": (DCGANGenerator, DCGANDiscriminator, 64),
            "stylegan": (StyleGANGenerator, StyleGANDiscriminator, 128)}     # G, D, z_dim


@dataclass
class Model:
    """A GAN: its generator G, discriminator D, moving average G_ema, and what builds them again."""
    arch: str
    resolution: int
    z_dim: int
    g_channels: list
    d_channels: list
    G: nn.Module
    G_ema: nn.Module
    D: nn.Module


def memory_format(device):
    """The memory layout in which convolutions of this size are fastest."""
    return (torch.contiguous_format if torch.device(device).type == "mps"      # not safe there
            else torch.channels_last)


def build_model(arch, resolution, device="cpu", z_dim=None, g_channels=None, d_channels=None):
    """A fresh model.  arch: 'dcgan' or 'stylegan'; resolution: 32, 64, 128 or 256."""
    make_G, make_D, default_z_dim = FAMILIES[arch]
    z_dim = z_dim or default_z_dim
    g_default, d_default = widths(arch, resolution)
    g_channels, d_channels = g_channels or g_default, d_channels or d_default
    G, D = make_G(z_dim, g_channels), make_D(d_channels)
    G, D = (net.to(device, memory_format=memory_format(device)) for net in (G, D))
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    return Model(arch, resolution, z_dim, g_channels, d_channels, G, G_ema, D)


# --------------------------------------------------------------------------------------------------
# Losses: the L_adv of the paper's adaptation loss.  Its form there is not known to us; here it is
# the non-saturating logistic loss (Goodfellow et al. 2014) with R1 (Mescheder et al. 2018).  D
# gives logits: its probability that x is real is sigmoid(D(x)); log sigmoid(a) = -softplus(-a).
# --------------------------------------------------------------------------------------------------
def d_logistic_loss(real_logits, fake_logits):
    """L_D = -E[log D(x)] - E[log(1 - D(G(z)))].  Logits [N] and [M] -> scalar."""
    ### BEGIN SOLUTION (exercise 1)
    return nnF.softplus(-real_logits).mean() + nnF.softplus(fake_logits).mean()
    ### END SOLUTION


def g_nonsaturating_loss(fake_logits):
    """L_adv of G = -E[log D(G(z))].  Logits [N] -> scalar."""
    ### BEGIN SOLUTION (exercise 1)
    return nnF.softplus(-fake_logits).mean()
    ### END SOLUTION


def d_r1_loss(D, real):
    """R1 = E[ |grad_x D(x)|^2 ] on real images x [N, 3, R, R] -> scalar, differentiable in D.

    Its weight in L_D is gamma / 2.  It keeps D smooth around the real images.
    """
    ### BEGIN SOLUTION (exercise 2)
    real = real.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(D(real).sum(), real, create_graph=True)     # [N, 3, R, R]
    return gradient.square().sum((1, 2, 3)).mean()
    ### END SOLUTION


# --------------------------------------------------------------------------------------------------
# One step of adversarial training: the same for the source model and for its adaptation, which adds
# the penalty to the loss of G (the paper's adaptation loss)
# --------------------------------------------------------------------------------------------------
def autocast(device, amp):
    """Automatic mixed precision: networks in bf16 or fp16, everything else left in float32."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


class Trainer:
    """Model, optimisers and random numbers of one training: all that the next step depends on."""

    def __init__(self, model, settings, amp):
        self.model, self.settings, self.amp = model, settings, amp
        self.device = next(model.G.parameters()).device
        options = dict(betas=(settings.beta1, settings.beta2), fused=self.device.type != "mps")
        self.opt_G = torch.optim.Adam(model.G.parameters(), **options)      # lr: in train_step
        self.opt_D = torch.optim.Adam([p for p in model.D.parameters() if p.requires_grad],
                                      **options)
        # fp16 alone needs its loss scaled, or small gradients become 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.random = torch.Generator().manual_seed(settings.seed)          # the same on any device
        self.step = 0
        several = dist.is_available() and dist.is_initialized()             # started by torchrun
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        if settings.batch_size % self.processes:
            raise UserError(f"--batch-size {settings.batch_size}: must be a multiple of the number "
                            f"of processes, {self.processes}")

    def draw(self, images):
        """Real images float [B, 3, R, R] in [-1, 1], with replacement, and z [B, z_dim].

        Of several processes all draw the same, and process r of n keeps images r, r + n, r + 2n,
        ...: so the groups of MinibatchStd are those of one process, too."""
        b, mine = self.settings.batch_size, slice(self.rank, None, self.processes)
        picks = torch.randint(len(images), (b,), generator=self.random)[mine]
        real = to_float(images[picks.to(images.device)].to(self.device))
        if self.settings.flip:
            mirror = (torch.rand(b, generator=self.random) < 0.5)[mine].to(self.device)
            real = torch.where(mirror[:, None, None, None], real.flip(3), real)
        z = torch.randn(b, self.model.z_dim, generator=self.random)[mine].to(self.device)
        return real.contiguous(memory_format=memory_format(self.device)), z

    def shift(self, x):
        """A batch moved up or down and left or right, its edges repeated: so D cannot learn the
        place of every pixel of the few shots by heart (after DiffAugment, Zhao et al. 2020)."""
        size = x.shape[-1]
        most = round(self.settings.shift * size)
        if not most:
            return x
        top, left = torch.randint(2 * most + 1, (2,), generator=self.random).tolist()
        return nnF.pad(x, [most] * 4, "replicate")[:, :, top:top + size, left:left + size]

    def train_step(self, images, pull=None):
        """One step of D, one of G.

        images  uint8 [N, 3, R, R], or float in [-1, 1]
        pull    a function of G that is added to its loss: lambda * the EWC penalty
        Returns a dict of scalar tensors, still on the device: reading one waits for it.
        """
        G, D, s = self.model.G, self.model.D, self.settings
        real, z = self.draw(images)
        lr = s.lr / math.sqrt(1 + self.step / s.lr_decay) if s.lr_decay else s.lr
        self.opt_G.param_groups[0]["lr"] = lr
        self.opt_D.param_groups[0]["lr"] = lr * s.d_lr_ratio

        # D: minimise  L_D + gamma / 2 * R1
        real = self.shift(real)                                             # [B, 3, R, R]
        with autocast(self.device, self.amp):
            fake = self.shift(G(z))                                         # [B, 3, R, R]
            real_logits, fake_logits = D(real), D(fake.detach())            # [B], [B]
        loss_D = d_logistic_loss(real_logits.float(), fake_logits.float())
        total_D = loss_D
        if self.step % s.r1_every == 0:                          # float32: its gradients are small
            total_D = loss_D + s.r1_every * s.r1_gamma / 2 * d_r1_loss(D, real)
        self.update(self.opt_D, total_D)

        # G: minimise  L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2
        with autocast(self.device, self.amp):
            fake_logits = D(fake)                                           # [B]
        loss_G = g_nonsaturating_loss(fake_logits.float())                  # L_adv
        penalty = pull(G) if pull else torch.zeros_like(loss_G)
        self.update(self.opt_G, loss_G + penalty)
        self.scaler.update()
        # Short at first: with 0.999 from the start, G_ema would long stay a copy of the source
        accumulate(self.model.G_ema, G, min(s.ema, (1 + self.step) / (10 + self.step)))
        self.step += 1
        return {"loss_D": loss_D.detach(), "loss_G": loss_G.detach(), "penalty": penalty.detach()}

    def update(self, optimizer, loss):
        parameters = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()                   # inputs: G's step needs no gradients in D's weights
        self.scaler.scale(loss).backward(inputs=parameters)
        if self.processes > 1:
            average_gradients([p.grad for p in parameters], self.processes)
        self.scaler.step(optimizer)


@torch.no_grad()
def accumulate(G_ema, G, decay):
    """theta_ema <- decay * theta_ema + (1 - decay) * theta, for all weights in one call."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# The source model: a GAN trained on a large domain, the start of everything in the paper
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def calibrate_batchnorm(G, z_dim, samples=4096, batch=256, seed=0):
    """Measure anew the statistics of every BatchNorm in G, over many z, and freeze them.

    The running statistics that training leaves belong to the weights of G; those of G_ema are
    averages, which have never seen a batch.
    """
    norms = [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None                           # None: the plain mean of all batches
        device = next(G.parameters()).device
        random = torch.Generator().manual_seed(seed)
        G.train()
        for _ in range(samples // batch):
            G(torch.randn(batch, z_dim, generator=random).to(device))
    return G.eval()


def pretrain(images, model, settings, out, amp="off", resume=False, save_every=1000):
    """Train a source model and save it.

    images    uint8 [N, 3, R, R], or float in [-1, 1]
    model     of build_model(), or one to go on with; trained in place, on its device
    settings  Settings; PRETRAIN has good ones for each family
    out       the checkpoint to write: G_ema and D, all that an adaptation needs.  Beside it stand
              OUT.png with samples, OUT.csv, and OUT.train, from which resume=True goes on bit for
              bit.  All are written every save_every steps.  With 20 images or more, samples are
              measured against them then (see Ruler), and what OUT holds is the best so far.
    amp       'off', 'bf16' or 'fp16'
    """
    out, device = Path(out), next(model.G.parameters()).device
    trainer, state, log = Trainer(model, settings, amp), out.with_name(out.name + ".train"), []
    origin = {"arch": model.arch, "resolution": model.resolution, "images": len(images)}
    if resume:
        log = resume_training(trainer, state, **origin)
    model.G.train(), model.D.train()
    ruler = None
    if len(images) >= 20 and trainer.rank == 0:
        some = to_float(images[::math.ceil(len(images) / 1000)])
        ruler = Ruler(discriminator_features(device), some[:10], some)

    def save():
        calibrate_batchnorm(model.G_ema, model.z_dim)
        log.append({"step": trainer.step})
        if ruler:
            log[-1].update(ruler.of_model(model))
            print("measured: " + "  ".join(f"{k} {v:.4g}" for k, v in log[-1].items()), flush=True)
        save_checkpoint(state, model, training=training_state(trainer, **origin), log=log)
        write_table(out.with_suffix(".csv"), log)
        if log[-1] is min(log, key=lambda row: row.get("frechet", -row["step"])):    # or latest
            save_checkpoint(out, model, settings=asdict(settings), **log[-1])
            image_grid(generate(model, 64), 8).save(out.with_suffix(".png"))

    run_training(trainer, images, "pretrain", save, save_every)
    return model


# --------------------------------------------------------------------------------------------------
# The importance of weights (the paper's importance measure): diagonal Fisher information
# --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def evaluating(*networks):
    """Networks in eval mode, where no image depends on another; afterwards in the mode they had."""
    modes = {module: module.training for net in networks for module in net.modules()}
    for net in networks:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def refuse_nothing(G, z):
    if len(z) == 0 or not any(p.requires_grad for p in G.parameters()):
        raise ValueError("Fisher information needs at least one z, and a G with requires_grad")


def fisher_diagonal(G, D, z):
    """How much each weight of G matters to the images it makes, with D frozen as the judge:

        F_i = E_z[ (d log D(G(z)) / d theta_i)^2 ]

    G  generator, z [1, ...] -> images;  D  discriminator, images -> logits, so log D is logsigmoid.
    z  [N, ...], the samples over which the mean is taken.
    Raises ValueError without a z, or if nothing in G can be trained.  Logits of any shape: several
    of one image add up.  A G or D that takes or returns more than this needs a small wrapper.
    Returns {name: float32 tensor like the parameter} for each trainable parameter of G.

    The likelihood of a GAN has no closed form; log D(G(z)) stands in for it (the paper's importance
    measure).  So this is an empirical Fisher information: it need not equal minus the mean second
    derivative, as that of a true likelihood does.  One sample at a time, because the mean of
    squares is wanted: the square of the mean gradient of a batch is another, smaller thing.  Never
    in half precision, which rounds the square of a gradient of 1e-4 to zero.  Neither network is
    changed in any way.  If G draws noise of its own, fix it, or F differs from call to call.
    """
    refuse_nothing(G, z)
    ### BEGIN SOLUTION (exercise 3)
    parameters = {name: p for name, p in G.named_parameters() if p.requires_grad}
    F = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    with evaluating(G, D), torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        for i in range(len(z)):
            log_likelihood = nnF.logsigmoid(D(G(z[i:i + 1]))).sum()         # log D(G(z_i))
            gradients = torch.autograd.grad(log_likelihood, list(parameters.values()),
                                            allow_unused=True, materialize_grads=True)
            for name, gradient in zip(F, gradients):
                F[name] += gradient.float().square()
    return {name: total / len(z) for name, total in F.items()}
    ### END SOLUTION


def fisher_diagonal_chunked(G, D, z, chunk=32):
    """fisher_diagonal(G, D, z), to rounding, for networks that torch.func.vmap can run.

    The gradients of a chunk of samples are computed at once, each still its own: much faster where
    one sample leaves most of a GPU idle, slower on a CPU.  Takes chunk times the memory of G's
    weights.
    """
    refuse_nothing(G, z)
    ### BEGIN SOLUTION (exercise 3)
    def log_likelihood(theta, z_i):
        return nnF.logsigmoid(D(torch.func.functional_call(G, theta, (z_i[None],)))).sum()

    theta = {name: p.detach() for name, p in G.named_parameters() if p.requires_grad}
    F = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in theta.items()}
    gradients_of = torch.func.vmap(torch.func.grad(log_likelihood), (None, 0))
    with evaluating(G, D), torch.autocast(z.device.type, enabled=False):
        for part in z.split(chunk):
            for name, gradients in gradients_of(theta, part).items():       # [chunk, *shape]
                F[name] += gradients.float().square().sum(0)
    return {name: total / len(z) for name, total in F.items()}
    ### END SOLUTION


# --------------------------------------------------------------------------------------------------
# Adaptation to a few images (the paper's adaptation loss):
#     L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2
# With --method raw, F is the Fisher information as in the paper; by default it is scaled_fisher(F).
# --------------------------------------------------------------------------------------------------
class WeightedSquares(torch.autograd.Function):
    """sum F (theta - theta_S)^2 over lists of tensors, with its gradient 2 F (theta - theta_S)
    written out: left to autograd, the same takes four times as long."""
    @staticmethod
    def forward(context, theta_S, F, *theta):
        ### BEGIN SOLUTION (exercise 4)
        difference = [d.float() for d in torch._foreach_sub(theta, theta_S)]    # no fp16 squares
        pull = torch._foreach_mul(difference, F)
        context.save_for_backward(*pull)
        torch._foreach_mul_(difference, pull)                       # in place: now F difference^2
        return sum(square.sum() for square in difference)
        ### END SOLUTION

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        ### BEGIN SOLUTION (exercise 4)
        return None, None, *torch._foreach_mul(context.saved_tensors, 2 * gradient)
        ### END SOLUTION


def ewc_penalty(G, theta_S, F):
    """sum_i F_i (theta_i - theta_S,i)^2, a scalar, differentiable in theta, the parameters of G.

    theta_S  {name: tensor}, *copies* of the parameters that G started from (the parameters
             themselves would move along, and the penalty would stay 0 for ever)
    F        {name: tensor}, of fisher_diagonal
    Parameters that F does not name are free.  There is no factor 1/2.  Multiply by lambda.
    """
    ### BEGIN SOLUTION (exercise 4)
    theta = dict(G.named_parameters())
    # sum((F[name] * (theta[name] - theta_S[name]).square()).sum() for name in F), only faster:
    return WeightedSquares.apply([theta_S[name] for name in F], list(F.values()),
                                 *(theta[name] for name in F))
    ### END SOLUTION


def relative_change(theta, theta_S):
    """|theta - theta_S| / |theta_S| over all weights, each norm taken over all of them at once."""
    change = [(theta[name].detach() - theta_S[name]).square().sum() for name in theta_S]
    return (sum(change) / sum(t.square().sum() for t in theta_S.values())).sqrt()


@dataclass
class Adaptation:
    """What adapt() returns: the adapted model, and what the pictures are made of."""
    model: Model
    theta_S: dict         # {name: tensor}: the parameters of G that it started from
    F: dict               # {name: tensor}: their Fisher information
    log: list             # one dict for every tenth step: losses, penalty, ...


def source_fisher(source, settings):
    """F of a source model, at the weights that adaptation starts from: those of G_ema."""
    G = copy.deepcopy(source.G_ema).requires_grad_(True)
    random = torch.Generator().manual_seed(settings.seed)
    z = torch.randn(settings.fisher_samples, source.z_dim, generator=random)
    z = z.to(next(G.parameters()).device)
    return (fisher_diagonal_chunked if z.is_cuda else fisher_diagonal)(G, source.D, z)


def scaled_fisher(F, most=0.99):
    """F of mean 1: capped at its quantile `most`, and divided by its mean after that.

    The scale of F depends on how sure D is: lambda would have to make up for it.  And a hundredth
    of the weights can hold nearly all of F, in the StyleGAN mostly biases that set the palette; but
    a new domain has a new palette.  Capped and scaled, lambda says how hard a weight of mean
    importance is held.  The price: F (theta - theta_S)^2 does not depend on the scale in which G
    stores its weights, and after the division it does.  Raises UserError if F is 0 nearly
    everywhere.
    """
    values = torch.cat([f.flatten().cpu() for f in F.values()])     # MPS has no kthvalue
    cap = values.kthvalue(math.ceil(most * len(values))).values
    mean = values.clamp(max=cap).mean()
    if not mean > 0:
        raise UserError("the Fisher information is 0 nearly everywhere: D is sure of each image, "
                        "or most of G is idle; use another source, or --method raw")
    return {name: f.clamp(max=float(cap)) / float(mean) for name, f in F.items()}


def pull_of(method, lam, theta_S, F):
    """What is added to the loss of G: a function of G, or None where nothing holds it back.

    l2  Every weight counts 1, which is the mean of the scaled F: is it the Fisher information that
        helps, or would any pull towards the source do?
    """
    if method not in LAM or not lam:
        return None
    if method == "ewc":
        F = scaled_fisher(F)
    elif method == "l2":
        F = {name: torch.ones_like(f) for name, f in F.items()}
    return lambda G: lam * ewc_penalty(G, theta_S, F)


def adapt(source, images, settings, out=None, amp="off", resume=False, save_every=200, F=None,
          measure=None, measure_every=400):
    """Adapt a source model to a few images with EWC, or with a baseline (settings.method).

    source   Model, not changed.  theta_S is its G_ema: Fisher information, penalty and training all
             start from the averaged weights, for they make the better pictures.
    images   the shots: uint8 [N, 3, R, R], or float in [-1, 1]; N >= 1
    out      where to keep a checkpoint as training goes on; resume=True goes on from it bit for bit
    F        the Fisher information, if it has been measured before
    measure  a function of the Model that returns {name: number} for the log, every so many steps
    Returns an Adaptation.
    """
    model = copy.deepcopy(source)
    model.G = copy.deepcopy(source.G_ema).requires_grad_(True).eval()   # so BatchNorm is fixed
    model.D.requires_grad_(True).train()
    F = F or source_fisher(source, settings)
    ### BEGIN SOLUTION (exercise 4)
    theta_S = {name: p.detach().clone() for name, p in model.G.named_parameters()}
    ### END SOLUTION
    pull = pull_of(settings.method, settings.lam, theta_S, F)
    if settings.method == "freezed":
        model.D.lower().requires_grad_(False)
    trainer, log = Trainer(model, settings, amp), []

    origin = {"images": fingerprint([images]),
              "source": fingerprint([*theta_S.values(), *source.D.state_dict().values()])}
    if resume:
        log = resume_training(trainer, out, **origin)

    def look(losses, images_per_s):
        row = {name: float(value) for name, value in losses.items()}
        change = float(relative_change(dict(model.G.named_parameters()), theta_S))
        share = row["penalty"] / max(row["loss_G"] + row["penalty"], 1e-12)
        log.append({"step": trainer.step, **row, "share": share, "change": change,
                    "images_per_s": images_per_s})
        if measure and (trainer.step % measure_every == 0 or trainer.step == settings.steps):
            log[-1].update(measure(model))

    def save():
        if out:
            save_checkpoint(out, model, training=training_state(trainer, **origin), log=log)

    run_training(trainer, images, settings.method, save, save_every, pull, look)
    return Adaptation(model, theta_S, F, log)


# --------------------------------------------------------------------------------------------------
# Which weights change (the paper's analysis of weight changes): layer by layer, beside their Fisher
# information
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def layers(theta, theta_S, F):
    """A dict for each layer of G, in G's order: its mean Fisher information, the mean absolute
    weight, and the change of the weights in %.

    The change is sum |theta - theta_S| / sum |theta_S| over a layer: a mean of single ratios would
    be ruled by the weights that happen to lie near 0.  A layer is a module; the style of a
    modulated convolution counts as part of it.
    """
    groups = {}
    for name in F:
        groups.setdefault(name.rpartition(".")[0].removesuffix(".style") or name, []).append(name)
    rows = []
    for layer, names in groups.items():
        ### BEGIN SOLUTION (exercise 5)
        n = sum(F[name].numel() for name in names)
        fisher = float(sum(F[name].sum() for name in names) / n)
        weight = float(sum(theta_S[name].abs().sum() for name in names) / n)
        change = float(sum((theta[name] - theta_S[name]).abs().sum() for name in names) / n)
        rows.append({"layer": layer, "fisher": fisher, "weight": weight,
                     "change": 100 * change / weight})
        ### END SOLUTION
    return rows


# --------------------------------------------------------------------------------------------------
# Measuring: do samples look like the target (fit), and unlike each other and the shots (variety)?
# The paper reports FID and LPIPS; here, with nothing to download, the same kind of distances in the
# features of a shipped D.  Read the two together: the source itself has the most variety of all.
# --------------------------------------------------------------------------------------------------
def frechet_distance(a, b):
    """Frechet distance of two Gaussians fitted to features a [N, C] and b [M, C] -> float.

        |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    With R^T R = C, the last trace is the sum of the singular values of R_a R_b^T.
    """
    def root(x):
        return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R

    R_a, R_b = root(a.double()), root(b.double())
    trace = R_a.square().sum() + R_b.square().sum() - 2 * torch.linalg.svdvals(R_a @ R_b.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + trace)


def precision_recall(real, fake, k=5):
    """Shares of fake inside the manifold of real, and of real inside that of fake.

    Features [N, C], [M, C].  A manifold is the union of balls around its points, each reaching to
    the k-th neighbour (Kynkaanniemi et al. 2019).
    """
    def inside(x, points):
        radius = torch.cdist(points, points).kthvalue(k + 1, dim=1).values      # 1st: the point
        return float((torch.cdist(x, points) <= radius).any(1).float().mean())

    return inside(fake, real), inside(real, fake)


def diversity_and_nearest(features, shots):
    """Mean distance between images that have the same nearest shot, averaged over the shots (after
    Ojha et al. 2021), and mean distance of an image to its nearest shot: 0 for an exact copy."""
    nearest = torch.cdist(features, shots).min(1)
    clusters = [features[nearest.indices == i] for i in range(len(shots))]
    distances = [torch.pdist(cluster).mean() for cluster in clusters if len(cluster) > 1]
    return float(sum(distances) / max(len(distances), 1)), float(nearest.values.mean())


def distances_kept(before, after):
    """Correlation of the distances between images with those between what they became, in features
    [N, C] and [N, C]: 1 if all that were alike stay alike.  What Ojha et al. (2021) train for."""
    return float(torch.corrcoef(torch.stack([torch.pdist(before), torch.pdist(after)]))[0, 1])


class Ruler:
    """Measures samples against held-out images of the target, in a given space of features.

    features   a function: images float [N, 3, R, R] in [-1, 1] -> float [N, C]
    shots      images; as training mirrors them, a mirrored shot counts as a shot of its own
    reference  images; without them there is no fit to measure
    source     what the source model makes of the z of the samples
    """
    def __init__(self, features, shots, reference=None, n=1000, source=None):
        self.features, self.n, self.reference = features, n, None
        self.shots = features(torch.cat([shots, shots.flip(3)]))                # [2 K, C]
        self.source = None if source is None else features(source)
        self.unit = self.shots.square().mean().sqrt()           # gives figures of a readable size
        if reference is not None:
            self.reference = features(reference[:n])
            self.unit = self.reference.square().mean().sqrt()
            self.reference = self.reference / self.unit
        self.shots = self.shots / self.unit

    def __call__(self, images):
        """{name: number} for images float [N, 3, R, R]: fit first, then variety."""
        return self.of_features(self.features(images))

    def of_features(self, x):
        x, row = x / self.unit, {}
        if self.reference is not None:
            row["frechet"] = frechet_distance(x, self.reference)
            row["precision"], row["recall"] = precision_recall(self.reference, x)
        row["diversity"], row["nearest_shot"] = diversity_and_nearest(x, self.shots)
        if self.source is not None:
            row["kept"] = distances_kept(self.source, x)
        return row

    def of_model(self, model):
        """The same for samples of a model."""
        return self(generate(model, self.n, seed=1))

    def of_reference(self):
        """The same for the reference, one half against the other: what perfect looks like."""
        x, half = self.reference, len(self.reference) // 2
        precision, recall = precision_recall(x[:half], x[half:])
        diversity, nearest = diversity_and_nearest(x, self.shots)
        return {"frechet": frechet_distance(x[:half], x[half:]), "precision": precision,
                "recall": recall, "diversity": diversity, "nearest_shot": nearest, "kept": math.nan}


def discriminator_features(device):
    """The last two stages of a discriminator, pooled: [N, 384].  Always that of the shipped DCGAN,
    so that runs from any source can be compared; nothing to download, but no FID either, and no
    stranger: runs from the shipped DCGAN begin with this D as their judge.

    As in LPIPS (Zhang et al. 2018), the channels at each place are scaled to length 1.
    """
    layers = load_checkpoint(HERE / SOURCE, device).D.requires_grad_(False).layers

    def features(images):
        x8 = layers[:6](nnF.interpolate(images.to(device), (64, 64), mode="area"))  # [N, 128, 8, 8]
        x4 = layers[6:8](x8)                                                        # [N, 256, 4, 4]
        return torch.cat([nnF.normalize(x, dim=1).mean((2, 3)) for x in (x8, x4)], 1).cpu()

    return lambda images: torch.cat([features(batch) for batch in images.split(100)])


def squeezenet_features(device):
    """torchvision's SqueezeNet 1.1 trained on ImageNet, pooled: [N, 512].  Downloaded once, 5 MB.

    It has seen neither source nor target, unlike the D above.  Its distances are no FID.
    """
    try:
        net = squeezenet1_1(weights=SqueezeNet1_1_Weights.IMAGENET1K_V1, progress=False).features
    except OSError as error:                                            # urllib's errors are these
        raise UserError(f"--features squeezenet: its weights cannot be fetched ({error}); go "
                        "online once, or use the default features")
    net = net.to(device).eval().requires_grad_(False)

    def features(images):
        x = nnF.interpolate(images.to(device) / 2 + 0.5, (128, 128), mode="bilinear",
                            antialias=True)
        x = normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return net(x).mean((2, 3)).cpu()                                        # [N, 512]

    return lambda images: torch.cat([features(batch) for batch in images.split(50)])


# --------------------------------------------------------------------------------------------------
# Running a training: progress, Ctrl-C, what a resumed run needs, several processes.  Nothing from
# here on belongs to the method
# --------------------------------------------------------------------------------------------------
def run_training(trainer, images, label, save, save_every, pull=None, look=None):
    """Train to the last step.  save() is called now and then, at the end, and upon Ctrl-C;
    look(losses, images per second) at every tenth step."""
    steps, writes = trainer.settings.steps, trainer.rank == 0
    if images.nbytes < 2**32:                            # once, not a batch at a time
        images = images.to(trainer.device)
    progress = Progress(trainer.step, steps, label)
    with ctrl_c() as asked_to_stop:
        while trainer.step < steps and not asked_to_stop:
            losses = trainer.train_step(images, pull)
            progress.show(trainer.step, losses)
            if trainer.device.type == "cpu" or trainer.step % 10 == 0:    # elsewhere it is a wait
                check_finite(losses, trainer.step)
            last = trainer.step == steps or asked_to_stop
            if look and (last or trainer.step % 10 == 0):
                look(losses, trainer.settings.batch_size / progress.seconds_per_step(trainer.step))
            if last or trainer.step % save_every == 0:
                for net in (trainer.model.G, trainer.model.D):
                    check_finite(dict(net.named_parameters()), trainer.step)
                if writes:
                    save()
    if asked_to_stop:
        raise KeyboardInterrupt


def check_finite(values, step):
    """Stop before a good checkpoint is overwritten by one whose weights are lost."""
    for name, value in values.items():
        if not value.isfinite().all():
            raise UserError(f"{name} not finite at step {step}: the training diverged; start anew "
                            "with a lower --lr or --lam (the last good checkpoint is kept)")


def fingerprint(tensors):
    """A short text that other tensors do not have."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def training_parts(trainer):
    model = trainer.model
    return {"G": model.G, "D": model.D, "G_ema": model.G_ema, "opt_G": trainer.opt_G,
            "opt_D": trainer.opt_D, "scaler": trainer.scaler}


def training_state(trainer, **origin):
    """All that the next step depends on; origin: what a resumed run must have in common."""
    origin = {**asdict(trainer.settings), "amp": trainer.amp, **origin}
    del origin["steps"]
    return {"step": trainer.step, "random": trainer.random.get_state(), "origin": origin,
            **{name: part.state_dict() for name, part in training_parts(trainer).items()}}


def resume_training(trainer, path, **origin):
    """Put a trainer into the state that a checkpoint holds; returns the log in it."""
    checkpoint = read_checkpoint(path)
    if "training" not in checkpoint:
        raise UserError(f"{path}: holds a finished model, not a training that can be resumed")
    try:
        state, log = checkpoint["training"], list(checkpoint["log"])
        before = state["origin"]
        for name, now in training_state(trainer, **origin)["origin"].items():
            was = before.get(name)
            if was != now:
                was = was if isinstance(was, (int, float, str)) else "something else"
                raise UserError(f"--resume: {name} was {was} when {path} was written, and is {now} "
                                "now; use the same, or start anew")
        for name, part in training_parts(trainer).items():
            if name.startswith("opt"):                     # its options are those of this training
                state[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state[name])
        for optimizer in (trainer.opt_G, trainer.opt_D):   # load_state_dict looks at no shapes
            for p in optimizer.param_groups[0]["params"]:
                shapes = [optimizer.state[p][k].shape for k in ("step", "exp_avg", "exp_avg_sq")]
                if shapes != [(), p.shape, p.shape]:
                    raise ValueError("optimizer state of another shape")
                check_finite(optimizer.state[p], state["step"])
        trainer.random.set_state(state["random"])
        trainer.step = int(state["step"])
        if trainer.step < 1:
            raise ValueError("a training that has not begun")
        if trainer.step > trainer.settings.steps:
            raise UserError(f"--steps {trainer.settings.steps}: {path} is at step {trainer.step} "
                            "already; give more")
    except UserError:
        raise
    except Exception as error:                             # a damaged file can raise anything
        raise UserError(damaged(path, error))
    return log


class Progress:
    """One line that says step, losses, speed and time left: rewritten in a terminal, or, in a log
    file, a line every ten seconds.  Reading a loss waits for the device, so it is done seldom."""

    def __init__(self, first, last, label):
        self.first, self.last, self.label = first, last, label
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stdout is not None and sys.stdout.isatty()

    def seconds_per_step(self, step):
        return max(time.monotonic() - self.start, 1e-6) / (step - self.first)

    def show(self, step, losses):
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 10) and step < self.last:
            return
        self.shown = now
        per_step = self.seconds_per_step(step)
        left = int(per_step * (self.last - step))
        text = " ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
        print(f"{self.label}: step {step}/{self.last}  {text}  {per_step * 1000:.0f} ms/step  "
              f"{left // 60}:{left % 60:02d} left" + "\033[K" * self.terminal, flush=True,
              end="\r" if self.terminal and step < self.last else "\n")


@contextlib.contextmanager
def ctrl_c():
    """Ctrl-C, or the SIGTERM of a batch system, asks for a stop after the step at hand: half a step
    could not be resumed from."""
    asked, main = [], threading.current_thread() is threading.main_thread()
    before = {kind: signal.signal(kind, lambda *_: asked.append(True))
              for kind in (signal.SIGINT, signal.SIGTERM) if main}      # others may not set them
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def average_gradients(gradients, processes):
    """Replace the gradients of each process, means over its share of the batch, by their mean."""
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / processes
    try:
        dist.all_reduce(flat)                              # one message: small ones are slow
    except RuntimeError as error:                          # half a step: it cannot be saved
        raise UserError(f"another process was lost ({error}); start all of them again, with "
                        "--resume, which goes on from the last save")
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients)])


# --------------------------------------------------------------------------------------------------
# Using a model, and keeping it in a file that holds nothing but tensors, numbers and strings
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def generate_batches(model, n, seed=0):
    """generate(), up to 100 images at a time."""
    device = next(model.G_ema.parameters()).device
    random = torch.Generator().manual_seed(seed)
    for first in range(0, n, 100):
        z = torch.cat([torch.randn(1, model.z_dim, generator=random)
                       for _ in range(min(100, n - first))])
        yield model.G_ema(z.to(device)).clamp(-1, 1).float().cpu()


def generate(model, n, seed=0):
    """n images of G_ema as float [n, 3, R, R] in [-1, 1], on the CPU.

    Image i of a seed comes from the same z whatever n, in a source and in its adaptations.
    """
    return torch.cat(list(generate_batches(model, n, seed)))


FORMAT = "ewc-gan 1"


def save_checkpoint(path, model, **extra):
    """Write a model: what it is, its G_ema and D, and extra; tensors, numbers and strings alone.

    Written under another name and renamed, so that a kill at any moment leaves the old file or the
    new one.  Raises UserError where it cannot be written.
    """
    sizes = ("arch", "resolution", "z_dim", "g_channels", "d_channels")
    checkpoint = {"format": FORMAT, **{name: getattr(model, name) for name in sizes},
                  "G_ema": model.G_ema.state_dict(), "D": model.D.state_dict(), **extra}
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:                     # RuntimeError: torch, disk full
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})")


PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2",
         *(f"torch {kind}Storage" for kind in ("Float", "Long", "Byte", "Int", "Double", "Half"))}


def damaged(path, error):
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"{path}: not a checkpoint of this program, or damaged ({reason}); use another file"


def read_checkpoint(path):
    """The dict in a checkpoint file.  UserError where it is missing, damaged, or holds code.

    A checkpoint may come from a stranger.  weights_only refuses to run code; the file must be a
    plain archive, of no more than it takes on disk, that names nothing but tensors and their like,
    so that reading it cannot fill the memory.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; give a file that one of the programs wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("it unpacks to more than it holds")
            pickled, = (n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
            for operation, name, _ in pickletools.genops(archive.read(pickled)):
                if "GLOBAL" in operation.name and name not in PLAIN:
                    raise ValueError(f"it names {name}, which is not plain data")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # the error says it all
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise ValueError(f"its format is not '{FORMAT}'")
    except Exception as error:                                   # a damaged file can raise anything
        raise UserError(damaged(path, error))
    return checkpoint


def load_checkpoint(path, device="cpu"):
    """The Model in a checkpoint, which says itself what it is: no flag is needed to load it.

    Every size is compared with the tensors in the file before anything is made of that size.
    """
    c = read_checkpoint(path)
    try:
        sizes = c["z_dim"], c["g_channels"], c["d_channels"]
        if not all(type(n) is int for n in (c["resolution"], sizes[0], *sizes[1], *sizes[2])):
            raise ValueError("a size that is no whole number")
        stages = [len(channels) for channels in widths(c["arch"], c["resolution"])]
        if c["resolution"] not in RESOLUTIONS or [len(n) for n in sizes[1:]] != stages:
            raise ValueError("a resolution, or a number of layers for it, that no network here has")
        tensors = [*c["G_ema"].values(), *c["D"].values()]
        if sum(tensor.nbytes for tensor in tensors) > Path(path).stat().st_size:
            raise ValueError("tensors larger than the file")
        if not all(t.dtype in (torch.float32, torch.int64) and t.isfinite().all() for t in tensors):
            raise ValueError("weights that are not finite numbers of 32 bits")
        with torch.device("meta"):                               # shapes without memory
            skeleton = build_model(c["arch"], c["resolution"], "meta", *sizes)
        skeleton.G_ema.load_state_dict(c["G_ema"], assign=True)  # raises where they do not fit
        skeleton.D.load_state_dict(c["D"], assign=True)
        model = build_model(c["arch"], c["resolution"], device, *sizes)
        model.G_ema.load_state_dict(c["G_ema"])
        model.G.load_state_dict(c["G_ema"])
        model.D.load_state_dict(c["D"])
        model.G.eval(), model.D.eval()
        if not generate(model, 1).isfinite().all():
            raise ValueError("weights that make no images")
    except Exception as error:
        raise UserError(damaged(path, error))
    return model


# --------------------------------------------------------------------------------------------------
# Pictures, after the paper's figures: samples beside the shots, methods from the same z, and the
# weight changes of the layers beside their Fisher information
# --------------------------------------------------------------------------------------------------
def image_grid(images, columns, scale=1):
    """float [N, 3, R, R] in [-1, 1] -> one PIL picture, row by row, white lines between images."""
    grid = make_grid(nnF.interpolate(images, scale_factor=scale), columns, pad_value=1)
    return to_pil_image(((grid + 1) * 127.5).round().clamp(0, 255).byte())


def canvas(width, height):
    """A white picture, a pen that draws on it, and a function that writes on it at (x, y)."""
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    return sheet, pen, lambda x, y, text, **k: pen.text((x, y), text, "black", font, **k)


COLORS = ["#1f5fa8", "#c0392b", "#2e8b57", "#d98e04", "#7d3c98", "#17a2b8", "#8a6d3b", "#555555"]


def draw_lines(pen, write, x, y, width, height, title, lines, from_zero=True):
    """One panel: lines {label: [(x, y), ...]} over axes whose ends are written at the corners."""
    xs, ys = zip(*(point for line in lines.values() for point in line))
    left, right, low, high = min(xs), max(xs), 0 if from_zero else min(ys), max(ys)
    pen.rectangle([x, y, x + width, y + height], outline="#cccccc")
    for color, (label, line) in zip(COLORS * len(lines), lines.items()):
        places = [(x + width * (a - left) / ((right - left) or 1),
                   y + height * (1 - (b - low) / ((high - low) or 1))) for a, b in line]
        pen.line(places if len(places) > 1 else places * 2, fill=color, width=2)
        x_end, y_end = places[-1]
        pen.ellipse([x_end - 4, y_end - 4, x_end + 4, y_end + 4], fill=color)
        write(x_end, y_end, f" {label}", anchor="ls" if x_end < x + width / 2 else "rs")
    write(x, y - 17, title)
    write(x + width, y - 17, f"{low:.3g} to {high:.3g}", anchor="ra")
    write(x + width, y + height + 2, f"{left:.3g} to {right:.3g}", anchor="ra")


def curves_picture(log, width=420, height=150):
    """Each column of the log against the step."""
    names = [name for name in dict.fromkeys(key for row in log for key in row)
             if name not in ("step", "images_per_s")]
    sheet, pen, write = canvas(width * 2, (height + 20) * math.ceil(len(names) / 2) + 10)
    for i, name in enumerate(names):
        line = [(row["step"], row[name]) for row in log if name in row]
        draw_lines(pen, write, 10 + i % 2 * width, 24 + i // 2 * (height + 20), width - 30,
                   height - 24, name, {"": line})
    return sheet


def paths_picture(logs, size=560):
    """Fit against variety as training goes on, one path a run: the best lies at lower right."""
    sheet, pen, write = canvas(size + 60, size + 60)
    lines = {label: [(row["recall"], math.log10(row["frechet"])) for row in log if "recall" in row]
             for label, log in logs.items() if "recall" in log[-1]}
    draw_lines(pen, write, 30, 30, size, size, "up: log10 of the Frechet distance.  right: recall",
               lines, from_zero=False)
    return sheet


def samples_picture(shots, rows):
    """The shots at the left; at the right rows of samples, [(label, images), ...]: a column shows
    what became of one z."""
    scale = max(1, 128 // shots.shape[-1])
    pictures = [image_grid(images, len(images), scale) for _, images in rows]
    height = pictures[0].height + 4
    across = min(math.ceil(len(shots) / len(rows)), 5)
    shown = shots[:across * len(rows)]
    left = image_grid(shown, across, scale)
    x = left.width + 130
    sheet, _, write = canvas(x + pictures[0].width + 6, 26 + max(height * len(rows), left.height))
    write(8, 5, f"{len(shown)} of {len(shots)} target images")
    sheet.paste(left, (6, 26))
    for i, ((label, _), picture) in enumerate(zip(rows, pictures)):
        write(x - 10, 20 + (i + 0.5) * height, label, anchor="rm")
        sheet.paste(picture, (x, 26 + i * height))
    return sheet


def layers_picture(rows, bar=300, height=20):
    """Bars: at the left the mean Fisher information (log scale), at the right the weight change."""
    sheet, pen, write = canvas(130 + 2 * bar + 140, 30 + height * len(rows))
    write(130, 6, "mean Fisher information (log scale)")
    write(200 + bar, 6, "weight change, %")
    logs = [math.log10(max(row["fisher"], 1e-30)) for row in rows]
    low, high, most = min(logs) - 0.3, max(logs), max(row["change"] for row in rows) or 1.0
    for i, (row, log) in enumerate(zip(rows, logs)):
        y = 28 + i * height
        write(8, y, row["layer"])
        bars = ((130, (log - low) / (high - low), "#c0392b", f"{row['fisher']:.1e}"),
                (200 + bar, row["change"] / most, "#1f5fa8", f"{row['change']:.2f}"))
        for x, share, color, label in bars:
            pen.rectangle([x, y + 1, x + share * bar, y + height - 4], fill=color)
            write(x + share * bar + 5, y, label)
    return sheet


@torch.no_grad()
def save_interpolation(path, source, model, stops=5, frames=12, seed=0, columns=4):
    """A GIF that walks through z: source in the upper row, adapted in the lower, the same z."""
    device = next(model.G_ema.parameters()).device
    random = torch.Generator().manual_seed(seed)
    corners = torch.randn(columns, stops, model.z_dim, generator=random)
    pictures = []
    for i in range(stops):
        a, b = corners[:, i], corners[:, (i + 1) % stops]
        for t in np.linspace(0, math.pi / 2, frames, endpoint=False):
            z = (math.cos(t) * a + math.sin(t) * b).to(device)      # keeps the length of a z
            rows = torch.cat([source.G_ema(z), model.G_ema(z)]).clamp(-1, 1).float().cpu()
            pictures.append(image_grid(rows, columns, max(1, 128 // model.resolution)))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_run(out, source, shots, result):
    """All pictures and tables of a run."""
    model, before, after = result.model, generate(source, 16), generate(result.model, 16)
    rows = layers(dict(model.G_ema.named_parameters()), result.theta_S, result.F)
    samples_picture(to_float(shots), [("source", before[:8]), ("adapted", after[:8]),
                                      ("source", before[8:]), ("adapted", after[8:])]).save(
        out / "samples.png")
    layers_picture(rows).save(out / "layers.png")
    curves_picture(result.log).save(out / "curves.png")
    save_interpolation(out / "interpolation.gif", source, model)
    write_table(out / "layers.csv", rows)
    write_table(out / "log.csv", result.log)


def print_table(table):
    """A line for each run: mean, and spread where there are several seeds, of every measure."""
    names = [name for name in table[0] if name != "run"]
    print("".join(f"{name:>18}" for name in ["run", *names]))
    for run in dict.fromkeys(row["run"] for row in table):
        line = f"{run:>18}"
        for name in names:
            values = np.array([row[name] for row in table if row["run"] == run])
            spread = f" ±{values.std(ddof=1):.2g}" if len(values) > 1 else ""
            line += f"{f'{values.mean():.3g}{spread}':>18}"
        print(line)


# --------------------------------------------------------------------------------------------------
# Command line: nothing below belongs to the method
# --------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """Options are spelt out, help reads like a manual, and what is wrong is a UserError."""
    def __init__(self, usage, doc):
        form = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26,
                                 width=96)
        super().__init__(usage=usage, description=doc, formatter_class=form, allow_abbrev=False,
                         epilog="exit codes: 0 done, 2 something to mend in the input (one line "
                                "says what), 130 stopped by Ctrl-C")

    def error(self, message):
        raise UserError(f"{message}; see --help")


def choose_device(name, amp):
    """'auto' -> the best there is.  Returns device and amp, neither of them 'auto'."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind in found if found[kind])
    if not found[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device auto")
    if amp == "auto" and name == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":                           # a CPU without bf16 arithmetic is slower with it
        can = getattr(torch.cpu, "get_capabilities", dict)() if name == "cpu" else {}
        amp = "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "off"
    if name == "cuda":
        torch.backends.cudnn.allow_tf32 = False   # what is left to float32 is to be float32
    if amp == "fp16" and name != "cuda":
        raise UserError("--amp fp16 needs a CUDA device; use bf16 or off")
    return name, amp


def number(kind, low, high=math.inf):
    """An argparse type: a number from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:              # nor is NaN
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def chosen(args):
    """The settings that the command line names, to replace the defaults."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Settings)}
    return {name: value for name, value in given.items()
            if value is not None and not isinstance(value, list)}


def add_shared_options(parser, table):
    """The options of both programs."""
    training = parser.add_argument_group("training")
    for option, metavar, kind, text in [
            ("--steps", "N", number(int, 1, 10**9), "training steps"),
            ("--batch-size", "N", number(int, 1, 10**5), "images a step"),
            ("--lr", "X", number(float, 1e-9, 1), "Adam's learning rate for G"),
            ("--d-lr-ratio", "X", number(float, 0, 100), "D's learning rate over G's"),
            ("--r1-gamma", "X", number(float, 0, 1e6), "weight of the R1 penalty on D"),
            ("--shift", "X", number(float, 0, 0.5), "D sees images moved by up to this part of "
             "their size, or it learns few shots by heart")]:
        name = option[2:].replace("-", "_")
        values = {arch: getattr(settings, name) for arch, settings in table.items()}
        default = ", ".join(f"{value:g} for {arch}" for arch, value in values.items())
        if len(set(values.values())) == 1:                       # one for all families
            default = f"{values['dcgan']:g}"
        training.add_argument(option, metavar=metavar, type=kind,
                              help=f"{text} (default: {default})")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
                         help="auto: cuda, else mps, else cpu (default: auto)")
    machine.add_argument("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
                         help="mixed precision; auto: where the device is fast with it, bf16 "
                         "rather than fp16 (default: auto)")


def build_parser():
    p = Parser("python ewc_gan.py --target DIR [options]\n"
               "       python ewc_gan.py --checkpoint FILE --generate N --out DIR", __doc__)
    run = p.add_argument_group("what to adapt, to what")
    run.add_argument("--target", type=Path, metavar="DIR", help="the few images to adapt to, of "
                     "any size and format, cropped to squares; about ten")
    run.add_argument("--source", type=Path, metavar="FILE", default=HERE / SOURCE,
                     help=f"the source model, of pretrain_source.py (default: {SOURCE})")
    run.add_argument("--out", type=Path, metavar="DIR",
                     help="folder for the results (default: out/TARGET)")
    run.add_argument("--shots", type=number(int, 1), metavar="K",
                     help="use the first K images, by name (default: all)")
    run.add_argument("--resume", action="store_true",
                     help="go on from adapted.pt in --out, after Ctrl-C or with more --steps")
    run.add_argument("--dry-run", action="store_true",
                     help="check all input, print the settings, write nothing")
    ewc = p.add_argument_group("the method; with several methods, strengths or seeds, a comparison")
    ewc.add_argument("--method", nargs="+", choices=list(METHODS), default=["ewc"], metavar="NAME",
                     help="; ".join(f"{name}: {text}" for name, text in METHODS.items())
                     + " (default: ewc)")
    ewc.add_argument("--lam", nargs="+", type=number(float, 0, 1e12), metavar="L",
                     help="lambda, the strength of EWC; several: a sweep; 0: plain fine-tuning "
                     f"(default: {LAM['ewc']:g}; for raw {LAM['raw']:g})")
    ewc.add_argument("--fisher-samples", type=number(int, 1, 10**7), metavar="N",
                     help=f"samples of the Fisher information (default: {Settings.fisher_samples})")
    ewc.add_argument("--seed", nargs="+", type=number(int, 0, 2**63 - 1), default=[0], metavar="S",
                     help="of all random numbers; several: mean and spread (default: 0)")
    ewc.add_argument("--reference", type=Path, metavar="DIR", help="target images that are held "
                     "out, 20 at least: measures how well each run fits them")
    ewc.add_argument("--features", default="discriminator", choices=["discriminator", "squeezenet"],
                     help="space of the distances: the D of the shipped DCGAN, or torchvision's "
                     "SqueezeNet, which has to be downloaded, 5 MB (default: discriminator)")
    add_shared_options(p, ADAPT)
    sample = p.add_argument_group("images from an adapted model")
    sample.add_argument("--checkpoint", type=Path, metavar="FILE", help="the model")
    sample.add_argument("--generate", type=number(int, 1, 10**7), metavar="N",
                        help="write N images as separate PNG files into --out, then stop")
    return p


def parse_arguments(argv):
    p = build_parser()
    args = p.parse_args(argv)
    given = {a.dest for a in p._actions if getattr(args, a.dest, a.default) != a.default}
    if args.lam and not set(args.method) & LAM.keys():
        raise UserError(f"--lam does not go with --method {' '.join(args.method)}; leave one out")
    if args.generate or args.checkpoint:
        if not (args.generate and args.checkpoint and args.out):
            raise UserError("--generate N, --checkpoint FILE and --out DIR go together; see --help")
        unfit = given - {"generate", "checkpoint", "out", "seed", "device"}
        if unfit:
            raise UserError(f"--{min(unfit).replace('_', '-')} does not go with --generate")
        if len(args.seed) > 1:
            raise UserError("--seed: --generate takes one")
    elif not args.target:
        raise UserError("say what to adapt to: --target DIR, such as --target data/10shot; "
                        "see --help")
    return args


def make_folder(path):
    """Make a folder, and see that it can be written to before hours are spent."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); choose another --out")


def run_generate(args, device):
    model = load_checkpoint(args.checkpoint, device)
    make_folder(args.out)
    images = (image for batch in generate_batches(model, args.generate, args.seed[0])
              for image in batch)
    for i, image in enumerate(images):
        image_grid(image[None], 1).save(args.out / f"seed{args.seed[0]}_{i:05d}.png")
    print(f"{args.generate} images in {args.out}")


def planned_runs(args, settings, out):
    """(name, settings, folder) of every run that is asked for, each once: without a pull there is
    one lambda, 0.  A single run goes into out, several into a folder each."""
    runs = {}
    for method in args.method:
        for lam in (args.lam or [LAM[method]]) if method in LAM else [0.0]:
            free = "freezed" if method == "freezed" else "finetune"
            name = f"{method}_{lam:.15g}" if lam else free
            for seed in args.seed:
                run = replace(settings, method=name.partition("_")[0], lam=lam, seed=seed)
                runs[f"{name}_seed{seed}" if len(args.seed) > 1 else name] = name, run
    return [(name, run, out / folder if len(runs) > 1 else out)
            for folder, (name, run) in runs.items()]


def refuse_inside(out, folder):
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out}: lies in {folder}, where its pictures would become images to "
                        "train on; name another")


def make_ruler(args, source, shots, device):
    """What --reference and --features ask for."""
    features = (squeezenet_features(device) if args.features == "squeezenet"
                else discriminator_features(device))
    reference = args.reference and load_images(args.reference, source.resolution)
    if args.reference and len(reference) < 20:
        raise UserError(f"--reference {args.reference}: {len(reference)} images; a distribution "
                        "takes 20 at least, and better 1000")
    n = 1000 if args.reference else 200
    return Ruler(features, to_float(shots), reference, n, generate(source, n, seed=1))


def run_adapt(args, device, amp):
    source = load_checkpoint(args.source, device)
    settings = replace(ADAPT[source.arch], **chosen(args))
    shots = read_folder(args.target, source.resolution)
    if args.shots and args.shots > len(shots):
        raise UserError(f"--shots {args.shots}: {args.target} holds {len(shots)} images")
    shots = shots[:args.shots]
    out = args.out or Path("out") / args.target.resolve().name
    runs = planned_runs(args, settings, out)
    for folder in (out, *(folder for *_, folder in runs)):
        refuse_inside(folder, args.target)
    begun = [folder for *_, folder in runs if args.resume and (folder / "adapted.pt").exists()]
    if args.resume and not begun:
        raise UserError(f"--resume: there is no adapted.pt in {runs[0][-1]}")
    ruler = make_ruler(args, source, shots, device)
    config = {"target": str(args.target), "shots": len(shots), "source": str(args.source),
              "arch": source.arch, "resolution": source.resolution,
              "source_sha256": hashlib.sha256(args.source.read_bytes()).hexdigest(),
              "device": device, "amp": amp, "torch": torch.__version__,
              "numpy": np.__version__, "python": sys.version.split()[0]}
    print("  ".join(f"{key}={value}" for key, value in {**asdict(runs[0][1]), **config}.items()),
          flush=True)
    if not args.dry_run:
        execute(runs, out, source, shots, ruler, config, begun, amp)


def execute(runs, out, source, shots, ruler, config, begun, amp):
    """Adapt, measure and picture each run, and then all of them side by side."""
    @functools.cache
    def fisher(seed):
        F = source_fisher(source, replace(runs[0][1], seed=seed))
        values = torch.cat([f.flatten() for f in F.values()]).sort().values
        share = values[-math.ceil(len(values) / 100):].sum() / values.sum()
        print(f"Fisher information: mean {values.mean():.2g}, median {values.median():.2g}; a "
              f"hundredth of the weights hold {share:.0%} of it", flush=True)
        return F

    logs, rows = {}, {"source": generate(source, 8)}
    table = [{"run": "source", **ruler.of_features(ruler.source)}]
    if ruler.reference is not None:
        table.append({"run": "held-out", **ruler.of_reference()})
    for name, run, folder in runs:
        make_folder(folder)
        text = json.dumps({**asdict(run), **config}, indent=1) + "\n"
        if folder not in begun:                                 # it may yet be refused
            (folder / "config.json").write_text(text)
        result = adapt(source, shots, run, folder / "adapted.pt", amp, folder in begun,
                       F=fisher(run.seed), measure=ruler.of_model)
        (folder / "config.json").write_text(text)
        write_run(folder, source, shots, result)
        if name not in rows:                                    # of several seeds, show the first
            logs[name], rows[name] = result.log, generate(result.model, 8)
        # The log of a resumed run may end with measures of other --features, or with none
        measured = ruler.of_model(result.model) if folder in begun else result.log[-1]
        table.append({"run": name, "seed": run.seed,
                      **{key: measured[key] for key in table[0] if key != "run"}})
    if len(runs) == 1:
        print(f"{out / 'samples.png'}: the source above, the adapted model below")
    else:
        samples_picture(to_float(shots), rows.items()).save(out / "comparison.png")
        if "recall" in next(iter(logs.values()))[-1]:           # not in runs resumed without it
            paths_picture(logs).save(out / "paths.png")
        write_table(out / "comparison.csv", table)
    if len(runs) > 1 or ruler.reference is not None:
        print_table(table)


def exit_cleanly(program, run):
    """Run a program: what the user can mend is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):       # a name may not fit the console's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        run()
    except (UserError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)    # a name can have \n
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: stopped; if a training had begun, it is saved: go on with the same "
              "command and --resume", file=sys.stderr)
        sys.exit(130)


def main(argv=None):
    def run():
        args = parse_arguments(argv)
        device, amp = choose_device(args.device, args.amp)
        if args.generate:
            run_generate(args, device)
        else:
            run_adapt(args, device, amp)

    exit_cleanly("ewc_gan.py", run)


if __name__ == "__main__":
    main()
