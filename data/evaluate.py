"""How good is it?  Measures and charts of finished runs, or of folders of images.

    python data/evaluate.py out/methods --reference out/held_out/emoji --features squeezenet
    python data/evaluate.py out/methods --factors emoji
    python data/evaluate.py out/my_images --target data/10shot --reference DIR

One row for each method and lambda: the mean over seeds, and their standard deviation.  Above
them two yardsticks: the source, not adapted; and one half of the held-out images against the
other, which is about what a perfect generator would get.

    frechet       distance to the held-out images: low is good.  Not FID: other features
    precision     share of the samples that lie among the held-out images
    recall        share of the held-out images that lie among the samples: real diversity
    diversity     distance between samples that have the same nearest shot
    nearest_shot  distance of a sample to its nearest shot: near 0 the shots are copied
    factors_kept  how much of a drawn face is kept: its turn, smile, glasses ...

Read them together: the source is the most diverse of all, and fits worst.
"""
import argparse
import csv
import json
import os
import re
import sys
from collections import namedtuple
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as nnF
from torchvision.models import squeezenet1_1
from torchvision.transforms.functional import normalize

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from draw_faces import draw_faces, face_of  # noqa: E402
from ewc_gan import (GAN, PICTURES, SHIPPED, Parser, UserError, clean_exit,  # noqa: E402
                     image_grid, load_images, reading, to_float, write_table)

# ---------- Measures ------------------------------------------------------------------------
def frechet_distance(a, b):
    """Frechet distance of two Gaussians, fitted to features a [N, C] and b [M, C] (Heusel et al.
    2017, there of Inception's features):

        |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    With C = R^T R, the last trace is the sum of the singular values of R_a R_b^T.  R comes from the
    samples themselves (QR), which is exact also for fewer samples than features."""
    def root(x):
        return torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R

    a = a.double()
    b = b.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    R_a = root(a)
    R_b = root(b)
    cross = torch.linalg.svdvals(R_a @ R_b.T).sum()
    return float(means + R_a.square().sum() + R_b.square().sum() - 2 * cross)

def precision_recall(real, fake, k=5):
    """(1) Share of fake [M, C] inside the manifold of real [N, C]; (2) of real in that of fake.
    A manifold is a union of balls, each around a point and up to its k-th neighbour
    (Kynkaanniemi et al. 2019)."""
    def share_inside(x, points):
        # k + 1, as the nearest of all is the point itself
        radius = torch.cdist(points, points).kthvalue(k + 1, dim=1).values      # [points]
        inside = (torch.cdist(x, points) <= radius).any(1)                      # [x]
        return float(inside.float().mean())

    return share_inside(fake, real), share_inside(real, fake)

def diversity_and_nearest(x, shots):
    """Of features x [N, C] and those of the shots [K, C]: (1) mean distance in a cluster of
    images with the same nearest shot, averaged over clusters of two or more (Ojha et al. 2021,
    there by LPIPS); (2) mean distance of an image to its nearest shot."""
    nearest = torch.cdist(x, shots).min(1)
    clusters = [x[nearest.indices == i] for i in range(len(shots))]
    distances = [torch.pdist(cluster).mean() for cluster in clusters if len(cluster) > 1]
    diversity = sum(distances) / max(len(distances), 1)
    return float(diversity), float(nearest.values.mean())

class Metrics:
    """All measures of a set of images: fit to held-out images, if there are any; diversity.

    features   a function, images float [N, 3, R, R] in [-1, 1] -> [N, C]: see features_of()
    shots      images [K, 3, R, R]; training mirrors them, so mirror images count as shots, too
    reference  held-out images, of which the first 1,000 count

    Features are divided by their root mean square (of the reference, or else of the shots), so
    that distances have no unit.  n: how many images to measure."""
    def __init__(self, features, shots, reference=None):
        self.n = 200 if reference is None else 1000
        known = shots = features(torch.cat([shots, shots.flip(3)]))     # [2 K, C]
        if reference is not None:
            known = features(reference[:self.n])                        # [N, C]
        scale = known.square().mean().sqrt()
        self.shots = shots / scale
        self.reference = None if reference is None else known / scale
        self.features = lambda images: features(images) / scale

    def __call__(self, images):
        """{measure: number} of the first n images, float [N, 3, R, R] in [-1, 1]."""
        return self.compare(self.features(images[:self.n]), self.reference)

    def compare(self, x, reference):
        row = {}
        if reference is not None:
            row["frechet"] = frechet_distance(x, reference)
            row["precision"], row["recall"] = precision_recall(reference, x)
        row["diversity"], row["nearest_shot"] = diversity_and_nearest(x, self.shots)
        return row

