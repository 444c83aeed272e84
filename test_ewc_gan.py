"""Tests against closed forms, brute force, other implementations, and bit by bit.

    python -m pytest                                    # everything
    python -m pytest -k exercise_3 -x -q --tb=short     # in a student's copy: grade exercise 3
"""
import copy
import csv
import io
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as nnF
from torch.utils._python_dispatch import TorchDispatchMode

import ewc_gan
import pretrain_source
from ewc_gan import (GAN, Adaptation, Trainer, UserError, adapt, d_logistic_loss, d_r1_loss,
                     ewc_penalty, fisher_diagonal, g_nonsaturating_loss, layer_changes,
                     load_images, pretrain, scaled_fisher, to_float, weights)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))
import draw_faces  # noqa: E402
import evaluate  # noqa: E402

torch.set_num_threads(1)                    # toy networks are faster so
os.environ["OMP_NUM_THREADS"] = "1"         # also in the processes that tests start
SHOTS = HERE / "data" / "10shot"
IMAGES = load_images(SHOTS, 32)
TOY = Adaptation(steps=4, batch_size=2, fisher_samples=4, r1_every=2,
                 method="raw", lam=100.0)
PROGRAMS = {"ewc_gan": ewc_gan, "pretrain_source": pretrain_source,
            "draw_faces": draw_faces, "evaluate": evaluate}
TOY_RUN = "--steps 12 --batch-size 2 --fisher-samples 2".split()
each_arch = pytest.mark.parametrize("arch", ["dcgan", "stylegan"])

# ---------- Helpers -------------------------------------------------------------------------
@torch.no_grad()
def small_gan(arch, seed=0):
    """A GAN of 32 pixels and a few thousand weights, its BatchNorm frozen at measured values."""
    torch.manual_seed(seed)
    channels = [12, 10, 8] if arch == "dcgan" else [12, 10, 8, 6]
    gan = GAN(arch, 32, 8, channels, [6, 8, 10])
    gan.G_ema.train()(torch.randn(64, 8))
    gan.G_ema.eval()
    gan.G.load_state_dict(gan.G_ema.state_dict())
    for p in gan.G.eval().parameters():                 # as after a training, G is not G_ema
        p.mul_(1.05)
    return gan

def check(fact, message):
    """Fail with this line alone: no tensors, no stack of calls."""
    if not fact:
        pytest.fail(message, pytrace=False)

def is_close(actual, expected, rtol=1e-4, atol=1e-6):
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected).double()
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol, atol)

def close(actual, expected, message, mistakes={}, **tolerance):
    """Fail if the values differ.  mistakes: {what is wrong: the value that it gives}."""
    if not is_close(actual, expected, **tolerance):
        for wrong, value in mistakes.items():
            check(not is_close(actual, value, **tolerance), f"{message}: {wrong}")
        check(False, message)

def error_of(function, *arguments):
    """The exception that a call raises, or None."""
    try:
        function(*arguments)
    except NotImplementedError:                         # an exercise that is not solved
        raise
    except Exception as error:
        return error

def same_states(a, b):
    for name, x in a.state_dict().items():
        check(torch.equal(x, b.state_dict()[name]), f"{name} differs")

def run(*argv, program=ewc_gan):
    """The exit code of a program; what it prints is read from capsys."""
    try:
        program.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0

def table_of(path):
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))

