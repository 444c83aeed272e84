"""Pretrain the source model that ewc_gan.py adapts.

    python pretrain_source.py                                     # the shipped domain
    python pretrain_source.py --data DIR --arch dcgan --out out/source.pt
    python pretrain_source.py --data DIR --out out/source.pt --resume
    python pretrain_source.py --data DIR --init data/source_stylegan.pt --out out/source.pt
    torchrun --nproc_per_node 8 pretrain_source.py --data DIR     # eight GPUs share a batch

Every thousand steps the model is written to OUT.pt, and 64 of its samples to OUT.png.  Stop it
when the samples are good enough; --resume goes on.  Under torchrun each process reads all images.
"""
import argparse
import os
import sys
from pathlib import Path

import torch

import ewc_gan

FACES = 20000           # the shipped source domain: faces 0 to 19,999 of seed 7
FACES_SEED = 7


def draw_source_images(resolution):
    """The shipped source domain, drawn on all processor cores: uint8 [N, 3, R, R]."""
    sys.path.insert(0, str(ewc_gan.SHIPPED))
    import draw_faces
    print(f"drawing {FACES} faces (takes minutes) ...")
    faces = draw_faces.draw_faces("photo", FACES, FACES_SEED, resolution)        # [N, R, R, 3]
    return torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous()


def parse_arguments(argv):
    p = ewc_gan.Parser("python pretrain_source.py", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="a folder of thousands of images, with those of the "
                   "folders in it (default: draws faces)")
    p.add_argument("--arch", choices=ewc_gan.PRETRAIN, help="(default: stylegan)")
    p.add_argument("--resolution", type=int, choices=[32, 64, 128, 256], help="(default: 64)")
    p.add_argument("--init", type=Path, help="start from this model, with its architecture")
    p.add_argument("--out", type=Path, help="a checkpoint (default: out/source_ARCH.pt)")
    p.add_argument("--resume", action="store_true", help="go on after a stop")
    ewc_gan.add_settings(p, ewc_gan.PRETRAIN)
    args = p.parse_args(argv)
    if args.init and (args.arch or args.resolution):
        p.error("--init decides --arch and --resolution: leave them out")
    args.out = args.out or Path("out", f"source_{args.arch or 'stylegan'}.pt")
    if args.data and args.out.resolve().is_relative_to(args.data.resolve()):
        p.error(f"--out {args.out}: lies in {args.data}, whose images are read")
    if args.out.exists() and not args.out.with_suffix(".unfinished.pt").exists():
        p.error(f"--out {args.out}: holds a finished model; name another file")
    args.amp = args.amp or ewc_gan.default_amp(args.device)
    return args


def join_processes(device):
    """Under torchrun: join the other processes; only the first one speaks."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if torch.distributed.get_rank():
            sys.stdout = open(os.devnull, "w")


def main(argv=None):
    with ewc_gan.clean_exit("pretrain_source.py"):
        args = parse_arguments(argv)
        join_processes(args.device)
        torch.backends.cudnn.allow_tf32 = False                  # float32 is to be float32
        torch.manual_seed(args.seed or 0)                        # of the initial weights
        if args.init:
            gan = ewc_gan.GAN.load(args.init, args.device)
        else:
            gan = ewc_gan.GAN(args.arch or "stylegan", args.resolution or 64)
            gan.to(args.device, memory_format=ewc_gan.memory_format(args.device))
        settings = ewc_gan.settings_from_args(ewc_gan.PRETRAIN[gan.arch], args)
        if args.data:
            images = ewc_gan.load_images(args.data, gan.resolution, nested=True)
        else:
            images = draw_source_images(gan.resolution)
        if len(images) < 1000:
            print("a source needs thousands of images: with few it learns them by heart")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        ewc_gan.pretrain(images, gan, settings, args.out, args.amp, args.resume)
        print(f"{args.out}: the source model;  {args.out.with_suffix('.png')}: samples")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
