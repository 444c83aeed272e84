"""Few-shot image generation with Elastic Weight Consolidation (EWC), in one file.

    python ewc_gan.py --target data/10shot                    # adapt the shipped source
    python ewc_gan.py --target DIR --source FILE --out DIR    # your images, your source
    python ewc_gan.py --target DIR --method finetune l2 ewc --seed 0 1 2
    python ewc_gan.py --checkpoint out/10shot/adapted.pt --generate 500

An independent implementation of Li, Zhang, Lu and Shechtman, "Few-shot Image Generation with
Elastic Weight Consolidation" (NeurIPS 2020, arXiv 2012.02780).  A GAN is pretrained on a large
source domain.  The Fisher information F says how much each weight theta_i of its generator G
matters.  Then G is adapted to about ten target images, while weights that matter are held near
their values in the source, theta_S:

    F_i     = E_z[ (d log D(G(z)) / d theta_i)^2 ]                 D: the source's, frozen
    L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2

So the images take on the target's look and keep the source's diversity.  By default the
largest F_i are capped, and F is divided by its mean (scaled_fisher).  The method and its
training end where "Networks" begins.  README.md says what differs from the paper.
"""
import argparse
import contextlib
import copy
import csv
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as nnF          # F is the Fisher information, as in the paper
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SHIPPED = Path(__file__).resolve().parent / "data"      # source_stylegan.pt, source_dcgan.pt
PICTURES = 6            # seed of the z in all pictures, chosen for source faces with few flaws

class UserError(ValueError):
    """Something that the user can fix: one line on stderr, and exit code 2."""

# ---------- Settings ------------------------------------------------------------------------
# Hyperparameters, chosen on the drawn faces.  Those with a help text are also options.
def option(default, help, low=0, choices=None):
    """A setting with its default, its help text, and its smallest value or its choices."""
    return field(default=default, metadata={"help": help, "low": low, "choices": choices})

@dataclass
class Training:
    """Hyperparameters of a training; the defaults pretrain the StyleGAN on many images."""
    steps: int = option(60000, "training steps", low=1)
    batch_size: int = option(16, "images a step", low=1)
    lr: float = option(5e-3, "Adam's learning rate for G", low=1e-9)
    d_lr_ratio: float = option(0.4, "D's learning rate over G's")
    shift: float = option(0.0, "D sees images moved by up to this fraction of their width")
    cutout: float = option(0.0, "D sees images with a hole of this fraction of their width")
    r1_gamma: float = option(1.0, "weight of the R1 penalty on D")
    r1_every: int = 16              # R1 is costly and changes slowly: every 16th step will do
    beta1: float = 0.0              # of Adam; with many images a StyleGAN needs no momentum
    beta2: float = 0.99
    ema: float = 0.999              # largest decay of G's moving average
    seed: int = option(0, "seed of all random numbers")

    def __post_init__(self):
        for f in fields(self):
            value = f.type(getattr(self, f.name))                   # also of NumPy's numbers
            setattr(self, f.name, value)
            low = f.metadata.get("low", 0)
            choices = f.metadata.get("choices")
            if not (value in choices if choices else low <= value < 2**63):     # nor NaN
                raise UserError(f"{f.name} {value}: must be {choices or f'{low} or more'}")

    def lr_at(self, step):
        """Decays as 1 / sqrt(step): needs no last step, so a training can be made longer."""
        return self.lr / math.sqrt(1 + step / 3000)

@dataclass
class Adaptation(Training):
    """Hyperparameters of an adaptation; the defaults adapt the StyleGAN to ten images."""
    steps: int = option(1200, "training steps", low=1)
    batch_size: int = option(4, "images a step", low=1)
    lr: float = option(4e-3, "Adam's learning rate for G", low=1e-9)
    # These three keep D from learning ten images by heart; thousands do not need them
    d_lr_ratio: float = option(0.1, "D's learning rate over G's")
    shift: float = option(0.0625, "D sees images moved by up to this fraction of their width")
    cutout: float = option(0.25, "D sees images with a hole of this fraction of their width")
    r1_gamma: float = option(0.3, "weight of the R1 penalty on D")
    beta1: float = 0.5              # momentum evens out batches of four images
    method: str = option("ewc", "ewc; raw: ewc with F as measured, for lambda about 20000 (DCGAN: "
                         "500); l2: each F_i is 1; finetune: no penalty; freezed: finetune with "
                         "D's lower layers frozen (Mo et al. 2020)",
                         choices=["ewc", "finetune", "l2", "freezed", "raw"])
    lam: float = option(1.5e-3, "lambda, the strength of the penalty; 0 is fine-tuning")
    fisher_samples: int = option(256, "number of z over which F is averaged", low=1)

    def lr_at(self, step):
        """Falls linearly to 0 at the last step, so that the images settle."""
        return self.lr * (1 - step / self.steps)

ADAPT = {
    "stylegan": Adaptation(),
    "dcgan": Adaptation(steps=2400, batch_size=8, cutout=0.5, lam=2.5e-3)}
PRETRAIN = {
    "stylegan": Training(),
    "dcgan": Training(steps=40000, lr=2e-3, d_lr_ratio=1.0, beta1=0.5)}

