"""Pretrain the source model that ewc_gan.py adapts.

    python pretrain_source.py                                     # the embedded domain: drawn faces
    python pretrain_source.py --data DIR --arch dcgan --resolution 64 --out out/source.pt
    python pretrain_source.py --data DIR --out out/source.pt --resume
    torchrun --nproc_per_node 8 pretrain_source.py --data DIR     # a batch shared by eight GPUs

Every thousand steps it measures samples against the images (OUT's name with .csv), and writes OUT,
the best model so far, with .png, 64 samples of it, and OUT.train, the state that --resume needs.
Stop it whenever the samples are good enough.
"""
import argparse
import contextlib
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import ewc_gan

FACES, FACES_SEED = 20000, 7        # the embedded source domain: faces 0 to 19,999 of seed 7


def draw_source_images(resolution):
    """The embedded source domain, drawn on all processor cores: uint8 [N, 3, R, R]."""
    sys.path.insert(0, str(ewc_gan.HERE / "data"))
    import draw_faces
    print(f"drawing {FACES} faces (a minute or two) ...", flush=True)
    faces = draw_faces.draw_faces("photo", FACES, FACES_SEED, resolution)        # [N, R, R, 3]
    return torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous()


def parse_arguments(argv):
    p = ewc_gan.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                       allow_abbrev=False)
    p.add_argument("--data", type=Path,
                   help="folder of images, nested or not (default: the program draws faces)")
    p.add_argument("--arch", default="dcgan", choices=sorted(ewc_gan.PRETRAIN),
                   help="family of networks (default: dcgan)")
    p.add_argument("--resolution", type=int, default=64, choices=[32, 64, 128, 256],
                   help="(default: 64)")
    p.add_argument("--out", type=Path, help="(default: out/source_ARCH.pt)")
    p.add_argument("--init", type=Path,
                   help="start from this checkpoint's weights; it decides --arch, --resolution")
    p.add_argument("--resume", action="store_true", help="go on from OUT.train")
    p.add_argument("--seed", type=ewc_gan.number(int, 0, 2**63 - 1), default=0,
                   help="of all random numbers (default: 0)")
    ewc_gan.add_shared_options(p, ewc_gan.PRETRAIN)
    return p.parse_args(argv)


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, if it did: a GPU each, and one that speaks."""
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    silence = open(os.devnull, "w") if torch.distributed.get_rank() else sys.stdout
    try:
        with contextlib.redirect_stdout(silence):
            yield device
    finally:
        torch.distributed.destroy_process_group()


def run(args):
    device, amp = ewc_gan.choose_device(args.device, args.amp)
    with process_group(device) as device:
        pretrain(args, device, amp)


def pretrain(args, device, amp):
    torch.manual_seed(args.seed)           # of the weights that training starts from
    if args.init:
        model = ewc_gan.load_checkpoint(args.init, device)
    else:
        model = ewc_gan.build_model(args.arch, args.resolution, device)
    settings = replace(ewc_gan.PRETRAIN[model.arch], **ewc_gan.chosen(args))
    out = args.out or Path("out") / f"source_{model.arch}.pt"
    if out.suffix != ".pt":
        raise ewc_gan.UserError(f"--out {out}: the name of a checkpoint ends in .pt")
    if args.resume:
        ewc_gan.read_checkpoint(out.with_name(out.name + ".train"))
    ewc_gan.make_folder(out.parent)
    print("  ".join(f"{key}={value}" for key, value in asdict(settings).items()), flush=True)
    if args.data:
        images = ewc_gan.read_folder(args.data, model.resolution, scratch=out.parent)
    else:
        images = draw_source_images(model.resolution)
    ewc_gan.pretrain(images, model, settings, out, amp, args.resume)
    print(f"{out}: the source model;  {out.with_suffix('.png')}: samples")


def main(argv=None):
    ewc_gan.exit_cleanly("pretrain_source.py", lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    main()
