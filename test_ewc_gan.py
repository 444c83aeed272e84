"""Tests against oracles: closed forms, brute force, other implementations, bit equality.

    python -m pytest                                           # everything
    python test_ewc_gan.py --student DIR                       # a copy of this repository to solve
    python -m pytest -k exercise_3 -x -q --tb=short            # in it: grade exercise 3
"""
import ast
import copy
import csv
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ewc_gan
import pretrain_source
from ewc_gan import GAN, Adaptation, Trainer, UserError, adapt, load_images, weights

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))
import draw_faces  # noqa: E402
import factors  # noqa: E402

SHOTS, SOURCE = HERE / "data" / "10shot", ewc_gan.SHIPPED / "source_stylegan.pt"
IMAGES = load_images(SHOTS, 32)
TOY = Adaptation(steps=4, batch_size=2, fisher_samples=4, method="raw", lam=100.0, r1_every=2)
GOOD = ["--target", "two", "--source", "good.pt"]       # in the folder bad_world
TOY_RUN = ["--steps", "12", "--batch-size", "2", "--fisher-samples", "2"]
ARCHS = sorted(ewc_gan.FAMILIES)
each_arch = pytest.mark.parametrize("arch", ARCHS)
EXERCISES = {1: ["d_logistic_loss", "g_nonsaturating_loss"], 2: ["d_r1_loss"],
             3: ["fisher_diagonal"], 4: ["ewc_penalty", "scaled_fisher"], 5: ["layers"]}

@torch.no_grad()
def small_gan(arch, seed=0):
    """A GAN of 32 pixels and a few thousand weights, its BatchNorm frozen at real statistics."""
    torch.manual_seed(seed)
    gan = GAN(arch, 32, 8, [12, 10, 8, 6][:3 + (arch == "stylegan")], [6, 8, 10])
    gan.to("cpu", memory_format=torch.channels_last).calibrate()
    gan.G.load_state_dict(gan.G_ema.state_dict())
    for p in gan.G.eval().parameters():                 # as after a training, G is not G_ema
        p.mul_(1.05)
    gan.D.train()(torch.randn(8, 3, 32, 32))            # gives MinibatchStd a running mean
    return gan

def check(fact, message):
    """Fail with one line that says what is wrong; no tensors, no stack of calls."""
    if not fact:
        pytest.fail(message, False)

def close(actual, expected, message, rtol=1e-4, atol=1e-6):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    check(actual.shape == expected.shape, f"{message}: the shape is {list(actual.shape)}")
    far = (actual - expected).abs()
    check((far <= atol + rtol * expected.abs()).all(), f"{message}: off by up to {far.max():.2g}")

def same_states(a, b, message=""):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        check(torch.equal(x, y), f"{message}{name} differs")

def run(*argv, program=ewc_gan):
    """The exit code of a program; what it prints is read from capsys."""
    try:
        program.main([str(a) for a in argv])
        return 0
    except SystemExit as stop:
        return stop.code

# ---------- Fisher information --------------------------------------------------------------------
def test_exercise_3_fisher_in_closed_form():
    """G(z) = W z, D(x) = A x: d sum log sigmoid(A W z) / dW_jk = (sigmoid(-A W z) A)_j z_k."""
    for logits, noise, says in (
            (1, 0, "F is not E[(d log D(G(z)) / d theta)^2], where D's probability is the sigmoid "
             "of its logit: per sample, squared, then averaged"),
            (2, 0, "of several logits of an image, the log D are summed"),
            (1, 0.5, "G and D must be in eval mode meanwhile")):
        torch.manual_seed(0)
        G = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Dropout(noise))
        G[1].idle = nn.Parameter(torch.ones(5))                     # five weights without effect
        D = nn.Sequential(nn.Dropout(noise), nn.Linear(5, logits, bias=False))
        W, A, z = G[0].weight.detach(), D[1].weight.detach(), torch.randn(50, 3)
        gradients = [torch.outer(torch.sigmoid(-A @ W @ z_i) @ A, z_i) for z_i in z]
        F = ewc_gan.fisher_diagonal(G, D, z)
        close(F[:15], torch.stack(gradients).square().mean(0).flatten(), says, atol=1e-8)
        close(F[15:], torch.zeros(5), "F of a weight without effect is 0")
    with pytest.raises(ValueError):                                 # a mean over no z
        ewc_gan.fisher_diagonal(G, D, z[:0])

def test_exercise_3_fisher_averages_over_samples_and_leaves_the_networks_as_they_were():
    def state(gan):
        return {"mode": [module.training for module in gan.modules()],
                "requires_grad": [p.requires_grad for p in gan.parameters()],
                "gradients": [str(p.grad) for p in gan.parameters()],
                "weights or buffers": [v.double().sum().item() for v in gan.state_dict().values()]}

    for arch in ARCHS:
        gan, z = small_gan(arch), torch.randn(4, 8)
        next(gan.G.train().children()).eval()           # a mode per module, not per network
        frozen = next(gan.G.parameters()).requires_grad_(False)
        gan.D(gan.G(z)).sum().backward()                # gradients that must stay
        before, F = state(gan), ewc_gan.fisher_diagonal(gan.G, gan.D, z)
        for what, value in state(gan).items():
            check(value == before[what], f"fisher_diagonal changed the {what} of a network")
        check(len(F) == sum(p.numel() for p in gan.G.parameters()) - frozen.numel(),
              "F is for the trainable parameters of G alone")
        singles = [ewc_gan.fisher_diagonal(gan.G, gan.D, z_i[None]) for z_i in z]
        close(F, sum(singles) / 4, "F is not the mean of each sample's squared gradient: the "
              "square of the batch-mean gradient is smaller", atol=1e-12)

def test_exercise_3_fisher_is_float32_under_autocast_and_works_under_no_grad():
    gan, z = small_gan("stylegan"), torch.randn(3, 8)
    plain = ewc_gan.fisher_diagonal(gan.G, gan.D, z)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inside = ewc_gan.fisher_diagonal(gan.G, gan.D, z)
    close(inside, plain, "inside autocast, too, F must be measured in float32", 0, 0)
    check(inside.dtype == torch.float32 and not plain.requires_grad, "F: float32, without a graph")

def test_exercise_3_fisher_keeps_the_graph_of_one_sample_at_a_time():
    """What autograd keeps for backward passes: no more for twelve samples than for two."""
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)
            most[-1] = max(most[-1], len(alive))

    alive, most, gan = weakref.WeakSet(), [], small_gan("dcgan")
    for n in (2, 12):
        most.append(0)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            ewc_gan.fisher_diagonal(gan.G, gan.D, torch.randn(n, 8))
    check(0 < most[1] <= most[0], "graphs of earlier samples are kept: memory grows with N")

