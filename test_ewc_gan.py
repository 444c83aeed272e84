"""Tests against oracles: closed forms, brute force, other implementations, bit equality.

    python -m pytest
"""
import copy
import csv
import functools
import inspect
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ewc_gan
import pretrain_source
from ewc_gan import Settings, adapt, build_model, ewc_penalty, fisher_diagonal, load_images

sys.path.insert(0, str(ewc_gan.HERE / "data"))
import draw_faces  # noqa: E402

FAMILIES = sorted(ewc_gan.FAMILIES)
SHOTS = ewc_gan.HERE / "data" / "10shot"
PROGRAM = Path(ewc_gan.__file__)
UNSOLVED = "raise NotImplementedError" in PROGRAM.read_text()      # in the student's version
TOY = Settings(steps=4, batch_size=2, fisher_samples=4, method="raw", lam=100.0, r1_every=2)


def small_model(arch, seed=0):
    """A model of 32 pixels and a few thousand weights, its BatchNorm frozen at real statistics."""
    torch.manual_seed(seed)
    stages = 3 + (arch == "stylegan")
    model = build_model(arch, 32, z_dim=8, g_channels=[12, 10, 8, 6][:stages],
                        d_channels=[6, 8, 10])
    ewc_gan.calibrate_batchnorm(model.G_ema, 8, samples=512)
    model.G.load_state_dict(model.G_ema.state_dict())
    with torch.no_grad():                               # as after a training, G is not G_ema
        for p in model.G.parameters():
            p.mul_(1.05)
    model.G.eval(), model.D.train()
    model.D(torch.randn(8, 3, 32, 32))                  # gives MinibatchStd a running mean
    return model


def ones_like_parameters(G):
    return {name: torch.ones_like(p) for name, p in G.named_parameters()}


def shots32(n=10):
    return ewc_gan.read_folder(SHOTS, 32)[:n]


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --------------------------------------------------------------------------------------------------
# Fisher information
# --------------------------------------------------------------------------------------------------
def test_exercise_3_fisher_in_closed_form():
    """G(z) = W z, D(x) = a.x: d log sigmoid(a.Wz) / dW_jk = sigmoid(-a.Wz) a_j z_k."""
    torch.manual_seed(0)
    G, D = nn.Linear(3, 5, bias=False), nn.Linear(5, 1, bias=False)
    z = torch.randn(50, 3)
    W, a = G.weight.detach().double(), D.weight.detach().double()[0]
    expected = torch.zeros(5, 3, dtype=torch.double)
    for z_i in z.double():
        logit = a @ W @ z_i
        expected += ((1 - torch.sigmoid(logit)) * torch.outer(a, z_i)) ** 2
    F = fisher_diagonal(G, D, z)
    assert list(F) == ["weight"]
    torch.testing.assert_close(
        F["weight"].double(), expected / 50, rtol=1e-4, atol=1e-9,
        msg=lambda m: "F is not E[(d log D(G(z)) / d theta)^2], D's probability the sigmoid of its "
                      f"logit: per sample, squared, then averaged\n{m}")


