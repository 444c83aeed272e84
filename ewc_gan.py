"""Few-shot image generation with Elastic Weight Consolidation (EWC), in one file.

    python ewc_gan.py --target data/10shot                    # adapt the shipped source
    python ewc_gan.py --target DIR --source FILE --out DIR    # your images, your source
    python ewc_gan.py --target DIR --method finetune l2 ewc --seed 0 1 2 --reference DIR
    python ewc_gan.py --checkpoint out/10shot/adapted.pt --generate 500 --out DIR

An independent implementation of Li, Zhang, Lu and Shechtman, "Few-shot Image Generation with
Elastic Weight Consolidation" (NeurIPS 2020, arXiv 2012.02780).  A GAN is pretrained on a large
source domain.  The Fisher information F says how much each weight theta_i of its generator G
matters.  Then G is adapted to about ten target images, while weights that matter are held near
their values in the source, theta_S:

    F_i     = E_z[ (d log D(G(z)) / d theta_i)^2 ]                       D: the source's, frozen
    L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2

So the images take on the target's look and keep the source's diversity.  Method and training end
where "Networks" begins.  What differs from the paper, such as the scale of F, is in README.md.
"""
import argparse
import contextlib
import copy
import csv
import glob
import json
import math
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as nnF              # F is the Fisher information, as in the paper
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

SHIPPED = Path(__file__).resolve().parent / "data"      # source_stylegan.pt, source_dcgan.pt

class UserError(ValueError):
    """Something that the user can fix: one line on stderr, and exit code 2."""

# ---------- Settings ------------------------------------------------------------------------------
# Hyperparameters of training, chosen on the drawn faces.  Those with a help text are options.
def option(default, help, **more):
    return field(default=default, metadata={"help": help, **more})

@dataclass
class Training:
    """Hyperparameters of a training; the defaults adapt the StyleGAN to ten images."""
    steps: int = option(1200, "training steps")
    batch_size: int = option(4, "images a step")
    lr: float = option(4e-3, "Adam's learning rate for G")
    d_lr_ratio: float = option(1.0, "D's learning rate over G's")
    shift: float = option(0.0625, "D sees images moved by up to this fraction of their width")
    cutout: float = option(0.5, "D sees images with a hole of this fraction of their width")
    r1_gamma: float = option(0.1, "weight of the R1 penalty on D")  # a large one hides details
    r1_every: int = 16              # R1 is costly and changes slowly: every 16th step is enough
    beta1: float = 0.0              # of Adam: with momentum G and D oscillate
    beta2: float = 0.99
    ema: float = 0.999              # largest decay of G's moving average
    seed: int = option(0, "seed of all random numbers")

    def __post_init__(self):
        for name, value in asdict(self).items():
            value = value.item() if hasattr(value, "item") else value   # of NumPy: a plain number
            setattr(self, name, value)
            least = 1 if name in ("steps", "batch_size", "r1_every", "fisher_samples") else 0
            if not isinstance(value, str) and not least <= value < math.inf:    # refuses NaN, too
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")

    def lr_at(self, step):          # decays as 1 / sqrt(step): needs no last step known in advance
        return self.lr / math.sqrt(1 + step / 3000)

@dataclass
class Adaptation(Training):
    """Hyperparameters of the adaptation to a few images."""
    method: str = option("ewc", "ewc; raw: ewc with F as measured, for lambda about 300; l2: each "
                         "F_i is 1; finetune: no penalty; freezed: finetune with D's lower layers "
                         "frozen (Mo et al. 2020)",
                         choices=["ewc", "finetune", "l2", "freezed", "raw"])
    lam: float = option(1.5e-3, "lambda, the strength of the penalty; 0 is fine-tuning")
    fisher_samples: int = option(256, "number of z over which F is averaged")

    def lr_at(self, step):          # linear decay to 0 at the last step, so that images settle
        return self.lr * (1 - step / self.steps)

# The layers of the DCGAN are not equalised, and learn fast: a D as fast as G memorises the shots
ADAPT = {"stylegan": Adaptation(),
         "dcgan": Adaptation(2400, 8, d_lr_ratio=0.1, r1_gamma=0.3, beta1=0.5, lam=2.5e-3)}
# Pretraining sees thousands of images: larger batches, a D as fast as G, no shift, no hole
PRETRAIN = {"stylegan": Training(60000, 16, lr=5e-3, shift=0.0, cutout=0.0),
            "dcgan": Training(40000, 16, 2e-3, shift=0.0, cutout=0.0, r1_gamma=1.0, beta1=0.5)}

# ---------- The method ----------------------------------------------------------------------------
# Nothing here depends on the networks below: any two modules G and D will do for which D(G(z)) is a
# logit.  In "log D", D is the probability of "real", sigmoid(logit); R1 uses the logit itself.
def as_vector(tensors):
    """Tensors as one float32 vector, channels (dimension 1) last, as in channels_last."""
    return torch.cat([(t.movedim(1, -1) if t.ndim > 1 else t).flatten().float() for t in tensors])

def weights(G):
    """theta: all trainable parameters of G as one float32 vector, in G's order, differentiable."""
    return as_vector([p for p in G.parameters() if p.requires_grad])

def fisher_diagonal(G, D, z):
    """How much each weight of G changes the log-likelihood that the frozen D gives its images:

        F_i = E_z[ (d log D(G(z)) / d theta_i)^2 ]

    G  generator, z [1, ...] -> images;  D  discriminator of its domain, images -> logits;
    z  [N, ...], the samples over which the mean is taken.  If G draws noise of its own, fix it.
    Returns one float32 vector without a graph, F_i beside theta_i of weights(G); 0 where a weight
    has no effect.  Raises UserError if there is no z.

    A GAN has no likelihood that can be computed, so log D(G(z)) stands in for it (the paper's
    importance measure).  One sample at a time, because each gradient must be squared before the
    mean is taken: the square of a batch's mean gradient is smaller, and shrinks as the batch grows.
    Always in float32, also inside autocast: half precision rounds small gradients, or loses them.
    Works inside no_grad.  Both networks are copied and put in eval mode: neither changes."""
    if len(z) == 0:
        raise UserError("the Fisher information is a mean over samples: give at least one z")
    G, D = copy.deepcopy(G).eval(), copy.deepcopy(D).eval().requires_grad_(False)
    theta = [p for p in G.parameters() if p.requires_grad]
    F = torch.zeros_like(weights(G))
    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        for z_i in z.split(1):
            log_likelihood = nnF.logsigmoid(D(G(z_i))).sum()                    # log D(G(z_i))
            gradient = torch.autograd.grad(log_likelihood, theta, allow_unused=True,
                                           materialize_grads=True)
            F += as_vector(gradient).square()
    return F / len(z)