# ---------- Penalty and losses --------------------------------------------------------------------
def test_weights_are_a_differentiable_float32_copy_in_the_order_of_the_parameters():
    G = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(3, 2).half())
    G[0].bias.requires_grad_(False)
    G[1].gain = nn.Parameter(torch.tensor(7.0))                     # channels are last:
    theta, expected = weights(G), [G[0].weight.permute(0, 2, 3, 1), *G[1].parameters()]
    expected = torch.cat([p.reshape(-1).float() for p in expected])
    with torch.no_grad():
        G[0].weight.add_(1)
    assert torch.equal(theta, expected), "theta must be a copy, which does not move with G"
    assert theta.dtype == torch.float32 and theta.requires_grad

def test_exercise_4_penalty_and_its_gradient_in_closed_form():
    """Also of a G in half precision, which has no number below 6e-8 for a term of the sum."""
    for G in (small_gan("stylegan").G, nn.Linear(40, 25).half()):
        theta_S, lam = weights(G).detach(), 1e4
        F = 1e-5 * torch.rand_like(theta_S)
        close(ewc_gan.ewc_penalty(G, theta_S, F).detach(), 0, "at theta = theta_S it is not 0")
        with torch.no_grad():
            for p in G.parameters():
                p.add_(0.01 * torch.randn_like(p))
        moved = weights(G).detach().double() - theta_S.double()
        penalty = ewc_gan.ewc_penalty(G, theta_S, F)
        close(penalty.detach(), (F.double() * moved**2).sum(),
              "not sum_i F_i (theta_i - theta_S,i)^2, in float32", atol=0)
        check(penalty.requires_grad, "the penalty must be differentiable in theta")
        (lam * penalty).backward()
        gradient = ewc_gan.as_vector([p.grad for p in G.parameters()])
        close(gradient, 2 * lam * F * moved, "its gradient is not 2 lam F (theta - theta_S)", 2e-3)

def test_exercise_4_scaled_fisher_is_capped_and_has_mean_1():
    torch.manual_seed(0)
    F = torch.rand(1000) ** 8
    scaled, order = ewc_gan.scaled_fisher(F), F.argsort()
    close(scaled.mean(), 1.0, "the mean of the scaled F is not 1")
    close(scaled[order[-100:]], [float(scaled.max())] * 100, "not capped at one value at the top")
    ratio = (scaled / F)[order[:899]]
    close(ratio, ratio.mean().expand(899), "the other 90 % lost their proportions")
    close(ewc_gan.scaled_fisher(1000 * F), scaled, "the scale of F must not matter")
    with pytest.raises(UserError):                                  # 0 nearly everywhere
        ewc_gan.scaled_fisher(torch.cat([torch.zeros(500), torch.ones(2)]))

def test_what_each_method_holds_back():
    G = nn.Linear(20, 20)
    theta_S, F = weights(G).detach() - 1, torch.rand(420) ** 8                  # all moved by 1
    for method, f in (("raw", F), ("ewc", ewc_gan.scaled_fisher(F)), ("l2", torch.ones(420))):
        penalty = ewc_gan.make_penalty(method, 3.0, theta_S, F)
        gradients = torch.autograd.grad(penalty(G), list(G.parameters()))
        close(ewc_gan.as_vector(gradients), 6 * f, f"{method}: not 2 lam F (theta - theta_S)", 1e-3)
    for method, lam in (("finetune", 3.0), ("freezed", 3.0), ("ewc", 0.0)):
        assert ewc_gan.make_penalty(method, lam, theta_S, F) is None

def test_exercise_1_losses_are_cross_entropies_of_logits():
    real, fake = torch.tensor([0.3, -2.0, 90.0]), torch.tensor([1.5, -90.0])
    bce = nn.functional.binary_cross_entropy_with_logits
    close(ewc_gan.d_logistic_loss(real, fake), bce(real, torch.ones(3)) + bce(fake, torch.zeros(2)),
          "L_D is not -E[log D(x)] - E[log(1 - D(G(z)))], where D(x) is the sigmoid of the logit")
    close(ewc_gan.g_nonsaturating_loss(fake), bce(fake, torch.ones(2)),
          "L_adv of G is not -E[log D(G(z))], the non-saturating loss, of logits")

def test_exercise_2_r1_in_closed_form():
    """D(x) = sum c x^2 has gradient 2 c x: R1 = E sum (2 c x)^2, d R1 / d c = 8 c E sum x^2."""
    c, x = torch.tensor(0.7, requires_grad=True), torch.randn(5, 3, 4, 4)
    r1 = ewc_gan.d_r1_loss(lambda images: (c * images.square()).sum((1, 2, 3)), x)
    size = x.square().sum((1, 2, 3)).mean()
    close(r1.detach(), 4 * c.detach() ** 2 * size,
          "R1 is the squared length of each image's gradient, averaged over the images")
    check(r1.requires_grad, "R1 must be differentiable in D: take its gradient with create_graph")
    close(torch.autograd.grad(r1, c)[0], 8 * c.detach() * size, "the gradient of R1 in D is wrong")
    check(not x.requires_grad, "the caller's images were changed: detach them first")

# ---------- Networks ------------------------------------------------------------------------------
@each_arch
@torch.no_grad()
def test_networks_have_their_sizes_and_couple_no_images(arch):
    for resolution in (32, 64, 128, 256):
        gan = GAN(arch, resolution)
        torch._foreach_mul_(list(gan.G_ema.to_rgb.parameters()), 100)   # however large: in -1..1
        image = gan.G_ema(torch.randn(1, gan.z_dim))
        assert image.shape == (1, 3, resolution, resolution) and 0.9 < image.abs().max() <= 1
        assert len(gan.D(image)) == 1 and all(6e5 < len(weights(x)) < 1.2e6 for x in (gan.G, gan.D))
    gan, z = small_gan(arch).eval(), torch.randn(6, 8)
    images = gan.G(z)
    close(images, torch.cat([gan.G(z_i) for z_i in z.split(1)]), "G couples", atol=1e-5)
    close(gan.D(images), torch.cat([gan.D(x) for x in images.split(1)]), "D couples", atol=1e-5)