@pytest.mark.parametrize("arch", FAMILIES)
def test_exercise_3_fisher_equals_per_sample_gradients_of_torch_func(arch):
    model = small_model(arch)
    G, D, z = model.G, model.D.eval(), torch.randn(6, 8)

    def log_likelihood(theta, z_i):
        image = torch.func.functional_call(G, theta, z_i[None])
        return -torch.log1p(torch.exp(-D(image))).sum()

    theta = {name: p.detach() for name, p in G.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(log_likelihood), (None, 0))(theta, z)
    for name, F in fisher_diagonal(G, model.D.train(), z).items():
        torch.testing.assert_close(F, gradients[name].square().mean(0), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("arch", FAMILIES)
def test_fisher_in_chunks_equals_the_explicit_loop(arch):
    model, z = small_model(arch), torch.randn(7, 8)
    list(model.G.parameters())[0].requires_grad_(False)
    model.G.double(), model.D.double()               # a wrong formula cannot pass as rounding
    loop = fisher_diagonal(model.G, model.D, z.double())
    model.D.train()
    chunked = ewc_gan.fisher_diagonal_chunked(model.G, model.D, z.double(), chunk=3)
    assert list(loop) == list(chunked) and model.D.training
    for name in loop:
        torch.testing.assert_close(chunked[name], loop[name], rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("arch", FAMILIES)
def test_exercise_3_fisher_is_not_the_square_of_the_mean_gradient(arch):
    """E[g^2] = (E g)^2 + Var g: the mean of squares exceeds the square of the mean."""
    model, z = small_model(arch), torch.randn(16, 8)
    one_by_one = fisher_diagonal(model.G, model.D, z)
    singles = [fisher_diagonal(model.G, model.D, z_i[None]) for z_i in z]
    loss = nn.functional.logsigmoid(model.D.eval()(model.G(z))).mean()
    mean_gradient = torch.autograd.grad(loss, list(model.G.parameters()))
    for (name, F), g in zip(one_by_one.items(), mean_gradient):
        torch.testing.assert_close(F, sum(s[name] for s in singles) / 16, rtol=1e-4, atol=1e-12,
                                   msg=lambda m: "F is not the mean of each sample's squared "
                                   "gradient (the square of the batch-mean gradient is smaller; "
                                   f"BatchNorm in train mode couples the samples)\n{m}")
        assert F.sum() > 1.2 * g.square().sum(), (
            f"{name}: F is near the square of the batch-mean gradient; square each sample's first")


@pytest.mark.parametrize("arch", FAMILIES)
def test_exercise_3_fisher_leaves_both_networks_as_they_were(arch):
    model = small_model(arch)
    G, D = model.G, model.D
    G.train(), D.train()
    next(G.children()).eval()                                       # a mode per module, not per net
    first, last = list(G.parameters())[0], list(D.parameters())[-1]
    first.requires_grad_(False), last.requires_grad_(False)
    D(G(torch.randn(4, 8))).sum().backward()

    def snapshot():
        return [(p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
                for net in (G, D) for p in net.parameters()] + [
                b.clone() for net in (G, D) for b in net.buffers()] + [
                m.training for net in (G, D) for m in net.modules()]

    def same(a, b):
        if isinstance(a, tuple):
            return all(same(x, y) for x, y in zip(a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    before = snapshot()
    F = fisher_diagonal(G, D, torch.randn(3, 8))
    assert same(tuple(before), tuple(snapshot())), "a parameter, buffer, flag or mode changed"
    assert list(G.named_parameters())[0][0] not in F, "F is for trainable parameters alone"


def test_exercise_3_fisher_freezes_a_discriminator_that_behaves_otherwise_in_training():
    """Somebody else's D: in train mode BatchNorm couples samples and drifts, dropout adds noise."""
    torch.manual_seed(0)
    G = nn.Linear(3, 6)
    D = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1)).train()
    D(torch.randn(64, 6) * 3 + 1)                                   # running statistics to keep
    z, statistics = torch.randn(5, 3), copy.deepcopy(D[0].state_dict())
    expected = fisher_diagonal(G, copy.deepcopy(D).eval(), z)
    try:
        F = fisher_diagonal(G, D, z)
    except ValueError as error:                                     # BatchNorm of a single sample
        pytest.fail(f"D must be frozen, in eval mode, while F is measured: {error}")
    for name in F:
        torch.testing.assert_close(F[name], expected[name], msg=lambda m:
                                   f"D must be frozen, in eval mode, while F is measured\n{m}")
    assert all(torch.equal(D[0].state_dict()[n], value) for n, value in statistics.items())
    assert all(module.training for module in D.modules())


def test_exercise_3_fisher_is_float32_under_autocast_and_works_under_no_grad():
    model, z = small_model("stylegan"), torch.randn(3, 8)
    plain = fisher_diagonal(model.G, model.D, z)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inside = fisher_diagonal(model.G, model.D, z)
    assert all(torch.equal(plain[n], inside[n]) and inside[n].dtype == torch.float32 for n in plain)


def test_exercise_3_fisher_memory_does_not_grow_with_samples():
    """Count the tensors that autograd keeps alive for backward passes: the peak is one sample's."""
    class Kept:
        now = peak = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Kept.now += 1
            Kept.peak = max(Kept.peak, Kept.now)

        def __del__(self):
            Kept.now -= 1

    def peak(n):
        Kept.now = Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            fisher_diagonal(model.G, model.D, torch.randn(n, 8))
        return Kept.peak

    model = small_model("dcgan")
    assert 0 < peak(12) <= peak(2), "graphs of earlier samples are kept: take gradients one by one"


def test_fisher_of_weights_without_effect_is_0_and_logits_of_an_image_add_up():
    class Half(nn.Linear):
        def forward(self, z):
            return z @ self.weight.T                                # the bias has no part in it

    torch.manual_seed(0)
    G, patches, z = Half(3, 4), nn.Linear(4, 2, bias=False), torch.randn(5, 3)
    F = fisher_diagonal(G, patches, z)
    assert (F["bias"] == 0).all()
    expected = torch.zeros(4, 3)
    for z_i in z:                                                   # log D: the sum of both logits'
        s = torch.sigmoid(-(patches(G(z_i))))
        expected += torch.outer(s @ patches.weight, z_i).detach().square() / 5
    torch.testing.assert_close(F["weight"], expected)


def test_fisher_of_nothing_is_an_error():
    model = small_model("dcgan")
    for fisher in (fisher_diagonal, ewc_gan.fisher_diagonal_chunked):
        with pytest.raises(ValueError, match="at least one"):
            fisher(model.G, model.D, torch.randn(0, 8))
        with pytest.raises(ValueError, match="requires_grad"):
            fisher(model.G_ema, model.D, torch.randn(2, 8))
    with pytest.raises(ewc_gan.UserError, match="0 nearly everywhere"):
        ewc_gan.scaled_fisher({"a": torch.zeros(500), "b": torch.ones(2)})


# --------------------------------------------------------------------------------------------------
# Penalty
# --------------------------------------------------------------------------------------------------
def test_exercise_4_penalty_and_its_gradient_in_closed_form():
    model, lam = small_model("stylegan"), 7.0
    G = model.G
    theta_S = {n: p.detach().clone() for n, p in G.named_parameters()}
    F = {n: torch.rand_like(p) for n, p in theta_S.items()}
    assert ewc_penalty(G, theta_S, F) == 0
    with torch.no_grad():
        for p in G.parameters():
            p.add_(torch.randn_like(p))
    penalty = ewc_penalty(G, theta_S, F)
    expected = sum(float((F[n].double() * (p.detach() - theta_S[n]).double() ** 2).sum())
                   for n, p in G.named_parameters())
    assert penalty.item() == pytest.approx(expected, rel=1e-5), "sum_i F_i (theta_i - theta_S,i)^2"
    assert penalty.requires_grad, "the penalty must be differentiable in theta"
    (lam * penalty).backward()
    for name, p in G.named_parameters():
        torch.testing.assert_close(p.grad, 2 * lam * F[name] * (p.detach() - theta_S[name]),
                                   msg=lambda m: f"{name}: not 2 lam F (theta - theta_S)\n{m}")


def test_exercise_4_penalty_is_not_squared_in_half_precision():
    """Half precision has no number below 6e-8, and would make 1e-9 of this sum's terms 0."""
    G = nn.Linear(40, 25, bias=False).half()
    theta_S = {"weight": G.weight.detach().clone()}
    with torch.no_grad():
        G.weight.copy_(theta_S["weight"] + 0.01)
    moved = (G.weight.detach().double() - theta_S["weight"].double()).square().sum().item()
    penalty = ewc_penalty(G, theta_S, {"weight": torch.full((25, 40), 1e-5)})
    penalty.backward()
    assert penalty.item() == pytest.approx(1e-5 * moved, rel=0.02)
    assert G.weight.grad.isfinite().all()


def test_exercise_4_theta_S_are_detached_copies():
    """Live references would move along with G, and the penalty would stay 0 for ever."""
    source = small_model("dcgan")
    run = adapt(source, shots32(1), replace(TOY, steps=0), F=ones_like_parameters(source.G_ema))
    for p in run.model.G.parameters():
        p.data.add_(1)                                          # as a training would
    for (name, p), copied in zip(source.G_ema.named_parameters(), run.theta_S.values()):
        assert torch.equal(p, copied), f"{name}: theta_S must be copies; live references move along"
        assert not copied.requires_grad, f"{name}: theta_S is a constant; detach the copies"


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
def test_exercise_1_losses_are_cross_entropies_of_logits():
    real, fake = torch.tensor([0.3, -2.0, 90.0]), torch.tensor([1.5, -90.0])
    bce = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(ewc_gan.d_logistic_loss(real, fake),
                               bce(real, torch.ones(3)) + bce(fake, torch.zeros(2)),
                               msg=lambda m: "L_D is not -E[log D(x)] - E[log(1 - D(G(z)))] of "
                               f"logits, whose probability is their sigmoid\n{m}")
    torch.testing.assert_close(ewc_gan.g_nonsaturating_loss(fake), bce(fake, torch.ones(2)),
                               msg=lambda m: "L_adv of G is not -E[log D(G(z))], the "
                               f"non-saturating loss, of logits\n{m}")


def test_exercise_2_r1_in_closed_form():
    """D(x) = sum c x^2 has gradient 2 c x: R1 = E sum (2 c x)^2, d R1 / d c = 8 c E sum x^2."""
    c = torch.tensor(0.7, requires_grad=True)
    x = torch.randn(5, 3, 4, 4)
    r1 = ewc_gan.d_r1_loss(lambda images: (c * images.square()).sum((1, 2, 3)), x)
    size = x.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(r1.detach(), 4 * c.detach() ** 2 * size, msg=lambda m:
                               f"R1 is the squared length of each image's gradient, averaged\n{m}")
    assert r1.requires_grad, "R1 must be differentiable in D: take its gradient with create_graph"
    torch.testing.assert_close(torch.autograd.grad(r1, c)[0], 8 * c.detach() * size)
    assert not x.requires_grad, "the caller's images were changed: detach them first"


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", FAMILIES)
def test_an_image_depends_on_its_z_alone_and_a_verdict_on_its_image_alone(arch):
    model, z = small_model(arch), torch.randn(6, 8)
    with torch.no_grad():
        images = model.G(z)
        assert images.std() > 0.01
        single = torch.cat([model.G(z[i:i + 1]) for i in range(6)])
        torch.testing.assert_close(images, single, rtol=1e-4, atol=1e-5,
                                   msg=lambda m: f"G couples the images of a batch\n{m}")
        D = model.D.eval()
        torch.testing.assert_close(D(images), torch.cat([D(image[None]) for image in images]),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("arch", FAMILIES)
def test_resolutions_and_sizes(arch, resolution):
    model = build_model(arch, resolution)
    image = model.G_ema(torch.randn(1, model.z_dim))
    assert image.shape == (1, 3, resolution, resolution) and model.D(image).shape == (1,)
    for net in (model.G, model.D):
        assert 0.6e6 < sum(p.numel() for p in net.parameters()) < 1.2e6


def test_what_the_networks_are_indifferent_to():
    """StyleGAN's mapping sees the direction of z alone; the ruler, no scale of D's features."""
    model = small_model("stylegan")
    z = torch.randn(3, 8)
    torch.testing.assert_close(model.G_ema(2 * z), model.G_ema(z), rtol=1e-4, atol=1e-5)
    assert (model.G_ema(2 * z) - model.G_ema(z + 1)).abs().max() > 1e-3
    D, images = model.D.eval(), torch.randn(4, 3, 32, 32)
    before = D(images)
    D.minibatch_std.running_std += 1
    assert (D(images) - before).abs().min() > 1e-4, "in eval mode the running mean stands in"
    features = ewc_gan.discriminator_features("cpu")(images)
    for block in (features[:, :128], features[:, 128:]):        # of channels of length 1 everywhere
        assert 0 < block.square().sum(1).max() <= 1.0001


def test_mixed_precision_is_used_where_it_is_asked_for(monkeypatch):
    seen, relu = set(), nn.functional.leaky_relu
    monkeypatch.setattr(nn.functional, "leaky_relu", lambda x, a: seen.add(x.dtype) or relu(x, a))
    adapt(small_model("stylegan"), shots32(), replace(TOY, steps=1, r1_every=9), amp="bf16")
    assert torch.bfloat16 in seen
    seen.clear()
    adapt(small_model("stylegan"), shots32(), replace(TOY, steps=1), amp="off")
    assert seen == {torch.float32}


def test_modulation_of_activations_equals_modulation_of_weights():
    """The definition in Karras et al. 2020: scale the weights by s, divide by their norm."""
    torch.manual_seed(0)
    layer = ewc_gan.ModulatedConv(5, 7, 3, 4)
    x, w = torch.randn(3, 5, 8, 8), torch.randn(3, 4)
    for image, w_i, output in zip(x, w, layer(x, w)):
        weight = layer.weight * layer.scale * layer.style(w_i[None])[0][:, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = nn.functional.conv2d(image[None], weight * 2**0.5, padding=1)[0]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_minibatch_std_against_numpy():
    layer = ewc_gan.MinibatchStd(group=4).train()
    x = torch.randn(8, 3, 2, 2)
    extra = layer(x)[:, 3]
    for j in range(2):                                   # groups: images 0 2 4 6 and 1 3 5 7
        expected = np.std(x[j::2].numpy(), axis=0).mean()
        np.testing.assert_allclose(extra[j::2].numpy(), expected, rtol=1e-4)
    x[:] = 1.0
    assert layer(x)[:, 3].max() < 1e-3, "a batch without variety must be visible to D"


def test_calibrated_batchnorm_has_the_statistics_of_its_inputs():
    torch.manual_seed(1)
    G = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1, 1)), nn.BatchNorm2d(6))
    ewc_gan.calibrate_batchnorm(G, 4, samples=2048)
    inputs = G[0](torch.randn(20000, 4))
    torch.testing.assert_close(G[2].running_mean, inputs.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(G[2].running_var, inputs.var(0), atol=0, rtol=0.1)
    assert not G[2].training


# --------------------------------------------------------------------------------------------------
# Training and adaptation
# --------------------------------------------------------------------------------------------------
def train_by_hand(source, images, settings):
    """Adaptation, written out: the oracle for the training step, fine-tuning and the whole loss."""
    G, D = copy.deepcopy(source.G_ema).requires_grad_(True), copy.deepcopy(source.D).train()
    ema = [p.detach().clone() for p in G.parameters()]
    theta_S, lam = copy.deepcopy(ema), settings.lam
    random = torch.Generator().manual_seed(settings.seed)
    z = torch.randn(settings.fisher_samples, source.z_dim, generator=random)
    F = list(fisher_diagonal(G, D, z).values())
    adam = [torch.optim.Adam(net.parameters(), 0.0, (settings.beta1, settings.beta2), fused=True)
            for net in (G, D)]
    random = torch.Generator().manual_seed(settings.seed)

    def shift(x):                                       # pixels that move in repeat the edge
        most = round(settings.shift * 32)
        if most == 0:
            return x
        rows, columns = ((torch.arange(32) + move - most).clamp(0, 31) for move in
                         torch.randint(2 * most + 1, (2,), generator=random))
        return x[:, :, rows][:, :, :, columns]

    for step in range(settings.steps):
        lr = settings.lr
        if settings.lr_decay:
            lr = lr / math.sqrt(1 + step / settings.lr_decay)
        for optimizer, rate in zip(adam, (lr, lr * settings.d_lr_ratio)):
            optimizer.param_groups[0]["lr"] = rate
        batch = images[torch.randint(len(images), (settings.batch_size,), generator=random)]
        x = batch.float() / 127.5 - 1
        flipped = torch.rand(len(x), generator=random) < 0.5
        x[flipped] = x[flipped].flip(3)
        x = x.contiguous(memory_format=torch.channels_last)
        z = torch.randn(settings.batch_size, source.z_dim, generator=random)
        x, fake = shift(x), shift(G(z))
        softplus = nn.functional.softplus
        loss = softplus(-D(x)).mean() + softplus(D(fake.detach())).mean()
        if step % settings.r1_every == 0:
            x.requires_grad_(True)
            g, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
            r1 = g.square().sum((1, 2, 3)).mean()
            loss = loss + settings.r1_every * settings.r1_gamma / 2 * r1
        adam[1].zero_grad(), loss.backward(), adam[1].step()
        loss = softplus(-D(fake)).mean()
        if lam:
            terms = zip(F, G.parameters(), theta_S)
            loss = loss + lam * sum((f * (p - p_S).square()).sum() for f, p, p_S in terms)
        adam[0].zero_grad(), loss.backward(), adam[0].step()
        for average, p in zip(ema, G.parameters()):
            average.lerp_(p.detach(), 1 - min(settings.ema, (1 + step) / (10 + step)))
    return G, D, ema


@pytest.mark.parametrize("lam", [0.0, 1000.0])
@pytest.mark.parametrize("arch", FAMILIES)
def test_adaptation_equals_the_loop_written_by_hand(arch, lam):
    """lam = 0 is plain fine-tuning bit for bit; lam > 0 adds lam * penalty to the loss of G."""
    source, settings = small_model(arch), replace(TOY, lam=lam, ema=0.3, lr_decay=2.0)
    settings.shift = 0.1 if lam else 0.0                # an odd sum of gradients is not bit-equal
    run = adapt(source, shots32(), settings)
    result = run.model
    G, D, ema = train_by_hand(source, shots32(), settings)
    pairs = [*zip(result.G.parameters(), G.parameters()), *zip(result.D.parameters(),
             D.parameters()), *zip(result.G_ema.parameters(), ema)]
    if lam == 0:
        assert all(torch.equal(a, b) for a, b in pairs)
    for (name, p), copied in zip(source.G_ema.named_parameters(), run.theta_S.values()):
        assert torch.equal(p, copied), f"{name}: theta_S must be copies; live references move along"
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_logged_penalty_is_lambda_times_the_distance():
    source, settings = small_model("dcgan"), replace(TOY, steps=1, lam=50.0)
    after_one = adapt(source, shots32(), settings)
    log = adapt(source, shots32(), replace(settings, steps=2)).log
    expected = 50.0 * ewc_penalty(after_one.model.G, after_one.theta_S, after_one.F).item()
    assert log[-1]["penalty"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert log[-1]["share"] == pytest.approx(expected / (expected + log[-1]["loss_G"]), rel=1e-4)


def test_pretraining_lives_on_batch_statistics_and_ships_measured_ones(tmp_path):
    model, out = small_model("dcgan"), tmp_path / "source.pt"
    before = model.G.norm4.running_mean.clone()
    ewc_gan.pretrain(shots32(), model, replace(TOY, lam=0.0), out)
    assert not torch.equal(model.G.norm4.running_mean, before), "G must train on batch statistics"
    shipped = ewc_gan.load_checkpoint(out).G_ema
    measured = ewc_gan.calibrate_batchnorm(copy.deepcopy(shipped), 8)
    for a, b in zip(shipped.buffers(), measured.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_pretraining_keeps_the_best_model(tmp_path, monkeypatch):
    """OUT is the model of the smallest Frechet distance, OUT.train the last one."""
    distances = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(ewc_gan, "frechet_distance", lambda *_: next(distances))
    model, out = small_model("stylegan"), tmp_path / "source.pt"
    ewc_gan.pretrain(shots32().repeat(2, 1, 1, 1), model, replace(TOY, steps=3), out, save_every=1)
    assert torch.load(out, weights_only=True)["step"] == 2
    last = torch.load(tmp_path / "source.pt.train", weights_only=True)
    assert last["training"]["step"] == 3 and [row["frechet"] for row in last["log"]] == [5, 3, 4]


def test_two_processes_train_like_one(tmp_path):
    """A batch of eight, shared by two processes of torchrun, moves the weights as in one."""
    command = ["pretrain_source.py", "--data", SHOTS, "--arch", "stylegan", "--resolution", "32",
               "--steps", "1", "--batch-size", "8", "--device", "cpu", "--amp", "off", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    assert run(*command[1:], tmp_path / "one.pt", program=pretrain_source) == 0
    subprocess.run([*torchrun, *command, tmp_path / "two.pt"], check=True, cwd=ewc_gan.HERE)
    one, two = (torch.load(tmp_path / f"{name}.pt.train", weights_only=True)["training"]
                for name in ("one", "two"))
    for net in ("G", "D"):
        for name in (name for name in one[net] if "running" not in name):
            difference = (one[net][name] - two[net][name]).abs().mean().item()
            assert difference < 0.002 * ewc_gan.PRETRAIN["stylegan"].lr, (net, name)


def test_gradients_of_several_processes_are_averaged(monkeypatch):
    """Their mean, not their sum: Adam would hide the difference, a clipped or scaled step not."""
    others = torch.arange(10.0)
    monkeypatch.setattr(ewc_gan.dist, "all_reduce", lambda flat: flat.add_(others / 2))
    mine = [torch.ones(2, 3), torch.full((4,), 3.0)]
    ewc_gan.average_gradients(mine, 2)
    torch.testing.assert_close(mine[0], (1 + others[:6].view(2, 3)) / 2)
    torch.testing.assert_close(mine[1], (3 + others[6:]) / 2)


def test_a_lost_process_leaves_a_state_to_resume_from(tmp_path, monkeypatch):
    def all_reduce(flat, calls=[]):
        calls.append(flat)
        if len(calls) > 5:                              # two a step, D and G: in half of the third
            raise RuntimeError("connection closed by peer")

    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(ewc_gan.dist, name, lambda value=value: value)
    monkeypatch.setattr(ewc_gan.dist, "all_reduce", all_reduce)
    out = tmp_path / "source.pt"
    with pytest.raises(ewc_gan.UserError, match="process was lost.*--resume"):
        ewc_gan.pretrain(shots32(), small_model("stylegan"), TOY, out, save_every=1)
    assert ewc_gan.read_checkpoint(tmp_path / "source.pt.train")["training"]["step"] == 2
    with pytest.raises(ewc_gan.UserError, match="--batch-size 3"):
        ewc_gan.pretrain(shots32(), small_model("stylegan"), replace(TOY, batch_size=3), out)


def test_r1_is_taken_in_float32(monkeypatch):
    seen, r1 = [], ewc_gan.d_r1_loss
    monkeypatch.setattr(ewc_gan, "d_r1_loss", lambda D, real: seen.append(
        torch.is_autocast_enabled("cpu")) or r1(D, real))
    adapt(small_model("dcgan"), shots32(), TOY, amp="bf16")
    assert seen == [False, False]


@pytest.mark.parametrize("arch", FAMILIES)
def test_adaptation_pulls_G_back_trains_D_and_leaves_the_source_alone(arch):
    source = small_model(arch)
    untouched = copy.deepcopy(source)
    free, held, huge = (adapt(source, shots32(), replace(TOY, steps=30, lam=lam))
                        for lam in (0.0, 1e4, 1e12))
    for name in ("G", "G_ema", "D"):
        assert states_equal(getattr(source, name), getattr(untouched, name))
    assert not any(torch.equal(a, b) for a, b in zip(held.model.D.parameters(),
                   source.D.parameters())), "D must be trained on during the adaptation"
    for name, p in source.G_ema.named_parameters():
        assert torch.equal(held.theta_S[name], p), "theta_S is a copy of G_ema, where G starts"
    for (name, buffer), after in zip(source.G_ema.named_buffers(), held.model.G.buffers()):
        assert torch.equal(buffer, after), f"{name}: BatchNorm must stay frozen"
    assert held.log[-1]["penalty"] > 0 and free.log[-1]["penalty"] == 0

    def weighted_change(result):                     # the distance that the penalty measures
        return ewc_penalty(result.model.G, free.theta_S, free.F).item()
    assert weighted_change(held) < 0.7 * weighted_change(free)
    assert weighted_change(huge) < 0.1 * weighted_change(free)
    z = torch.randn(16, 8)
    moved = [(r.model.G(z) - source.G_ema(z)).abs().mean().item() for r in (free, huge)]
    assert moved[1] < 0.5 * moved[0], "a huge lambda must keep the generator where it was"


@pytest.mark.parametrize("arch", FAMILIES)
def test_fisher_of_a_run_is_measured_at_theta_S_with_the_source_D(arch):
    source = small_model(arch)
    F = adapt(source, shots32(), TOY).F
    z = torch.randn(TOY.fisher_samples, 8, generator=torch.Generator().manual_seed(TOY.seed))
    expected = fisher_diagonal(copy.deepcopy(source.G_ema).requires_grad_(True), source.D, z)
    assert F.keys() == expected.keys() and all(torch.equal(F[n], expected[n]) for n in F)


@pytest.mark.parametrize("arch", FAMILIES)
def test_two_plus_two_steps_equal_four_bit_for_bit(arch, tmp_path):
    source, images, path = small_model(arch), shots32(), tmp_path / "adapted.pt"
    whole = adapt(source, images, TOY, save_every=2)
    adapt(source, images, replace(TOY, steps=2), path)
    resumed = adapt(source, images, TOY, path, resume=True)
    for changed in (replace(TOY, lam=1.0), replace(TOY, seed=1)):
        with pytest.raises(ewc_gan.UserError, match="--resume"):
            adapt(source, images, changed, path, resume=True)
    with pytest.raises(ewc_gan.UserError, match="images was"):
        adapt(source, images.flip(0), TOY, path, resume=True)
    with pytest.raises(ewc_gan.UserError, match="--steps 1.*at step 4 already"):
        adapt(source, images, replace(TOY, steps=1), path, resume=True)
    with pytest.raises(ewc_gan.UserError, match="source was"):
        adapt(small_model(arch, 1), images, TOY, path, resume=True)
    for name in ("G", "D", "G_ema"):
        assert states_equal(getattr(whole.model, name), getattr(resumed.model, name))
    assert [row["step"] for row in resumed.log] == [2, 4]
    assert adapt(source, ewc_gan.to_float(images), replace(TOY, steps=2)).log[0]["loss_D"] == (
        resumed.log[0]["loss_D"]), "float images are images too"

    settings = replace(TOY, lam=0.0, lr_decay=2.0)
    model = small_model(arch)
    whole = ewc_gan.pretrain(images, copy.deepcopy(model), settings, tmp_path / "whole.pt")
    out = tmp_path / "part.pt"
    ewc_gan.pretrain(images, copy.deepcopy(model), replace(settings, steps=2), out)
    resumed = ewc_gan.pretrain(images, small_model(arch, 1), settings, out, resume=True)
    for name in ("G", "D", "G_ema"):
        assert states_equal(getattr(whole, name), getattr(resumed, name))


@pytest.mark.parametrize("arch", FAMILIES)
def test_mixed_precision_agrees_with_full_precision(arch):
    """bf16 keeps 8 bits: after ten steps the losses agree to 10 %, images to 1 %; F exactly."""
    source = small_model(arch)
    full, half = (adapt(source, shots32(), replace(TOY, steps=10, batch_size=8), amp=amp)
                  for amp in ("off", "bf16"))
    assert all(torch.equal(full.F[n], half.F[n]) for n in full.F), "Fisher belongs in float32"
    for name in ("loss_D", "loss_G", "penalty"):
        assert half.log[-1][name] == pytest.approx(full.log[-1][name], rel=0.1, abs=0.01)
    z = torch.randn(8, 8)
    difference = (full.model.G_ema(z) - half.model.G_ema(z)).abs().mean()
    assert difference < 0.02                                       # images span -1..1
    assert all(p.dtype == torch.float32 for p in half.model.G.parameters())


def test_average_follows_its_formula():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * a.weight.detach() + 0.1 * b.weight.detach()
    ewc_gan.accumulate(a, b, 0.9)
    torch.testing.assert_close(a.weight.detach(), expected)


def test_exercise_5_layer_changes_by_hand():
    theta_S = {"up.weight": torch.tensor([[1.0, -3.0]]), "up.style.bias": torch.tensor([4.0])}
    theta = {"up.weight": torch.tensor([[2.0, -3.0]]), "up.style.bias": torch.tensor([3.0])}
    F = {"up.weight": torch.tensor([[1.0, 2.0]]), "up.style.bias": torch.tensor([6.0])}
    row, = ewc_gan.layers(theta, theta_S, F)
    assert row["layer"] == "up" and row["weight"] == pytest.approx(8 / 3)
    assert row["fisher"] == pytest.approx(3), "the mean of F is over the weights, not the tensors"
    assert row["change"] == pytest.approx(25), (                           # (1+0+1) / (1+3+4)
        "sum |theta - theta_S| over sum |theta_S|, in %: not a mean of single ratios")


def test_relative_change_by_hand():
    theta_S, theta = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {}
    theta["a"], theta["b"] = torch.tensor([4.0]), torch.tensor([4.0])
    assert ewc_gan.relative_change(theta, theta_S) == pytest.approx(1 / 5)


# --------------------------------------------------------------------------------------------------
# Baselines, comparisons and their measures
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", FAMILIES)
def test_what_each_method_holds_back(arch):
    """raw: each weight by F; ewc: by F without its scale and its few giants; l2: all alike."""
    model = small_model(arch)
    G, F = model.G, fisher_diagonal(model.G, model.D, torch.randn(4, 8))
    theta_S = {name: p.detach() - 1 for name, p in G.named_parameters()}       # all moved by 1

    def pull_on_each_weight(method, F):
        pull = ewc_gan.pull_of(method, 3.0, theta_S, F)
        gradients = torch.autograd.grad(pull(G), list(G.parameters()))
        return torch.cat([g.flatten() for g in gradients]) / (2 * 3.0)

    raw, ewc, l2 = (pull_on_each_weight(method, F) for method in ("raw", "ewc", "l2"))
    f = torch.cat([f.flatten() for f in F.values()])
    torch.testing.assert_close(raw, f, rtol=1e-3, atol=0)
    torch.testing.assert_close(l2, torch.ones_like(f), rtol=1e-3, atol=0)
    assert ewc.mean().item() == pytest.approx(1, rel=1e-3), "l2 and ewc: the same pull in sum"
    order = f.sort()
    giants = len(f) // 100
    torch.testing.assert_close(ewc[order.indices[-giants:]].std().item(), 0.0, atol=1e-3, rtol=0,
                               msg="the largest 1 % of F are not all cut to one height")
    rest = order.indices[:-giants - 1]
    torch.testing.assert_close(ewc[rest] * f[rest].sum(), f[rest] * ewc[rest].sum(),
                               rtol=1e-3, atol=1e-12, msg="the other 99 % lost their proportions")
    louder = {name: 1000 * f for name, f in F.items()}
    torch.testing.assert_close(pull_on_each_weight("ewc", louder), ewc, rtol=1e-3, atol=1e-12)
    for method, lam in (("finetune", 3.0), ("freezed", 3.0), ("ewc", 0.0), ("raw", 0.0)):
        assert ewc_gan.pull_of(method, lam, theta_S, F) is None


@pytest.mark.parametrize("arch", FAMILIES)
def test_freezed_trains_the_upper_layers_of_D_alone(arch):
    """Features of 8x8 and larger stay; the weights after them, and all of G, do not."""
    source = small_model(arch)
    result = adapt(source, shots32(), replace(TOY, method="freezed"))
    before, after = dict(source.D.named_parameters()), dict(result.model.D.named_parameters())
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    last_stage = {"dcgan": ("layers.4", "layers.6"),
                  "stylegan": ("blocks.1", "last", "hidden", "out")}[arch]
    assert frozen == {name for name in before if not name.startswith(last_stage)} != set()
    assert not any(torch.equal(p, result.theta_S[name])
                   for name, p in result.model.G.named_parameters())
    assert states_equal(adapt(source, shots32(), replace(TOY, method="finetune")).model.G,
                        adapt(source, shots32(), replace(TOY, lam=0.0)).model.G)


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2.  In general: by numpy."""
    def whitened(n, c):                                     # mean 0 and covariance 1, exactly
        x = torch.randn(n, c, dtype=torch.double)
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T

    torch.manual_seed(0)
    sigma_a, sigma_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.1])
    a, b = whitened(50, 3) * sigma_a, whitened(80, 3) * sigma_b + torch.tensor([1.0, 0.0, -2.0])
    expected = 1 + 4 + (2**2 + 0 + 0.4**2)
    assert ewc_gan.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    a, b = (torch.randn(40, 5, dtype=torch.double) @ torch.randn(5, 5, dtype=torch.double)
            for _ in range(2))
    C_a, C_b = (np.cov(x.numpy().T) for x in (a, b))
    eigenvalues = np.linalg.eigvals(C_a @ C_b).real
    expected = ((a.mean(0) - b.mean(0)).square().sum().item() + np.trace(C_a) + np.trace(C_b)
                - 2 * np.sqrt(eigenvalues).sum())
    assert ewc_gan.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    few = torch.randn(4, 9)                                 # fewer samples than features
    assert ewc_gan.frechet_distance(few, few) == pytest.approx(0, abs=1e-5)


def test_precision_and_recall_of_constructed_sets():
    """Two far clusters are real, the generator knows one of them, and an island of its own."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))                 # 25 points
    real, fake = torch.cat([grid, grid + 100]), torch.cat([grid + 0.1, grid[:6] + 900])
    assert ewc_gan.precision_recall(real, fake) == (pytest.approx(25 / 31), pytest.approx(25 / 50))
    line = torch.arange(4.0)[:, None]                       # k = 1: balls of radius 1
    assert ewc_gan.precision_recall(line, torch.tensor([[4.0], [5.0], [9.0]]), k=1) == (
        pytest.approx(1 / 3), pytest.approx(1 / 4))


def test_diversity_and_nearest_shot_by_hand():
    shots = torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 0.0]])
    features = torch.tensor([[0.0, 1.0], [0.0, -2.0], [10.0, 0.0], [10.0, 4.0], [10.0, -4.0]])
    diversity, nearest = ewc_gan.diversity_and_nearest(features, shots)
    assert diversity == pytest.approx((3 + (4 + 4 + 8) / 3) / 2)     # the third cluster is empty
    assert nearest == pytest.approx((1 + 2 + 0 + 4 + 4) / 5)
    assert ewc_gan.diversity_and_nearest(shots, shots) == (0, 0), "copies of the shots"


def test_kept_distances_by_hand():
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])                 # distances 1 3 2
    moved_and_scaled = torch.tensor([[5.0, 1.0], [5.0, 3.0], [5.0, 7.0]])      # distances 2 6 4
    assert ewc_gan.distances_kept(before, moved_and_scaled) == pytest.approx(1)
    other = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]])                  # distances 3 1 2
    assert ewc_gan.distances_kept(before, other) == pytest.approx(-1)