# ---------- The method ----------------------------------------------------------------------
# Any two modules G and D will do.  In formulas D(x) is the probability that x is real; in code
# D(x) is a logit, and sigmoid(D(x)) is that probability.
def weights(G):
    """theta: all trainable parameters of G, in its order, as one differentiable float32 vector."""
    return torch.cat([p.flatten().float() for p in G.parameters() if p.requires_grad])

def fisher_diagonal(G, D, z):
    """How much each weight of G changes the log-likelihood that the frozen D gives its images:

        F_i = E_z[ (d log D(G(z)) / d theta_i)^2 ]

    G  generator: z -> images.  If it draws noise of its own, fix it
    D  discriminator of G's domain: images -> logits; several for an image are summed
    z  [N, ...]: N samples of the generator's input, over which the mean is taken
    Returns one float32 vector without a graph, F_i beside theta_i of weights(G); 0 where a
    weight has no effect.  Raises UserError if F is not finite, as for N = 0.

    A GAN has no likelihood that can be computed, so log D(G(z)) stands in for it (the paper's
    importance measure).  One sample at a time, because each gradient must be squared before
    the mean is taken: the square of a batch's mean gradient is smaller, and shrinks as the
    batch grows.  Always in float32, also inside autocast: half precision rounds small
    gradients, or loses them.  Both networks are copied and put in eval mode: neither changes.
    Networks with hooks for weight or spectral norm cannot be copied: remove the hooks first."""
    G = copy.deepcopy(G).eval()
    D = copy.deepcopy(D).eval().requires_grad_(False)
    theta = [p for p in G.parameters() if p.requires_grad]
    F = torch.zeros_like(weights(G))
    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        for z_i in z.split(1):                                              # [1, ...]
            log_likelihood = nnF.logsigmoid(D(G(z_i))).sum()                # log D(G(z_i))
            gradient = torch.autograd.grad(log_likelihood, theta, allow_unused=True,
                                           materialize_grads=True)
            F += torch.cat([g.flatten().float() for g in gradient]).square()
    F = F / len(z)
    if not F.isfinite().all():
        raise UserError("the Fisher information is not finite: no z was given, or G or D "
                        "returns NaN or infinity for a single sample in eval mode")
    return F

def scaled_fisher(F, quantile=0.9):
    """F, capped at a quantile of its values, then divided by its mean.  Its mean is then 1, so
    that lambda is comparable between sources, and with l2 (each F_i = 1).

    Why: the scale of F depends on how confident D is, and a few weights can have nearly all of
    the sum of F: in the StyleGAN mostly biases that set colours, which a new domain must change.
    Raises UserError if the capped F is 0 everywhere."""
    values = F.cpu()                                                    # MPS has no kthvalue
    cap = values.kthvalue(math.ceil(quantile * len(values))).values
    mean = values.clamp(max=cap).mean()
    if not mean > 0:
        raise UserError("the Fisher information is 0 nearly everywhere: D is sure of every "
                        "image, or most of G has no effect; use another source, or --method raw")
    return F.clamp(max=float(cap)) / float(mean)

def ewc_penalty(G, theta_S, F):
    """sum_i F_i (theta_i - theta_S,i)^2, a scalar that is differentiable in theta.

    theta_S  weights(G).detach() from before the adaptation: a copy, which does not move with G
    F        fisher_diagonal(G, D, z), or scaled_fisher() of it"""
    return (F * (weights(G) - theta_S).square()).sum()

# L_adv: the non-saturating logistic loss (Goodfellow et al. 2014), and R1 for D (Mescheder et
# al. 2018).  Logarithms of a sigmoid overflow for large logits if computed as written.
def d_logistic_loss(real_logits, fake_logits):
    """L_D = -E[log D(x)] - E[log(1 - D(G(z)))].  Logits [N] and [M] -> scalar."""
    return nnF.softplus(-real_logits).mean() + nnF.softplus(fake_logits).mean()

def g_nonsaturating_loss(fake_logits):
    """L_adv of G = -E[log D(G(z))].  Logits [N] -> scalar."""
    return nnF.softplus(-fake_logits).mean()

def d_r1_loss(D, real):
    """R1 = E[ |d logit / d x|^2 ] on real images x [N, 3, R, R] -> scalar, differentiable in D.
    Its weight in the loss of D is gamma / 2."""
    real = real.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(D(real).sum(), real, create_graph=True)     # [N, 3, R, R]
    return gradient.square().flatten(1).sum(1).mean()