@torch.no_grad()
def test_layers_by_their_definitions():
    """Equalized: y = (gain / sqrt(inputs) * lr_multiplier * weight) x + lr_multiplier * bias.
    ModulatedConv (Karras et al. 2020): scale the weights by s, divide them by their norm."""
    torch.manual_seed(0)
    linear, x = ewc_gan.Equalized(4, 6, bias=2.0, gain=3.0, lr_multiplier=0.1), torch.randn(2, 6)
    close(linear(x), x @ linear.weight.T * 0.3 / 6**0.5 + 2.0, "linear")
    conv, x = ewc_gan.Equalized(4, 5, 3, 3, padding=1), torch.randn(3, 5, 8, 8)
    expected = nn.functional.conv2d(x, conv.weight * (2 / 45) ** 0.5, padding=1)
    close(conv(x), expected, "convolution", atol=1e-5)
    layer, w = ewc_gan.ModulatedConv(5, 7, 3, 4), torch.randn(3, 4)
    for image, w_i, output in zip(x, w, layer(x, w)):
        weight = layer.weight * layer.scale * layer.style(w_i[None])[0][:, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = nn.functional.conv2d(image[None], weight * 2**0.5, padding=1)[0]
        close(output, expected, "modulated convolution", atol=1e-5)
    gan, z = small_gan("stylegan"), torch.randn(3, 8)
    close(gan.G(2 * z), gan.G(z), "the mapping must see the direction of z alone", atol=1e-5)
    G = small_gan("dcgan").G
    G.relu16.register_forward_hook(lambda *_: torch.ones(3, 8, 16, 16))
    assert G(z)[:, :, 2:-2, 2:-2].std((2, 3)).max() < 1e-6, "a checkerboard in an even area"

def test_minibatch_std_against_numpy():
    layer, x = ewc_gan.MinibatchStd(), torch.randn(8, 3, 2, 2)
    for images, groups in ((x, 2), (x[:3], 1)):         # of eight: 0 2 4 6 and 1 3 5 7
        for j in range(groups):
            expected = np.std(images[j::groups].numpy(), 0).mean()
            np.testing.assert_allclose(layer(images)[j::groups, 3].detach(), expected, rtol=1e-4)
    layer.running_std.fill_(5)
    assert (layer.eval()(x)[:, 3] == 5).all(), "in eval mode the running mean takes its place"

# ---------- Training and adaptation; more in the last section -------------------------------------
@each_arch
def test_adaptation_trains_D_and_holds_G_back_and_leaves_the_source_alone(arch):
    """In freezed, D's features of 8x8 and larger stay: the weights after them have these names."""
    upper = {"dcgan": ("layers.4", "layers.6"), "stylegan": ("blocks.1", "last", "hidden", "out")}
    source, z, toy = small_gan(arch), torch.randn(16, 8), replace(TOY, steps=30)
    untouched = copy.deepcopy(source)
    free, huge, freezed = (adapt(source, IMAGES, replace(toy, **given))[0] for given in (
        {"lam": 0.0}, {"lam": 1e12}, {"method": "freezed"}))
    same_states(source, untouched, "the source was changed: ")
    for gan, names in ((free, ""), (freezed, upper[arch])):
        for (name, p), q in zip(source.D.named_parameters(), gan.D.parameters()):
            assert torch.equal(p, q) != name.startswith(names), f"{name}: frozen, or not frozen"
    for (name, buffer), after in zip(source.G_ema.named_buffers(), free.G.buffers()):
        assert torch.equal(buffer, after), f"{name}: BatchNorm must stay frozen"
    moved = [(gan.G(z) - source.G_ema(z)).abs().mean().item() for gan in (free, huge)]
    assert moved[1] < 0.5 * moved[0], "a huge lambda must keep the generator where it was"

@each_arch
def test_a_resumed_adaptation_ends_with_the_same_bits(arch, tmp_path, monkeypatch):
    """Killed in its 16th step, a run goes on from its 10th; a look at the clock takes 11 s."""
    def killed_at_15(self, images, step=Trainer.train_step):
        if self.step == 15:
            raise KeyboardInterrupt
        return step(self, images)

    source, path, toy = small_gan(arch), tmp_path / "r.pt", replace(TOY, steps=20, seed=np.int64(1))
    whole, _, log = adapt(source, IMAGES, toy)
    monkeypatch.setattr(ewc_gan.time, "monotonic", iter(range(0, 10**6, 11)).__next__)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", killed_at_15)
        adapt(source, IMAGES, toy, path)
    resumed, _, resumed_log = adapt(source, IMAGES, toy, path, resume=True)
    same_states(whole, resumed)
    assert resumed_log == log and [row["step"] for row in log] == [10, 20]
    for name, gan, images, lam in (("source", small_gan(arch, 1), IMAGES, TOY.lam),
                                   ("images", source, IMAGES.flip(0), TOY.lam),
                                   ("lam", source, IMAGES, 1.0)):
        with pytest.raises(UserError, match=f"{name} was"):
            adapt(gan, images, replace(toy, lam=lam), path, resume=True)

def test_pretraining_uses_batch_statistics_keeps_the_best_model_and_resumes(tmp_path, monkeypatch):
    distances, out = iter([5.0, 3.0, 4.0, 5.0, 3.0, 4.0]), tmp_path / "source.pt"
    monkeypatch.setattr(ewc_gan, "frechet_distance", lambda *_: next(distances))
    whole, part, resumed = small_gan("dcgan"), small_gan("dcgan"), small_gan("dcgan", 1)
    for gan, path, steps in ((whole, out, 30), (part, tmp_path / "part.pt", 20),
                             (resumed, tmp_path / "part.pt", 30)):
        s = replace(ewc_gan.PRETRAIN["dcgan"], steps=steps, batch_size=4)
        log = ewc_gan.pretrain(IMAGES, gan, s, path, resume=gan is resumed, every=10)
    same_states(whole, resumed, "resumed: ")
    mean = small_gan("dcgan").G.norm4.running_mean
    assert not torch.equal(whole.G.norm4.running_mean, mean), "G must train on batch statistics"
    assert [row["frechet"] for row in log] == [5, 3, 4]
    assert torch.load(out, weights_only=True)["step"] == 20, "the best model is the second"
    G = GAN.load(out).G_ema
    inputs = G.conv4(torch.randn(20000, 8, 1, 1)).transpose(0, 1).flatten(1).detach()
    close(G.norm4.running_mean, inputs.mean(1), "mean of inputs", atol=0.1 * inputs.std().item())
    close(G.norm4.running_var, inputs.var(1), "variance of inputs", rtol=0.1)

def test_two_processes_share_a_step(tmp_path):
    """Each draws half of the batch with a seed of its own; the gradients are averaged."""
    command = ("-m torch.distributed.run --nproc_per_node 2 pretrain_source.py --data data/10shot "
               "--arch stylegan --resolution 32 --steps 1 --batch-size 8 --amp off --out").split()
    subprocess.run([sys.executable, *command, tmp_path / "two.pt"], check=True, cwd=HERE)
    two = torch.load(tmp_path / "two.pt.train", weights_only=True)["gan"]
    torch.manual_seed(0)
    gan, gradients = GAN("stylegan", 32).to("cpu", memory_format=torch.channels_last).train(), []
    for seed in (0, 1):
        settings = replace(ewc_gan.PRETRAIN["stylegan"], batch_size=4, seed=seed)
        trainer = Trainer(copy.deepcopy(gan), settings)
        trainer.train_step(IMAGES)
        gradients.append([p.grad for p in trainer.gan.D.parameters()])
    for (name, p), *pair in zip(gan.D.named_parameters(), *gradients):
        mean = sum(pair) / 2                        # Adam's first step is the sign of the gradient
        clear, moved = mean.abs() > 1e-3 * mean.abs().max(), two[f"D.{name}"] - p.detach()
        assert (moved.sign() == -mean.sign())[clear].float().mean() > 0.999, name

@pytest.mark.parametrize("amp, dtype, rel", [("bf16", torch.bfloat16, 0.1),
                                             ("fp16", torch.float16, 0.4)])
def test_mixed_precision_agrees_with_full_precision_and_R1_is_in_float32(amp, dtype, rel):
    """fp16 skips its first steps, until the scale is small enough."""
    def look(D, inputs, logits):                        # R1 alone asks for gradients of pixels
        seen.add(("R1" if inputs[0].is_leaf and inputs[0].requires_grad else "", logits.dtype))

    source, settings, seen = small_gan("stylegan"), replace(TOY, steps=10, batch_size=8), set()
    full, F, log_full = adapt(source, IMAGES, settings)
    source.D.register_forward_hook(look)
    half, _, log_half = adapt(source, IMAGES, settings, amp=amp, F=F)
    assert seen == {("R1", torch.float32), ("", dtype)}
    for name in ("loss_D", "loss_G", "penalty"):
        assert log_half[-1][name] == pytest.approx(log_full[-1][name], rel=rel, abs=0.01)
    assert (half.generate(8) - full.generate(8)).abs().mean().item() < rel / 4

def test_the_loss_is_scaled_in_fp16_alone_and_the_scale_updated():
    for amp, factor in (("fp16", 2.0**16), ("bf16", 1.0)):
        gan, seen = small_gan("dcgan"), []
        trainer = Trainer(gan, TOY, amp)
        gan.G.conv4.weight.register_hook(lambda g, seen=seen: seen.append(g.flatten()[0].item()))
        trainer.update(trainer.opt_G, weights(gan.G).sum())         # each gradient is 1, scaled
        assert seen == [factor]
        trainer.scaler.update()
        trainer.train_step(IMAGES)                                  # halves it or is counted
        state = trainer.scaler.state_dict()
        assert not state or state["scale"] < factor or state["_growth_tracker"] == 2

def test_divergence_and_a_full_disk_keep_the_last_good_checkpoint(tmp_path):
    """Files may grow to 20 kB, less than a checkpoint."""
    resource, source, path = pytest.importorskip("resource"), small_gan("dcgan"), tmp_path / "a.pt"
    adapt(source, IMAGES, TOY, path)
    good, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match="diverged"):
        adapt(source, ewc_gan.to_float(IMAGES) * math.nan, TOY, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            adapt(source, IMAGES, TOY, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]

def test_exercise_5_layer_changes_by_hand():
    G = nn.ModuleDict({"up": nn.Linear(2, 1), "style": nn.Linear(1, 1)})
    G["up"].add_module("style", nn.Linear(1, 1, bias=False))
    theta, theta_S = torch.tensor([[2.0, -3, 0, 3, 1, 5], [1, -3, 0, 4, 2, 5]])     # 4 are of up
    nn.utils.vector_to_parameters(theta, G.parameters())
    rows = ewc_gan.layers(G, theta_S, torch.tensor([1.0, 2, 3, 6, 5, 5]))
    check([row["layer"] for row in rows] == ["up", "style"], "a style belongs to its convolution")
    close(rows[0]["weight"], 8 / 4, "'weight' is not the mean of |theta_S|")
    close(rows[0]["fisher"], 3, "'fisher' is not the mean of F over the weights of the layer")
    close(rows[0]["change"], 100 * (1 + 1) / (1 + 3 + 4), "'change' is not "
          "sum |theta - theta_S| / sum |theta_S| in %, or a mean of single ratios")

# ---------- Measures ------------------------------------------------------------------------------
def test_frechet_distance_against_numpy():
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 sum of the roots of the eigenvalues of C_a C_b."""
    torch.manual_seed(0)
    a, b = (torch.randn(40, 5).double() @ torch.randn(5, 5).double() + i for i in range(2))
    C_a, C_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = ((a.mean(0) - b.mean(0)).square().sum().item() + np.trace(C_a) + np.trace(C_b)
                - 2 * np.sqrt(np.linalg.eigvals(C_a @ C_b).real).sum())
    assert ewc_gan.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)

def test_precision_recall_diversity_and_nearest_shot_of_constructed_sets():
    """Two far clusters are real, the generator knows one of them, and an island of its own."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))                 # 25 points
    real, fake = torch.cat([grid, grid + 100]), torch.cat([grid + 0.1, grid[:6] + 900])
    assert ewc_gan.precision_recall(real, fake) == pytest.approx((25 / 31, 25 / 50))
    line, fake = torch.arange(4.0)[:, None], torch.tensor([[4.0], [5.0], [9.0]])
    assert ewc_gan.precision_recall(line, fake, k=1) == pytest.approx((1 / 3, 1 / 4))
    shots = torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 0.0]])    # nothing is near the third
    features = torch.tensor([[0.0, 1.0], [0.0, -2.0], [10.0, 0.0], [10.0, 4.0], [10.0, -4.0]])
    expected = (3 + (4 + 4 + 8) / 3) / 2, (1 + 2 + 0 + 4 + 4) / 5
    assert ewc_gan.diversity_and_nearest(features, shots) == pytest.approx(expected)

