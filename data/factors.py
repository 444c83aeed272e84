"""Which factors of a drawn face does an adaptation keep?

    python data/factors.py out/methods_emoji/*/adapted.pt

The drawn domain knows every face: its turn, smile, glasses, hair and more.  A linear probe (ridge
regression on the 8x8 features of the shipped D) learns to read these factors off drawings of a
style.  One probe reads the samples of the source (style photo), another the adapted samples of the
same z (style of the target).  The correlation of the two readings, over 1,000 z, says how much of a
factor is kept: 0 for nothing, 1 if all is kept, up to scale.  The row "drawings" is a yardstick, no
strict limit: how well the probe of the target style reads the true factors of unseen drawings, in
which dyed hair (14 %) hides the hair colour.

Runs are named by their folders; seeds are averaged.  Writes factors.csv and factors.png above them.
"""
import argparse
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import draw_faces  # noqa: E402
import ewc_gan  # noqa: E402

FACTORS = {                                     # name -> its value for a draw_faces.Face
    "turn": lambda face: face.turn, "tilt": lambda face: face.tilt,
    "smile": lambda face: face.smile, "open mouth": lambda face: max(face.mouth_open, 0),
    "glasses": lambda face: face.glasses != "none", "bun": lambda face: face.hair_cut == "bun",
    "long hair": lambda face: face.hair_cut == "long", "bald": lambda face: face.hair_cut == "bald",
    "curly": lambda face: face.hair_cut == "curly",
    "beard": lambda face: face.beard in ("full", "moustache"),
    "width": lambda face: face.head_width, "gaze": lambda face: face.gaze_x,
    "hair colour": lambda face: face.hair_color}


def drawings(style, n, seed):
    """Faces 0..n-1 of a seed: images float [n, 3, 64, 64] in [-1, 1], and factors [n, 13]."""
    images = torch.from_numpy(draw_faces.draw_faces(style, n, seed)).permute(0, 3, 1, 2)
    faces = (draw_faces.face_of(seed, i) for i in range(n))
    table = [[float(value(face)) for value in FACTORS.values()] for face in faces]
    return ewc_gan.to_float(images), torch.tensor(table)


@torch.no_grad()
def features(images):
    """images [N, 3, 64, 64] -> features [N, 8192] of the shipped D, at 8x8."""
    layers = ewc_gan.GAN.load(ewc_gan.SHIPPED / "source_dcgan.pt").D.layers[:6]
    return torch.cat([layers(batch).flatten(1) for batch in images.split(100)])


def probe(style, n=3000, seed=11, ridge=0.01):
    """A function, images -> factors [N, 13] up to a constant, learnt from n drawings of a style:
    ridge regression in its dual form, W = X^T (X X^T + a I)^-1 Y, with a relative to X X^T."""
    images, Y = drawings(style, n, seed)
    X = features(images)
    mean = X.mean(0)
    X = X - mean
    K = (X @ X.T).double()
    a = ridge * K.diagonal().mean()
    W = X.T @ torch.linalg.solve(K + a * torch.eye(n), (Y - Y.mean(0)).double()).float()
    return lambda images: (features(images) - mean) @ W


def correlations(a, b):
    """Of each column of a [N, C] with that of b [N, C] -> [C]."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-12)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", type=Path, help="adapted.pt of each run")
    p.add_argument("--style", choices=["emoji", "sketch", "statue"], default="emoji",
                   help="the style of the target (default: emoji)")
    p.add_argument("--source", type=Path, help="what was adapted (default: the shipped source of "
                   "the first model's family)")
    args = p.parse_args(argv)
    family = ewc_gan.GAN.load(args.models[0]).arch
    source = ewc_gan.GAN.load(args.source or ewc_gan.SHIPPED / f"source_{family}.pt")
    read = probe(args.style)
    images, truth = drawings(args.style, 1000, 12)
    readings = {"drawings": [correlations(read(images), truth)]}
    before = probe("photo")(source.generate(1000, seed=1))
    for path in args.models:
        run = re.sub(r"_seed\d+$", "", path.resolve().parent.name)
        after = read(ewc_gan.GAN.load(path).generate(1000, seed=1))
        readings.setdefault(run, []).append(correlations(before, after))
    rows, runs = [], {run: torch.stack(kept) for run, kept in readings.items()}     # [seeds, C]
    for run, kept in runs.items():
        spread = kept.mean(1).std().item() if len(kept) > 1 else 0.0
        rows.append({"run": run, "seeds": len(kept), **dict(zip(FACTORS, kept.mean(0).tolist())),
                     "mean": kept.mean().item(), "spread": spread})
    out = args.models[0].resolve().parent.parent
    ewc_gan.write_table(out / "factors.csv", rows)
    bars = {row["run"]: list(row.values())[2:-1] for row in rows}               # and the mean
    title, names = "correlation, by factor", [*FACTORS, "mean"]
    ewc_gan.chart([(title, names, bars, 0)], 1200, 240).save(out / "factors.png")
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v!s:>14}"
                        for k, v in row.items()))


if __name__ == "__main__":
    main()
