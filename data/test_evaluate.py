"""Tests of data/evaluate.py: closed forms, constructed sets, definitions."""
import csv
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "data")]
import evaluate  # noqa: E402
import ewc_gan  # noqa: E402
from ewc_gan import GAN, load_images  # noqa: E402

SHOTS = HERE / "data" / "10shot"

@torch.no_grad()
def small_gan(arch, seed=0):
    torch.manual_seed(seed)
    gan = GAN(arch, 32, 8, [12, 10, 8, 6][:3 + (arch == "stylegan")], [6, 8, 10])
    gan.to("cpu", memory_format=torch.channels_last).calibrate()
    return gan

def run(*argv, program=ewc_gan):
    try:
        program.main([str(a) for a in argv])
        return 0
    except SystemExit as stop:
        return stop.code

def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

# ---------- Measures ------------------------------------------------------------------------
def test_frechet_distance_of_an_enlarged_copy_and_of_fewer_images_than_features():
    """For b = s a + m it is |mu_a - mu_b|^2 + (1 - s)^2 tr(C_a); in general |mu_a - mu_b|^2 +
    tr(C_a) + tr(C_b) - 2 (sum of the singular values of A B^T), with C_a = A^T A."""
    torch.manual_seed(0)
    a = torch.randn(40, 5) @ torch.randn(5, 5)
    b = 3 * a + 1
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + 4 * a.var(0).sum()
    assert evaluate.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-5)

    few = torch.randn(12, 30).double()
    many = torch.randn(50, 30).double() + 1
    A = (few - few.mean(0)) / math.sqrt(11)
    B = (many - many.mean(0)) / math.sqrt(49)
    trace = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    means = (few.mean(0) - many.mean(0)).square().sum()
    expected = means + few.var(0).sum() + many.var(0).sum() - 2 * trace
    assert evaluate.frechet_distance(few, many) == pytest.approx(float(expected), rel=1e-5)