def scaled_fisher(F, quantile=0.9):
    """F, capped at a quantile of its values, then divided by its mean.  Its mean is then 1, so that
    lambda is comparable between sources, and with l2 (each F_i = 1).

    Why: the scale of F depends on how confident D is, and a few weights can have nearly all of the
    sum of F: in the StyleGAN mostly biases that set colours, which a new domain must change.  The
    price: storing a weight as c * theta (its F is then F / c^2) changes this penalty, but not the
    unscaled one.  Raises UserError if the capped F is 0 everywhere."""
    values = F.cpu()                                                    # MPS has no kthvalue
    cap = values.kthvalue(math.ceil(quantile * len(values))).values
    mean = values.clamp(max=cap).mean()
    if not mean > 0:
        raise UserError("the Fisher information is 0 nearly everywhere: D is sure of every image, "
                        "or most of G has no effect; use another source, or --method raw")
    return F.clamp(max=float(cap)) / float(mean)

def ewc_penalty(G, theta_S, F):
    """sum_i F_i (theta_i - theta_S,i)^2, without lambda or 1/2: a scalar, differentiable in theta.

    theta_S  weights(G).detach() from before the adaptation: a copy, which does not move with G
    F        fisher_diagonal(G, D, z), or scaled_fisher() of it"""
    return F.dot((weights(G) - theta_S).square())           # faster than (F * ...).sum()

def make_penalty(method, lam, theta_S, F):
    """lambda * ewc_penalty as a function of G, or None.  l2 (each F_i = 1) shows if F helps."""
    if method in ("finetune", "freezed") or lam == 0:
        return None
    F = {"ewc": scaled_fisher, "l2": torch.ones_like, "raw": lambda F: F}[method](F)
    return lambda G: lam * ewc_penalty(G, theta_S, F)

# L_adv: the non-saturating logistic loss (Goodfellow et al. 2014), with R1 (Mescheder et al. 2018).
# For a logit a, log sigmoid(a) = -softplus(-a), and log(1 - sigmoid(a)) = -softplus(a).
def d_logistic_loss(real_logits, fake_logits):
    """L_D = -E[log D(x)] - E[log(1 - D(G(z)))].  Logits [N] and [M] -> scalar."""
    return nnF.softplus(-real_logits).mean() + nnF.softplus(fake_logits).mean()

def g_nonsaturating_loss(fake_logits):
    """L_adv of G = -E[log D(G(z))].  Logits [N] -> scalar."""
    return nnF.softplus(-fake_logits).mean()

def d_r1_loss(D, real):
    """R1 = E[ |grad_x D(x)|^2 ] on real images x [N, 3, R, R] -> scalar, differentiable in D.  Its
    weight in the loss of D is gamma / 2."""
    real = real.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(D(real).sum(), real, create_graph=True)     # [N, 3, R, R]
    return gradient.square().flatten(1).sum(1).mean()