def test_runs_of_a_comparison():
    """lambda is meant for ewc, raw and l2, and 0 makes all of them fine-tuning: run that once."""
    def names(*argv):
        args = ewc_gan.parse_arguments(["--target", "t", *argv])
        runs = ewc_gan.planned_runs(args, Settings(), Path("o"))
        return {str(folder): (run.method, run.lam, run.seed) for _, run, folder in runs}

    assert names() == {"o": ("ewc", Settings().lam, 0)}
    assert names("--lam", "0") == {"o": ("finetune", 0.0, 0)}
    assert names("--lam", "0", "5", "--method", "ewc", "l2", "freezed", "finetune") == {
        "o/finetune": ("finetune", 0.0, 0), "o/ewc_5": ("ewc", 5.0, 0), "o/l2_5": ("l2", 5.0, 0),
        "o/freezed": ("freezed", 0.0, 0)}
    assert names("--method", "raw", "ewc") == {                    # each with a default of its own
        "o/raw_100": ("raw", 100.0, 0), "o/ewc_0.0025": ("ewc", 0.0025, 0)}
    assert names("--seed", "3", "4", "--method", "freezed") == {
        "o/freezed_seed3": ("freezed", 0.0, 3), "o/freezed_seed4": ("freezed", 0.0, 4)}