def test_metrics_of_constructed_sets():
    """Features are two pixels: half of the samples lie in the reference, which they all cover."""
    def images(points):                                             # [N, 2] -> [N, 3, 1, 2]
        return points[:, None, None].expand(-1, 3, 1, 2)

    def gan(points):
        return types.SimpleNamespace(generate=lambda n, seed: images(points[:n]))

    torch.manual_seed(0)
    target, shots = torch.randn(500, 2), torch.tensor([[3.0, 4.0]])
    after, scale = torch.randn(1000, 2), target.square().mean().sqrt()
    after[500:] += 50
    metrics = ewc_gan.Metrics(lambda x: x[:, 0, 0], images(shots), images(target))
    row = metrics(gan(after))
    assert row["precision"] == pytest.approx(0.5, abs=0.02) and row["recall"] > 0.95
    assert row["frechet"] == pytest.approx(ewc_gan.frechet_distance(after / scale, target / scale))
    for copies in (shots, shots.flip(1)):                           # a mirrored shot is a shot
        row = metrics(gan(copies.expand(1000, 2) + 1e-4 * torch.randn(1000, 2)))
        assert row["nearest_shot"] < 1e-3 and row["diversity"] < 1e-3

@torch.no_grad()
def test_judges_by_their_definitions(monkeypatch):
    images, net = ewc_gan.to_float(load_images(SHOTS, 64, 3)), ewc_gan.squeezenet1_1().eval()
    monkeypatch.setattr(ewc_gan, "squeezenet1_1", lambda **_: net)      # with random weights
    maps = [images]
    for conv in GAN.load(ewc_gan.SHIPPED / "source_dcgan.pt").D.layers[:-1:2]:
        maps.append(nn.functional.leaky_relu(conv(maps[-1]), 0.2))
    of_8x8, of_4x4 = ((m / m.norm(dim=1, keepdim=True)).mean((2, 3)) for m in maps[3:])
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[:, :, None, None]
    big = nn.functional.interpolate(images / 2 + .5, (128, 128), mode="bilinear")
    for judge, expected in (("discriminator", torch.cat([of_8x8, of_4x4], 1)),
                            ("squeezenet", net.features((big - mean) / std).mean((2, 3)))):
        features = ewc_gan.features_of(judge, "cpu")(images.repeat(40, 1, 1, 1))
        close(features[-3:], expected, judge, atol=1e-5)