def test_precision_and_recall_of_constructed_sets():
    """Two far clusters are real, the generator knows one of them, and an island of its own."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))       # 25 points
    real = torch.cat([grid, grid + 100])
    fake = torch.cat([grid + 0.1, grid[:6] + 900])
    expected = (25 / 31, 25 / 50)
    assert evaluate.precision_recall(real, fake) == pytest.approx(expected)
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])           # each ball reaches to the next
    fake = torch.tensor([[4.0], [5.0], [9.0]])
    expected = (1 / 3, 1 / 4)
    assert evaluate.precision_recall(real, fake, k=1) == pytest.approx(expected)

def test_diversity_and_nearest_shot_of_constructed_sets():
    shots = torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 0.0]])    # none is near the third
    near_first = torch.tensor([[0.0, 1.0], [0.0, -2.0]])
    near_second = torch.tensor([[10.0, 0.0], [10.0, 4.0], [10.0, -4.0]])
    x = torch.cat([near_first, near_second])
    diversity = (3 + (4 + 4 + 8) / 3) / 2
    nearest = (1 + 2 + 0 + 4 + 4) / 5
    expected = (diversity, nearest)
    assert evaluate.diversity_and_nearest(x, shots) == pytest.approx(expected)
    expected = (0, 1.5)                                         # no cluster of two
    x = torch.tensor([[0.0, 1.0], [10.0, 2.0]])
    assert evaluate.diversity_and_nearest(x, shots) == pytest.approx(expected)

def as_images(points):
    """[N, 2] -> [N, 3, 1, 2], whose features are the two pixels of a row."""
    return points[:, None, None].expand(-1, 3, 1, 2)

def pixels(images):
    return images[:, 0, 0]

def test_metrics_of_constructed_sets():
    """Half of the samples lie in the reference, and all of the reference among the samples."""
    torch.manual_seed(0)
    reference = torch.randn(500, 2)
    shots = torch.tensor([[3.0, 4.0]])
    samples = torch.randn(1000, 2)
    samples[500:] += 50
    metrics = evaluate.Metrics(pixels, as_images(shots), as_images(reference))
    row = metrics(as_images(samples))
    assert list(row) == ["frechet", "precision", "recall", "diversity", "nearest_shot"]
    assert row["precision"] == pytest.approx(0.5, abs=0.02)
    assert row["recall"] > 0.95
    scale = reference.square().mean().sqrt()
    distance = evaluate.frechet_distance(samples / scale, reference / scale)
    assert row["frechet"] == pytest.approx(distance)
    assert metrics.n == 1000

    alone = evaluate.Metrics(pixels, as_images(shots))
    noise = 1e-4 * torch.randn(200, 2)
    mirrored = shots.flip(1)
    for copies in (shots, mirrored):                            # a mirrored shot is a shot
        row = alone(as_images(copies + noise))
        assert list(row) == ["diversity", "nearest_shot"]
        assert row["nearest_shot"] < 1e-3
        assert row["diversity"] < 1e-3
    black = torch.zeros(1, 2)
    row = alone(as_images(black))
    root_mean_square = math.sqrt((9 + 16) / 2)
    assert row["nearest_shot"] == pytest.approx(5 / root_mean_square)
    assert alone.n == 200

@torch.no_grad()
def test_features_by_their_definitions(monkeypatch):
    images = ewc_gan.to_float(load_images(SHOTS, 64, 3))
    net = evaluate.squeezenet1_1().eval()                       # with random weights
    monkeypatch.setattr(evaluate, "squeezenet1_1", lambda **_: net)
    maps = [images]
    D = GAN.load(ewc_gan.SHIPPED / "source_dcgan.pt").D
    for conv in D.layers[:-1:2]:
        maps.append(nn.functional.leaky_relu(conv(maps[-1]), 0.2))
    unit8 = maps[3] / maps[3].norm(dim=1, keepdim=True)         # [3, 128, 8, 8]
    unit4 = maps[4] / maps[4].norm(dim=1, keepdim=True)         # [3, 256, 4, 4]
    of_D = torch.cat([unit8.mean((2, 3)), unit4.mean((2, 3))], 1)

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    big = nn.functional.interpolate(images / 2 + 0.5, (128, 128), mode="bilinear")
    of_net = net.features((big - mean) / std).mean((2, 3))

    many = images.repeat(40, 1, 1, 1)                           # more than one batch
    expected = {"discriminator": of_D, "squeezenet": of_net, "factor": maps[3]}
    for judge, features in expected.items():
        measured = evaluate.features_of(judge)(many)
        assert len(measured) == 120
        torch.testing.assert_close(measured[-3:], features, rtol=1e-4, atol=1e-5)

# ---------- Factors -------------------------------------------------------------------------
@torch.no_grad()
def test_factors_are_read_off_drawings_and_compared(capsys):
    read = evaluate.probe("photo", n=250)
    images, truth = evaluate.drawings("photo", 150, 12)         # not those it was fitted to
    readings = read(images)
    kept = evaluate.correlations(readings, truth)
    assert list(kept) == [*evaluate.FACTORS, "factors_kept"]
    assert kept["factors_kept"] > 0.6
    for i, name in enumerate(evaluate.FACTORS):
        expected = np.corrcoef(readings[:, i], truth[:, i])[0, 1]
        assert kept[name] == pytest.approx(expected, abs=1e-4)
    gan = GAN.load(ewc_gan.SHIPPED / "source_dcgan.pt")
    one = read(gan.generate(100, seed=1))
    other = read(gan.generate(100, seed=2))
    assert evaluate.correlations(one, one)["factors_kept"] == pytest.approx(1)
    kept = evaluate.correlations(one, other)                    # faces of other z
    assert abs(kept["factors_kept"]) < 0.15

# ---------- Charts --------------------------------------------------------------------------
def bar_height(sheet, x, color):
    """Pixels of a color in a column of a chart, from the top of its axis down."""
    column = np.array(sheet)[50:, x].astype(int) @ [0x10000, 0x100, 1]
    return (column == color).sum()

def test_bars_of_a_chart_are_as_high_as_their_values():
    """Two names, 770 pixels wide; two labels, 308 pixels wide; bars of up to 130 pixels."""
    blue = 0x1f5fa8
    orange = 0xd9822b
    bars = {"x": torch.tensor([0.0, 4.0]), "y": torch.tensor([3.0, math.inf])}
    sheet = evaluate.chart([("title", ["a", "b"], bars, 1)])
    assert bar_height(sheet, 200, blue) <= 1                    # below the foot, which is 1
    assert bar_height(sheet, 500, orange) == pytest.approx(130 * 2 / 3, abs=2)
    assert bar_height(sheet, 1000, blue) == pytest.approx(130, abs=1)
    assert bar_height(sheet, 1300, orange) <= 1                 # a ratio to 0

def test_layers_picture_divides_by_what_fine_tuning_changed():
    def toy_run(label, change):
        row = {"layer": "conv", "fisher": "0.01", "change": str(change)}
        return evaluate.Run(label, 0, None, [row], None)

    runs = [toy_run("finetune", 8), toy_run("ewc", 1), toy_run("ewc", 3)]
    sheet = evaluate.layers_picture(runs)
    assert sheet.height == 3 * 210
    ratio = sheet.crop((0, 420, 1600, 630))
    assert bar_height(ratio, 200, 0x1f5fa8) == pytest.approx(130, abs=1)
    assert bar_height(ratio, 900, 0xd9822b) == pytest.approx(130 * 2 / 8, abs=2)
    assert evaluate.layers_picture(runs[1:]).height == 2 * 210

# ---------- The program ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with ewc and finetune of seeds 0 and 1, adapted from a toy source."""
    folder = tmp_path_factory.mktemp("evaluate")
    small_gan("dcgan").save(folder / "source.pt")
    argv = ["--target", SHOTS, "--source", folder / "source.pt"]
    argv += ["--seed", 0, 1, "--method", "ewc", "finetune"]
    argv += ["--steps", 12, "--batch-size", 2, "--fisher-samples", 2]
    assert run(*argv, "--device", "cpu", "--out", folder / "out") == 0
    return folder / "out"