def test_a_comparison_measures_what_it_leaves_behind(tmp_path, capsys, monkeypatch):
    """The figures in comparison.csv are those of the models in its folders; --resume repeats it."""
    source = small_model("dcgan")
    ewc_gan.save_checkpoint(tmp_path / "source.pt", source)
    ruler = ewc_gan.Ruler(ewc_gan.discriminator_features("cpu"), load_images(SHOTS, 32),
                          load_images(SHOTS.parent, 32), 40, ewc_gan.generate(source, 40, seed=1))
    monkeypatch.setattr(ewc_gan, "make_ruler", lambda *_: ruler)
    argv = ["--target", SHOTS, "--method", "ewc", "finetune", "--seed", 0, 1, "--reference",
            SHOTS.parent, "--out", tmp_path, "--steps", 2, "--batch-size", 2, "--fisher-samples", 2,
            "--source", tmp_path / "source.pt"]
    assert run(*argv) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    lam = ewc_gan.ADAPT["dcgan"].lam
    assert [(row["run"], row["seed"]) for row in table] == [
        ("source", ""), ("held-out", ""), (f"ewc_{lam:g}", "0"), (f"ewc_{lam:g}", "1"),
        ("finetune", "0"), ("finetune", "1")]
    assert float(table[0]["kept"]) == pytest.approx(1, abs=1e-5)
    measured = []
    for row, folder in zip(table[2:], (f"ewc_{lam:g}_seed0", f"ewc_{lam:g}_seed1", "finetune_seed0",
                                       "finetune_seed1")):
        model = ewc_gan.load_checkpoint(tmp_path / folder / "adapted.pt")
        measures = ruler(ewc_gan.generate(model, ruler.n, seed=1))
        assert {name: float(row[name]) for name in measures} == pytest.approx(measures, rel=1e-3)
        measured.append(measures["frechet"])
    mean, spread = np.mean(measured[2:]), np.std(measured[2:], ddof=1)
    assert f"{mean:.3g} ±{spread:.2g}" in printed
    assert {"comparison.png", "paths.png"} <= {path.name for path in tmp_path.iterdir()}
    F_of_seeds = [(tmp_path / f"finetune_seed{seed}" / "layers.csv").read_text() for seed in (0, 1)]
    assert F_of_seeds[0] != F_of_seeds[1], "each seed has a Fisher information of its own"
    before = (tmp_path / "comparison.csv").read_bytes()
    assert run(*argv, "--resume") == 0 and (tmp_path / "comparison.csv").read_bytes() == before
    other = ewc_gan.Ruler(lambda images: images[:, 0, ::8, ::8].flatten(1), load_images(SHOTS, 32),
                          load_images(SHOTS.parent, 32), 40, ewc_gan.generate(source, 40, seed=1))
    monkeypatch.setattr(ewc_gan, "make_ruler", lambda *_: other)
    assert run(*argv, "--resume") == 0                          # finished runs, other --features
    with open(tmp_path / "comparison.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["frechet"]) == pytest.approx(other.of_model(model)["frechet"], rel=1e-3)


def test_the_ruler_compares_what_became_of_the_same_z():
    source, shots = small_model("dcgan"), shots32()
    ruler = ewc_gan.make_ruler(ewc_gan.parse_arguments(["--target", "x"]), source, shots, "cpu")
    assert ruler.n == 200 and ruler.reference is None
    assert ruler(ewc_gan.generate(source, 200, seed=1))["kept"] == pytest.approx(1, abs=1e-4)
    assert ruler(ewc_gan.generate(source, 200, seed=0))["kept"] < 0.5
    assert ruler(ewc_gan.generate(small_model("dcgan", 1), 200, seed=1))["kept"] < 0.99


def test_copies_of_the_shots_are_told_mirrored_or_not():
    shots = load_images(SHOTS, 32)
    ruler = ewc_gan.Ruler(ewc_gan.discriminator_features("cpu"), shots)
    for copies in (shots, shots.flip(3)):
        assert ruler(copies)["nearest_shot"] < 1e-3
    assert ruler(torch.cat([shots, shots.flip(3)] * 2))["diversity"] < 1e-3
    assert ruler(load_images(SHOTS.with_name("10shot_sketch"), 32))["nearest_shot"] > 1


def test_squeezenet_that_cannot_be_fetched_is_one_line(tmp_path, capsys, monkeypatch):
    def offline(**_):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(ewc_gan, "squeezenet1_1", offline)
    out = tmp_path / "o"
    assert run("--target", SHOTS, "--features", "squeezenet", "--out", out) == 2
    error = capsys.readouterr().err
    assert "--features squeezenet" in error and error.count("\n") == 1 and not out.exists()


def test_squeezenet_features_are_those_of_one_image_at_a_time(monkeypatch):
    """With random weights, for the real ones would have to be downloaded."""
    torch.manual_seed(0)
    net = ewc_gan.squeezenet1_1()
    monkeypatch.setattr(ewc_gan, "squeezenet1_1", lambda **_: net)
    images = load_images(SHOTS, 64)
    features = ewc_gan.squeezenet_features("cpu")(images)
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    for image, feature in zip(images[:3], features):
        big = nn.functional.interpolate(image[None] / 2 + .5, (128, 128), mode="bilinear")
        x = (big.permute(0, 2, 3, 1) - mean) / std
        expected = net.features(x.permute(0, 3, 1, 2)).flatten(2).mean(2)[0]
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Images and files
# --------------------------------------------------------------------------------------------------
def test_load_images_of_every_mode(tmp_path):
    """One grey-level ramp, stored in many ways, must come back as the same pixels."""
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    grey = Image.fromarray(ramp)
    turned = Image.Exif()
    turned[0x0112] = 6                                              # "turn me by 90 degrees"
    (tmp_path / "nested" / "deeper").mkdir(parents=True)
    grey.save(tmp_path / "a.png")
    grey.convert("P").save(tmp_path / "b.png")
    Image.merge("RGBA", [grey] * 3 + [Image.new("L", (16, 16), 255)]).save(tmp_path / "c.PNG")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "d.png")          # 16 bits
    grey.convert("CMYK").save(tmp_path / "nested" / "e.tif")
    grey.rotate(90).convert("RGB").save(tmp_path / "nested" / "deeper" / "f.png", exif=turned)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "z.png")            # transparent
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_images(tmp_path, 16)
    assert images.shape == (7, 3, 16, 16) and images.dtype == torch.float32
    expected = torch.from_numpy(ramp).float().expand(3, 16, 16) / 127.5 - 1
    for image in images[:6]:
        torch.testing.assert_close(image, expected, atol=0.02, rtol=0)
    assert (images[6] == 1).all(), "transparent pixels lie on white"