def test_bars_of_a_chart_are_as_high_as_their_values():
    sheet = np.array(ewc_gan.chart([("t", ["a", "b"], {"x": [0.0, 4.0], "y": [3.0, math.inf]}, 1)],
                                   width=500, height=90))
    for color, x, expected in ((0x1f5fa8, 100, 0), (0xd9822b, 220, 60), (0x1f5fa8, 300, 90)):
        column = sheet[30:, x].astype(int) @ [0x10000, 0x100, 1]
        assert abs((column == color).sum() - expected) <= 1

# ---------- Images, files, bad input --------------------------------------------------------------
def test_load_images_of_every_mode(tmp_path, monkeypatch, capsys):
    """One grey-level ramp, stored in many ways, must come back as the same pixels."""
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    grey, opaque = Image.fromarray(ramp), Image.new("L", (16, 16), 255)
    turned = (b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"     # by 90 degrees
              b"\x90\0\0\x0b\0\0\0\x01\xff\xff\xff\xff\0\0\0\0")         # and an odd tag
    for name, image in {
            "a.png": grey, "b.png": grey.convert("P"), "d/e/e.tif": grey.convert("CMYK"),
            "c.PNG": Image.merge("RGBA", [grey] * 3 + [opaque]), "more/g.tga": grey,
            "16bits.png": Image.fromarray(ramp.astype(np.uint16) * 257),
            "cropped.png": Image.fromarray(np.pad(ramp, ((0, 0), (16, 16)))),
            "transparent.png": Image.new("RGBA", (16, 16), (255, 0, 0, 0))}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    grey.rotate(90).convert("RGB").save(tmp_path / "d" / "f.png", exif=turned)
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "more")
    for name in (".hidden.png", "phone.heic", "notes.txt"):
        (tmp_path / name).write_text("not an image")
    images = load_images(tmp_path, 16)
    assert capsys.readouterr().out.endswith("left out: .heic .txt\n")
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.uint8
    assert (images[9] == 255).all(), "transparent pixels lie on white"
    close(images[:9], torch.from_numpy(ramp).expand(9, 3, 16, 16), "ramp", rtol=0, atol=3)
    listed = ewc_gan.glob.glob
    monkeypatch.setattr(ewc_gan.glob, "glob", lambda *a, **k: listed(*a, **k)[::-1])
    assert torch.equal(load_images(tmp_path, 16, 4), images[:4]), "the order is that of the names"

@each_arch
def test_checkpoint_round_trip(arch, tmp_path):
    gan = small_gan(arch)
    gan.save(tmp_path / "m.pt", note="x")
    again = GAN.load(tmp_path / "m.pt")
    assert not any(module.training for module in again.modules())
    for saved, loaded in ((gan.G_ema, again.G_ema), (gan.G_ema, again.G), (gan.D, again.D)):
        same_states(saved, loaded)
    close(gan.generate(3, 5), again.generate(7, 5)[:3], "image i of a seed", atol=1e-5)
    assert not torch.equal(gan.z(2, 0), gan.z(2, 1))

class Code:
    def __reduce__(self):
        return exec, ("open('hacked', 'w').close()",)