@pytest.fixture
def cheap_features(monkeypatch):
    """Colours at 4x4 places instead of a network's features, which would take a minute."""
    def colours(images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def features_of(judge):
        judges.append(judge)
        return colours

    judges = []
    monkeypatch.setattr(evaluate, "features_of", features_of)
    return judges, colours

def test_a_table_has_the_measures_of_its_runs(runs, cheap_features, capsys):
    """evaluation.csv has those of the models in the folders; the table their mean and spread."""
    judges, colours = cheap_features
    held_out = runs.parent / "held_out"
    held_out.mkdir()
    random = np.random.default_rng(0)
    for i in range(15):
        noise = random.integers(256, size=(40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(held_out / f"{i}.png")
    argv = [runs, "--reference", held_out, "--features", "squeezenet"]
    assert run(*argv, program=evaluate) == 0
    printed = capsys.readouterr().out
    assert judges == ["squeezenet"]
    assert "only 15 images: distances are too large" in printed

    shots = ewc_gan.to_float(load_images(SHOTS, 32))
    reference = ewc_gan.to_float(load_images(held_out, 32))
    metrics = evaluate.Metrics(colours, shots, reference)
    table = table_of(runs / "evaluation.csv")
    names = " ".join(row["run"] + row["seed"] for row in table)
    assert names == "source held-out ewc0 ewc1 finetune0 finetune1"
    source = GAN.load(runs.parent / "source.pt")
    expected = [metrics(source.generate(1000, seed=1))]
    halves = metrics.reference.chunk(2)
    expected.append(metrics.compare(*halves))
    for folder in sorted(runs.glob("*_seed?")):
        gan = GAN.load(folder / "adapted.pt")
        expected.append(metrics(gan.generate(1000, seed=1)))
    for row, measured in zip(table, expected, strict=True):
        written = {name: float(row[name]) for name in measured}
        assert written == pytest.approx(measured, rel=1e-3)

    frechet = [row["frechet"] for row in expected[4:]]
    mean = np.mean(frechet)
    spread = np.std(frechet, ddof=1)
    assert f"{mean:.3g} ±{spread:.2g}" in printed
    assert Image.open(runs / "layers.png").height == 3 * 210
    assert Image.open(runs / "interpolation.gif").n_frames > 20

def test_factors_are_columns_and_a_chart(runs, cheap_features, monkeypatch, tmp_path, capsys):
    def draw(style, n, seed):
        torch.manual_seed(seed)
        return torch.rand(20, 3, 64, 64), torch.rand(20, 13)

    monkeypatch.setattr(evaluate, "drawings", draw)
    def probe(style):
        return lambda images: images[:, 0, 10, 4:17]            # 13 of its pixels

    monkeypatch.setattr(evaluate, "probe", probe)
    assert run(runs, "--factors", "emoji", "--out", tmp_path, program=evaluate) == 0
    table = table_of(tmp_path / "evaluation.csv")
    assert [row["run"] for row in table[:2]] == ["source", "drawings"]
    source = GAN.load(runs.parent / "source.pt")
    gan = GAN.load(runs / "ewc_seed0" / "adapted.pt")
    before = source.generate(1000, seed=1)[:, 0, 10]
    after = gan.generate(1000, seed=1)[:, 0, 10]
    kept = []
    for i, name in enumerate(evaluate.FACTORS, start=4):
        expected = np.corrcoef(before[:, i], after[:, i])[0, 1]
        kept.append(expected)
        assert float(table[2][name]) == pytest.approx(expected, abs=1e-3)
    mean = float(table[2]["factors_kept"])
    assert mean == pytest.approx(np.mean(kept), abs=1e-3)
    assert table[0]["factors_kept"] == table[1]["diversity"] == ""
    assert Image.open(tmp_path / "factors.png").height == 210

def test_a_collapse_is_said_in_words(runs, cheap_features, monkeypatch, tmp_path, capsys):
    """The adapted GANs make one image: nearly the same for every z."""
    source = GAN.load(runs.parent / "source.pt")
    theta_S = ewc_gan.weights(source.G_ema)

    def generate(gan, n, seed=0):
        z = gan.z(n, seed)
        if not torch.equal(ewc_gan.weights(gan.G_ema), theta_S):
            z = z[:1] + 0.001 * z
        return gan.images(z)

    monkeypatch.setattr(GAN, "generate", generate)
    assert run(runs, "--out", tmp_path, program=evaluate) == 0
    printed = capsys.readouterr().out
    table = table_of(tmp_path / "evaluation.csv")
    before = float(table[0]["diversity"])
    after = float(table[3]["diversity"])
    assert after < before / 2
    words = f"alike (diversity {after:.1f}, it should be about {before:.1f}): try fewer --steps"
    assert f"finetune_seed0: the samples are much {words}" in printed

def test_folders_of_images_are_measured_like_runs(runs, cheap_features, tmp_path, capsys):
    checkpoint = runs / "ewc_seed0" / "adapted.pt"
    folder = tmp_path / "x"
    argv = ["--checkpoint", checkpoint, "--generate", 200, "--seed", 1]
    assert run(*argv, "--out", folder) == 0
    argv = [checkpoint.parent, folder, "--out", tmp_path]
    assert run(*argv, program=evaluate) == 0
    table = table_of(tmp_path / "evaluation.csv")
    names = [row["run"] for row in table]
    assert names == ["source", "ewc", str(folder)]
    for name in ("diversity", "nearest_shot"):
        of_gan = float(table[1][name])
        assert float(table[2][name]) == pytest.approx(of_gan, rel=0.02)     # as 8-bit images
    assert run(folder, "--target", SHOTS, program=evaluate) == 0
    row, = table_of(folder / "evaluation.csv")
    assert row["run"] == str(folder)

def copied_run(runs, folder, **changes):
    """A copy of the run ewc_seed0 whose config.json has other values."""
    shutil.copytree(runs / "ewc_seed0", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))

def test_mistakes_get_one_line_and_code_2(runs, tmp_path, monkeypatch, capsys):
    def says(text, *argv):
        assert run(*argv, program=evaluate) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1

    copied_run(runs, tmp_path / "a" / "ewc")
    copied_run(runs, tmp_path / "a" / "other", shots=3)
    says("the runs differ", tmp_path / "a")
    (tmp_path / "a" / "ewc" / "config.json").unlink()
    says("ewc: config.json or layers.csv", tmp_path / "a")
    says("images need --target", SHOTS)
    says("images need --target", tmp_path / "nothing")
    says("nothing", runs, tmp_path / "nothing")
    says("no --factors", SHOTS, "--target", SHOTS, "--factors", "emoji")
    says("10 images: 12 are needed", runs, "--reference", SHOTS)
    says("invalid choice", runs, "--factors", "houses")
    says("unrecognized arguments", runs, "--ref", SHOTS)

    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(evaluate, "squeezenet1_1", offline)
    says("go online once, 5 MB", runs, "--features", "squeezenet", "--out", tmp_path)