def test_images_that_are_not_square_are_cropped_at_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (load_images(tmp_path, 20) == 1).all()


@pytest.mark.parametrize("count, batch", [(10, 16), (1, 4)])
def test_fewer_images_than_the_batch(count, batch):
    result = adapt(small_model("dcgan"), shots32(count), replace(TOY, steps=2, batch_size=batch))
    assert np.isfinite(result.log[-1]["loss_D"])


def run(*argv, program=ewc_gan):
    """Exit code and nothing else; the text is read from capsys."""
    try:
        program.main([str(a) for a in argv])
        return 0
    except SystemExit as stop:
        return stop.code


class Code:
    def __reduce__(self):
        return exec, ("open('hacked', 'w').close()",)


@pytest.fixture(scope="session")
def bad_world(tmp_path_factory):
    """A folder full of things that can be wrong, beside a few that are right."""
    world = tmp_path_factory.mktemp("world")
    picture = (SHOTS / "00000.png").read_bytes()
    Image.open(SHOTS / "00000.png").convert("RGB").save(world / "x.jpg")
    jpeg = (world / "x.jpg").read_bytes()
    for folder, name, content in [
            ("two", "a.png", picture), ("two", "b \u00e9\n\u732b.png", picture),
            ("text", "x.png", b"hello"), ("cut", "x.png", picture[:len(picture) // 2]),
            ("cut_jpeg", "x.jpg", jpeg[:len(jpeg) // 2]), ("zero", "x.png", b""),
            ("newline", "a\nb.png", b"no"), ("empty", "notes.txt", b"")]:
        (world / folder).mkdir(exist_ok=True)
        (world / folder / name).write_bytes(content)
    for folder, mode, size in [("dot", "RGB", (1, 1)), ("bomb", "1", (20000, 20000))]:
        (world / folder).mkdir()
        Image.new(mode, size).save(world / folder / "x.png")
    (world / "loop").mkdir()
    (world / "loop" / "x.png").symlink_to("x.png")
    (world / "file").write_text("a file")
    (world / "folder.pt").mkdir()

    model = small_model("dcgan")
    ewc_gan.save_checkpoint(world / "good.pt", model)
    good = torch.load(world / "good.pt", weights_only=True)
    weights = good["G_ema"]
    name = "conv8.weight"
    huge = torch.zeros(1, 1, 1, 1).expand(10**6, 12, 4, 4)
    tower = []
    for _ in range(60):                                     # to print it would take for ever
        tower = [tower, tower]
    for label, change in {
            "old": {"format": "ewc-gan 0"}, "headless": {"arch": None},
            "pixels": {"resolution": 48}, "stages": {"g_channels": [8] * 9999},
            "missing": {"G_ema": {k: v for k, v in weights.items() if k != name}},
            "extra": {"G_ema": {**weights, "more": torch.zeros(1)}},
            "misshapen": {"G_ema": {**weights, name: weights[name][:-1]}},
            "nan": {"G_ema": {**weights, name: weights[name] * math.nan}},
            "no_D": {"D": None}, "family": {"arch": "stylegan"},
            "giant": {"z_dim": 10**12}, "minus": {"z_dim": -1}, "float": {"resolution": 32.0},
            "double": {"G_ema": {**weights, name: weights[name].double() * 1e300}},
            "variance": {"G_ema": {**weights, "norm4.running_var": -torch.ones(12)}},
            "bytes": {"note": bytearray(3)}, "tower": {"resolution": tower},
            "stretched": {"z_dim": 10**6, "G_ema": {**weights, "conv4.weight": huge}}}.items():
        torch.save({**good, **change}, world / f"{label}.pt")
    torch.save({"weights": torch.zeros(3)}, world / "foreign.pt")
    torch.save(good, world / "legacy.pt", _use_new_zipfile_serialization=False)
    whole = (world / "good.pt").read_bytes()
    (world / "cut.pt").write_bytes(whole[:5000])
    (world / "zero.pt").write_bytes(b"")
    (world / "text.pt").write_bytes(b"hello")
    (world / "code.pt").write_bytes(pickle.dumps(Code()))
    with zipfile.ZipFile(world / "code2.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Code()))
        archive.writestr("archive/version", "3\n")
    with zipfile.ZipFile(world / "good.pt") as old, zipfile.ZipFile(
            world / "zipbomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
        new.writestr("archive/data/999", bytes(10**7))

    (world / "run" / "ewc_1").mkdir(parents=True)
    (world / "run" / "ewc_1" / "a.png").write_bytes(picture)
    adapt(model, shots32(2), TOY, world / "run" / "adapted.pt")
    run = torch.load(world / "run" / "adapted.pt", weights_only=True)
    run["training"]["opt_G"]["state"][0]["exp_avg"] = torch.zeros(3)
    (world / "run2").mkdir()
    torch.save(run, world / "run2" / "adapted.pt")
    return world


def contents(folder):
    return {path: path.lstat().st_mtime_ns if path.is_symlink() or path.is_dir()
            else path.read_bytes() for path in folder.rglob("*")}


TARGET = ["--target", "two"]
GOOD = [*TARGET, "--source", "good.pt"]
BAD_INPUT = [                                       # program, arguments, what the line names
    *((ewc_gan, ["--target", folder], says) for folder, says in [
        ("nowhere", "nowhere"), ("empty", "empty: no images"), ("file", "file: no such folder"),
        ("text", "x.png"), ("cut", "x.png"), ("cut_jpeg", "x.jpg"), ("dot", "at least 8x8"),
        ("bomb", "bomb"), ("zero", "x.png"), ("loop", "loop"), ("newline", "a b.png")]),
    *((ewc_gan, [*TARGET, option, value], option) for option, value in [
        ("--steps", "0"), ("--steps", "-1"), ("--steps", "1.5"), ("--lr", "nan"), ("--lr", "0"),
        ("--lr", "fast"), ("--lam", "-1"), ("--lam", "nan"), ("--lam", "inf"), ("--shots", "3"),
        ("--shots", "0"), ("--batch-size", "0"), ("--shift", "0.6"), ("--r1-gamma", "-1"),
        ("--d-lr-ratio", "-1"), ("--seed", "-1"), ("--seed", str(2**63)), ("--fisher-samples", "0"),
        ("--method", "magic"), ("--device", "tpu"), ("--amp", "fp8"), ("--features", "vgg"),
        ("--unknown", "1"), ("--step", "3"), ("--reference", "two"),
        ("--generate", "3"), ("--checkpoint", "good.pt")]),
    (ewc_gan, [*TARGET, "--method", "finetune", "--lam", "5"], "--lam"),
    (ewc_gan, [], "--target"), (ewc_gan, [*TARGET, "--amp", "fp16", "--device", "cpu"], "--amp"),
    (ewc_gan, [*TARGET, "--out", "two/out"], "lies in two"),
    (ewc_gan, [*TARGET, "--resume"], "adapted.pt"),
    (ewc_gan, [*TARGET, "--reference", "text"], "x.png"),
    (ewc_gan, [*TARGET, "--reference", "nowhere"], "nowhere"),
    (ewc_gan, [*GOOD, "--out", "file"], "--out"), (ewc_gan, [*GOOD, "--out", "file/out"], "--out"),
    (ewc_gan, [*GOOD, "--out", "run", "--resume", "--seed", "5"], "--resume"),
    (ewc_gan, [*TARGET, "--batch-size", "10000000000000000000"], "--batch-size"),
    (ewc_gan, ["--target", "run/ewc_1", "--out", "run", "--lam", "1", "2"], "run/ewc_1"),
    *((ewc_gan, [*TARGET, "--source", f"{name}.pt"], f"{name}.pt") for name in [
        "nowhere", "folder", "cut", "zero", "text", "code", "code2", "foreign", "legacy", "zipbomb",
        "old", "headless", "pixels", "missing", "extra", "misshapen", "nan", "no_D", "family",
        "stages", "giant", "minus", "stretched", "float", "double", "variance", "bytes", "tower"]),
    (ewc_gan, ["--generate", "3", "--out", "o"], "--checkpoint"),
    (ewc_gan, ["--generate", "3", "--checkpoint", "good.pt"], "--out"),
    (ewc_gan, ["--generate", "3", "--out", "o", "--checkpoint", "good.pt", "--seed", "1", "2"],
     "--seed"),
    (ewc_gan, ["--generate", "3", "--out", "o", "--checkpoint", "nan.pt"], "nan.pt"),
    (ewc_gan, ["--generate", "3", "--out", "file", "--checkpoint", "good.pt"], "--out"),
    (ewc_gan, ["--generate", "3", "--out", "o", "--checkpoint", "good.pt", "--lam", "3"], "--lam"),
    *((pretrain_source, argv, says) for argv, says in [
        (["--data", "nowhere", "--out", "new/s.pt"], "nowhere"), (["--data", "cut"], "x.png"),
        (["--resolution", "48"], "--resolution"), (["--arch", "vae"], "--arch"),
        (["--data", "two", "--out", "source"], ".pt"), (["--data", "two", "--resume"], ".train"),
        (["--data", "two", "--out", "file/s.pt"], "file"),
        (["--data", "two", "--out", "two/s.pt"], "two/s.pt"), (["--steps", "0"], "--steps"),
        (["--init", "nan.pt"], "nan.pt"), (["--init", "good.pt", "--arch", "dcgan"], "--arch"),
        (["--benchmark", "--data", "two"], "--data"), (["--lam", "3"], "--lam")]),
    *((draw_faces, argv, says) for argv, says in [
        ([], "--out"), (["--out", "o", "--style", "cubist"], "--style"),
        (["--out", "file"], "file"),
        (["--out", "o", "--n", "0"], "--n"), (["--out", "o", "--resolution", "8"], "--resolution"),
        (["--out", "o", "--seed", "-1"], "--seed"),
        (["--out", "o", "--sheet", "s.png"], "--sheet")]),
]


@pytest.mark.parametrize("program, argv, says", BAD_INPUT, ids=[
    f"{program.__name__} {' '.join(argv)}" for program, argv, _ in BAD_INPUT])
def test_bad_input_gets_one_line_and_code_2_and_changes_nothing(program, argv, says, bad_world,
                                                                capsys, monkeypatch):
    monkeypatch.chdir(bad_world)
    before = contents(bad_world)
    assert run(*argv, program=program) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert contents(bad_world) == before


def test_a_training_state_that_does_not_fit_is_refused(bad_world):
    """PyTorch's load_state_dict of an optimiser looks at no shapes, and its step may crash."""
    source, path = ewc_gan.load_checkpoint(bad_world / "good.pt"), bad_world / "run2" / "adapted.pt"
    with pytest.raises(ewc_gan.UserError, match="damaged.*optimizer"):
        adapt(source, shots32(2), TOY, path, resume=True)
    good = ewc_gan.read_checkpoint(bad_world / "run" / "adapted.pt")
    for change in ({"opt_G": {**good["training"]["opt_G"], "state": {}}}, {"step": 2.5j},
                   {"step": -1}, {"G": None}, {"random": torch.zeros(3)}, {"origin": 7}):
        torch.save({**good, "training": {**good["training"], **change}}, path)
        with pytest.raises(ewc_gan.UserError, match="damaged"):
            adapt(source, shots32(2), TOY, path, resume=True)


SLOW = pytest.mark.skipif(not os.environ.get("EWC_GAN_SLOW"),
                          reason="takes minutes: EWC_GAN_SLOW=1 python -m pytest -k slow")
VICTIM = """
import sys, torch, ewc_gan, test_ewc_gan as t
from dataclasses import replace
job, out, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
settings = replace(t.TOY, steps=60, lam=t.TOY.lam if job == "adapt" else 0.0)
model, images = t.small_model("dcgan"), t.shots32()
torch.manual_seed(0)
print("begun", flush=True)
if job == "adapt":
    ewc_gan.adapt(model, images, settings, out, resume=resume, save_every=1)
else:
    ewc_gan.pretrain(images, model, settings, out, resume=resume, save_every=1)
"""


@SLOW
@pytest.mark.parametrize("job", ["adapt", "pretrain"])
def test_slow_kill_9_at_twenty_moments_and_resume(job, tmp_path):
    """Never a broken file, and in the end the very weights of an undisturbed run."""
    def start(out, resume):
        return subprocess.Popen([sys.executable, "-c", VICTIM, job, out, resume],
                                cwd=ewc_gan.HERE, stdout=subprocess.PIPE, text=True)

    whole, hurt = tmp_path / "whole.pt", tmp_path / "hurt.pt"
    victim = start(whole, "new")
    victim.stdout.readline()
    begin = time.monotonic()
    assert victim.wait() == 0
    whole_s = time.monotonic() - begin
    state = {"adapt": hurt, "pretrain": tmp_path / "hurt.pt.train"}[job]
    random, steps = np.random.default_rng(0), []
    for _ in range(20):
        victim = start(hurt, "resume" if state.exists() else "new")
        victim.stdout.readline()
        time.sleep(random.uniform(0, whole_s / 4))
        victim.kill()
        victim.wait()
        if state.exists():
            steps.append(ewc_gan.read_checkpoint(state)["training"]["step"])
    assert steps == sorted(steps) and len(set(steps)) > 3, steps
    assert start(hurt, "resume").wait() == 0
    end = whole if job == "adapt" else tmp_path / "whole.pt.train"
    a, b = (torch.load(path, weights_only=True) for path in (end, state))
    for net in ("G", "D", "G_ema"):
        for name, tensor in a["training"][net].items():
            assert torch.equal(tensor, b["training"][net][name]), (net, name)


@SLOW
def test_slow_long_run_stays_flat():
    """20,000 steps: no more memory, file handles or time a step at the end than at the start."""
    resource = pytest.importorskip("resource")
    seen = []

    def measure(_):
        handles = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        seen.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, handles, time.monotonic()))
        return {}

    adapt(small_model("dcgan"), shots32(), replace(TOY, steps=20000, r1_every=16), measure=measure,
          measure_every=2000)
    memory, handles, clock = zip(*seen)
    assert len(seen) == 10 and memory[-1] < 1.05 * memory[0] and handles[-1] == handles[0]
    times = np.diff(clock)
    assert np.median(times[-3:]) < 1.5 * np.median(times[:3])


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    """Files may grow to 20 kB, less than a checkpoint: the save fails, the old one survives."""
    pytest.importorskip("resource")
    path = tmp_path / "adapted.pt"
    adapt(small_model("dcgan"), shots32(), replace(TOY, steps=2), path)
    good = path.read_bytes()
    program = """
import resource, sys, test_ewc_gan as t
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
def save():
    t.adapt(t.small_model("dcgan"), t.shots32(), t.TOY, sys.argv[1], resume=True)
t.ewc_gan.exit_cleanly("test", save)
"""
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ewc_gan.HERE, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(path) in done.stderr
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["adapted.pt"]


def test_the_same_seed_gives_the_same_bits_whatever_the_folder(tmp_path, monkeypatch):
    """Neither the name of --out nor the order in which the disk lists the images plays a part."""
    ewc_gan.save_checkpoint(tmp_path / "s.pt", small_model("dcgan"))
    toy = ["--source", tmp_path / "s.pt", "--target", SHOTS, "--steps", 3, "--fisher-samples", 2]
    assert run(*toy, "--out", tmp_path / "one") == 0
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *a, **k: reversed(list(rglob(*a, **k))))
    assert run(*toy, "--out", tmp_path / "another") == 0
    one, two = (ewc_gan.read_checkpoint(tmp_path / n / "adapted.pt") for n in ("one", "another"))
    for net in ("G", "D", "G_ema"):
        assert all(torch.equal(t, two["training"][net][k]) for k, t in one["training"][net].items())
    for name in ("samples.png", "layers.csv", "interpolation.gif"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "another" / name).read_bytes()


def test_checkpoint_round_trip(tmp_path):
    for arch in FAMILIES:
        model = small_model(arch)
        ewc_gan.save_checkpoint(tmp_path / "m.pt", model, note="x")
        again = ewc_gan.load_checkpoint(tmp_path / "m.pt")
        assert not again.G.training and not again.D.training      # from now on BatchNorm is frozen
        assert states_equal(model.G_ema, again.G_ema) and states_equal(model.D, again.D)
        assert torch.equal(ewc_gan.generate(model, 3, 5), ewc_gan.generate(again, 3, 5))
        torch.testing.assert_close(ewc_gan.generate(model, 3, 5), ewc_gan.generate(again, 7, 5)[:3],
                                   rtol=1e-4, atol=1e-5)
        assert torch.load(tmp_path / "m.pt", weights_only=True)["note"] == "x"


# --------------------------------------------------------------------------------------------------
# What ships: drawn faces, sources, README
# --------------------------------------------------------------------------------------------------
def test_faces_depend_on_seed_and_index_alone():
    five, three = (draw_faces.draw_faces("photo", n, 3, workers=1) for n in (5, 3))
    assert five.shape == (5, 64, 64, 3) and five.dtype == np.uint8
    assert (five[:3] == three).all() and (five[0] != five[1]).any()
    assert (draw_faces.draw_faces("photo", 3, 4, workers=1) != three).any()


def test_ten_shot_sets_are_what_their_command_draws():
    for folder, style in [("10shot", "emoji"), ("10shot_sketch", "sketch"),
                          ("10shot_statue", "statue"), ("10shot_houses", "houses")]:
        files = sorted((ewc_gan.HERE / "data" / folder).iterdir())
        drawn = draw_faces.draw_faces(style, 10, draw_faces.TEN_SHOT_SEED, workers=1)
        assert len(files) == 10
        for path, face in zip(files, drawn):       # other versions of Pillow may round differently
            assert np.abs(np.asarray(Image.open(path)).astype(int) - face).mean() < 1


@pytest.mark.parametrize("arch", FAMILIES)
def test_shipped_sources_make_varied_images_that_their_D_believes(arch):
    path = ewc_gan.HERE / "data" / f"source_{arch}.pt"
    assert path.stat().st_size < 10e6
    model = ewc_gan.load_checkpoint(path)
    images = ewc_gan.generate(model, 64)
    faces = torch.from_numpy(draw_faces.draw_faces("photo", 64, 1, workers=1)).permute(0, 3, 1, 2)
    faces = ewc_gan.to_float(faces)
    assert images.shape == (64, 3, 64, 64)
    distance = [torch.pdist(x.flatten(1)).mean() for x in (images, faces)]
    assert distance[0] > 0.8 * distance[1], "the samples are less varied than the drawings"
    for statistic in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3))):
        torch.testing.assert_close(statistic(images), statistic(faces), atol=0.25, rtol=0)
    noise = torch.rand_like(faces) * 2 - 1
    with torch.no_grad():
        D = model.D.eval()
        assert D(faces).mean() > D(images).mean() > D(noise).mean()