@pytest.fixture(scope="session")
def bad_world(tmp_path_factory):
    """A folder full of things that can be wrong, beside a few that are right."""
    world, picture = tmp_path_factory.mktemp("world"), (SHOTS / "00000.png").read_bytes()
    small_gan("dcgan").save(world / "good.pt")
    for name, content in (("two/a.png", picture), ("two/b \u00e9\n\u732b.png", picture),
                          ("cut/a\nb.png", picture[:len(picture) // 2]), ("file", b"a file"),
                          ("cut.pt", (world / "good.pt").read_bytes()[:5000]),
                          ("run/adapted.pt", b"")):
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(content)
    good = torch.load(world / "good.pt", weights_only=True)
    missing = dict(good["G_ema"])
    broken = {**missing, "conv8.weight": missing.pop("conv8.weight") * math.nan}
    for name, change in {"nan": {"G_ema": broken}, "missing": {"G_ema": missing},
                         "giant": {"z_dim": 10**12}, "code": {"G_ema": Code()}}.items():
        torch.save({**good, **change}, world / f"{name}.pt")
    torch.save(Code(), world / "run" / "adapted.pt")
    return world

@pytest.mark.parametrize("program, argv, says", [           # says: what the line names
    (ewc_gan, ["--target", "nowhere"], "nowhere: no such folder, or no images"),
    (ewc_gan, ["--target", "cut"], "a b.png"), (ewc_gan, [], "--target"),
    *((ewc_gan, [*GOOD, option, value], option) for option, value in [("--shots", "0"),
        ("--steps", "1.5"), ("--lam", "inf"), ("--method", "magic"), ("--step", "3"),
        ("--generate", "3"), ("--features", "squeezenet"), ("--fisher-samples", "0")]),
    (ewc_gan, [*GOOD, "--out", "two"], "lies in two"), (ewc_gan, [*GOOD, "--out", "file"], "file"),
    (ewc_gan, [*GOOD, "--out", "run", "--resume"], "run/adapted.pt: not a checkpoint that this"),
    *((ewc_gan, ["--target", "two", "--source", f"{name}.pt"], f"{name}.pt")
      for name in ("nowhere", "cut", "code", "missing", "nan", "giant")),
    (pretrain_source, ["--data", "two", "--resume"], ".train")])
def test_bad_input_gets_one_line_and_code_2_and_loses_nothing(program, argv, says, bad_world,
                                                              capsys, monkeypatch):
    monkeypatch.chdir(bad_world)
    monkeypatch.setattr(ewc_gan, "squeezenet1_1", None)             # as if there was no network
    before = {path: path.read_bytes() for path in bad_world.rglob("*.p*")}
    assert run(*argv, program=program) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert before == {path: path.read_bytes() for path in bad_world.rglob("*.p*")}
    assert not Path("hacked").exists(), "code in a checkpoint was run"

# ---------- What ships: drawn faces, sources, README, programs ------------------------------------
def test_faces_depend_on_seed_and_index_alone_and_the_ten_shot_sets_are_what_is_drawn():
    five, three, other = (draw_faces.draw_faces("photo", n, seed, workers=1)
                          for n, seed in ((5, 3), (3, 3), (3, 4)))
    assert (five[:3] == three).all() and (five[0] != five[1]).any() and (other != three).any()
    for style, folder in draw_faces.TEN_SHOT_FOLDERS.items():
        drawn = draw_faces.draw_faces(style, 10, draw_faces.TEN_SHOT_SEED, workers=1)
        for path, face in zip(sorted((HERE / "data" / folder).iterdir()), drawn, strict=True):
            assert np.abs(np.asarray(Image.open(path)).astype(int) - face).mean() < 1

@each_arch
@torch.no_grad()
def test_shipped_sources_make_varied_images_that_their_D_believes(arch):
    gan = GAN.load(HERE / "data" / f"source_{arch}.pt")
    images, (faces, _) = gan.generate(64), factors.drawings("photo", 64, 1)
    varied = [torch.pdist(x.flatten(1)).mean().item() for x in (images, faces)]
    assert varied[0] > 0.8 * varied[1], "the samples are less varied than the drawings"
    close(images.mean((0, 2, 3)), faces.mean((0, 2, 3)), "mean colour", atol=0.25)
    assert gan.D(faces).mean() > gan.D(images).mean() > gan.D(torch.rand_like(faces)).mean()

@torch.no_grad()
def test_factors_are_read_off_drawings_and_compared():
    read, gan = factors.probe("photo", n=600), GAN.load(SOURCE)
    images, truth = factors.drawings("photo", 200, 12)              # not those it was fitted to
    assert factors.correlations(read(images), truth).mean() > 0.6
    a, b = (read(gan.generate(200, seed)) for seed in (1, 2))
    close(factors.correlations(a, a), torch.ones(13), "the source against itself")
    assert factors.correlations(a, b).abs().mean() < 0.15, "other faces have other factors"

def readme_blocks(language):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)

@pytest.mark.parametrize("name", [
    "README.md", "data/README.md", "data/RESULTS.md", "data/ASSIGNMENTS.md"])
def test_links_and_options_in_the_documents_exist(name, capsys):
    path = HERE / name
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (path.parent / link.partition("#")[0]).exists(), link
    for program in (ewc_gan, pretrain_source, draw_faces):
        assert run("--help", program=program) == 0
    helps = capsys.readouterr().out + "--student --nproc_per_node"
    assert [option for option in re.findall(r"`(--[a-z0-9-]+)", text) if option not in helps] == []

def test_readme_code_runs_with_somebody_elses_networks():
    block, = readme_blocks("python")
    G, D = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 1))
    names = {"G": G, "D": D, "z": torch.randn(5, 3), "lam": 2.0,
             "adversarial_loss": lambda G: G.weight.sum()}
    exec(block, names)
    with torch.no_grad():
        G.weight += 1
    exec(block[block.index("loss = "):], names)
    penalty = 2 * names["F"][:18].sum().item()
    assert names["loss"].item() == pytest.approx(G.weight.sum().item() + penalty, rel=1e-4)

def test_readme_commands_parse():
    lines = "\n".join(readme_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines
                if line.startswith(("python ", "torchrun ")) and "--help" not in line]
    programs = {"ewc_gan.py": ewc_gan, "pretrain_source.py": pretrain_source,
                "data/draw_faces.py": draw_faces}
    assert len(commands) >= 5
    for command in commands:
        program, *argv = command[3 if command[0] == "torchrun" else 1:]
        if program in programs:
            programs[program].parse_arguments(argv)
        else:
            assert program in ("-m", "test_ewc_gan.py") or (HERE / program).exists(), program

def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

def test_the_main_job_and_its_sequel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("out/10shot")
    assert run("--target", SHOTS, *TOY_RUN) == 0 and "ewc 12/12" in capsys.readouterr().out
    files = "samples.png progress.png layers.png layers.csv curves.png log.csv interpolation.gif"
    assert {p.name for p in out.iterdir()} == {*files.split(), "adapted.pt", "config.json"}
    assert [row["step"] for row in table_of(out / "log.csv")] == ["10", "12"]
    source, gan = GAN.load(SOURCE), GAN.load(out / "adapted.pt")
    before, after = source.generate(16), gan.generate(16)
    rows = [("source", before[:8]), ("adapted", after[:8]), ("source", before[8:])]
    expected = ewc_gan.samples_picture(load_images(SHOTS, 64), [*rows, ("adapted", after[8:])])
    assert np.array_equal(Image.open(out / "samples.png"), expected)
    assert not torch.equal(before, after) and Image.open(out / "interpolation.gif").n_frames > 20
    F = ewc_gan.fisher_diagonal(source.G_ema, source.D, source.z(2, 0))
    rows = ewc_gan.layers(gan.G_ema, weights(source.G_ema), F)
    for row, written in zip(rows, table_of(out / "layers.csv"), strict=True):
        assert float(written["change"]) == pytest.approx(row["change"]), "of G_ema, not of G"
        assert float(written["fisher"]) == pytest.approx(row["fisher"])
    assert run("--checkpoint", out / "adapted.pt", "--generate", 3, "--out", "more") == 0
    assert {p.name for p in Path("more").iterdir()} == {f"seed0_0000{i}.png" for i in range(3)}
    close(ewc_gan.to_float(load_images("more", 64)), after[:3], "images as files", atol=0.005)