def stopped(step, monkeypatch, train, *arguments, **more):
    """A training that is interrupted, as by Ctrl-C, before this step."""
    def train_step(self, images, train_step=Trainer.train_step):
        if self.step == step:
            raise KeyboardInterrupt
        return train_step(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", train_step)
        train(*arguments, **more)

# ---------- Exercises 1 and 2: losses -------------------------------------------------------
def test_exercise_1_losses_have_these_values():
    """The values were computed from the definitions, with fifty digits."""
    real = torch.tensor([0.3, -2.0])
    fake = torch.tensor([1.5, -0.5, 0.1])
    close(d_logistic_loss(real, fake), 2.3139373,
          "L_D is not -E[log D(x)] - E[log(1 - D(G(z)))], D(x) being the sigmoid of the logit",
          {"a sum over the images, not their mean": 5.6011702,
           "real and fake are exchanged": 1.0972706})
    close(g_nonsaturating_loss(fake), 0.6066290,
          "L_adv of G is not -E[log D(G(z))], D(x) being the sigmoid of the logit",
          {"this is E[log(1 - D(G(z)))], which saturates": -0.9732956,
           "a sum over the images, not their mean": 1.8198869})

def test_exercise_1_losses_of_large_logits_do_not_overflow():
    """The sigmoid of 200 is rounded to 1, and exp(200) to infinity; the losses are 0 or 200."""
    zero = torch.zeros(1)                               # D(x) = 1/2: adds log 2 = .6931
    for what, loss, at_200, at_minus_200 in (
            ("L_D of a real image", lambda a: d_logistic_loss(a, zero), 0.6931, 200.6931),
            ("L_D of a fake image", lambda a: d_logistic_loss(zero, a), 200.6931, 0.6931),
            ("L_adv of G", g_nonsaturating_loss, 0, 200)):
        for logit, expected in ((200.0, at_200), (-200.0, at_minus_200)):
            a = torch.tensor([logit], requires_grad=True)
            message = f"{what} overflows, or is rounded, for a logit of {logit:g}"
            close(loss(a), expected, message, atol=1e-4)
            slope, = torch.autograd.grad(loss(a), a)
            check(slope.isfinite(), f"the gradient of {message}")

def test_exercise_2_r1_in_closed_form():
    """D(x) = sum c x^2 has gradient 2 c x: R1 = E sum (2 c x)^2, d R1 / d c = 8 c E sum x^2."""
    c = torch.tensor(0.7, requires_grad=True)
    x = torch.randn(5, 3, 4, 4)
    r1 = d_r1_loss(lambda images: c * images.square().sum((1, 2, 3)), x)
    size = x.square().sum((1, 2, 3))
    expected = 1.96 * size.mean()
    close(r1, expected, "R1 is not the squared length of each image's gradient, averaged",
          {"the mean over pixels, not their sum": expected / 48,
           "the sum over images, not their mean": expected * 5})
    check(r1.requires_grad, "R1 is not differentiable in D: take the gradient with create_graph")
    gradient, = torch.autograd.grad(r1, c)
    close(gradient, 5.6 * size.mean(), "d R1 / d D is wrong")
    check(not x.requires_grad, "the caller's images were changed: detach them first")

# ---------- Exercise 3: Fisher information --------------------------------------------------
def conv_and_linear(logits=1, dropout_G=0.0, dropout_D=0.0):
    """A G whose image is a linear function of z, and a linear D.  Five weights have no effect.
    Returns G, D, z and d sum log sigmoid(A W z) / d W_jk = (sigmoid(-A W z) A)_j z_k."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2, bias=False).to(memory_format=torch.channels_last)
    G = nn.Sequential(conv, nn.Flatten(), nn.Dropout(dropout_G))
    G.idle = nn.Parameter(torch.ones(5))
    linear = nn.Linear(3, logits, bias=False)
    D = nn.Sequential(nn.Dropout(dropout_D), linear)
    z = torch.randn(50, 2, 2, 2)
    flat = z.flatten(1)                                                     # [50, 8]
    A = linear.weight.detach()                                              # [logits, 3]
    AW = A @ conv.weight.detach().flatten(1)                                # [logits, 8]
    of_image = torch.sigmoid(-flat @ AW.T) @ A                              # [50, 3]
    gradients = torch.einsum("nj,nk->njk", of_image, flat)
    return G, D, z, gradients.flatten(1)                                    # [50, 24]

def test_exercise_3_fisher_in_closed_form():
    """F_i = E_z[(d log D(G(z)) / d theta_i)^2], for a G and a D that are linear."""
    G, D, z, gradients = conv_and_linear()
    expected = gradients.square().mean(0)
    squared_mean = gradients.mean(0).square()
    of_logit = D[1].weight.detach().T * z.flatten(1)[:, None]               # [50, 3, 8]
    error = error_of(fisher_diagonal, G, D, z)
    check(not error, f"fisher_diagonal fails: {error}")
    F = fisher_diagonal(G, D, z)
    check(F.shape == (29,), "F is not one vector with a value for each trainable weight of G")
    same_values = is_close(F.sort().values[5:], expected.sort().values, atol=1e-8)
    close(F[5:], expected, "F is not E_z[(d log D(G(z)) / d theta)^2]",
          {"this is a sum over z, not the mean": 50 * expected,
           "the mean gradient was squared; square the gradient of each z": squared_mean,
           "the gradient of a batch was squared; square that of each z": 50 * squared_mean,
           "the gradient of a mean was squared; square that of each z": squared_mean / 50,
           "the gradients are not squared": gradients.mean(0),
           "the gradients are made positive, not squared": gradients.abs().mean(0),
           "the order is not that of weights(G): flatten() of each parameter":
               F[5:] if same_values else expected,
           "this is for the logit; D(x) is its sigmoid": of_logit.square().mean(0).flatten()},
          atol=1e-8)
    close(F[:5], torch.zeros(5), "F of a weight without effect is not 0")

def test_exercise_3_fisher_of_several_logits_and_with_dropout():
    for message, given in (
            ("of several logits of an image, the log D are summed", {"logits": 2}),
            ("G must be in eval mode meanwhile", {"dropout_G": 0.5}),
            ("D must be in eval mode meanwhile", {"dropout_D": 0.5})):
        G, D, z, gradients = conv_and_linear(**given)
        F = fisher_diagonal(G, D, z)
        close(F[5:], gradients.square().mean(0), message, atol=1e-8)

def test_exercise_3_fisher_of_a_D_that_is_sure():
    """At a logit of -200 the sigmoid is 0 in float32, but d log D / d logit is 1."""
    G, D, z, _ = conv_and_linear()
    z = z[:1]
    A = D[1].weight.data
    A *= -200 / D(G(z))[0]
    message = "log(sigmoid(logit)) overflows to -inf for a logit of -200: see exercise 1"
    check(not error_of(fisher_diagonal, G, D, z), message)
    F = fisher_diagonal(G, D, z)
    close(F[5:], torch.outer(A[0], z.flatten()).square().flatten(), message)

def test_exercise_3_fisher_refuses_what_has_no_mean():
    G, D, z, _ = conv_and_linear()
    error = error_of(fisher_diagonal, G, D, z[:0])
    check(isinstance(error, UserError), "F of no z has no value: raise UserError")
    G[0].weight.data.fill_(math.nan)
    error = error_of(fisher_diagonal, G, D, z)
    check(isinstance(error, UserError), "G returns NaN, so F is not finite: raise UserError")

def test_exercise_3_fisher_leaves_the_networks_as_they_were():
    def state():
        return {"mode": [module.training for module in gan.modules()],
                "requires_grad": [p.requires_grad for p in gan.parameters()],
                "gradients": [str(p.grad) for p in gan.parameters()],
                "weights or buffers": [x.sum() for x in gan.state_dict().values()]}

    gan = small_gan("dcgan")
    z = torch.randn(4, 8)
    gan.G.train()
    gan.G.norm4.eval()                                  # a mode per module, not per network
    gan.G.norm4.requires_grad_(False)
    gan.D(gan.G(z)).sum().backward()                    # gradients that must stay
    before = state()
    error = error_of(fisher_diagonal, gan.G, gan.D, z)
    check(not error, f"weights of G that are frozen: {error}")
    for what, value in state().items():
        check(value == before[what], f"fisher_diagonal changed the {what} of a network")
    F = fisher_diagonal(gan.G, gan.D, z)
    check(len(F) == len(weights(gan.G)), "F is for the trainable parameters of G alone")

def test_exercise_3_fisher_is_float32_under_autocast_and_works_under_no_grad():
    gan = small_gan("stylegan")
    z = torch.randn(3, 8)
    plain = fisher_diagonal(gan.G, gan.D, z)
    check(not plain.requires_grad, "F must be without a graph")
    with torch.autocast("cpu", torch.bfloat16):
        inside = fisher_diagonal(gan.G, gan.D, z)
    check(torch.equal(inside, plain), "inside autocast, too, F must be measured in float32")
    with torch.no_grad():
        error = error_of(fisher_diagonal, gan.G, gan.D, z)
    check(not error, "inside no_grad, too, F must be measured")

class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it and alive; keeps the maximum."""
    def __init__(self):
        super().__init__()
        self.made = {}
        self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        alive = [size for storage, size in self.made.values() if not storage.expired()]
        self.most = max(self.most, sum(alive))
        return result

def test_exercise_3_memory_does_not_grow_with_the_number_of_z():
    gan = small_gan("dcgan")
    most = []
    for n in (2, 12):
        z = torch.randn(n, 8)
        with Memory() as memory:
            fisher_diagonal(gan.G, gan.D, z)
        most.append(memory.most)
    check(most[1] < 1.2 * most[0], "memory grows with the number of z: gradients or graphs of "
          f"earlier z are kept (2 z: {most[0]} bytes, 12 z: {most[1]})")

# ---------- Exercise 4: penalty -------------------------------------------------------------
def test_weights_are_a_differentiable_float32_copy_in_the_order_of_the_parameters():
    conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    G = nn.Sequential(conv, nn.Linear(3, 2).half())
    conv.bias.requires_grad_(False)
    theta = weights(G)
    expected = torch.cat([p.reshape(-1).float() for p in (conv.weight, *G[1].parameters())])
    assert theta.tolist() == expected.tolist(), "not flatten() of each, in G's order"
    conv.weight.data.add_(1)
    assert torch.equal(theta, expected), "theta must be a copy, which does not move with G"
    assert theta.requires_grad

def test_exercise_4_penalty_and_its_gradient_in_closed_form():
    """Of a G in half precision, which has no number below 6e-8 for a term of the sum."""
    torch.manual_seed(0)
    G = nn.Conv2d(4, 50, 5).half().to(memory_format=torch.channels_last)
    theta_S = weights(G).detach()
    F = 1e-5 * torch.rand(len(theta_S))
    close(ewc_penalty(G, theta_S, F), 0, "the penalty at theta = theta_S is not 0")
    for p in G.parameters():
        p.data += 0.01 * torch.randn_like(p)
    moved = (weights(G).detach() - theta_S).double()
    expected = (F * moved**2).sum()
    penalty = ewc_penalty(G, theta_S, F)
    close(penalty, expected, "not sum_i F_i (theta_i - theta_S,i)^2, in float32",
          {"half of it": expected / 2,
           "the mean, not the sum": expected / len(F),
           "not squared": (F * moved.abs()).sum()}, atol=0)
    check(penalty.requires_grad, "the penalty must be differentiable in theta")
    (1e4 * penalty).backward()
    gradient = torch.cat([p.grad.flatten() for p in G.parameters()])
    close(gradient, 2e4 * F * moved, "its gradient is not 2 F (theta - theta_S)", rtol=2e-3)
    small = ewc_penalty(G.float(), weights(G).detach() - 1e-4, F)
    close(small, 1e-8 * F.sum(), "a small change of theta is rounded away", rtol=0.01, atol=0)

def test_exercise_4_scaled_fisher_is_capped_and_has_mean_1():
    torch.manual_seed(0)
    F = torch.rand(1000).sort().values ** 8             # in ascending order
    for quantile in (0.9, 0.5):
        measured = F.clone()
        scaled = scaled_fisher(measured, quantile)
        check(torch.equal(measured, F), "F was changed in place: return a new tensor")
        close(scaled.mean(), 1.0, "the mean of the scaled F is not 1")
        below = int((scaled < scaled.max()).sum())
        check(below < 999, "the largest F_i are not capped: they differ")
        check(abs(below - 1000 * quantile) < 3,
              f"not capped at the quantile asked for, {quantile}, but at .{below}")
        ratio = scaled[:below] / F[:below]
        close(ratio, ratio.mean().expand(below), "below the cap F lost its proportions")
    scaled = scaled_fisher(F)
    close(scaled, scaled_fisher(F, 0.9), "the default quantile is not .9")
    close(scaled, scaled_fisher(1000 * F), "the scale of F must not matter")
    zeros = torch.cat([torch.zeros(500), torch.ones(2)])
    error = error_of(scaled_fisher, zeros)
    check(isinstance(error, UserError),
          "an F that is 0 nearly everywhere cannot be divided by its mean: raise UserError")

# ---------- Exercise 5: layers --------------------------------------------------------------
def three_layers():
    """Eleven weights: constant (2), up (4, its bias, its style) and style (3)."""
    up = nn.Conv2d(2, 1, (1, 2))
    up.style = nn.Linear(1, 1, bias=False)
    G = nn.ModuleDict({"up": up, "style": nn.Linear(2, 1)})
    G.constant = nn.Parameter(torch.zeros(2))
    theta = vector("1 1  2 -3 0 3  9  1  5 6 7")
    nn.utils.vector_to_parameters(theta, G.parameters())
    return G.to(memory_format=torch.channels_last)

def vector(numbers):
    return torch.tensor([float(x) for x in numbers.split()])

def test_exercise_5_layer_changes_by_hand():
    """Layers, in the order of their weights, and their values as counted on paper."""
    theta_S = vector("1 0  1 -3 0 5  8  2  5 6 7")
    F = vector("1 2  1 2 3 6  7  5  4 4 1")
    rows = layer_changes(three_layers(), theta_S, F)
    names = [row["layer"] for row in rows]
    check(names == ["constant", "up", "style"], f"a style belongs to its convolution: {names}")
    columns = {key: [row[key] for row in rows] for key in ("weight", "fisher", "change")}
    for values in columns.values():
        check({type(x) for x in values} == {float}, "the values are not floats, but tensors")
    size = vector("2 6 3")
    theta_S = vector("1 19 18")                         # sums of absolute values, by layer
    moved = 100 * vector("1 5 0")
    close(columns["weight"], theta_S / size, "'weight' is not the mean of |theta_S|")
    close(columns["fisher"], vector("3 24 9") / size, "'fisher' is not the mean of F")
    close(columns["change"], moved / theta_S,
          "'change' is not sum |theta - theta_S| / sum |theta_S|, in %",
          {"divided by |theta|, not |theta_S|": moved / vector("2 18 18"),
           "theta is in another order than weights(G)": 100 * vector("1 11 0") / theta_S})

def test_exercise_5_layer_changes_of_a_G_that_is_partly_frozen():
    """The bias of up is no part of weights(G), so it has no part in theta_S and F."""
    G = three_layers()
    G["up"].bias.requires_grad_(False)
    theta_S = weights(G).detach() + 1
    F = torch.arange(10.0)
    message = "a frozen parameter is not in weights(G), and must not be counted"
    check(not error_of(layer_changes, G, theta_S, F), message)
    rows = layer_changes(G, theta_S, F)
    close([row["fisher"] for row in rows], [0.5, 4.0, 8.0], message)

# ---------- Networks ------------------------------------------------------------------------
@each_arch
@torch.no_grad()
def test_networks_have_their_sizes_and_couple_no_images(arch):
    for resolution in (32, 64, 128, 256):
        gan = GAN(arch, resolution)
        for p in gan.G_ema.to_rgb.parameters():
            p.mul_(100)                                 # however large: the image is in -1..1
        image = gan.G_ema(torch.randn(1, gan.z_dim))
        assert image.shape == (1, 3, resolution, resolution)
        assert 0.9 < image.abs().max() <= 1
    gan = small_gan(arch)
    z = torch.randn(6, 8)
    logits = gan.D(gan.G(z))
    close(gan.D(gan.G(z[:1])), logits[:1], "G or D couples images", atol=1e-5)

@torch.no_grad()
def test_modulated_convolution_by_its_definition():
    """Karras et al. 2020: scale the weights by a style, and divide them by their norm.  The style
    is 1 + weight w / root of the length of w: equalised, with a bias of 1."""
    torch.manual_seed(0)
    layer = ewc_gan.ModulatedConv(5, 7, 3, 4)
    x = torch.randn(3, 5, 8, 8)
    w = torch.randn(3, 4)
    styles = 1 + w @ layer.style.weight.T / 2
    for image, style, output in zip(x, styles, layer(x, w)):
        weight = layer.weight * style[:, None, None]    # of this image
        weight = 2**0.5 * nnF.normalize(weight.flatten(1)).view_as(weight)
        close(output, nnF.conv2d(image, weight, padding=1), "modulated convolution", atol=1e-5)
    layer = ewc_gan.ModulatedConv(5, 7, 5, 4, up="free")
    styles = 1 + w @ layer.style.weight.T / 2
    for image, style, output in zip(x, styles, layer(x, w)):
        weight = layer.weight * style[:, None, None]
        weight = 2 * 2**0.5 * nnF.normalize(weight.flatten(1)).view_as(weight)
        apart = torch.zeros(5, 16, 16)
        apart[:, ::2, ::2] = image                      # a transposed convolution by another way
        turned = weight.flip(2, 3)
        close(output, nnF.conv2d(apart, turned, padding=2), "up", atol=1e-5)
    layer.up = "smooth"
    flat = layer(torch.ones(3, 5, 8, 8), w)
    assert flat.shape == (3, 7, 16, 16)
    middle = flat[:, :, 2:-2, 2:-2]                     # no checkerboard
    close(middle, middle[:, :, :1, :1].expand_as(middle), "flat x becomes flat", atol=1e-5)

# ---------- Training and adaptation; the loop written by hand is in the last section --------
@each_arch
def test_adaptation_trains_D_and_leaves_the_source_alone(arch):
    """In freezed, D's features of 8x8 and larger stay: only the layers after them change."""
    source = small_gan(arch)
    untouched = copy.deepcopy(source)
    for method, trained in (("finetune", "layers"), ("freezed", ("layers.4", "layers.6"))):
        gan = adapt(source, IMAGES, replace(TOY, method=method)).gan
        for name, p in gan.D.named_parameters():
            same = torch.equal(p, source.D.get_parameter(name))
            assert same != name.startswith(trained), f"{name}: frozen, or not frozen"
        for name, buffer in gan.G.named_buffers():
            same = torch.equal(buffer, source.G_ema.get_buffer(name))
            assert same, f"{name}: BatchNorm must stay frozen"
    same_states(source, untouched)

@pytest.mark.parametrize("arch, steps", [("stylegan", 120), ("dcgan", 410)])
def test_a_resumed_adaptation_ends_with_the_same_bits(arch, steps, tmp_path, monkeypatch):
    """Stopped 5 steps before its end, it goes on from step 100 or 400, that of a look; until its
    end the older model stays."""
    source = small_gan(arch)
    settings = replace(TOY, steps=steps, seed=np.int64(1))
    whole = adapt(source, IMAGES, settings)
    adapt(source, IMAGES, TOY, tmp_path)                # an earlier run into the same folder
    assert os.listdir(tmp_path) == ["adapted.pt"]
    finished = tmp_path / "adapted.pt"
    older = finished.read_bytes()
    stopped(steps - 5, monkeypatch, adapt, source, IMAGES, settings, tmp_path)
    for name, gan, images, lr in (("source", small_gan(arch, 1), IMAGES, settings.lr),
                                  ("images", source, IMAGES.flip(0), settings.lr),
                                  ("lr", source, IMAGES, 1)):
        with pytest.raises(UserError, match=f"unfinished.pt: .*its {name} was"):
            adapt(gan, images, replace(settings, lr=lr), tmp_path, resume=True)
    assert finished.read_bytes() == older
    resumed = adapt(source, IMAGES, settings, tmp_path, resume=True)
    same_states(whole.gan, resumed.gan)
    same_states(whole.gan.G_ema, GAN.load(finished).G_ema)
    assert resumed.log == whole.log
    assert os.listdir(tmp_path) == ["adapted.pt"]

def test_pretraining_keeps_the_newest_model_and_resumes(tmp_path, monkeypatch):
    """Stopped in step 116, its file has the model of step 60, and it goes on from step 100."""
    settings = replace(ewc_gan.PRETRAIN["dcgan"], steps=120, batch_size=4)
    whole = small_gan("dcgan")
    mean = whole.G.norm4.running_mean.clone()
    pretrain(IMAGES, whole, settings, tmp_path / "whole.pt", every=60)
    after = whole.G.norm4.running_mean
    assert not torch.equal(after, mean), "G must train with the statistics of each batch"
    part = tmp_path / "part.pt"
    gan = small_gan("dcgan")
    longer = replace(settings, steps=1000)
    stopped(115, monkeypatch, pretrain, IMAGES, gan, longer, part, every=60)
    assert torch.load(part, weights_only=True)["step"] == 60
    pretrain(IMAGES, gan, settings, part, resume=True, every=60)
    same_states(whole, gan)
    same_states(whole.G_ema, GAN.load(part).G_ema)
    assert sorted(os.listdir(tmp_path)) == ["part.png", "part.pt", "whole.png", "whole.pt"]

def test_two_processes_share_a_step(tmp_path):
    """Each draws half of the batch with a seed of its own; the gradients are averaged."""
    small_gan("stylegan").save(tmp_path / "one.pt")
    gradients = []
    for seed in (0, 1):
        gan = GAN.load(tmp_path / "one.pt").train()
        before = weights(gan.D)
        settings = replace(ewc_gan.PRETRAIN["stylegan"], batch_size=4, seed=seed)
        Trainer(gan, settings).train_step(IMAGES)
        for p in gan.D.parameters():
            p.data = p.grad
        gradients.append(weights(gan.D))
    command = ("-m torch.distributed.run --nproc_per_node 2 pretrain_source.py --steps 1 "
               "--batch-size 8 --amp off --data data/10shot --init").split()
    files = [tmp_path / "one.pt", "--out", tmp_path / "two.pt"]
    subprocess.run([sys.executable, *command, *files], check=True, cwd=HERE)
    moved = weights(GAN.load(tmp_path / "two.pt").D) - before
    mean = sum(gradients) / 2                   # Adam's first step is the sign of the gradient
    clear = mean.abs() > 1e-3 * mean.abs().max()
    same_sign = moved[clear].sign() == -mean[clear].sign()
    assert same_sign.float().mean() > 0.999

@pytest.mark.parametrize("amp, dtype, rel", [
    ("bf16", "bfloat16", 0.1), ("fp16", "float16", 0.4)])
def test_mixed_precision_agrees_with_full_precision_and_R1_is_in_float32(amp, dtype, rel):
    """fp16 skips its first steps, until the scale is small enough."""
    def look(D, inputs, logits):                # R1 alone asks for gradients of pixels
        if D.training:
            pixels = inputs[0].is_leaf and inputs[0].requires_grad
            seen.add(f"{logits.dtype} {pixels}")

    seen = set()
    source = small_gan("stylegan").train()
    settings = replace(TOY, steps=10, batch_size=8)
    full = adapt(source, IMAGES, settings)
    source.D.register_forward_hook(look)
    half = adapt(source, IMAGES, settings, amp=amp)
    assert seen == {"torch.float32 True", f"torch.{dtype} False"}
    for name, loss in full.log[-1].items():
        close(half.log[-1][name], loss, name, rtol=rel, atol=0.01)

@pytest.mark.parametrize("amp, factor", [("fp16", 2.0**16), ("bf16", 1.0)])
def test_the_loss_is_scaled_in_fp16_alone(amp, factor):
    """The gradient of a sum of weights is 1, scaled."""
    gan = small_gan("dcgan")
    trainer = Trainer(gan, TOY, amp)
    seen = []
    gan.G.to_rgb.bias.register_hook(seen.append)
    trainer.update(trainer.opt_G, weights(gan.G).sum())
    assert seen[0].tolist() == [factor] * 3

def test_divergence_and_a_full_disk_keep_the_last_good_checkpoint(tmp_path):
    """Files may grow to 20 kB, less than a checkpoint."""
    resource = pytest.importorskip("resource")
    source = small_gan("dcgan")
    path = tmp_path / "adapted.pt"
    adapt(source, IMAGES, TOY, tmp_path)
    good = path.read_bytes()
    with pytest.raises(UserError, match="diverged"):
        adapt(source, to_float(IMAGES) * math.nan, TOY, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            adapt(source, IMAGES, TOY, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["adapted.pt"]

def test_adapt_refuses_images_of_another_size():
    with pytest.raises(UserError, match="64 pixels"):
        adapt(small_gan("dcgan"), load_images(SHOTS, 64), TOY)

# ---------- Images and files ----------------------------------------------------------------
def test_load_images_of_every_mode(tmp_path, capsys):
    """One ramp of grey levels, stored in many ways, must come back as the same pixels."""
    ramp = np.arange(0, 256, 17, np.uint8)[None].repeat(16, 0)
    grey = Image.fromarray(ramp)
    for name in ("a L.png", "b P.PNG", "c CMYK.tif", "d LA.png", "e RGB.tga"):
        grey.convert(name[2:-4]).save(tmp_path / name)
    turned = (b"Exif\0\0MM\0*\0\0\0\x08\0\x02"
              b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"                   # turned by 90 degrees
              b"\x90\0\0\x0b\0\0\0\x01\xff\xff\xff\xff\0\0\0\0")        # an odd tag
    grey.rotate(90).save(tmp_path / "f.png", exif=turned)
    grey.crop((-16, 0, 32, 16)).save(tmp_path / "g cropped.png")
    Image.new("RGBA", (16, 16)).save(tmp_path / "transparent.png")
    (tmp_path / "more").mkdir()
    for name in (".hidden.png", "phone.heic", "notes.txt"):
        (tmp_path / name).write_text("no image")
    loaded = load_images(tmp_path, 16)
    left_out = capsys.readouterr().out.partition("left out: ")[2]
    assert {"1 .heic", "1 .txt", "1 more"} <= set(re.findall(r"1 \S+", left_out))
    assert loaded.dtype == torch.uint8
    assert (loaded[7] == 255).all(), "transparent pixels lie on white"
    for image in loaded[:7].flatten(0, 1):              # each channel of each
        close(image, ramp, "ramp", rtol=0, atol=3)

def test_nested_folders_are_read_once_and_only_if_asked_for(tmp_path, capsys):
    """Three images, and links into the folder itself: they stay three."""
    for name in ("a.png", "in/b.png", "in/deeper/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "in")
    assert len(load_images(tmp_path, 8, nested=True)) == 3
    assert len(load_images(tmp_path, 8)) == 1
    assert "1 in 1 other" in capsys.readouterr().out

@each_arch
def test_checkpoint_round_trip(arch, tmp_path):
    """All that is loaded is in eval mode, and G is G_ema.  Image i of a seed is always the same."""
    gan = small_gan(arch)
    gan.save(tmp_path / "m.pt", note="x")
    again = GAN.load(tmp_path / "m.pt")
    gan.G = gan.G_ema
    same_states(gan, again)
    assert not any(module.training for module in again.modules())
    images = again.generate(7, seed=5)
    close(gan.generate(3, seed=5), images[:3], "image i of a seed", atol=1e-5)

# ---------- Command line and bad input ------------------------------------------------------
class Code:
    def __reduce__(self):
        return exec, ("open('hacked', 'w').close()",)

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder full of things that can be wrong, beside a few that are right."""
    world = tmp_path_factory.mktemp("world")
    small_gan("dcgan").save(world / "good.pt")
    good = torch.load(world / "good.pt", weights_only=True)
    torch.save({**good, "z_dim": 10**12}, world / "giant.pt")
    torch.save({**good, "G_ema": Code()}, world / "code.pt")
    picture = (SHOTS / "00000.png").read_bytes()
    for name, content in {
            "two/a.png": picture, "two/b \u00e9\n\u732b.png": picture, "file": b"a file",
            "cut/a\nb.png": picture[:500], "cut/good.png": picture, "nested/in/a.png": picture,
            "cut.pt": (world / "good.pt").read_bytes()[:5000], "run/unfinished.pt": b"",
            "part.pt": b"", "part.unfinished.pt": b""}.items():
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_bytes(content)
    Image.new("I;16", (8, 8)).save(world / "cut" / "sixteen.png")
    return world

BAD_INPUT = [                                       # what is typed; what the line names
    ("ewc_gan", "--target"),
    ("ewc_gan --target nowhere", "nowhere:"),
    ("ewc_gan --target file", "file:"),
    ("ewc_gan --target nested", "nested: no images in it; left out: 1 in"),
    ("ewc_gan --target cut", "cut/a b.png: cannot be used"),
    ("ewc_gan --target cut", "cut/sixteen.png: cannot be used (more than 8 bits"),
    ("ewc_gan --target two --source cut.pt", "cut.pt"),
    ("ewc_gan --target two --source code.pt", "code.pt"),
    ("ewc_gan --target two --source giant.pt", "giant.pt"),
    ("ewc_gan --target two --source run/unfinished.pt", "run/unfinished.pt"),
    ("ADAPT --shots 0", "--shots"),
    ("ADAPT --steps 1.5", "--steps"),
    ("ADAPT --lam inf", "lam inf"),
    ("ADAPT --method magic", "--method"),
    ("ADAPT --step 3", "--step"),
    ("ADAPT --out file", "file"),
    ("ADAPT --out run --resume", "run/unfinished.pt: cannot be used"),
    ("ewc_gan --checkpoint good.pt", "--generate"),
    ("ewc_gan --checkpoint good.pt --generate 0", "--generate"),
    ("pretrain_source --data two --out two/x.pt", "lies in two"),
    ("pretrain_source --data two --out good.pt", "good.pt: holds a finished model"),
    ("pretrain_source --data two --out part.pt --resume", "part.unfinished.pt: cannot be used"),
    ("pretrain_source --init good.pt --arch dcgan", "--init"),
    ("draw_faces --style magic --out x", "--style"),
    ("evaluate two", "--target"),
    ("evaluate two --target two --factors emoji", "--factors"),
    ("evaluate two --target two --reference two", "2 images: 12 are needed")]
ADAPT = "ewc_gan --target two --source good.pt".split()

@pytest.fixture
def several(world, monkeypatch):
    """Two runs of one command, in the folder world."""
    monkeypatch.chdir(world)
    assert run(*ADAPT[1:], *TOY_RUN, "--seed", 0, 1, "--out", "several") == 0
    return Path("several")

@pytest.mark.parametrize("typed, named", BAD_INPUT)
def test_bad_input_gets_one_line_and_code_2_and_loses_nothing(typed, named, world, capsys,
                                                              monkeypatch):
    def files():
        return {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}

    monkeypatch.chdir(world)
    before = files()
    program, *argv = typed.replace("ADAPT", " ".join(ADAPT)).split()
    assert run(*argv, program=PROGRAMS[program]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert files() == before

def test_the_main_job_and_what_it_leaves(tmp_path, monkeypatch, capsys):
    """Its files show and hold what their names say."""
    monkeypatch.chdir(tmp_path)
    out = Path("out/10shot")
    assert run("--target", SHOTS, *TOY_RUN) == 0
    assert "ewc 12/12" in capsys.readouterr().out
    assert (out / "progress.png").exists()
    source = GAN.load(ewc_gan.SHIPPED / "source_stylegan.pt")
    gan = GAN.load(out / "adapted.pt")
    before = source.generate(10, ewc_gan.PICTURES)
    after = gan.generate(10, ewc_gan.PICTURES)
    assert not torch.equal(before, after)
    rows = [("target", load_images(SHOTS, 64)), ("source", before), ("ewc", after)]
    assert np.array_equal(Image.open(out / "samples.png"), ewc_gan.samples_picture(rows))
    log = table_of(out / "log.csv")
    assert list(log[0]) == ["step", "loss_D", "loss_adv", "penalty"]
    assert [row["step"] for row in log] == ["10", "12"]
    theta_S = weights(source.G_ema)
    rows = layer_changes(gan.G_ema, theta_S, theta_S)           # of G_ema, not of G
    written = [float(row["change"]) for row in table_of(out / "layers.csv")]
    close(written, [row["change"] for row in rows], "change in layers.csv")

def test_generate_writes_images_of_each_seed_and_a_sheet(world, monkeypatch):
    """Also on a console that lacks the letters of the folder's name."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    out = Path("\u732b")
    assert run("--checkpoint", "good.pt", "--generate", 3, "--seed", 0, 5, "--out", out) == 0
    gan = GAN.load("good.pt")
    images = torch.cat([gan.generate(3), gan.generate(3, seed=5)])
    assert torch.equal(load_images(out, 32), ewc_gan.to_uint8(images))
    assert Path("\u732b_seed5.png").exists()

def test_several_runs_have_a_folder_each_and_resume_leaves_finished_ones(several, capsys):
    before = [path.stat().st_mtime for path in several.rglob("*.pt")]
    assert sorted(os.listdir(several)) == ["comparison.png", "ewc_seed0", "ewc_seed1"]
    assert run(*ADAPT[1:], *TOY_RUN, "--seed", 0, 1, "--out", several, "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert before == [path.stat().st_mtime for path in several.rglob("*.pt")]

def test_settings_of_the_runs_of_a_command():
    """lambda is meant for ewc, raw and l2: the other methods run once.  0 is called finetune."""
    typed = "--target t --lr 0.5 --lam 0 5 --method l2 freezed"
    args = ewc_gan.parse_arguments(typed.split())
    settings = ewc_gan.settings_from_args(Adaptation(), args)
    runs = ewc_gan.planned_runs(args, settings)
    assert set(runs) == {"finetune", "l2_5", "freezed"}
    assert runs["l2_5"] == Adaptation(lr=0.5, method="l2", lam=5)

def test_a_closed_pipe_stops_with_one_line(several):
    """As `python ewc_gan.py ... | head -2` does."""
    command = [sys.executable, HERE / "ewc_gan.py", *ADAPT[1:], *TOY_RUN, "--steps", "500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.readline()
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1
    assert error.startswith("ewc_gan.py: stopped")
    assert error.count("\n") == 1

# ---------- data/evaluate.py ----------------------------------------------------------------
def test_frechet_distance_by_singular_values():
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 (sum of the singular values of A B^T), where
    C_a = A^T A; with fewer images than features."""
    torch.manual_seed(0)
    a = torch.randn(12, 30).double()
    b = torch.randn(50, 30).double() + 1
    A = (a - a.mean(0)) / 11**0.5
    B = (b - b.mean(0)) / 49**0.5
    means = (a.mean(0) - b.mean(0)).square().sum()
    trace = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    close(evaluate.frechet_distance(a, b), means + trace, "Frechet distance")

def test_precision_and_recall_of_constructed_sets():
    """Two far clusters are real, the generator knows one of them, and an island of its own."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))       # 25 points
    real = torch.cat([grid, grid + 100])
    fake = torch.cat([grid + 0.1, grid[:6] + 900])
    close(evaluate.precision_recall(real, fake), [25 / 31, 25 / 50], "precision, recall")

def test_a_table_has_the_measures_of_its_runs(several, monkeypatch):
    """The features are colours at 4x4 places, instead of those of a network."""
    def colours(images):
        return nnF.adaptive_avg_pool2d(images, 4).flatten(1)

    monkeypatch.setattr(evaluate, "features_of", lambda judge: colours)
    assert run(several, program=evaluate) == 0
    metrics = evaluate.Metrics(colours, to_float(load_images("two", 32)))
    for row in table_of(several / "evaluation.csv")[1:]:        # after the source
        gan = GAN.load(several / f"ewc_seed{row['seed']}" / "adapted.pt")
        expected = metrics(gan.generate(metrics.n, seed=1))
        close(float(row["diversity"]), expected["diversity"], "diversity", rtol=1e-3)

# ---------- What ships ----------------------------------------------------------------------
def test_faces_depend_on_seed_and_index_alone_and_the_ten_shot_sets_are_what_is_drawn():
    five = draw_faces.draw_faces("photo", 5, 3, workers=1)
    assert np.array_equal(five[:3], draw_faces.draw_faces("photo", 3, 3))
    for style, folder in draw_faces.TEN_SHOT_FOLDERS.items():
        drawn = draw_faces.draw_faces(style, 10, draw_faces.TEN_SHOT_SEED, workers=1)
        shots = load_images(HERE / "data" / folder, 64).movedim(1, 3).numpy()
        assert np.abs(shots - drawn.astype(int)).mean() < 1

@each_arch
@torch.no_grad()
def test_shipped_sources_make_varied_images_that_their_D_believes(arch):
    gan = GAN.load(ewc_gan.SHIPPED / f"source_{arch}.pt")
    images = gan.generate(64)
    drawn = draw_faces.draw_faces("photo", 64, 1)
    faces = to_float(torch.from_numpy(drawn).movedim(3, 1))
    noise = torch.rand_like(faces)
    assert images.std(0).mean() > 0.8 * faces.std(0).mean(), "less varied than the drawings"
    real, fake, absurd = (gan.D(x).mean() for x in (faces, images, noise))
    assert real > fake > absurd

# ---------- Left out of a student's copy: documents, solutions, the copy itself -------------

def blocks_of(language):
    text = (HERE / "README.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)

def test_readme_code_runs_with_somebody_elses_networks():
    """With every weight moved by 1, and nothing but the penalty: lambda times the sum of F."""
    block, = (block for block in blocks_of("python") if "ewc_penalty" in block)
    G = nn.Linear(3, 6)
    D = nn.Sequential(nn.Linear(6, 1))
    names = {"G": G, "D": D, "z": torch.randn(5, 3), "lam": 2, "adversarial_loss": lambda G: 0}
    exec(block, names)
    for p in G.parameters():
        p.data += 1
    exec(block[block.index("loss = "):], names)
    close(names["loss"], 2 * names["F"].sum(), "loss")

def test_readme_commands_run(tmp_path, monkeypatch, world):
    """At toy size where that is quick; the others are read."""
    monkeypatch.chdir(tmp_path)
    text = "".join(blocks_of("bash")).replace("\\\n", " ")
    commands = re.findall("^python (.*)", text, re.M)
    assert len(commands) >= 4
    for command in commands:
        path, *argv = shlex.split(command, comments=True)
        program = PROGRAMS.get(Path(path).stem)
        if program == ewc_gan and "--generate" in argv:
            assert run(*argv, "--checkpoint", world / "good.pt", "--generate", 2) == 0
        elif program == ewc_gan and "--help" not in argv:
            assert run(*argv, "--target", SHOTS, "--source", world / "good.pt", *TOY_RUN) == 0
        elif program and "--help" not in argv:
            program.parse_arguments(argv)
        else:
            assert path == "-m" or (HERE / path).exists(), path

def fisher_by_torch_func(G, D, z):
    """F by torch.func: an oracle, and a right answer to exercise 3."""
    G = copy.deepcopy(G).eval()
    D = copy.deepcopy(D).eval().requires_grad_(False)

    def log_likelihood(theta, z_i):
        image = torch.func.functional_call(G, theta, z_i[None])
        return nnF.logsigmoid(D(image)).sum()

    theta = {name: p.detach() for name, p in G.named_parameters() if p.requires_grad}
    F = torch.zeros(())
    with torch.autocast("cpu", enabled=False):
        for z_i in z:
            gradient = torch.func.grad(log_likelihood)(theta, z_i).values()
            F = F + torch.cat([g.flatten() for g in gradient]).square() / len(z)
    if not (len(z) and F.isfinite().all()):
        raise UserError("F is not finite")
    return F

@each_arch
def test_fisher_equals_per_sample_gradients_of_torch_func(arch):
    gan = small_gan(arch)
    z = torch.randn(6, 8)
    expected = fisher_by_torch_func(gan.G, gan.D, z)
    F = fisher_diagonal(gan.G, gan.D, z)
    close(F, expected, "F by torch.func is another", rtol=1e-3, atol=1e-12)

def augmented(x, settings, random):
    """Moved, with edges repeated, and with a hole; pixel by pixel."""
    if not settings.shift:
        return x
    at = torch.arange(32)
    far = round(settings.shift * 32)
    moves = torch.randint(2 * far + 1, (2, 1), generator=random) - far
    rows, columns = (at + moves).clamp(0, 31)
    x = x[:, :, rows][:, :, :, columns]
    hole = round(settings.cutout * 32)
    middle = torch.randint(32, (2, 1), generator=random)
    rows, columns = (at >= middle - hole // 2) & (at < middle - hole // 2 + hole)
    return x.masked_fill(rows[:, None] & columns, 0)

def train_by_hand(source, images, F, s):
    """Adaptation, written out: the oracle for the training step and the whole loss."""
    G = copy.deepcopy(source.G_ema)
    D = copy.deepcopy(source.D)
    theta_S = nn.utils.parameters_to_vector(G.parameters()).detach()
    ema = copy.deepcopy(G)
    betas = (s.beta1, s.beta2)
    opt_G = torch.optim.Adam(G.parameters(), betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), betas=betas, fused=True)
    random = torch.Generator().manual_seed(s.seed)
    for step in range(s.steps):
        lr = s.lr * (1 - step / s.steps)
        opt_G.param_groups[0]["lr"] = lr
        opt_D.param_groups[0]["lr"] = lr * s.d_lr_ratio
        index = torch.randint(len(images), (s.batch_size,), generator=random)
        x = images[index] / 127.5 - 1
        flipped = torch.rand(len(x), generator=random) < 0.5
        x[flipped] = x[flipped].flip(3)
        z = torch.randn(s.batch_size, source.z_dim, generator=random)
        x = augmented(x, s, random)
        fake = augmented(G(z), s, random)
        loss = nnF.softplus(-D(x)).mean()
        loss = loss + nnF.softplus(D(fake.detach())).mean()
        if step % s.r1_every == 0:
            x.requires_grad_(True)
            gradient, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
            r1 = gradient.square().sum((1, 2, 3)).mean()
            loss = loss + s.r1_every * s.r1_gamma / 2 * r1
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        loss = nnF.softplus(-D(fake)).mean()
        if F is not None:
            theta = nn.utils.parameters_to_vector(G.parameters())
            loss = loss + s.lam * sum(F * (theta - theta_S) ** 2)
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()
        decay = min(s.ema, (1 + step) / (10 + step))
        for average, p in zip(ema.parameters(), G.parameters()):
            average.data.lerp_(p.data, 1 - decay)
    return {"D": D, "G": G, "G_ema": ema}

@pytest.mark.parametrize("method, lam", [
    ("finetune", 5), ("ewc", 0), ("ewc", 1), ("raw", 1000), ("l2", 1)])
@each_arch
def test_adaptation_equals_the_loop_written_by_hand(arch, method, lam):
    """Without a penalty, shift and hole it is plain fine-tuning, bit for bit."""
    source = small_gan(arch)
    settings = replace(TOY, method=method, lam=lam, ema=0.15, seed=3,
                       shift=0.1, cutout=0.4)
    measured = fisher_diagonal(source.G_ema, source.D, source.z(4, 1003))
    F = {"ewc": scaled_fisher(measured), "raw": measured,
         "l2": torch.ones_like(measured), "finetune": None}[method]
    if method == "finetune" or lam == 0:
        settings = replace(settings, shift=0, cutout=0)
        F = None
    for steps in (1, 2):                # in the first step D comes first; the penalty is 0
        settings.steps = steps
        gan, fisher, log, _ = adapt(source, IMAGES, settings)
        assert torch.equal(fisher, measured), "F is not that of G_ema"
        for name, network in train_by_hand(source, IMAGES, F, settings).items():
            message = f"{name} after step {steps} is not that of the loop written by hand"
            for p, q in zip(getattr(gan, name).parameters(), network.parameters()):
                check(torch.equal(p, q) if F is None else is_close(p, q), message)
    assert ("penalty" in log[-1]) == (method != "finetune")
