"""Pretrain the source model that ewc_gan.py adapts.

    python pretrain_source.py                                     # the shipped domain: drawn faces
    python pretrain_source.py --data DIR --arch dcgan --resolution 64 --out out/source.pt
    python pretrain_source.py --data DIR --out out/source.pt --resume
    torchrun --nproc_per_node 8 pretrain_source.py --data DIR     # a batch shared by eight GPUs

Every thousand steps samples are compared with the images.  The best model so far is kept in OUT.pt,
with 64 of its samples in OUT.png; --resume needs OUT.pt.train.  Stop it when the samples are good
enough.  Under torchrun each process decodes (or draws) all images.
"""
import argparse
import os
import sys
from pathlib import Path

import torch

import ewc_gan

FACES, FACES_SEED = 20000, 7        # the shipped source domain: faces 0 to 19,999 of seed 7


def draw_source_images(resolution):
    """The shipped source domain, drawn on all processor cores: uint8 [N, 3, R, R]."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
    import draw_faces
    print(f"drawing {FACES} faces (takes minutes) ...", flush=True)
    faces = draw_faces.draw_faces("photo", FACES, FACES_SEED, resolution)        # [N, R, R, 3]
    return torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous()


def parse_arguments(argv):
    p = ewc_gan.Parser("python pretrain_source.py", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, metavar="DIR", help="thousands of images (default: draws "
                   "faces)")
    p.add_argument("--arch", choices=ewc_gan.PRETRAIN, default="dcgan", help="(default: dcgan)")
    p.add_argument("--resolution", type=int, choices=[32, 64, 128, 256], default=64)
    p.add_argument("--init", type=Path, metavar="FILE", help="start from this model, which decides "
                   "arch and resolution")
    p.add_argument("--out", type=Path, metavar="FILE", help="the checkpoint to write (default: "
                   "out/source_ARCH.pt)")
    p.add_argument("--resume", action="store_true", help="go on after a stop, or with more --steps")
    ewc_gan.add_settings(p, ewc_gan.PRETRAIN)
    return p.parse_args(argv)


def main(argv=None):
    with ewc_gan.clean_exit("pretrain_source.py"):
        args = parse_arguments(argv)
        device = args.device
        if torch.distributed.is_torchelastic_launched():         # by torchrun: join the others
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
            if torch.distributed.get_rank():                     # one process speaks
                sys.stdout = open(os.devnull, "w")
        torch.backends.cudnn.allow_tf32 = False                  # float32 is to be float32
        torch.manual_seed(args.seed or 0)                        # of the initial weights
        if args.init:
            gan = ewc_gan.GAN.load(args.init, device)
        else:
            gan = ewc_gan.GAN(args.arch, args.resolution)
            gan.to(device, memory_format=ewc_gan.memory_format(device))
        settings = ewc_gan.settings_from_args(ewc_gan.PRETRAIN[gan.arch], args)
        out = args.out or Path("out", f"source_{gan.arch}.pt")
        ewc_gan.refuse_inside(out, args.data)
        images = (ewc_gan.load_images(args.data, gan.resolution) if args.data
                  else draw_source_images(gan.resolution))
        out.parent.mkdir(parents=True, exist_ok=True)
        ewc_gan.pretrain(images, gan, settings, out, args.amp, args.resume)
        print(f"{out}: the source model;  {out.with_suffix('.png')}: samples")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