def test_a_comparison_measures_what_it_leaves_behind(tmp_path, capsys, monkeypatch):
    """The figures in comparison.csv are those of the models in its folders; --resume repeats it."""
    made, out, Metrics = [], tmp_path / "out", ewc_gan.Metrics
    small_gan("dcgan").save(tmp_path / "source.pt")
    monkeypatch.setattr(ewc_gan, "Metrics", lambda *a: made.append(Metrics(*a)) or made[-1])
    argv = ["--target", SHOTS, "--method", "ewc", "finetune", "--seed", 0, 1, "--reference",
            SHOTS.parent, "--out", out, *TOY_RUN, "--source", tmp_path / "source.pt"]
    assert run(*argv) == 0
    printed, table, name = capsys.readouterr().out, table_of(out / "comparison.csv"), "ewc"
    assert [row["run"] + row["seed"] for row in table] == [
        "source", "held-out", name + "0", name + "1", "finetune0", "finetune1"]
    halves = made[0].reference.chunk(2)                 # "held-out": one against the other
    assert float(table[1]["frechet"]) == pytest.approx(ewc_gan.frechet_distance(*halves), rel=1e-3)
    for row in table[2:]:
        measured = made[0](GAN.load(out / f"{row['run']}_seed{row['seed']}" / "adapted.pt"))
        assert {key: float(row[key]) for key in measured} == pytest.approx(measured, rel=1e-3)
    values = [float(row["frechet"]) for row in table[4:]]
    assert f"{np.mean(values):.3g} ±{np.std(values, ddof=1):.2g}" in printed
    assert run(*argv, "--resume") == 0 and {"comparison.png", "layers.png"} <= {*os.listdir(out)}
    assert table_of(out / "comparison.csv") == table

def test_settings_of_the_runs_of_a_command():
    """lambda is meant for ewc, raw and l2: the other methods run once."""
    def runs(*argv):
        args = ewc_gan.parse_arguments(["--target", "t", *argv])
        plan = ewc_gan.planned_runs(args, ewc_gan.settings_from_args(Adaptation(), args))
        return {folder: settings for folder, (_, settings) in plan.items()}

    assert runs("--lr", "0.5") == {"ewc": Adaptation(lr=0.5)}
    assert runs("--lam", "1", "5", "--method", "l2", "freezed") == {
        "l2_1": Adaptation(method="l2", lam=1), "l2_5": Adaptation(method="l2", lam=5),
        "freezed": Adaptation(method="freezed", lam=0)}
    settings = ewc_gan.PRETRAIN["dcgan"]                # its lr: over the root of 1 + step / 3000
    assert settings.lr_at(0) == 2e-3 and settings.lr_at(9000) == pytest.approx(1e-3)

# ---------- Exercises: a student's copy has the bodies of these functions replaced ----------------
def without_solutions(source, numbers=EXERCISES):
    """The text of ewc_gan.py with the bodies of the exercises' functions replaced."""
    lines, exercise = source.splitlines(), {name: n for n in numbers for name in EXERCISES[n]}
    for node in reversed(ast.parse(source).body):
        if getattr(node, "name", None) in exercise:
            body = node.body[1 if ast.get_docstring(node) else 0:]
            gap = f"    raise NotImplementedError('exercise {exercise[node.name]}')"
            lines[body[0].lineno - 1:body[-1].end_lineno] = [gap]
    return "\n".join(lines) + "\n"

def make_student_copy(folder):
    """A copy of the repository in a new folder: exercises unsolved, tests without solutions."""
    folder = Path(folder)
    if folder.exists():
        sys.exit(f"test_ewc_gan.py: {folder} exists; name a new folder")
    shutil.copytree(HERE / "data", folder / "data", ignore=shutil.ignore_patterns("__pycache__"))
    names = "ewc_gan.py test_ewc_gan.py README.md pretrain_source.py requirements.txt LICENSE"
    program, tests, readme, *_ = (Path(shutil.copy(HERE / name, folder)) for name in names.split())
    program.write_text(without_solutions(program.read_text()))
    readme.write_text(re.sub(r"#L\d+", "", readme.read_text()))     # the lines are others there
    tests.write_text(tests.read_text().partition("\n# ---------- Solutions")[0] + "\n")
    print(f"{folder}: the student's copy; grade with: python -m pytest -k exercise_1 -x -q")

def skipping(function):
    """In a student's copy, what is no exercise but needs one is skipped until it is solved."""
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except NotImplementedError as gap:
            if "::test_exercise" in os.environ.get("PYTEST_CURRENT_TEST", ""):
                raise
            pytest.skip(f"needs {gap}")
    return call

if "raise NotImplementedError" in Path(ewc_gan.__file__).read_text():
    for unsolved in sum(EXERCISES.values(), []):
        setattr(ewc_gan, unsolved, skipping(getattr(ewc_gan, unsolved)))

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--student":
        sys.exit("usage: python test_ewc_gan.py --student DIR;  to run the tests: python -m pytest")
    make_student_copy(sys.argv[2])

# ---------- Solutions: tests that contain one.  A student's copy ends here ------------------------
@each_arch
def test_fisher_equals_per_sample_gradients_of_torch_func(arch):
    gan, z = small_gan(arch), torch.randn(6, 8)
    D = copy.deepcopy(gan.D).eval()

    def log_likelihood(theta, z_i):
        image = torch.func.functional_call(gan.G, theta, z_i[None])
        return -torch.log1p(torch.exp(-D(image))).sum()

    theta = {name: p.detach() for name, p in gan.G.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(log_likelihood), (None, 0))(theta, z)
    expected = ewc_gan.as_vector([g.square().mean(0) for g in gradients.values()])
    close(ewc_gan.fisher_diagonal(gan.G, gan.D, z), expected, arch, rtol=1e-3, atol=1e-12)