def readme_blocks(*languages):
    text = (ewc_gan.HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.S)


def readme_commands():
    lines = "\n".join(readme_blocks("bash", "sh")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines
            if line.startswith(("python ", "torchrun ")) and not re.search(" -c | --help", line)]


@pytest.mark.parametrize("name", ["README.md", "data/README.md"])
def test_links_and_names_in_the_documents_exist(name):
    path = ewc_gan.HERE / name
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", text, re.M)}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 0
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (path.parent / link).exists(), link
    helps = ewc_gan.build_parser().format_help() + pretrain_source.build_parser().format_help()
    for option in re.findall(r"`(--[a-z0-9-]+)", text):
        assert option in helps or option in ("--style", "--ten-shot"), option
    columns = {"nearest_shot", "loss_D", "loss_G", "theta_S", "img_align_celeba"}
    for word in re.findall(r"`([a-z0-9.]+_[A-Za-z0-9_.]+)`", text):
        known = [m for m in (ewc_gan, pretrain_source) if hasattr(m, word.split(".")[0])]
        assert known or word in columns or (path.parent / word).exists(), word
    for file in re.findall(r"`(data/[^`*]+)`", text):
        assert (ewc_gan.HERE / file).exists(), file


def test_readme_code_runs_with_somebody_elses_networks():
    block, = readme_blocks("python")
    G, D = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 1))
    names = {"G": G, "D": D, "z": torch.randn(5, 3), "lam": 2.0,
             "adversarial_loss": lambda G: G.weight.sum()}
    exec(block, names)
    assert names["loss"].item() == pytest.approx(G.weight.sum().item(), abs=1e-6)    # no way yet
    with torch.no_grad():
        G.weight += 1
    exec(block[block.index("loss = "):], names)
    penalty = 2 * names["fisher"]["weight"].sum().item()
    assert names["loss"].item() == pytest.approx(G.weight.sum().item() + penalty, rel=1e-4)