# ---------- Features ------------------------------------------------------------------------
def discriminator_features(D, images):
    """[N, 384]: the last two stages of the shipped DCGAN's D.  The channels at each place are
    scaled to length 1, as in LPIPS (Zhang et al. 2018), then averaged over the places."""
    x8 = factor_features(D, images)                                     # [N, 128, 8, 8]
    x4 = D.layers[6:8](x8)                                              # [N, 256, 4, 4]
    pooled = [nnF.normalize(x, dim=1).mean((2, 3)) for x in (x8, x4)]
    return torch.cat(pooled, 1)

def factor_features(D, images):
    """[N, 128, 8, 8]: one stage of D, not averaged, as a factor needs to know where an eye is."""
    return D.layers[:6](nnF.interpolate(images, 64, mode="area"))

def squeezenet_features(net, images):
    """[N, 512]: the last layer of SqueezeNet 1.1 (Iandola et al. 2016) before its classes,
    averaged over the places.  Trained on ImageNet, it has seen neither source nor target."""
    x = nnF.interpolate(images / 2 + 0.5, 128, mode="bilinear", antialias=True)
    x = normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return net.features(x).mean((2, 3))

def features_of(judge):
    """A function, images float [N, 3, R, R] in [-1, 1] -> features, always on the CPU.
    judge: "discriminator", "squeezenet", or "factor"."""
    features = {"squeezenet": squeezenet_features, "discriminator": discriminator_features,
                "factor": factor_features}[judge]
    if judge == "squeezenet":
        with reading("--features squeezenet (go online once, 5 MB)"):
            net = squeezenet1_1(weights="DEFAULT").eval()
    else:
        net = GAN.load(SHIPPED / "source_dcgan.pt").D

    @torch.no_grad()
    def in_batches(images):
        return torch.cat([features(net, batch) for batch in images.split(100)])

    return in_batches

# ---------- Factors of drawn faces ----------------------------------------------------------
FACTORS = ("turn tilt smile open_mouth glasses bun long_hair bald curly beard width gaze "
           "hair_colour").split()

def factors_of(face):
    """The values of FACTORS, in their order, for a draw_faces.Face: a number, or yes or no."""
    hair = [face.hair_cut == cut for cut in ("bun", "long", "bald", "curly")]
    return [face.turn, face.tilt, face.smile, max(face.mouth_open, 0), face.glasses != "none",
            *hair, face.beard in ("full", "moustache"),
            face.head_width, face.gaze_x, face.hair_color]

def drawings(style, n, seed):
    """Faces 0 to n - 1 of a seed: images float [n, 3, 64, 64] in [-1, 1]; factors [n, 13]."""
    images = torch.from_numpy(draw_faces(style, n, seed))               # [n, 64, 64, 3]
    factors = [factors_of(face_of(seed, i)) for i in range(n)]
    return to_float(images.permute(0, 3, 1, 2)), torch.tensor(factors)

def probe(style, n=3000):
    """A function, images [N, 3, R, R] -> factors [N, 13] up to a constant, learnt from drawings.
    It is linear (Alain and Bengio 2016): ridge regression, in its dual form, as there are fewer
    drawings than features.  With features X and factors Y, both centred:

        W = X^T (X X^T + a I)^-1 Y        a: 1 % of the mean of the diagonal of X X^T
    """
    features = features_of("factor")
    images, factors = drawings(style, n, 11)
    X = features(images).flatten(1)                                     # [n, 8192]
    mean = X.mean(0)
    X = X - mean
    Y = (factors - factors.mean(0)).double()                            # [n, 13]
    K = (X @ X.T).double()
    a = 0.01 * K.diagonal().mean()
    W = X.T @ torch.linalg.solve(K + a * torch.eye(n), Y).float()       # [8192, 13]
    return lambda images: (features(images).flatten(1) - mean) @ W

def correlations(a, b):
    """{factor: correlation of its column in a [N, 13] with that in b}, and "factors_kept",
    their mean: 0 if nothing is kept, 1 if all is, up to scale."""
    values = nnF.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=0)     # [13]
    return {**dict(zip(FACTORS, values.tolist())), "factors_kept": float(values.mean())}

def factors_kept(style, source):
    """(1) A function: a GAN adapted from source -> correlations() of the factors in its samples
    with those in the source's, of the same 1,000 z.  One probe reads the source (style photo),
    another the adapted GAN.  (2) A yardstick, no strict limit: how well the latter reads unseen
    drawings, in which dyed hair (14 %) hides the hair colour."""
    print("drawing 7,000 faces, from which to learn what a factor looks like ...")
    read = probe(style)
    before = probe("photo")(source.generate(1000, seed=1))              # [1000, 13]
    images, truth = drawings(style, 1000, 12)

    def kept(gan):
        after = read(gan.generate(1000, seed=1))
        return correlations(before, after)

    return kept, correlations(read(images), truth)