def augment_by_hand(x, settings, random):
    far, hole, at = round(settings.shift * 32), round(settings.cutout * 32), torch.arange(32)
    if far:                                             # pixels that move in repeat the edge
        rows, columns = ((at + move - far).clamp(0, 31) for move in
                         torch.randint(2 * far + 1, (2,), generator=random))
        x = x[:, :, rows][:, :, :, columns]
    if hole:
        rows, columns = ((at >= middle - hole // 2) & (at < middle - hole // 2 + hole)
                         for middle in torch.randint(32, (2,), generator=random))
        x = x.masked_fill(rows[:, None] & columns, 0)
    return x

def train_by_hand(source, images, F, s):
    """Adaptation, written out: the oracle for the training step, fine-tuning and the whole loss."""
    G, D = copy.deepcopy(source.G_ema), copy.deepcopy(source.D).train()
    theta_S, ema = ([p.detach().clone() for p in G.parameters()] for _ in range(2))
    F = F.split([p.numel() for p in ema])
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), betas=(s.beta1, s.beta2), fused=True)
                    for net in (G, D))
    random, softplus = torch.Generator().manual_seed(s.seed), nn.functional.softplus
    for step in range(s.steps):
        opt_G.param_groups[0]["lr"] = s.lr * (1 - step / s.steps)
        opt_D.param_groups[0]["lr"] = s.lr * (1 - step / s.steps) * s.d_lr_ratio
        x = images[torch.randint(len(images), (s.batch_size,), generator=random)] / 127.5 - 1
        flipped = torch.rand(len(x), generator=random) < 0.5
        x[flipped] = x[flipped].flip(3)
        x = x.contiguous(memory_format=torch.channels_last)
        z = torch.randn(s.batch_size, source.z_dim, generator=random)
        x, fake = augment_by_hand(x, s, random), augment_by_hand(G(z), s, random)
        loss = softplus(-D(x)).mean() + softplus(D(fake.detach())).mean()
        if step % s.r1_every == 0:
            x.requires_grad_(True)
            gradient, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
            r1 = gradient.square().sum((1, 2, 3)).mean()
            loss = loss + s.r1_every * s.r1_gamma / 2 * r1
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        loss = softplus(-D(fake)).mean()
        if s.lam:
            loss = loss + s.lam * sum((f * ewc_gan.as_vector([p - p_S]).square()).sum()
                                      for f, p, p_S in zip(F, G.parameters(), theta_S))
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()
        for average, p in zip(ema, G.parameters()):
            average.lerp_(p.detach(), 1 - min(s.ema, (1 + step) / (10 + step)))
    return G, D, ema

@pytest.mark.parametrize("lam", [0.0, 1000.0])
@each_arch
def test_adaptation_equals_the_loop_written_by_hand(arch, lam):
    """lam = 0 is plain fine-tuning bit for bit; lam > 0 adds lam * penalty to the loss of G."""
    source, settings = small_gan(arch), replace(TOY, lam=lam, ema=0.3, seed=3)
    settings.shift, settings.cutout = (0.1, 0.4) if lam else (0.0, 0.0)     # bit-equal without
    gan, F, log = adapt(source, IMAGES, settings)
    assert torch.equal(F, ewc_gan.fisher_diagonal(source.G_ema, source.D, source.z(4, 3)))
    G, D, ema = train_by_hand(source, IMAGES, F, settings)
    for a, b in [*zip(gan.G.parameters(), G.parameters()), *zip(gan.D.parameters(), D.parameters()),
                 *zip(gan.G_ema.parameters(), ema)]:
        assert torch.equal(a, b) if lam == 0 else torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert (log[-1]["penalty"] > 0) == (lam > 0)

def messages_of(program, number, monkeypatch):
    """What the tests of an exercise say of the functions in this program; nothing if they pass."""
    names, student, messages = sum(EXERCISES.values(), []), dict(vars(ewc_gan)), []
    answers = [node for node in ast.parse(program).body if getattr(node, "name", "") in names]
    exec(compile(ast.Module(answers, []), "student.py", "exec"), student)
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(ewc_gan, name, student[name])
        for name in [name for name in globals() if name.startswith(f"test_exercise_{number}_")]:
            messages.append("")
            try:
                globals()[name]()
            except (Exception, pytest.fail.Exception) as error:
                messages[-1] = f"{type(error).__name__}: {error}"
    return messages

def test_a_student_starts_with_failing_exercises_and_loses_nothing(tmp_path, monkeypatch):
    whole, folder = Path(ewc_gan.__file__).read_text(), tmp_path / "student"
    make_student_copy(folder)
    assert (folder / "ewc_gan.py").read_text() == without_solutions(whole)
    assert Path(ewc_gan.__file__).read_text() == whole and not (folder / ".git").exists()
    assert "torch.func" not in (folder / "test_ewc_gan.py").read_text()
    with pytest.raises(SystemExit, match="exists"):
        make_student_copy(folder)
    for number in EXERCISES:
        unsolved = without_solutions(whole, [number])
        for other in EXERCISES:
            messages = messages_of(unsolved, other, monkeypatch)
            expected = "NotImplementedError" if other == number else ""
            assert messages and {m.partition(":")[0] for m in messages} == {expected}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "exercise_1 or comparison"],
                          cwd=folder, capture_output=True, text=True)
    assert "1 failed, 1 skipped" in done.stdout, done.stdout

@pytest.mark.parametrize("number, right, wrong, says", [
    (1, "softplus(-real_logits).mean() +", "relu(-real_logits).mean() +", "L_D is not"),
    (1, "nnF.softplus(-fake_logits).mean()", "-nnF.softplus(fake_logits).mean()", "non-saturating"),
    (2, "create_graph=True", "create_graph=False", "create_graph"),
    (2, "gradient.square().flatten(1).sum(1).mean()", "gradient.square().mean()", "squared length"),
    (3, "z.split(1)", "z.split(len(z))", "the square of the batch-mean gradient"),
    (3, "nnF.logsigmoid(D(G(z_i)))", "torch.log(D(G(z_i)).abs())", "sigmoid of its"),
    (3, "copy.deepcopy(D).eval()", "copy.deepcopy(D)", "must be in eval mode"),
    (3, "copy.deepcopy(G).eval()", "G.eval()", "fisher_diagonal changed the mode"),
    (3, "torch.autocast(z.device.type, enabled=False)", "torch.enable_grad()", "float32"),
    (4, "(weights(G) - theta_S).square()", "(weights(G) - theta_S).abs()", "not sum_i F_i"),
    (4, "F.dot((weights(G) -", "F.dot((weights(G).detach() -", "differentiable"),
    (4, "F.clamp(max=float(cap)) / float(mean)", "F / float(F.mean())", "capped at one value"),
    (5, ".abs().sum() / old.abs().sum()", ".div(old).abs().mean()", "single ratios")])
def test_a_wrong_answer_is_told_what_is_wrong(number, right, wrong, says, monkeypatch):
    whole = Path(ewc_gan.__file__).read_text()
    assert right in whole
    messages = messages_of(whole.replace(right, wrong), number, monkeypatch)
    assert any(says in message for message in messages), messages