# ---------- Training ------------------------------------------------------------------------
class Trainer:
    """One training.  With F, G is held back by settings.lam * ewc_penalty(G, theta_S, F).
    Under torchrun each process draws its share of the batch, and gradients are averaged."""
    def __init__(self, gan, settings, amp="off", theta_S=None, F=None):
        self.gan = gan
        self.settings = settings
        self.amp = amp
        self.theta_S = theta_S
        self.F = F
        self.step = 0
        self.log = []               # a dict of losses for every tenth step
        self.progress = {}          # step -> samples of the same ten z, uint8 [10, 3, R, R]
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.processes = dist.get_world_size() if several else 1
        betas = (settings.beta1, settings.beta2)                # the rates: set in train_step
        trained = [p for p in gan.D.parameters() if p.requires_grad]
        self.opt_G = torch.optim.Adam(gan.G.parameters(), betas=betas, fused=True)
        self.opt_D = torch.optim.Adam(trained, betas=betas, fused=True)
        # fp16 alone needs its loss scaled, or small gradients are rounded to 0
        self.scaler = torch.amp.GradScaler(gan.device.type, enabled=amp == "fp16")
        self.random = torch.Generator().manual_seed(settings.seed + self.rank)     # on the CPU
        self.parts = {"gan": gan, "opt_G": self.opt_G, "opt_D": self.opt_D, "scaler": self.scaler}

    def draw(self, images):
        """Real images [B, 3, R, R] in [-1, 1], with replacement, mirrored at random, and z."""
        n = max(1, self.settings.batch_size // self.processes)
        index = torch.randint(len(images), (n,), generator=self.random)
        mirrored = torch.rand(n, generator=self.random) < 0.5
        z = torch.randn(n, self.gan.z_dim, generator=self.random).to(self.gan.device)
        real = to_float(images[index.to(images.device)])
        real[mirrored] = real[mirrored].flip(3)
        return real.to(z), z

    def augment(self, x):
        """What D sees of x [B, 3, R, R]: all of it moved by one random shift, with one random
        square set to 0, so that D does not memorise the shots (DiffAugment, Zhao et al. 2020)."""
        size = x.shape[-1]
        far = round(self.settings.shift * size)
        hole = round(self.settings.cutout * size)
        if far:
            top, left = torch.randint(2 * far + 1, (2,), generator=self.random).tolist()
            x = nnF.pad(x, [far] * 4, "replicate")[:, :, top:top + size, left:left + size]
        if hole:
            corner = torch.randint(size, (2,), generator=self.random) - hole // 2
            top, left = corner.clamp(min=0).tolist()
            bottom, right = (corner + hole).tolist()
            x = x.clone()
            x[:, :, top:bottom, left:right] = 0
        return x

    def train_step(self, images):
        """One step of D and one of G on images uint8 [N, 3, R, R], or float in [-1, 1].
        Returns {name: scalar tensor}, left on the device: on a GPU, reading synchronises."""
        G, D, s = self.gan.G, self.gan.D, self.settings
        half = torch.float16 if self.amp == "fp16" else torch.bfloat16
        autocast = torch.autocast(self.gan.device.type, half, enabled=self.amp != "off")
        self.opt_G.param_groups[0]["lr"] = s.lr_at(self.step)
        self.opt_D.param_groups[0]["lr"] = s.lr_at(self.step) * s.d_lr_ratio
        real, z = self.draw(images)
        # D: minimise  L_D + gamma / 2 * R1
        real = self.augment(real)                                       # [B, 3, R, R]
        with autocast:
            fake = self.augment(G(z))                                   # [B, 3, R, R]
            real_logits = D(real)                                       # [B]
            fake_logits = D(fake.detach())                              # [B]
        loss_D = d_logistic_loss(real_logits.float(), fake_logits.float())
        total_D = loss_D
        if self.step % s.r1_every == 0:         # in float32; rare, so weighted r1_every times
            total_D = loss_D + s.r1_every * s.r1_gamma / 2 * d_r1_loss(D, real)
        self.update(self.opt_D, total_D)
        # G: minimise  L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2
        with autocast:
            fake_logits = D(fake)               # [B]; fake has kept the graph of G until here
        loss_adv = g_nonsaturating_loss(fake_logits.float())
        losses = {"loss_D": loss_D, "loss_adv": loss_adv}
        loss = loss_adv
        if self.F is not None:
            loss = loss_adv + s.lam * ewc_penalty(G, self.theta_S, self.F)
            losses["penalty"] = loss - loss_adv
        self.update(self.opt_G, loss)
        self.scaler.update()
        self.update_average()
        self.step += 1
        return {name: x.detach() for name, x in losses.items()}

    def update(self, optimizer, loss):
        parameters = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        self.scaler.scale(loss).backward(inputs=parameters)
        if self.processes > 1:
            for p in parameters:
                dist.all_reduce(p.grad.div_(self.processes))
        self.scaler.step(optimizer)

    @torch.no_grad()
    def update_average(self):
        """theta_ema <- decay * theta_ema + (1 - decay) * theta.  The decay starts at 0.1 and
        rises: else G_ema would stay near its start for a thousand steps."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for average, p in zip(self.gan.G_ema.parameters(), self.gan.G.parameters()):
            average.lerp_(p, 1 - decay)

    def train(self, images, label, look, every, unfinished=None, resume=False, **same):
        """Train to the last step; look(step) is called at each `every`-th and the last.  The file
        `unfinished` has the state until then; to resume from it, `same` must be equal."""
        same = {**asdict(self.settings), "amp": self.amp, "images": checksum(images), **same}
        if resume and unfinished.exists():
            self.load_state(unfinished, same)
        print(f"{label}: step {self.step} of {self.settings.steps}")
        first = self.step
        start = time.monotonic()
        while self.step < self.settings.steps:
            losses = self.train_step(images)
            last = self.step == self.settings.steps
            if self.step % 10 == 0 or last:
                self.record(losses)
            if self.step % every == 0 or last:
                look(self.step)
            if self.step % 100 == 0 or last:
                self.save_state(unfinished, same)
                self.show(label, (time.monotonic() - start) / (self.step - first))
        if unfinished and self.rank == 0:
            unfinished.unlink()

    def record(self, losses):
        """Add a row to the log; stop a training that has diverged."""
        self.log.append({"step": self.step, **{name: float(x) for name, x in losses.items()}})
        if not all(p.isfinite().all() for p in self.gan.parameters()):
            raise UserError(f"the training diverged before step {self.step}: start again with "
                            "a lower --lr or --lam (what was saved before is kept)")

    def show(self, label, per_step):
        losses = "  ".join(f"{name} {x:.2f}" for name, x in list(self.log[-1].items())[1:])
        left = per_step * (self.settings.steps - self.step)
        print(f"{label} {self.step}/{self.settings.steps}  {losses}  "
              f"{1000 * per_step:.0f} ms/step  {left:.0f} s left")

    def save_state(self, unfinished, same):
        if unfinished and self.rank == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state["random"] = self.random.get_state()
            write_checkpoint(unfinished, {**state, "same": same, "step": self.step,
                                          "log": self.log, "progress": self.progress})

    def load_state(self, unfinished, same):
        with reading(unfinished):
            saved = torch.load(unfinished, map_location="cpu", weights_only=True)
            for name, value in saved["same"].items():
                if value != same[name]:
                    raise UserError(f"its {name} was {value}, and is {same[name]} now")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.step = saved["step"]
            self.log = saved["log"]
            self.progress = saved["progress"]
            if self.rank == 0:          # it wrote the file; the others must not draw the same
                self.random.set_state(saved["random"])

def pretrain(images, gan, settings, checkpoint, amp="off", resume=False, every=1000):
    """Train a GAN in place on images uint8 [N, 3, R, R], or float in [-1, 1]: the source.

    checkpoint  a file such as source.pt: the model, renewed each `every` steps, with samples in
                source.png.  resume=True goes on from source.unfinished.pt, if it is there"""
    checkpoint = Path(checkpoint)
    unfinished = checkpoint.with_suffix(".unfinished.pt")
    trainer = Trainer(gan, settings, amp)

    def look(step):
        if trainer.rank == 0:                               # one process writes
            gan.calibrate()
            gan.save(checkpoint, settings=asdict(settings), step=step)
            image_grid(gan.generate(64), 8).save(checkpoint.with_suffix(".png"))

    gan.train()
    # steps=None: a resumed pretraining may have more steps, see lr_at
    trainer.train(images, "pretrain", look, every, unfinished, resume, steps=None)
    return trainer.log

# A GAN; fisher_diagonal() of its source; and log and progress of its Trainer
Adapted = namedtuple("Adapted", "gan fisher log progress")

def adapt(source, images, settings, out=None, amp="off", resume=False, fisher=None):
    """Adapt a source GAN, which is not changed, to a few images with EWC, or with a baseline.

    images    the shots: uint8 [N, 3, R, R], or float in [-1, 1], of the source's resolution R
    out       a folder, in which the adapted GAN becomes adapted.pt.  resume=True goes on from
              unfinished.pt in it, the state of a training that was stopped
    amp       'off', 'bf16' or 'fp16';  fisher  of the source, if measured before"""
    if images.shape[-1] != source.resolution:
        raise UserError(f"images of {images.shape[-1]} pixels; the source: {source.resolution}")
    theta_S = weights(source.G_ema).detach()        # of G_ema: it makes the better images
    if fisher is None:
        z = source.z(settings.fisher_samples, seed=1000 + settings.seed)    # not those of pictures
        fisher = fisher_diagonal(source.G_ema, source.D, z.to(source.device))
    F = None                                        # finetune, freezed: no penalty
    if settings.method == "ewc":
        F = scaled_fisher(fisher)
    if settings.method == "raw":
        F = fisher
    if settings.method == "l2":                     # holds all weights alike: shows if F helps
        F = torch.ones_like(fisher)
    gan = copy.deepcopy(source)
    gan.G = copy.deepcopy(source.G_ema).eval()      # eval: BatchNorm stays as in the source
    if settings.method == "freezed":
        for layer in gan.D.lower:
            layer.requires_grad_(False)
    trainer = Trainer(gan, settings, amp, theta_S, F)

    def look(step):
        trainer.progress[step] = to_uint8(gan.generate(10, PICTURES))
        if out and step == settings.steps:
            gan.save(Path(out, "adapted.pt"), settings=asdict(settings))
    trainer.train(images.to(source.device), settings.method, look, 400,
                  out and Path(out, "unfinished.pt"), resume, source=checksum(theta_S))
    return Adapted(gan, fisher, trainer.log, trainer.progress)

def layer_of(name):
    """'up.weight' -> 'up', and 'up.style.weight', too: a style belongs to its convolution."""
    return name.rpartition(".")[0].removesuffix(".style") or name

@torch.no_grad()
def layer_changes(G, theta_S, F):
    """Which weights changed (the paper's analysis): a dict for each 'layer' (layer_of), with three
    floats: the mean 'fisher', the mean absolute 'weight' in theta_S, and 'change' in %: sum
    |theta - theta_S| / sum |theta_S|, as a mean of ratios depends mostly on weights near 0."""
    sizes = Counter()
    for name, p in G.named_parameters():
        sizes[layer_of(name)] += p.numel() * p.requires_grad
    table = torch.stack([weights(G), theta_S, F])                       # [3, weights]
    rows = []
    for layer, part in zip(sizes, table.split(list(sizes.values()), dim=1)):
        after, before, fisher = part                                    # of this layer
        change = 100 * (after - before).abs().sum() / before.abs().sum()
        rows.append({"layer": layer, "fisher": float(fisher.mean()),
                     "weight": float(before.abs().mean()), "change": float(change)})
    return rows

# ---------- Networks ------------------------------------------------------------------------
# About a million weights at 64x64.  In eval mode neither images nor logits depend on the rest
# of the batch: F, a mean over single samples, needs that.
class DCGANGenerator(nn.Sequential):
    """z [N, z_dim] -> image [N, 3, R, R] in (-1, 1): a DCGAN (Radford et al. 2016).  BatchNorm
    sees each batch while the source is pretrained, and stays in eval mode after that."""
    def __init__(self, z_dim, channels):
        super().__init__()
        c_in, size = z_dim, 4
        for c_out in channels:
            stride, padding = (1, 0) if size == 4 else (2, 1)           # 1 -> 4, then doubles
            conv = nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False)
            self.add_module(f"conv{size}", conv)
            self.add_module(f"norm{size}", nn.BatchNorm2d(c_out))
            self.add_module(f"relu{size}", nn.ReLU())
            c_in, size = c_out, 2 * size
        self.to_rgb = nn.ConvTranspose2d(c_in, 3, 4, 2, 1, output_padding=1)    # R + 1
        for weight in self.parameters():
            if weight.ndim == 4:
                nn.init.normal_(weight, 0, 0.02)

    def forward(self, z):
        x = super().forward(z[:, :, None, None])                        # [N, 3, R + 1, R + 1]
        return torch.tanh(nnF.avg_pool2d(x, 2, stride=1))       # a mean leaves no checkerboard

class Equalized(nn.Module):
    """A linear layer with equalised learning rate: its weights are stored as
    N(0, 1 / lr_multiplier^2) and scaled in forward, so that Adam's relative step is alike in
    every layer (Karras et al. 2018).  theta and F refer to the stored weights."""
    def __init__(self, c_in, c_out, bias=0.0, gain=1.0, lr_multiplier=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([c_out], bias / lr_multiplier))
        self.scale = gain * lr_multiplier / math.sqrt(c_in)
        self.lr_multiplier = lr_multiplier

    def forward(self, x):
        return nnF.linear(x, self.weight * self.scale, self.bias * self.lr_multiplier)

class ModulatedConv(nn.Module):
    """x [N, I, H, W], w [N, w_dim] -> [N, O, H, W]: a convolution whose input channels are
    scaled by a style s(w), and whose output channels are divided by the norm of their scaled
    weights (Karras et al. 2020).  To scale x, not each image's weights, is faster.  up doubles
    H and W with a transposed convolution; if "smooth", a mean removes its checkerboard."""
    def __init__(self, c_in, c_out, size, w_dim, demodulate=True, up=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, size, size))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.style = Equalized(w_dim, c_in, bias=1.0)
        self.scale = 1 / math.sqrt(c_in * size**2)
        self.demodulate = demodulate
        self.up = up

    def forward(self, x, w):
        s = self.style(w)                                                   # [N, I]
        weight = self.weight * self.scale                                   # [O, I, k, k]
        x = x * s[:, :, None, None]
        if self.up:
            x = nnF.conv_transpose2d(2 * x, weight.transpose(0, 1), None, 2, 1)     # 2H + 1
            x = nnF.avg_pool2d(2 * x, 2, 1) if self.up == "smooth" else x[:, :, 1:, 1:]
        else:
            x = nnF.conv2d(x, weight, padding="same")                       # [N, O, H, W]
        if self.demodulate:
            norm_squared = s.square() @ weight.square().sum((2, 3)).T       # [N, O]
            gain = math.sqrt(2) * (norm_squared + 1e-8).rsqrt()
            x = x * gain[:, :, None, None].to(x.dtype)                      # may be half
        return x + self.bias[:, None, None].to(x.dtype)

class StyleGANGenerator(nn.Module):
    """z [N, z_dim] -> image [N, 3, R, R] in (-1, 1): a small StyleGAN2 (Karras et al. 2020).
    No noise inputs: an image depends on z alone.  With a tanh flat colours are easy to draw."""
    def __init__(self, z_dim, channels):
        super().__init__()
        self.mapping = nn.ModuleList(
            Equalized(z_dim, z_dim, gain=math.sqrt(2), lr_multiplier=0.01) for _ in range(4))
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.convs = nn.ModuleDict({"conv4": ModulatedConv(channels[0], channels[0], 3, z_dim)})
        for size, c_in, c_out in zip([8, 16, 32, 64, 128, 256], channels, channels[1:]):
            self.convs[f"up{size}"] = ModulatedConv(c_in, c_out, 5, z_dim, up="free")
            self.convs[f"conv{size}"] = ModulatedConv(c_out, c_out, 3, z_dim)
        self.convs[f"up{size}"].up = "smooth"       # not all: free ones can draw hatching
        self.to_rgb = ModulatedConv(channels[-1], 3, 1, z_dim, demodulate=False)

    def forward(self, z):
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()           # on a sphere
        for layer in self.mapping:
            w = nnF.leaky_relu(layer(w), 0.2)                               # [N, z_dim]
        x = self.constant.expand(len(z), -1, -1, -1)                        # [N, C, 4, 4]
        for conv in self.convs.values():
            x = nnF.leaky_relu(conv(x, w), 0.2)                             # [N, C', R', R']
        return torch.tanh(self.to_rgb(x, w))

class Discriminator(nn.Module):
    """image [N, 3, R, R] -> logit [N].  No BatchNorm: D judges each image by itself."""
    def __init__(self, channels):
        super().__init__()
        convs, layers = [], []
        for c_in, c_out in zip([3] + channels, channels):
            convs.append(nn.Conv2d(c_in, c_out, 4, 2, 1))               # halves
            layers += [convs[-1], nn.LeakyReLU(0.2)]
        convs.append(nn.Conv2d(channels[-1], 1, 4))                     # 4 -> 1
        self.layers = nn.Sequential(*layers, convs[-1])
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, 0.2)
            nn.init.zeros_(conv.bias)
        self.lower = convs[:-2]                         # what FreezeD freezes: down to 8x8

    def forward(self, x):
        return self.layers(x).flatten()

FAMILIES = {        # G, z_dim, and the channels of G at 4, 8, 16, ... pixels
    "stylegan": (StyleGANGenerator, 128, [128, 128, 96, 48, 24, 12, 8]),
    "dcgan": (DCGANGenerator, 64, [192, 128, 96, 64, 32, 16])}

class GAN(nn.Module):
    """Generator G, its moving average G_ema, and discriminator D.  arch: 'dcgan' or 'stylegan';
    resolution: 32, 64, 128 or 256; then the sizes, by default those of the shipped sources."""
    SIZES = ["arch", "resolution", "z_dim", "g_channels", "d_channels"]

    def __init__(self, arch, resolution, z_dim=None, g_channels=None, d_channels=None):
        super().__init__()
        make_G, default_z_dim, channels = FAMILIES[arch]
        stages = int(math.log2(resolution)) - 2             # 64 pixels: 4, 8, 16, 32
        self.arch = arch
        self.resolution = resolution
        self.z_dim = z_dim or default_z_dim
        self.g_channels = g_channels or channels[:stages + (arch == "stylegan")]
        self.d_channels = d_channels or [8, 16, 32, 64, 128, 256][-stages:]
        self.G = make_G(self.z_dim, self.g_channels)
        self.D = Discriminator(self.d_channels)
        self.G_ema = copy.deepcopy(self.G).eval()

    @property
    def device(self):
        return next(self.parameters()).device

    def z(self, n, seed=0):
        """n noise vectors [n, z_dim].  Drawn one by one, so that number i of a seed is the
        same whatever n is: in the source, in every adaptation, in every picture."""
        random = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randn(self.z_dim, generator=random) for _ in range(n)])

    @torch.no_grad()
    def images(self, z):
        """z [N, z_dim] -> images of G_ema, float [N, 3, R, R] in [-1, 1], on the CPU."""
        batches = z.to(self.device).split(100)
        return torch.cat([self.G_ema(batch).float().cpu() for batch in batches])

    def generate(self, n, seed=0):
        """The images of z(n, seed), float [n, 3, R, R] in [-1, 1], on the CPU."""
        return self.images(self.z(n, seed))

    @torch.no_grad()
    def calibrate(self):
        """Measure G_ema's BatchNorm statistics over 4,096 z: those of G do not fit."""
        norms = [m for m in self.G_ema.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None                           # None: the plain mean of all batches
        self.G_ema.train()
        for z in self.z(4096).split(256) if norms else []:
            self.G_ema(z.to(self.device))
        self.G_ema.eval()

    def save(self, checkpoint, **extra):
        """Write sizes, G_ema, D and extra: only tensors, numbers, strings, lists and dicts."""
        sizes = {name: getattr(self, name) for name in self.SIZES}
        networks = {"G_ema": self.G_ema.state_dict(), "D": self.D.state_dict()}
        write_checkpoint(checkpoint, {**sizes, **networks, **extra})

    @classmethod
    def load(cls, checkpoint, device="cpu"):
        """The GAN in a checkpoint, in eval mode.  UserError if the file cannot be used."""
        with reading(checkpoint):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            gan = cls(*(saved[name] for name in cls.SIZES))
            gan.G.load_state_dict(saved["G_ema"])
            gan.G_ema.load_state_dict(saved["G_ema"])
            gan.D.load_state_dict(saved["D"])
        return gan.eval().to(device, memory_format=memory_format(device))

def memory_format(device):              # the fastest one; channels_last is not safe on MPS
    return torch.contiguous_format if device == "mps" else torch.channels_last

# ---------- Files and images ----------------------------------------------------------------
def reason(error):
    """Why something failed: the system's words, or the first sentence of the error."""
    text = getattr(error, "strerror", None) or str(error) or "out of memory"
    return " ".join(text.split()).partition(". ")[0]

@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong while a file is read becomes one line with its name."""
    try:
        yield
    except Exception as error:                          # a damaged file can raise anything
        raise UserError(f"{path}: cannot be used ({reason(error)})") from error

def write_checkpoint(checkpoint, content):
    """Written under another name, then renamed: a kill leaves the old file or the new one."""
    temporary = Path(f"{checkpoint}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        temporary.replace(checkpoint)
    except (OSError, RuntimeError) as error:            # RuntimeError: torch's, on a full disk
        temporary.unlink(missing_ok=True)
        raise UserError(f"{checkpoint}: cannot be written ({reason(error)})") from error

def checksum(tensor):
    return zlib.crc32(tensor.cpu().contiguous().numpy())

def to_float(images):
    """uint8 0..255 -> float -1..1; floats are taken to be in -1..1 already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images

def to_uint8(images):
    """float -1..1 -> uint8 0..255."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()

FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP"]       # that are read

def read_image(path, resolution):
    """An image of any size and mode -> uint8 [3, R, R]: the square at its centre, on white."""
    with reading(path), Image.open(path, formats=FORMATS) as file:
        file.getexif()                      # parsed, to turn the image upright; but not kept,
        file.info.pop("exif", None)         # or it is written anew, which odd tags break
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":
            raise UserError("more than 8 bits a channel: save it with 8")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        size = (resolution, resolution)
        return pil_to_tensor(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS))

def load_images(folder, resolution, limit=None, nested=False):
    """The images of a folder, or the first `limit`, by name: uint8 [N, 3, R, R].  nested: also
    those of the folders below it.  Images of any size are cropped to squares at the centre;
    hidden files are left out.  Raises UserError if there are none, or some cannot be read."""
    folder = Path(folder)
    suffixes = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    paths, others = [], Counter()
    for path in sorted(folder.rglob("*") if nested else folder.glob("*")):
        if "/." in f"/{path.relative_to(folder).as_posix()}":       # hidden
            continue
        if path.suffix.lower() in suffixes:
            paths.append(path)
        elif not (nested and path.is_dir()):
            others[path.suffix or path.name] += 1           # a folder is named
    note = " ".join(f"{n} {kind}" for kind, n in others.items())
    note = note and f"; left out: {note} (convert images to PNG)"
    if not paths:
        problem = "no images in it" if folder.is_dir() else "no such folder"
        if folder.is_file():
            problem = "a file, not a folder"
        raise UserError(f"{folder}: {problem}{note}")
    print(f"{folder}: {len(paths)} images{note}")

    def read(path):
        try:
            return read_image(path, resolution)
        except UserError as error:
            return str(error)
    Image.MAX_IMAGE_PIXELS = 10**9                      # Pillow would refuse large panoramas
    with ThreadPoolExecutor() as pool:                  # Pillow decodes without Python's lock
        images = list(pool.map(read, paths[:limit]))
    damaged = [image for image in images if isinstance(image, str)]
    if damaged:
        raise UserError("; ".join(damaged))
    return torch.stack(images)

# ---------- Pictures and tables -------------------------------------------------------------
def image_grid(images, columns):
    """Images [N, 3, R, R], enlarged to 128 pixels or more -> one PIL picture, row by row."""
    images = nnF.interpolate(to_float(images), scale_factor=max(1, 128 // images.shape[-1]))
    return to_pil_image(to_uint8(make_grid(images, columns, pad_value=1)))

def samples_picture(rows):
    """Rows of images, [(label, images [N, 3, R, R]), ...], with their labels at the left."""
    pictures = [image_grid(images, len(images)) for _, images in rows]
    height = pictures[0].height
    width = 120 + max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, _) in enumerate(rows):
        pen.text((110, (i + 0.5) * height), label, "black", ImageFont.load_default(14), "rm")
        sheet.paste(pictures[i], (120, i * height))
    return sheet

def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

def write_run(out, source, shots, label, adapted):
    """The pictures and tables of one run."""
    gan = adapted.gan
    rows = [("target", shots[:10]), ("source", source.generate(10, PICTURES))]
    samples_picture([*rows, (label, gan.generate(10, PICTURES))]).save(out / "samples.png")
    for step, samples in adapted.progress.items():
        rows.append((f"step {step}", samples))
    samples_picture(rows).save(out / "progress.png")
    changes = layer_changes(gan.G_ema, weights(source.G_ema), adapted.fisher)
    write_table(out / "layers.csv", changes)
    write_table(out / "log.csv", adapted.log)

# ---------- Command line --------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")

def add_settings(p, table, several=()):
    """Options for the settings that have a help text; `several` of them take several values."""
    for f in fields(table["stylegan"]):
        if not f.metadata:
            continue
        defaults = dict.fromkeys(str(getattr(settings, f.name)) for settings in table.values())
        default = ", for the DCGAN ".join(defaults)
        p.add_argument("--" + f.name.replace("_", "-"), type=f.type,
                       choices=f.metadata["choices"], nargs="+" if f.name in several else None,
                       help=f"{f.metadata['help']} (default: {default})")
    available = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    devices = [name for name, backend in available.items() if backend.is_available()]
    p.add_argument("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    p.add_argument("--amp", choices=["off", "bf16", "fp16"],
                   help="mixed precision (default: off; on a GPU bf16, or fp16 if it lacks bf16)")

def default_amp(device):
    if device != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

def settings_from_args(defaults, args):
    """The settings of a family, with what the command line names in place of its defaults."""
    given = {f.name: getattr(args, f.name) for f in fields(defaults) if f.metadata}
    numbers = {name: x for name, x in given.items() if isinstance(x, int | float)}
    return replace(defaults, **numbers)

def parse_arguments(argv):
    p = Parser("python ewc_gan.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", type=Path, help="the few images to adapt to")
    p.add_argument("--source", type=Path, default=SHIPPED / "source_stylegan.pt",
                   help="a model of pretrain_source.py (default: data/source_stylegan.pt)")
    p.add_argument("--out", type=Path, help="where to write (default: out/TARGET; "
                   "with --generate: beside the model)")
    p.add_argument("--shots", type=int, help="how many images to use (default: all)")
    p.add_argument("--resume", action="store_true", help="go on with runs that were stopped")
    add_settings(p, ADAPT, several=("method", "lam", "seed"))
    p.add_argument("--checkpoint", type=Path, help="a model to --generate from")
    p.add_argument("--generate", type=int, help="how many images to write")
    args = p.parse_args(argv)
    given = [x is not None for x in (args.target, args.checkpoint, args.generate)]
    if given not in ([True, False, False], [False, True, True]):
        p.error("give --target, as in --target data/10shot, or --checkpoint with --generate")
    if 0 in (args.shots, args.generate) or (args.shots or args.generate or 1) < 0:
        p.error("--shots and --generate: must be 1 or more")
    args.amp = args.amp or default_amp(args.device)
    return args

def run_generate(args):
    gan = GAN.load(args.checkpoint, args.device)
    out = args.out or args.checkpoint.parent / "generated"
    out.mkdir(parents=True, exist_ok=True)
    print(f"{out}: holds {len(list(out.iterdir()))} files before")
    for seed in args.seed or [0]:
        images = gan.generate(args.generate, seed)
        for i, image in enumerate(to_uint8(images)):
            to_pil_image(image).save(out / f"seed{seed}_{i:05d}.png")
        image_grid(images, 10).save(f"{out}_seed{seed}.png")
        print(f"{len(images)} images written; {out}_seed{seed}.png shows all of them")

def planned_runs(args, defaults):
    """{label: settings} of every run that is asked for.  Lambda 0 is fine-tuning."""
    methods = args.method or [defaults.method]
    lams = args.lam or [defaults.lam]
    seeds = args.seed or [defaults.seed]
    runs = {}
    for method, lam, seed in itertools.product(methods, lams, seeds):
        if lam == 0 and method != "freezed":
            method = "finetune"
        label = method
        if len(lams) > 1 and method not in ("finetune", "freezed"):
            label += f"_{lam:g}"
        if len(seeds) > 1:
            label += f"_seed{seed}"
        runs[label] = replace(defaults, method=method, lam=lam, seed=seed)
    return runs

def run_adapt(args):
    """Every run that is asked for: one in out, several in folders of out."""
    source = GAN.load(args.source, args.device)
    shots = load_images(args.target, source.resolution, args.shots)
    top = args.out or Path("out", args.target.resolve().name)
    runs = planned_runs(args, settings_from_args(ADAPT[source.arch], args))
    rows = [("target", shots[:10]), ("source", source.generate(10, PICTURES))]
    fisher = {}                                         # by seed: all methods share it
    print(f"{args.source.name}, adapted on {args.device}, amp {args.amp}, into {top}: "
          f"{' '.join(runs)}; F is measured first")
    for label, settings in runs.items():
        out = top / label if len(runs) > 1 else top
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / "adapted.pt"
        finished = checkpoint.exists() and not (out / "unfinished.pt").exists()
        if args.resume and finished:
            print(f"{checkpoint}: finished, nothing to resume")
            gan = GAN.load(checkpoint, args.device)
        else:
            adapted = adapt(source, shots, settings, out, args.amp, args.resume,
                            fisher.get(settings.seed))
            gan = adapted.gan
            fisher[settings.seed] = adapted.fisher
            config = {**vars(args), **asdict(settings)}
            (out / "config.json").write_text(json.dumps(config, default=str, indent=1))
            write_run(out, source, shots, label, adapted)
        rows.append((label, gan.generate(10, PICTURES)))
    if len(runs) > 1:
        samples_picture(rows).save(top / "comparison.png")
    print(f"{top}: " + "  ".join(sorted(path.name for path in top.iterdir())))

@contextlib.contextmanager
def clean_exit(program):
    """What the user can mend becomes one line on stderr and exit code 2."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # lacks a character?
    try:
        yield
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):            # BrokenPipe: of "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # or Python complains as it exits
        sys.exit(f"{program}: stopped; a training goes on with the same command and --resume")
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        name = f"{error.filename}: " if getattr(error, "filename", None) else ""
        text = str(error) if isinstance(error, UserError) else name + reason(error)
        print(f"{program}: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)

def main(argv=None):
    with clean_exit("ewc_gan.py"):
        args = parse_arguments(argv)
        torch.backends.cudnn.allow_tf32 = False         # float32 is to be float32: F, R1
        run_generate(args) if args.generate else run_adapt(args)

if __name__ == "__main__":
    main()