# ---------- Training ------------------------------------------------------------------------------
class Trainer:
    """The networks of one training, their optimisers, and its random number generator.  `penalty`
    is None or a function of G, added to G's loss.  After init_process_group (pretrain_source.py
    under torchrun) each process draws its share of the batch with its own seed, and gradients are
    averaged; BatchNorm sees the whole batch on GPUs, MinibatchStd its process's share."""
    def __init__(self, gan, settings, amp="off", penalty=None):
        self.gan, self.settings, self.amp, self.penalty = gan, settings, amp, penalty
        self.device, self.step, self.log = gan.device, 0, []
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        if several and self.device.type == "cuda":
            gan.G = nn.SyncBatchNorm.convert_sync_batchnorm(gan.G)
        adam = dict(betas=(settings.beta1, settings.beta2), fused=True)     # lr: in train_step
        self.opt_G = torch.optim.Adam(gan.G.parameters(), **adam)
        self.opt_D = torch.optim.Adam([p for p in gan.D.parameters() if p.requires_grad], **adam)
        # fp16 alone needs its loss scaled, or small gradients are rounded to 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.random = torch.Generator().manual_seed(settings.seed + self.rank)     # on the CPU
        self.parts = {"gan": gan, "opt_G": self.opt_G, "opt_D": self.opt_D, "scaler": self.scaler}

    def draw(self, images):
        """Real images [B, 3, R, R] in [-1, 1], with replacement, mirrored at random, and z."""
        b, to = max(1, self.settings.batch_size // self.processes), self.device
        index = torch.randint(len(images), (b,), generator=self.random).to(images.device)
        real = to_float(images[index].to(to, non_blocking=True))
        mirror = (torch.rand(b, generator=self.random) < 0.5)[:, None, None, None]
        real = torch.where(mirror.to(to, non_blocking=True), real.flip(3), real)
        z = torch.randn(b, self.gan.z_dim, generator=self.random).to(to, non_blocking=True)
        return real.contiguous(memory_format=memory_format(to)), z

    def augment(self, x):
        """What D sees of x [B, 3, R, R]: translated at random (edge pixels repeated) and with a
        random square set to 0; one shift and one square for all of x, new ones in each call.  This
        keeps D from memorising the few shots (after DiffAugment, Zhao et al. 2020)."""
        size = x.shape[-1]
        far, hole = round(self.settings.shift * size), round(self.settings.cutout * size)
        if far:
            top, left = torch.randint(2 * far + 1, (2,), generator=self.random).tolist()
            x = nnF.pad(x, [far] * 4, "replicate")[:, :, top:top + size, left:left + size]
        if hole:
            rows, columns = (slice(max(0, at - hole // 2), at + hole - hole // 2) for at in
                             torch.randint(size, (2,), generator=self.random).tolist())
            x = x.clone()
            x[:, :, rows, columns] = 0
        return x

    def train_step(self, images):
        """One step of D and one of G on images uint8 [N, 3, R, R], or float in [-1, 1].  Returns
        {name: scalar tensor}, left on the device: on a GPU, reading one synchronises."""
        G, D, s = self.gan.G, self.gan.D, self.settings
        autocast = torch.autocast(self.device.type, enabled=self.amp != "off",
                                  dtype=torch.float16 if self.amp == "fp16" else torch.bfloat16)
        self.opt_G.param_groups[0]["lr"] = s.lr_at(self.step)
        self.opt_D.param_groups[0]["lr"] = s.lr_at(self.step) * s.d_lr_ratio
        real, z = self.draw(images)

        # D: minimise  L_D + gamma / 2 * R1
        real = self.augment(real)                                           # [B, 3, R, R]
        with autocast:
            fake = self.augment(G(z))                                       # [B, 3, R, R]
            real_logits, fake_logits = D(real), D(fake.detach())            # [B], [B]
        loss_D = d_logistic_loss(real_logits.float(), fake_logits.float())
        total_D = loss_D
        if self.step % s.r1_every == 0:     # lazy R1: rare, so weighted r1_every times; in float32
            total_D = loss_D + s.r1_every * s.r1_gamma / 2 * d_r1_loss(D, real)
        self.update(self.opt_D, total_D)

        # G: minimise  L_adapt = L_adv + lambda * sum_i F_i (theta_i - theta_S,i)^2
        with autocast:
            fake_logits = D(fake)                                           # [B]
        loss_G = g_nonsaturating_loss(fake_logits.float())                  # L_adv
        penalty = self.penalty(G) if self.penalty else torch.zeros_like(loss_G)
        self.update(self.opt_G, loss_G + penalty)
        self.scaler.update()
        # theta_ema <- decay * theta_ema + (1 - decay) * theta.  The decay starts at 0.1 and rises:
        # with 0.999 from the first step, G_ema would stay near its start for a thousand steps
        decay = min(s.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.gan.G_ema.parameters()), list(G.parameters()), 1 - decay)
        self.step += 1
        return {"loss_D": loss_D.detach(), "loss_G": loss_G.detach(), "penalty": penalty.detach()}

    def update(self, optimizer, loss):
        parameters = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        self.scaler.scale(loss).backward(inputs=parameters)     # for G: no gradients of D's weights
        if self.processes > 1:
            for p in parameters:
                dist.all_reduce(p.grad.div_(self.processes))
        self.scaler.step(optimizer)

    def train(self, images, label, out=None, resume=False, metrics=None, every=400, **same):
        """Train to the last step.  Returns the log: a dict of losses for every tenth step, with
        metrics(gan, step) for every `every`-th.  `out`: a checkpoint, written every ten seconds;
        resume=True goes on from it: settings (but steps), images and `same` must be equal."""
        same = {**asdict(self.settings), "steps": None, "amp": self.amp, **same,
                "images": zlib.crc32(images.cpu().contiguous().numpy())}
        if resume:
            self.resume(out, same)
        first, last = self.step, self.settings.steps
        start = saved = time.monotonic()
        while self.step < last:
            losses = self.train_step(images)
            if self.step % 10 and self.step < last:
                continue
            self.log.append({"step": self.step, **{k: float(v) for k, v in losses.items()}})
            if not all(v.isfinite().all() for v in [*losses.values(), *self.gan.parameters()]):
                raise UserError(f"the training diverged before step {self.step}; start again with "
                                "a lower --lr or --lam (what was saved before is kept)")
            if metrics and (self.step % every == 0 or self.step == last):
                self.log[-1].update({k: float(v) for k, v in metrics(self.gan, self.step).items()})
            now = time.monotonic()
            if now > saved + 10 or self.step == last:
                saved, per_step = now, (now - start) / (self.step - first)
                if out and self.rank == 0:
                    state = {name: part.state_dict() for name, part in self.parts.items()}
                    self.gan.save(out, **state, step=self.step, random=self.random.get_state(),
                                  same=same, log=self.log)
                text = "  ".join(f"{name} {value:.2f}" for name, value in losses.items())
                print(f"{label} {self.step}/{last}  {text}  {1000 * per_step:.0f} ms/step  "
                      f"{per_step * (last - self.step):.0f} s left", flush=True)
        return self.log

    def resume(self, path, same):
        with reading(path, "a checkpoint that this run can resume from"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in same.items():
                if saved["same"][name] != value:
                    raise ValueError(f"{name} was {saved['same'][name]} there, and is {value} now")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.step, self.log = saved["step"], saved["log"]
            if self.rank == 0:              # it wrote the file; the others must not draw the same
                self.random.set_state(saved["random"])

def pretrain(images, gan, settings, out, amp="off", resume=False, every=1000):
    """Train a GAN in place on images uint8 [N, 3, R, R], or float in [-1, 1]: the source model.
    `out`, such as source.pt: the model with the lowest Frechet distance to the images, measured
    each `every` steps; source.png: samples; source.pt.train: resume=True goes on from there."""
    out, trainer = Path(out), Trainer(gan, settings, amp)
    features = features_of("discriminator", gan.device)
    reference = features(to_float(images[::math.ceil(len(images) / 1000)]))

    def measure(gan, step):
        gan.calibrate()
        frechet = frechet_distance(features(gan.generate(1000, seed=1)), reference)
        print(f"Frechet distance {frechet:.4g}", flush=True)
        best = min(row.get("frechet", math.inf) for row in trainer.log)
        if frechet <= best or not out.exists():
            gan.save(out, settings=asdict(settings), step=step, frechet=frechet)
            image_grid(gan.generate(64), 8).save(out.with_suffix(".png"))
        return {"frechet": frechet}

    gan.G.train(), gan.D.train()
    return trainer.train(images, "pretrain", f"{out}.train", resume,
                         None if trainer.rank else measure, every)

def adapt(source, images, settings, out=None, amp="off", resume=False, F=None, metrics=None):
    """Adapt a source GAN, which is not changed, to a few images with EWC, or with a baseline.

    images    the shots: uint8 [N, 3, R, R], or float in [-1, 1];  settings  Adaptation
    out       where to keep a checkpoint, from which resume=True goes on
    amp       'off', 'bf16' or 'fp16';  F  the Fisher information, if it has been measured before
    metrics   a function of GAN and step that returns {name: number}, called every 400 steps
    Returns the adapted GAN, F, and the log, a list of one dict for every tenth step."""
    theta_S = weights(source.G_ema).detach()        # those of G_ema: it makes the better images
    if F is None:
        z = source.z(settings.fisher_samples, settings.seed).to(source.device)
        F = fisher_diagonal(source.G_ema, source.D, z)
    gan = copy.deepcopy(source)
    gan.G = copy.deepcopy(source.G_ema).eval()      # eval: BatchNorm stays as it is
    gan.D.train()
    for layer in gan.D.lower if settings.method == "freezed" else ():
        layer.requires_grad_(False)
    trainer = Trainer(gan, settings, amp, make_penalty(settings.method, settings.lam, theta_S, F))
    log = trainer.train(images.to(source.device), settings.method, out, resume, metrics,
                        source=zlib.crc32(theta_S.cpu().numpy()))
    return gan, F, log

@torch.no_grad()
def layers(G, theta_S, F):
    """Which weights changed (the paper's analysis): a dict for each layer of the adapted G: 'layer'
    (a module; a style belongs to its convolution), mean 'fisher', mean absolute 'weight' in theta_S
    and 'change' in %: sum |theta - theta_S| / sum |theta_S|, not a mean of single ratios, which
    would depend mostly on weights near 0."""
    sizes = {name: p.numel() for name, p in G.named_parameters() if p.requires_grad}
    table, groups, rows = torch.stack([weights(G), theta_S, F]), {}, []         # [3, weights]
    for name, part in zip(sizes, table.split(list(sizes.values()), 1)):
        groups.setdefault(name.rpartition(".")[0].removesuffix(".style") or name, []).append(part)
    for layer, parts in groups.items():
        theta, old, f = torch.cat(parts, 1)
        rows.append({"layer": layer, "fisher": float(f.mean()), "weight": float(old.abs().mean()),
                     "change": float(100 * (theta - old).abs().sum() / old.abs().sum())})
    return rows

# ---------- Networks ------------------------------------------------------------------------------
# Two families of about a million weights at 64x64.  In eval mode, images and logits do not depend
# on the rest of the batch: F, a mean over single samples, needs that.
class DCGANGenerator(nn.Sequential):
    """z [N, z_dim] -> image [N, 3, R, R] in (-1, 1): a DCGAN (Radford et al. 2016).  BatchNorm sees
    each batch while the source is pretrained, and stays in eval mode after that."""
    def __init__(self, z_dim, channels):
        super().__init__()
        for i, (c_in, c_out) in enumerate(zip([z_dim] + channels, channels)):
            stride, padding = (2, 1) if i else (1, 0)                   # 1 -> 4, then doubles
            conv = nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False)
            self.add_module(f"conv{4 << i}", conv)
            self.add_module(f"norm{4 << i}", nn.BatchNorm2d(c_out))
            self.add_module(f"relu{4 << i}", nn.ReLU())
        self.to_rgb = nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1, output_padding=1)    # R + 1
        for weight in (p for p in self.parameters() if p.ndim == 4):
            nn.init.normal_(weight, 0, 0.02)

    def forward(self, z):               # the mean of 2x2 pixels leaves no checkerboard of one pixel
        return torch.tanh(nnF.avg_pool2d(super().forward(z[:, :, None, None]), 2, 1))

class DCGANDiscriminator(nn.Module):
    """image [N, 3, R, R] -> logit [N].  No BatchNorm: D must judge each image by itself."""
    def __init__(self, channels):
        super().__init__()
        layers = []
        for c_in, c_out in zip([3] + channels, channels):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1), nn.LeakyReLU(0.2)]              # halves
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4))             # 4 -> 1
        for conv in self.layers[::2]:
            nn.init.kaiming_normal_(conv.weight, 0.2)
            nn.init.zeros_(conv.bias)
        self.lower = list(self.layers[:-3])     # what FreezeD freezes: down to 8x8 features

    def forward(self, x):
        return self.layers(x).flatten()