@pytest.mark.skipif(UNSOLVED, reason="the solutions have been taken out")
def test_readme_command_takes_the_solutions_out(tmp_path):
    line, = [line for block in readme_blocks("bash") for line in block.splitlines()
             if line.startswith("python -c")]
    shutil.copy(PROGRAM, tmp_path)
    subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, check=True)
    whole, student = PROGRAM.read_text(), (tmp_path / PROGRAM.name).read_text()
    gap = re.compile(r"### BEGIN SOLUTION \((exercise \d)\)\n.*?### END SOLUTION", re.S)
    assert student == gap.sub(r"raise NotImplementedError  # (\1)", whole) != whole
    assert "### BEGIN" not in student and "### END" not in student
    compile(student, "student.py", "exec")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_goes_on(tmp_path, monkeypatch, kind):
    """Interrupted inside its third step, the run ends that step, saves it, and can be resumed."""
    source, path = small_model("dcgan"), tmp_path / "adapted.pt"
    whole, step = adapt(source, shots32(), TOY), ewc_gan.Trainer.train_step

    def interrupted(self, *args):
        if self.step == 2:
            signal.raise_signal(kind)
        return step(self, *args)

    monkeypatch.setattr(ewc_gan.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt(source, shots32(), TOY, path)
    monkeypatch.undo()
    assert ewc_gan.read_checkpoint(path)["training"]["step"] == 3
    assert states_equal(adapt(source, shots32(), TOY, path, resume=True).model.G, whole.model.G)


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    source, path = small_model("dcgan"), tmp_path / "adapted.pt"
    adapt(source, shots32(), replace(TOY, steps=2), path)
    good = path.read_bytes()
    broken = ewc_gan.to_float(shots32()) * float("nan")
    with pytest.raises(ewc_gan.UserError, match="diverged"):
        adapt(source, broken, TOY, path)
    assert path.read_bytes() == good
    fine = ewc_gan.Trainer.train_step

    def lose_a_weight(self, *args):                                 # the losses are still fine
        losses = fine(self, *args)
        list(self.model.D.parameters())[-1].data.fill_(math.nan)
        return losses

    monkeypatch.setattr(ewc_gan.Trainer, "train_step", lose_a_weight)
    with pytest.raises(ewc_gan.UserError, match="diverged"):
        adapt(source, shots32(), replace(TOY, steps=1), path)
    assert path.read_bytes() == good


def test_readme_commands_parse():
    commands = readme_commands()
    assert len(commands) >= 5
    for command in commands:
        program, *argv = shlex.split(command.replace("--nproc_per_node 8 ", ""))[1:]
        if program == "ewc_gan.py":
            ewc_gan.parse_arguments(argv)
        elif program == "pretrain_source.py":
            pretrain_source.parse_arguments(argv)
        elif program == "data/draw_faces.py":
            draw_faces.parse_arguments(argv)
        else:
            assert command == "python -m pytest"


def test_the_main_job_and_its_sequel_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ewc_gan.HERE / "data")
    toy = ["--steps", "12", "--batch-size", "2", "--fisher-samples", "2"]
    assert run("--target", "data/10shot", *toy, "--dry-run") == 0 and not Path("out").exists()
    assert run("--target", "data/10shot", *toy) == 0
    out = Path("out/10shot")
    assert {p.name for p in out.iterdir()} == {
        "samples.png", "layers.png", "layers.csv", "curves.png", "log.csv", "interpolation.gif",
        "adapted.pt", "config.json"}
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss_D,loss_G,penalty,share,change") and len(lines) == 3
    source, model = (ewc_gan.load_checkpoint(p) for p in (ewc_gan.SOURCE, out / "adapted.pt"))
    before, after = ewc_gan.generate(source, 16), ewc_gan.generate(model, 16)
    expected = ewc_gan.samples_picture(load_images("data/10shot", 64), [
        ("source", before[:8]), ("adapted", after[:8]), ("source", before[8:]),
        ("adapted", after[8:])])
    with Image.open(out / "samples.png") as picture:
        assert np.array_equal(picture, expected) and not torch.equal(before, after)
    with Image.open(out / "interpolation.gif") as gif:
        assert gif.n_frames > 20
    assert run("--checkpoint", out / "adapted.pt", "--generate", 3, "--out", "more") == 0
    assert sorted(p.name for p in Path("more").iterdir()) == [
        "seed0_00000.png", "seed0_00001.png", "seed0_00002.png"]
    with open(out / "layers.csv") as file:
        assert all(float(row["change"]) > 0 for row in csv.DictReader(file)), "of the adapted model"
    model = ewc_gan.load_checkpoint(out / "adapted.pt")
    written, made = load_images("more", 64), ewc_gan.generate(model, 3)
    torch.testing.assert_close(written, made, atol=0.005, rtol=0)             # 8 bits a pixel