# ---------- Charts and tables ---------------------------------------------------------------
COLORS = ["#1f5fa8", "#d9822b", "#3f8f5f", "#a23b72", "#777777", "#c8b400"]

def chart(panels):
    """Panels of bars, one below the other -> a PIL picture, 1600 pixels wide.  A panel: (title,
    names, {label: a value for each name}, the value at the foot of the bars)."""
    sheet = Image.new("RGB", (1600, 210 * len(panels)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(13)
    for i, (title, names, bars, foot) in enumerate(panels):
        values = torch.stack(list(bars.values()))                       # [labels, names]
        values = values.nan_to_num(foot, foot)                          # of ratios to 0
        high = float(values.max())
        heights = (values - foot).clamp(min=0) * 130 / (high - foot + 1e-9)
        bottom = 210 * i + 185                                          # all in pixels
        group = 1540 / len(names)
        width = 0.8 * group / len(bars)
        pen.text((60, bottom - 180), title, "black")
        for y, value in [(bottom, foot), (bottom - 130, high)]:
            pen.line([60, y, 1600, y], "#dddddd")
            pen.text((52, y), f"{value:.3g}", "black", anchor="rm")
        for n, name in enumerate(names):
            pen.text((60 + n * group, bottom + 4), name, "black")
        for r, (label, color) in enumerate(zip(bars, COLORS * 9)):
            pen.text((60 + 130 * r, bottom - 158), label, color)
            for n, height in enumerate(heights[r].tolist()):
                x = 60 + n * group + r * width
                pen.rectangle([x, bottom - height, x + width, bottom], color)
    return sheet

def mean_by_label(pairs):
    """Pairs of a label and a tensor -> {label: mean of its tensors}, the mean over seeds."""
    groups = {}
    for label, values in pairs:
        groups.setdefault(label, []).append(values)
    return {label: torch.stack(group).mean(0) for label, group in groups.items()}

def layers_picture(runs):
    """F of the first run; what changed in each run; and that as a part of fine-tuning's change."""
    def column(run, name):
        return torch.tensor([float(row[name]) for row in run.layers])

    names = [row["layer"] for row in runs[0].layers]
    fisher = column(runs[0], "fisher").clamp(min=1e-20).log10()
    changes = mean_by_label((run.label, column(run, "change")) for run in runs)
    panels = [
        ("mean Fisher information F, log10", names, {"": fisher}, int(fisher.min()) - 1),
        ("change of the weights in %", names, changes, 0)]
    if "finetune" in changes:
        ratios = {label: change / changes["finetune"] for label, change in changes.items()}
        title = ("change / change in finetune: below 1 the penalty held a layer back, also where "
                 "a layer with a large F still changes most")
        panels.append((title, names, ratios, 0))
    return chart(panels)

def factors_picture(rows):
    names = [*FACTORS, "factors_kept"]                                  # the last: their mean
    kept = [row for row in rows if row["factors_kept"] != ""]
    bars = mean_by_label((row["run"], torch.tensor([row[name] for name in names])) for row in kept)
    return chart([("correlation of factors with those of the source", names, bars, 0)])

def save_interpolation(path, source, gan):
    """A GIF that walks round a circle in z: the source above, the adapted GAN below."""
    a, b = source.z(8, PICTURES).split(4)                               # [4, z_dim] each
    pictures = []
    for angle in torch.arange(32) * torch.pi / 16:
        z = angle.cos() * a + angle.sin() * b                           # as normal as a and b
        images = torch.cat([source.images(z), gan.images(z)])
        pictures.append(image_grid(images, 4))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)

def print_table(rows):
    """A line for each label: the mean of every measure, and the spread of several seeds."""
    columns = [name for name in rows[0] if name not in ("run", "seed", *FACTORS)]
    width = max(len(row["run"]) for row in rows)
    print(" " * width + "".join(f"{name:>16}" for name in columns))
    for label in dict.fromkeys(row["run"] for row in rows):
        line = f"{label:{width}}"
        for name in columns:
            values = [row[name] for row in rows if row["run"] == label and row[name] != ""]
            line += f"{mean_and_spread(values):>16}"
        print(line)

def mean_and_spread(values):
    values = torch.tensor(values)
    text = f"{values.mean():.3g}" if len(values) else ""
    return f"{text} ±{values.std():.2g}" if len(values) > 1 else text

# ---------- Command line --------------------------------------------------------------------
# setup: source, target and number of shots; layers: the rows of layers.csv
Run = namedtuple("Run", "label seed setup layers gan")

def load_run(checkpoint, top):
    """top: the folder that holds all runs, below which a run has its name, such as ewc_seed0."""
    folder = checkpoint.parent
    with reading(f"{folder}: config.json or layers.csv"):
        config = json.loads((folder / "config.json").read_text())
        setup = (config["source"], config["target"], config["shots"])
        layers = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
        label = re.sub(r"_seed\d+$", "", str(folder.relative_to(top)))
    return Run(label, config["seed"], setup, layers, GAN.load(checkpoint))

def load_enough(folder, resolution):
    """The first 1,000 images below a folder, float [N, 3, R, R] in [-1, 1]; 12 at least."""
    images = load_images(folder, resolution, 1000, nested=True)
    n = len(images)
    if n < 12:                          # each half: a point and its five neighbours
        raise UserError(f"{folder}: only {n} images: 12 are needed, better 1,000")
    if n < 500:
        print(f"{folder}: only {n} images: distances are too large, compare rows only")
    return to_float(images)

def parse_arguments(argv):
    p = Parser("python data/evaluate.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="+", type=Path, help="runs below them, or images in them")
    p.add_argument("--target", type=Path, help="the shots (default: those of the runs)")
    p.add_argument("--reference", type=Path, help="held-out images of the target's kind")
    p.add_argument("--features", choices=["discriminator", "squeezenet"], default="discriminator",
                   help="what sees the images (default: %(default)s)")
    p.add_argument("--factors", choices=["emoji", "sketch", "statue"],
                   help="the style of drawn targets: which factors of a face are kept?")
    p.add_argument("--out", type=Path, help="where to write (default: the first folder)")
    return p.parse_args(argv)

def measure(metrics, source, runs, images, style):
    """The rows of evaluation.csv: of yardsticks, of runs, and of images, {folder: images}."""
    rows = []
    if source:
        rows.append({"run": "source", "seed": "", **metrics(source.generate(metrics.n, seed=1))})
    if metrics.reference is not None:
        rows.append({"run": "held-out", **metrics.compare(*metrics.reference.chunk(2))})
    should_be = min((row["diversity"] for row in rows), default=0)      # of what there is above
    if style:
        kept, drawn = factors_kept(style, source)
        rows.append({"run": "drawings", **drawn})
    for run in runs:
        name = f"{run.label}_seed{run.seed}"
        print(f"{name} ...")
        row = {"run": run.label, "seed": run.seed, **metrics(run.gan.generate(metrics.n, seed=1))}
        if style:
            row.update(kept(run.gan))
        rows.append(row)
        if row["diversity"] < 2 / 3 * should_be:
            print(f"{name}: the samples are much alike (diversity {row['diversity']:.1f}, it "
                  f"should be about {should_be:.1f}): try fewer --steps or a larger --lam")
    for folder, samples in images.items():
        rows.append({"run": folder, **metrics(samples)})
    columns = dict.fromkeys((name for row in rows for name in row), "")
    return [{**columns, **row} for row in rows]

def evaluate(args):
    # Whatever may be wrong is found first; measuring takes minutes
    found = {folder: set(folder.resolve().rglob("adapted.pt")) for folder in args.folders}
    checkpoints = sorted(set().union(*found.values()))
    top = os.path.commonpath([path.parents[1] for path in checkpoints] or ["."])
    runs = [load_run(path, top) for path in checkpoints]
    setups = {run.setup for run in runs} or {(None, None, None)}
    if len(setups) > 1:
        raise UserError("the runs differ in source, target or shots: evaluate them one by one")
    source, target, limit = setups.pop()
    target = args.target or target
    if not target or args.factors and not runs:
        raise UserError("no adapted.pt in the folders: images need --target, and no --factors")
    source = source and GAN.load(source)
    resolution = source.resolution if source else 64
    shots = to_float(load_images(target, resolution, limit))
    reference = args.reference and load_enough(args.reference, resolution)
    images = {str(folder): load_enough(folder, resolution)
              for folder in found if not found[folder]}
    out = args.out or args.folders[0]
    out.mkdir(parents=True, exist_ok=True)

    metrics = Metrics(features_of(args.features), shots, reference)
    rows = measure(metrics, source, runs, images, args.factors)
    print_table(rows)
    write_table(out / "evaluation.csv", rows)
    if args.factors:
        factors_picture(rows).save(out / "factors.png")
    if runs:
        layers_picture(runs).save(out / "layers.png")
        save_interpolation(out / "interpolation.gif", source, runs[0].gan)
    print(f"tables and charts are in {out}")

def main(argv=None):
    with clean_exit("evaluate.py"):
        evaluate(parse_arguments(argv))

if __name__ == "__main__":
    main()