class Equalized(nn.Module):
    """Linear layer (shape [O, I]) or convolution ([O, I, k, k]) with equalised learning rate: its
    weights are stored as N(0, 1 / lr_multiplier^2) and scaled in forward, so that Adam's relative
    step is alike in every layer (Karras et al. 2018).  theta and F refer to the stored weights."""
    def __init__(self, *shape, bias=0.0, gain=math.sqrt(2), lr_multiplier=1.0, **conv):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / lr_multiplier)
        self.bias = nn.Parameter(torch.full(shape[:1], bias / lr_multiplier))
        self.scale = gain * lr_multiplier / math.sqrt(math.prod(shape[1:]))
        self.lr_multiplier, self.conv = lr_multiplier, conv

    def forward(self, x):
        weight, bias = self.weight * self.scale, self.bias * self.lr_multiplier
        if weight.ndim == 2:
            return nnF.linear(x, weight, bias)
        return nnF.conv2d(x, weight, bias, **self.conv)

class ModulatedConv(nn.Module):
    """x [N, I, H, W], w [N, w_dim] -> [N, O, H, W]: a convolution whose input channels are scaled
    by a style s(w), and whose output channels are divided by the norm of their scaled weights
    (Karras et al. 2020).  Scaling x, not the weight of each image, gives the same, faster."""
    def __init__(self, c_in, c_out, size, w_dim, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, size, size))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.style = Equalized(c_in, w_dim, bias=1.0, gain=1.0)
        self.scale, self.padding = 1 / math.sqrt(c_in * size**2), size // 2
        self.demodulate = demodulate

    def forward(self, x, w):
        s, weight = self.style(w), self.weight * self.scale                 # [N, I], [O, I, k, k]
        x = nnF.conv2d(x * s[:, :, None, None], weight, padding=self.padding)   # [N, O, H, W]
        if self.demodulate:
            inverse_norm = (s.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()  # [N, O]
            x = x * (math.sqrt(2) * inverse_norm)[:, :, None, None].to(x.dtype)     # may be half
        return x + self.bias[:, None, None].to(x.dtype)

class StyleGANGenerator(nn.Module):
    """z [N, z_dim] -> image [N, 3, R, R] in (-1, 1): a small StyleGAN2 (Karras et al. 2020).  No
    noise inputs: an image depends on z alone, so that images of the same z can be compared.  tanh
    at the end, as in DCGAN: flat colours, such as a white ground, are easy to draw with it."""
    def __init__(self, z_dim, channels):
        super().__init__()
        self.mapping = nn.ModuleList(Equalized(z_dim, z_dim, lr_multiplier=0.01) for _ in range(4))
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.first = ModulatedConv(channels[0], channels[0], 3, z_dim)
        self.before = nn.ModuleList(ModulatedConv(i, o, 3, z_dim)
                                    for i, o in zip(channels, channels[1:]))
        self.after = nn.ModuleList(ModulatedConv(c, c, 3, z_dim) for c in channels[1:])
        self.to_rgb = nn.ModuleList(ModulatedConv(c, 3, 1, z_dim, False) for c in channels)

    def forward(self, z):
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()       # [N, z_dim], on a sphere
        for layer in self.mapping:
            w = nnF.leaky_relu(layer(w), 0.2)                               # [N, z_dim]
        x = self.constant.expand(len(z), -1, -1, -1)                        # [N, C, 4, 4]
        x = nnF.leaky_relu(self.first(x, w), 0.2)
        image = self.to_rgb[0](x, w)                                        # [N, 3, 4, 4]
        for before, after, to_rgb in zip(self.before, self.after, self.to_rgb[1:]):
            x = nnF.leaky_relu(self.upsample(before(x, w)), 0.2)            # [N, C', 2H, 2W]
            x = nnF.leaky_relu(after(x, w), 0.2)
            image = self.upsample(image) + to_rgb(x, w)                     # [N, 3, 2H, 2W]
        return torch.tanh(image)

class MinibatchStd(nn.Module):
    """Append one channel: the mean standard deviation in groups of four images, or of all, which
    tells D if they lack variety (Karras et al. 2018).  In eval mode its running mean takes its
    place, as in BatchNorm, so that D judges each image by itself: F needs single samples."""
    def __init__(self):
        super().__init__()
        self.register_buffer("running_std", torch.zeros(()))

    def forward(self, x):                                                       # [N, C, H, W]
        n, std = len(x), self.running_std.expand(len(x))
        if self.training and n > 1:
            group = 4 if n % 4 == 0 else n
            variance = x.float().unflatten(0, (group, -1)).var(0, unbiased=False)   # [N/4, C, H, W]
            std = (variance + 1e-8).sqrt().mean((1, 2, 3)).repeat(group)            # [N]
            self.running_std.lerp_(std.detach().mean(), 0.01)
        return torch.cat([x, std.to(x.dtype)[:, None, None, None].expand(n, 1, *x.shape[2:])], 1)

class ResidualBlock(nn.Module):
    """Halve the resolution: a strided convolution beside an averaged skip, scaled to variance 1."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.main = Equalized(c_out, c_in, 4, 4, stride=2, padding=1)
        self.skip = Equalized(c_out, c_in, 1, 1, gain=1.0)

    def forward(self, x):
        main = nnF.leaky_relu(self.main(x), 0.2)                        # [N, C', H/2, W/2]
        return (main + self.skip(nnF.avg_pool2d(x, 2))) * math.sqrt(0.5)

class StyleGANDiscriminator(nn.Module):
    """image [N, 3, R, R] -> logit [N]: residual, with minibatch standard deviation."""
    def __init__(self, c):
        super().__init__()
        self.stem = Equalized(c[0], 3, 4, 4, stride=2, padding=1)                       # R -> R/2
        self.blocks = nn.Sequential(*(ResidualBlock(i, o) for i, o in zip(c, c[1:])))   # R/2 -> 4
        self.minibatch_std, self.last = MinibatchStd(), Equalized(64, c[-1] + 1, 3, 3, padding=1)
        self.hidden, self.out = Equalized(128, 64 * 16), Equalized(1, 128, gain=1.0)
        self.lower = [self.stem, *self.blocks[:-1]]     # what FreezeD freezes: down to 8x8 features

    def forward(self, x):
        x = self.blocks(nnF.leaky_relu(self.stem(x), 0.2))                  # [N, C, 4, 4]
        x = nnF.leaky_relu(self.last(self.minibatch_std(x)), 0.2)           # [N, 64, 4, 4]
        return self.out(nnF.leaky_relu(self.hidden(x.flatten(1)), 0.2)).flatten()

FAMILIES = {        # G, D, z_dim, and the channels of G at 4, 8, 16, ... pixels
    "stylegan": (StyleGANGenerator, StyleGANDiscriminator, 128, [128, 128, 96, 48, 24, 12, 8]),
    "dcgan": (DCGANGenerator, DCGANDiscriminator, 64, [192, 128, 96, 64, 32, 16])}

class GAN(nn.Module):
    """Generator G, its moving average G_ema, and discriminator D.  arch: 'dcgan' or 'stylegan';
    resolution: 32, 64, 128 or 256; then the sizes, by default those of the shipped sources."""
    SIZES = ("arch", "resolution", "z_dim", "g_channels", "d_channels")

    def __init__(self, arch, resolution, z_dim=None, g_channels=None, d_channels=None):
        super().__init__()
        make_G, make_D, default_z_dim, channels = FAMILIES[arch]
        stages = int(math.log2(resolution)) - 2                         # 64 pixels: 4, 8, 16, 32
        self.arch, self.resolution, self.z_dim = arch, resolution, z_dim or default_z_dim
        self.g_channels = g_channels or channels[:stages + (arch == "stylegan")]
        self.d_channels = d_channels or [8, 16, 32, 64, 128, 256][-stages:]
        self.G, self.D = make_G(self.z_dim, self.g_channels), make_D(self.d_channels)
        self.G_ema = copy.deepcopy(self.G).eval()

    device = property(lambda self: next(self.parameters()).device)

    def z(self, n, seed=0):
        """n noise vectors [n, z_dim].  Drawn one by one, so that number i of a seed is the same
        whatever n is: in the source, in every adaptation, in every picture."""
        random = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randn(self.z_dim, generator=random) for _ in range(n)])

    @torch.no_grad()
    def images(self, z):
        """z [N, z_dim] -> images of G_ema, float [N, 3, R, R] in [-1, 1], on the CPU."""
        return torch.cat([self.G_ema(part.to(self.device)).float().cpu() for part in z.split(100)])

    def generate(self, n, seed=0):
        return self.images(self.z(n, seed))

    @torch.no_grad()
    def calibrate(self):
        """Recompute G_ema's BatchNorm statistics over 4,096 z: its weights are not those of G."""
        for norm in (m for m in self.G_ema.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.momentum = None                        # None: the plain mean of all batches
        random = torch.Generator().manual_seed(0)
        self.G_ema.train()
        for _ in range(16 if self.arch == "dcgan" else 0):
            self.G_ema(torch.randn(256, self.z_dim, generator=random).to(self.device))
        self.G_ema.eval()

    def save(self, path, **extra):
        """Write the sizes, G_ema, D and extra: only tensors, numbers, strings, lists and dicts.
        Written to another name and renamed, so that a kill leaves the old file or the new one."""
        extra.update({name: getattr(self, name) for name in self.SIZES}, format="ewc-gan 1",
                     G_ema=self.G_ema.state_dict(), D=self.D.state_dict())
        unfinished = Path(f"{path}.tmp")
        try:
            torch.save(extra, unfinished)
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:        # RuntimeError: torch's, on a full disk
            unfinished.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written; is the disk full? ({error})") from error

    @classmethod
    def load(cls, path, device="cpu"):
        """The GAN in a checkpoint, in eval mode, with G as G_ema.  No code in the file is run.
        Raises UserError if the file cannot be used."""
        with reading(path, "a checkpoint of this program"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            gan = cls(*(saved[name] for name in cls.SIZES))
            for net, name in ((gan.G, "G_ema"), (gan.G_ema, "G_ema"), (gan.D, "D")):
                net.load_state_dict(saved[name])
            if not all(tensor.isfinite().all() for tensor in gan.state_dict().values()):
                raise ValueError("weights that are not finite")
        return gan.eval().to(device, memory_format=memory_format(device))

def memory_format(device):              # in which these convolutions are fastest; not safe on MPS
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last

# ---------- Images --------------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path, what):
    try:
        yield
    except Exception as error:                  # a damaged file can raise anything
        raise UserError(f"{path}: not {what}, or damaged ({error!r:.200})") from error

def load_images(folder, resolution, limit=None):
    """The images below a folder, or the first `limit`, by name: uint8 [N, 3, R, R].  Every format
    that Pillow reads, of any size, cropped to squares at the centre; hidden files are left out,
    links are followed.  Raises UserError if there are none, or one cannot be read."""
    def read(path):
        with reading(path, "an image that Pillow can read"), Image.open(path) as file:
            file.getexif(), file.info.pop("exif", None)     # else rewritten, which odd tags break
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):              # 16 bits, which convert("RGB") would clip
                image = image.convert("I").point(lambda value: value / 257)
            if image.has_transparency_data:             # on white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            size = resolution, resolution
            return pil_to_tensor(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS))

    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = (Path(folder, name) for name in glob.glob("**/*.*", root_dir=folder, recursive=True))
    files = sorted(path for path in found if path.is_file())
    paths = [path for path in files if path.suffix.lower() in readable]
    if others := {path.suffix for path in files} - {path.suffix for path in paths}:
        print(f"{folder}: files of other types are left out: {' '.join(sorted(others))}")
    if not paths[:limit]:
        raise UserError(f"{folder}: no such folder, or no images in it that Pillow can read")
    with ThreadPoolExecutor() as pool:                  # Pillow decodes without Python's lock
        return torch.stack(list(pool.map(read, paths[:limit])))

def to_float(images):
    """uint8 0..255 -> float -1..1; floats are taken to be in -1..1 already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images

# ---------- Measures ------------------------------------------------------------------------------
# Fit to the target, and diversity.  The paper reports FID and LPIPS; these are of the same kind, in
# other features.  Read both together: the source itself is the most diverse of all.
def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): the Frechet distance of two Gaussians
    fitted to features a [N, C] and b [M, C].  With R^T R = C, the last trace is the sum of the
    singular values of R_a R_b^T."""
    def root(x):
        return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R

    R_a, R_b = root(a.double()), root(b.double())
    trace = R_a.square().sum() + R_b.square().sum() - 2 * torch.linalg.svdvals(R_a @ R_b.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + trace)

def precision_recall(real, fake, k=5):
    """Fractions of fake [M, C] inside the manifold of real [N, C], and of real inside that of fake:
    a union of balls, each reaching to a point's k-th neighbour (Kynkaanniemi et al. 2019)."""
    def inside(x, points):
        radius = torch.cdist(points, points).kthvalue(k + 1, dim=1).values      # 1st: the point
        return float((torch.cdist(x, points) <= radius).any(1).float().mean())
    return inside(fake, real), inside(real, fake)

def diversity_and_nearest(features, shots):
    """(1) Mean distance in a cluster of images with the same nearest shot, averaged over clusters
    of two or more (after Ojha et al. 2021); (2) mean distance of an image to its nearest shot."""
    nearest = torch.cdist(features, shots).min(1)
    clusters = [features[nearest.indices == i] for i in range(len(shots))]
    distances = [torch.pdist(cluster).mean() for cluster in clusters if len(cluster) > 1]
    return float(sum(distances) / max(len(distances), 1)), float(nearest.values.mean())

class Metrics:
    """Measures the samples of a GAN: fit to held-out images, if there are any, then diversity.
    features: of features_of().  As training mirrors the shots, mirror images count as shots."""
    def __init__(self, features, shots, reference=None):
        self.n = 200 if reference is None else 1000
        self.shots = features(torch.cat([shots, shots.flip(3)]))                    # [2 K, C]
        self.reference = self.shots[:0] if reference is None else features(reference[:self.n])
        scale = (self.shots if reference is None else self.reference).square().mean().sqrt()
        self.of_gan = lambda gan: features(gan.generate(self.n, seed=1)) / scale    # [n, C]
        self.shots, self.reference = self.shots / scale, self.reference / scale

    def __call__(self, gan, step=None):
        return self.compare(self.of_gan(gan), self.reference)

    def compare(self, x, reference):
        row = {}
        if len(reference):
            row["frechet"] = frechet_distance(x, reference)
            row["precision"], row["recall"] = precision_recall(reference, x)
        row["diversity"], row["nearest_shot"] = diversity_and_nearest(x, self.shots)
        return row

def features_of(judge, device):
    """A function, images float [N, 3, R, R] in [-1, 1] -> features [N, C] of a network, pooled.
    judge: 'squeezenet', torchvision's, trained on ImageNet, which is independent of all runs, or
    'discriminator', the last two stages of the shipped DCGAN's D, with the channels at each place
    scaled to length 1, as in LPIPS (Zhang et al. 2018): no download, but it knows the source."""
    if judge == "squeezenet":
        with reading("--features squeezenet", "downloaded yet (go online once, 5 MB)"):
            net = squeezenet1_1(weights=SqueezeNet1_1_Weights.IMAGENET1K_V1, progress=False)
        net = net.features.to(device).eval().requires_grad_(False)
    else:
        net = GAN.load(SHIPPED / "source_dcgan.pt", device).D.layers.requires_grad_(False)

    def features(x):
        if judge == "squeezenet":
            x = nnF.interpolate(x.to(device) / 2 + 0.5, 128, mode="bilinear", antialias=True)
            x = normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            return net(x).mean((2, 3)).cpu()                                        # [N, 512]
        x8 = net[:6](nnF.interpolate(x.to(device), 64, mode="area"))                # [N, 128, 8, 8]
        x4 = net[6:8](x8)                                                           # [N, 256, 4, 4]
        return torch.cat([nnF.normalize(x, dim=1).mean((2, 3)) for x in (x8, x4)], 1).cpu()
    return lambda images: torch.cat([features(batch) for batch in images.split(100)])

# ---------- Pictures and tables -------------------------------------------------------------------
def image_grid(images, columns, scale=1):
    """float [N, 3, R, R] in [-1, 1] -> one PIL picture, row by row, white lines between images."""
    grid = make_grid(nnF.interpolate(images, scale_factor=scale), columns, pad_value=1)
    return to_pil_image(((grid + 1) * 127.5).round().clamp(0, 255).byte())

def samples_picture(shots, rows):
    """Up to 40 shots at the left; at the right rows of samples, [(label, images), ...]."""
    pictures = [image_grid(x, len(x), max(1, 128 // x.shape[-1])) for _, x in rows]
    height = pictures[0].height + 4
    columns = math.ceil(len(shots[:40]) * (shots.shape[-1] + 2) / (height * len(rows)))
    left = image_grid(to_float(shots[:40]), columns)
    size = left.width + pictures[0].width + 126, 26 + max(height * len(rows), left.height)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 5), "target images", "black", font)
    sheet.paste(left, (6, 26))
    for y, (label, _), picture in zip(range(26, 10**6, height), rows, pictures):
        pen.text((left.width + 110, y + height / 2), label, "black", font, anchor="rm")
        sheet.paste(picture, (left.width + 120, y))
    return sheet

def chart(panels, width=1200, height=120):
    """Bars, in panels one below the other: [(title, names, {run: values}, foot of the bars)]."""
    sheet = Image.new("RGB", (width, (height + 60) * len(panels)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    colors = "#1f5fa8", "#d9822b", "#3f8f5f", "#a23b72", "#777777", "#c8b400"
    for end, (title, names, runs, foot) in zip(range(height + 34, 10**6, height + 60), panels):
        table = torch.tensor(list(runs.values())).nan_to_num(foot, foot)    # of ratios to zero
        high, group = float(table.max()), (width - 68) / len(names)
        heights = (table - foot).clamp(min=0) * (height / (high - foot or 1))   # [runs, names]
        pen.text((60, end - height - 26), title, "black", font)
        for part in (0, 0.5, 1):                                        # the axis
            y, value = end - part * height, foot + part * (high - foot)
            pen.text((52, y), f"{value:.3g}", "black", font, anchor="rm")
            pen.line([56, y, width, y], "#dddddd")
        for r, (run, row, color) in enumerate(zip(runs, heights.tolist(), colors * 9)):
            pen.text((300 + 130 * r, end - height - 26), run, color, font)
            for i, h in enumerate(row):
                x = 60 + group * (i + 0.8 * r / len(runs))
                pen.rectangle([x, end - h, x + 0.8 * group / len(runs), end], color)
        for i in range(0, len(names), math.ceil(40 / group)):
            pen.text((60 + i * group, end + 2), str(names[i]), "black", font)
    return sheet

def layers_picture(runs):
    """runs: {name: rows of layers()}.  F of the first run, then what changed in all of them."""
    first, *_ = runs.values()
    names, fisher = zip(*((row["layer"], math.log10(row["fisher"] or 1e-30)) for row in first))
    changes = {run: [row["change"] for row in rows] for run, rows in runs.items()}
    return chart([("mean Fisher information, log10", names, {"": fisher}, min(fisher) - 0.3),
                  ("change of the weights in %", names, changes, 0)])

def save_interpolation(path, source, gan, stops=4, frames=8, columns=4):
    """A GIF that moves through z: the source in the upper row, the adapted GAN in the lower."""
    corners = source.z(columns * stops).view(stops, columns, -1)
    pictures = []
    for a, b in zip(corners, corners.roll(-1, 0)):
        for t in torch.arange(frames) * (math.pi / 2 / frames):         # z nearly keeps its length
            z = t.cos() * a + t.sin() * b
            rows = torch.cat([source.images(z), gan.images(z)])
            pictures.append(image_grid(rows, columns, max(1, 128 // gan.resolution)))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)

def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)

def print_table(table):
    """A line for each run: the mean of every measure, and its spread if there are several seeds."""
    print("".join(f"{name:>18}" for name in table[0]))
    for run in dict.fromkeys(row["run"] for row in table):
        cells = [run]
        for name in list(table[0])[1:]:
            values = torch.tensor([row[name] for row in table if row["run"] == run])
            spread = f" ±{values.std():.2g}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3g}{spread}")
        print("".join(f"{cell:>18}" for cell in cells))

def write_run(out, source, shots, gan, F, log, progress):
    """All pictures and tables of one run; progress: {step: samples}.  Returns layers()'s rows."""
    before, after = source.generate(16), gan.generate(16)
    samples_picture(shots, [("source", before[:8]), ("adapted", after[:8]), ("source", before[8:]),
                            ("adapted", after[8:])]).save(out / "samples.png")
    if progress:                                            # not where a finished run was resumed
        shown = [("source", before[:8]), *((f"step {step}", x) for step, x in progress.items())]
        samples_picture(shots, shown).save(out / "progress.png")
    save_interpolation(out / "interpolation.gif", source, gan)
    rows, panels = layers(gan.G_ema, weights(source.G_ema), F), []
    layers_picture({"": rows}).save(out / "layers.png")
    for name in list(log[-1])[1:]:
        steps, values = zip(*((row["step"], row[name]) for row in log if name in row))
        foot = 0.9 * min(values) if min(values) > max(values) / 2 else min(0, *values)
        panels.append((f"{name} by step", steps, {"": values}, foot))
    chart(panels).save(out / "curves.png")
    write_table(out / "layers.csv", rows)
    write_table(out / "log.csv", log)
    diversity = [row["diversity"] for row in log if "diversity" in row]
    if diversity[-1] < 2 / 3 * diversity[0]:
        print("diversity fell by a third since step 400: try fewer --steps, then a larger --lam")
    return rows

# ---------- Command line --------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")

def add_settings(p, table, several=()):
    """Options for the settings that have a help text; `several` of them take several values."""
    for f in (f for f in fields(table["stylegan"]) if f.metadata):
        values = dict.fromkeys(str(getattr(settings, f.name)) for settings in table.values())
        default = f"(default: {', for the DCGAN '.join(values)})"
        p.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar="X",
                       nargs="+" if f.name in several else None,
                       choices=f.metadata.get("choices"), help=f"{f.metadata['help']} {default}")
    cuda, can = torch.cuda.is_available(), getattr(torch.cpu, "get_capabilities", dict)()
    devices = ["cuda"] * cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    fast = torch.cuda.is_bf16_supported(False) if cuda else can.get("avx512_bf16")
    p.add_argument("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    p.add_argument("--amp", choices=["off", "bf16", "fp16"], help="mixed precision (default: "
                   "%(default)s)", default="bf16" if fast else "fp16" if cuda else "off")

def settings_from_args(defaults, args):
    """The settings of a family, with what the command line names in place of its defaults."""
    given = {f.name: getattr(args, f.name) for f in fields(defaults) if f.metadata}
    return replace(defaults, **{k: v for k, v in given.items() if not isinstance(v, list | None)})

def parse_arguments(argv):
    p = Parser("python ewc_gan.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", type=Path, metavar="DIR", help="the few images to adapt to")
    p.add_argument("--source", type=Path, metavar="FILE", default=SHIPPED / "source_stylegan.pt",
                   help="a model of pretrain_source.py (default: data/source_stylegan.pt)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: out/TARGET)")
    p.add_argument("--shots", type=int, metavar="K", help="use the first K images (default: all)")
    p.add_argument("--resume", action="store_true", help="go on with runs that were stopped")
    p.add_argument("--reference", type=Path, metavar="DIR", help="held-out images, to measure fit")
    p.add_argument("--features", default="discriminator", choices=["discriminator", "squeezenet"],
                   help="of the measures; SqueezeNet is a download of 5 MB (default: %(default)s)")
    add_settings(p, ADAPT, several=("method", "lam", "seed"))
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="a model to --generate from")
    p.add_argument("--generate", type=int, metavar="N", help="write N images into --out, then stop")
    args = p.parse_args(argv)
    if any(n is not None and n < 1 for n in (args.shots, args.generate)):
        p.error("--shots and --generate: must be 1 or more")
    if bool(args.target) == bool(args.checkpoint) or bool(args.checkpoint) != bool(args.generate):
        p.error("give --target, as in --target data/10shot, or --checkpoint with --generate")
    args.out = args.out or Path("out", args.target.resolve().name if args.target else "images")
    return args

def refuse_inside(out, *folders):
    for folder in filter(None, folders):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: lies in {folder}, whose images are read")

def run_generate(args):
    gan, (seed, *_) = GAN.load(args.checkpoint, args.device), args.seed or [0]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, z in enumerate(gan.z(args.generate, seed).split(1)):
        image_grid(gan.images(z), 1).save(args.out / f"seed{seed}_{i:05d}.png")
    print(f"{args.generate} images written; {args.out} holds {len(list(args.out.iterdir()))}")

def planned_runs(args, settings):
    """{folder: (name, settings)} of every run that is asked for; without a penalty lambda is 0."""
    runs, seeds = {}, args.seed or [settings.seed]
    for method in args.method or [settings.method]:
        lams = [0.0] if method in ("finetune", "freezed") else args.lam or [settings.lam]
        for lam in lams:
            name = f"{method}_{lam:g}" if len(lams) > 1 else method
            for seed in seeds:
                folder = f"{name}_seed{seed}" if len(seeds) > 1 else name
                runs[folder] = name, replace(settings, method=method, lam=lam, seed=seed)
    return runs

def run_adapt(args):
    """Adapt, measure and picture every run that is asked for: one in out, several in folders."""
    source, out = GAN.load(args.source, args.device), args.out
    refuse_inside(out, args.target, args.reference)
    shots = load_images(args.target, source.resolution, args.shots)
    reference = args.reference and to_float(load_images(args.reference, source.resolution, 1000))
    if args.reference and len(reference) < 12:      # each half: a point and 5 neighbours
        raise UserError(f"--reference {args.reference}: needs 12 images, better 1,000")
    metrics = Metrics(features_of(args.features, args.device), to_float(shots), reference)
    runs = planned_runs(args, settings_from_args(ADAPT[source.arch], args))
    print(f"{len(shots)} images, {source.arch} of {source.resolution} pixels, on {args.device}, "
          f"amp {args.amp}, into {out}: {' '.join(runs)}", flush=True)
    table, F, samples, changes = [{"run": "source", **metrics(source)}], {}, {}, {}
    samples["source"] = source.generate(8)
    if args.reference:      # one half against the other: nearly what a perfect G would get
        table.append({"run": "held-out", **metrics.compare(*metrics.reference.chunk(2))})
    for folder, (name, run) in runs.items():
        folder = out / folder if len(runs) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, progress = folder / "adapted.pt", {}

        def measure(gan, step):
            progress[step] = gan.generate(8)
            return metrics(gan)

        gan, F[run.seed], log = adapt(source, shots, run, checkpoint, args.amp,
                                      args.resume and checkpoint.exists(), F.get(run.seed), measure)
        config = {**vars(args), **asdict(run), "images": len(shots), "torch": torch.__version__}
        (folder / "config.json").write_text(json.dumps(config, default=str, indent=1))
        rows = write_run(folder, source, shots, gan, F[run.seed], log, progress)
        changes.setdefault(name, rows)                          # of several seeds, show the first
        samples.setdefault(name, gan.generate(8))
        last = {key: log[-1][key] for key in list(table[0])[1:]} if progress else metrics(gan)
        table.append({"run": name, "seed": run.seed, **last})
    print_table(table)
    if len(runs) > 1:
        write_table(out / "comparison.csv", table)
        samples_picture(shots, samples.items()).save(out / "comparison.png")
        layers_picture(changes).save(out / "layers.png")
    print(f"{out}: " + "  ".join(sorted(path.name for path in out.iterdir())))

@contextlib.contextmanager
def clean_exit(program):
    try:
        yield
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{program}: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{program}: stopped; a training goes on with the same command and --resume")

def main(argv=None):
    with clean_exit("ewc_gan.py"):
        args = parse_arguments(argv)
        torch.backends.cudnn.allow_tf32 = False         # float32 is to be float32: F, R1, measures
        run_generate(args) if args.generate else run_adapt(args)

if __name__ == "__main__":
    main()