def test_pretraining_on_a_folder_and_adapting_it(tmp_path, capsys):
    out = tmp_path / "source.pt"
    argv = ["--data", SHOTS, "--resolution", 32, "--batch-size", 2, "--out", out, "--amp", "off"]
    for arch in FAMILIES:
        assert run(*argv, "--arch", arch, "--steps", 2, program=pretrain_source) == 0
        assert run(*argv, "--arch", arch, "--steps", 3, "--resume", program=pretrain_source) == 0
        assert out.with_suffix(".png").exists()
        assert torch.load(out, weights_only=True)["step"] == 3
    assert run("--target", SHOTS, "--source", out, "--out", tmp_path / "o", "--steps", 1,
               "--fisher-samples", 1) == 0


def test_benchmark_prints_its_figures_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    medians = pretrain_source.medians
    monkeypatch.setattr(pretrain_source, "medians", lambda jobs, device, _=7: medians(
        jobs, device, 2))
    assert run("--benchmark", "--resolution", 32, "--batch-size", 2, "--amp", "off",
               program=pretrain_source) == 0
    text = capsys.readouterr().out
    names = re.findall(r"^([A-Za-z ]+)[,:]", text, re.M)
    assert names == ["dcgan", "pretraining", "adaptation", "Fisher information", "peak memory"]
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Exercises: the solutions stand in ewc_gan.py; without them just the tests of theirs fail
# --------------------------------------------------------------------------------------------------
SOLUTION = r"### BEGIN SOLUTION \(exercise {}\).*?### END SOLUTION"


def exercise_failures(program, monkeypatch, number=""):
    """{test: message} of the exercise tests that fail when ewc_gan.py is the given text."""
    student = types.ModuleType("ewc_gan_student")
    student.__file__ = str(PROGRAM)
    monkeypatch.setitem(sys.modules, student.__name__, student)
    exec(compile(program, "student.py", "exec"), student.__dict__)
    mine, failures = globals(), {}
    for name in ("ewc_gan", "Settings", "adapt", "build_model", "ewc_penalty", "fisher_diagonal"):
        monkeypatch.setitem(mine, name, getattr(student, name, student))
    for name, test in [item for item in mine.items() if
                       item[0].startswith(f"test_exercise_{number}")]:
        arches = FAMILIES if "arch" in inspect.signature(test).parameters else [None]
        for arguments in ([arch] if arch else [] for arch in arches):
            try:
                test(*arguments)
            except (Exception, pytest.fail.Exception) as error:
                failures[name] = f"{type(error).__name__}: {error}"
    monkeypatch.undo()
    return failures


@pytest.mark.skipif(UNSOLVED, reason="proves the solutions, which have been taken out")
@pytest.mark.parametrize("number", range(1, 6))
def test_without_its_solution_the_tests_of_an_exercise_fail_and_no_others(number, monkeypatch):
    whole = PROGRAM.read_text()
    pattern = SOLUTION.format(number)
    stripped = re.sub(pattern, "raise NotImplementedError", whole, flags=re.S)
    assert stripped != whole
    failures = exercise_failures(stripped, monkeypatch)
    of_this = {name for name in globals() if name.startswith(f"test_exercise_{number}_")}
    assert set(failures) == of_this != set()
    assert all(message.startswith("NotImplementedError") for message in failures.values())


@pytest.mark.skipif(UNSOLVED, reason="proves the solutions, which have been taken out")
@pytest.mark.parametrize("number, right, wrong, says", [
    (1, "nnF.softplus(-real_logits).mean() +", "-real_logits.sigmoid().mean() +", "L_D is not"),
    (1, "nnF.softplus(-fake_logits).mean()", "-nnF.softplus(fake_logits).mean()", "non-saturating"),
    (2, "create_graph=True", "create_graph=False", "create_graph"),
    (2, "real.detach().requires_grad_(True)", "real.requires_grad_(True)", "detach them first"),
    (2, "gradient.square().sum((1, 2, 3)).mean()", "gradient.square().mean()", "squared length"),
    (3, "D(G(z[i:i + 1]))).sum()", "D(G(z))).mean()", "the square of the batch-mean gradient"),
    (3, "nnF.logsigmoid(D(G(z[i:i + 1])))", "torch.log(D(G(z[i:i + 1])).abs())", "sigmoid of its"),
    (3, "gradient.float().square()", "gradient.float()", "squared"),
    (3, "with evaluating(G, D), torch.enable", "with torch.enable", "must be frozen, in eval mode"),
    (4, "2 * gradient", "gradient", "not 2 lam F"),
    (4, "p.detach().clone() for name, p in model", "p for name, p in model", "must be copies"),
    (4, "p.detach().clone() for name, p in model", "p.clone() for name, p in model", "detach"),
    (5, "(theta[name] - theta_S[name]).abs()", "(theta[name] / theta_S[name] - 1).abs()",
     "single ratios"),
])
def test_a_wrong_answer_is_told_what_is_wrong(number, right, wrong, says, monkeypatch):
    whole = PROGRAM.read_text()
    assert right in whole
    failures = exercise_failures(whole.replace(right, wrong), monkeypatch, number)
    assert any(says in message for message in failures.values()), failures


def skip_unsolved(test):
    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        try:
            test(*args, **kwargs)
        except NotImplementedError:
            pytest.skip("needs the solution of an exercise")
    return wrapped


if UNSOLVED:                    # in the student's version what builds on an exercise has to wait
    globals().update({name: skip_unsolved(test) for name, test in list(globals().items())
                      if name.startswith("test_") and not name.startswith("test_exercise_")})
