"""Pretrain the source model that ewc_gan.py adapts.

    python pretrain_source.py                                     # the embedded domain: drawn faces
    python pretrain_source.py --data DIR --arch dcgan --resolution 64 --out out/source.pt
    python pretrain_source.py --data DIR --out out/source.pt --resume
    torchrun --nproc_per_node 8 pretrain_source.py --data DIR     # a batch shared by eight GPUs
    python pretrain_source.py --benchmark                         # how fast is this machine at it?

Every thousand steps it measures samples against the images (OUT's name with .csv), and writes OUT,
the best model so far, with .png, 64 samples of it, and OUT.train, the state that --resume needs.
Stop it whenever the samples are good enough.
"""
import contextlib
import copy
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import ewc_gan

FACES, FACES_SEED = 20000, 7        # the embedded source domain: faces 0 to 19,999 of seed 7


def draw_source_images(resolution):
    """The embedded source domain, drawn on all processor cores: uint8 [N, 3, R, R]."""
    sys.path.insert(0, str(ewc_gan.HERE / "data"))
    import draw_faces
    print(f"drawing {FACES} faces (takes minutes) ...", flush=True)
    faces = draw_faces.draw_faces("photo", FACES, FACES_SEED, resolution)        # [N, R, R, 3]
    return torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous()


def on_disk(folder, shape, dtype):
    """An array kept in a file without a name, so that it need not fit into memory."""
    if shutil.disk_usage(folder).free < 2 * math.prod(shape):            # a full disk would kill us
        raise ewc_gan.UserError(f"{folder}: too little room there for {shape[0]} decoded images")
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=shape)                 # outlives its name


def build_parser():
    p = ewc_gan.Parser("python pretrain_source.py [options]", __doc__)
    source = p.add_argument_group("the source")
    source.add_argument("--data", type=Path, metavar="DIR", help="images, nested or not, of any "
                        "size and format, cropped to squares; thousands (default: draws faces)")
    source.add_argument("--arch", choices=sorted(ewc_gan.PRETRAIN),
                        help="family of networks (default: dcgan)")
    source.add_argument("--resolution", type=int, choices=ewc_gan.RESOLUTIONS,
                        help="width and height of the images (default: 64)")
    source.add_argument("--out", type=Path, metavar="FILE",
                        help="the checkpoint to write (default: out/source_ARCH.pt)")
    source.add_argument("--init", type=Path, metavar="FILE", help="start from this checkpoint's "
                        "weights; it decides --arch and --resolution")
    source.add_argument("--resume", action="store_true",
                        help="go on from OUT.train, after Ctrl-C or with more --steps")
    source.add_argument("--seed", type=ewc_gan.number(int, 0, 2**63 - 1), default=0, metavar="S",
                        help="of all random numbers (default: 0)")
    source.add_argument("--benchmark", action="store_true", help="measure speed and memory with "
                        "random images and weights, print them, write nothing")
    ewc_gan.add_shared_options(p, ewc_gan.PRETRAIN)
    return p


def parse_arguments(argv):
    args = build_parser().parse_args(argv)
    for option, others in (("init", ["arch", "resolution", "resume"]),
                           ("benchmark", ["data", "out", "init", "resume"])):
        unfit = [f"--{other}" for other in others if getattr(args, other)]
        if getattr(args, option) and unfit:
            raise ewc_gan.UserError(f"--{option} does not go with {unfit[0]}; leave one out")
    return args


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
    if args.benchmark:
        benchmark(args.arch or "dcgan", args.resolution or 64, torch.device(device), amp,
                  args.batch_size)
        return
    with process_group(device) as device:
        pretrain(args, device, amp)


def pretrain(args, device, amp):
    torch.manual_seed(args.seed)           # of the weights that training starts from
    if args.init:
        model = ewc_gan.load_checkpoint(args.init, device)
    else:
        model = ewc_gan.build_model(args.arch or "dcgan", args.resolution or 64, device)
    settings = replace(ewc_gan.PRETRAIN[model.arch], **ewc_gan.chosen(args))
    out = args.out or Path("out") / f"source_{model.arch}.pt"
    if out.suffix != ".pt":
        raise ewc_gan.UserError(f"--out {out}: the name of a checkpoint ends in .pt")
    if args.data:
        ewc_gan.refuse_inside(out, args.data)
    if args.resume:
        ewc_gan.read_checkpoint(out.with_name(out.name + ".train"))
    print("  ".join(f"{key}={value}" for key, value in asdict(settings).items()), flush=True)
    if args.data:
        parents = out.absolute().parents                 # nothing is made before all input is read
        scratch = next(path for path in parents if path.is_dir())
        images = ewc_gan.read_folder(args.data, model.resolution, partial(on_disk, scratch))
    else:
        images = draw_source_images(model.resolution)
    ewc_gan.make_folder(out.parent)
    ewc_gan.pretrain(images, model, settings, out, amp, args.resume)
    print(f"{out}: the source model;  {out.with_suffix('.png')}: samples")


# --------------------------------------------------------------------------------------------------
# Benchmark
# --------------------------------------------------------------------------------------------------
def medians(jobs, device, rounds=7):
    """Median seconds of each job in {name: function}; in turns, so all see the same machine."""
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in times.items()}      # the first warms up


def training(model, settings, amp, images, pull=None):
    """A function that makes the 16 steps between two R1 penalties, on a copy of the model."""
    trainer = ewc_gan.Trainer(copy.deepcopy(model), settings, amp)

    def steps():
        for _ in range(settings.r1_every):
            trainer.train_step(images, pull)
    return steps, trainer


def plain_training(model, settings, images):
    """The same steps as a first version would do them: float32, contiguous, Adam by the tensor."""
    steps, trainer = training(model, settings, "off", images)
    options = dict(betas=(settings.beta1, settings.beta2), fused=False, foreach=False)
    trainer.opt_G, trainer.opt_D = (torch.optim.Adam(net.parameters(), **options)
                                    for net in (trainer.model.G, trainer.model.D))
    for net in (trainer.model.G, trainer.model.D):
        net.to(memory_format=torch.contiguous_format)

    def plain_steps():
        with mock.patch.object(ewc_gan, "memory_format", lambda device: torch.contiguous_format):
            steps()
    return plain_steps


def attainable_rate(device, amp):
    """Floating-point operations a second of one large convolution, here and now."""
    n, c = (256 if device.type == "cuda" else 4), 256
    conv = torch.nn.Conv2d(c, c, 3, padding=1).to(device, memory_format=torch.channels_last)
    x = torch.randn(n, c, 64, 64, device=device).contiguous(memory_format=torch.channels_last)

    def once():
        with torch.no_grad(), ewc_gan.autocast(device, amp):
            conv(x)
    return 2 * n * 64**2 * c**2 * 9 / medians({"conv": once}, device)["conv"]


def peak_memory(device):
    """MiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":                              # has no such count
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10)


def benchmark(arch, resolution, device, amp, batch_size=None):
    """Print the speed of pretraining, adaptation and Fisher information on this machine."""
    model = ewc_gan.build_model(arch, resolution, device)
    ewc_gan.calibrate_batchnorm(model.G_ema, model.z_dim)
    images = torch.randint(256, (64, 3, resolution, resolution), dtype=torch.uint8).to(device)
    settings = ewc_gan.PRETRAIN[arch]
    settings = replace(settings, batch_size=batch_size or settings.batch_size)
    print(f"{arch}, {resolution} pixels, {device}, {amp}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}", flush=True)

    steps, _ = training(model, settings, amp, images)
    r1 = ewc_gan.d_r1_loss                   # the counter cannot bear an image that is a leaf
    with (mock.patch.object(ewc_gan, "d_r1_loss", lambda D, x: r1(lambda leaf: D(leaf * 1), x)),
          FlopCounterMode(display=False) as counter):
        steps()
    seconds = medians({"ours": steps, "plain": plain_training(model, settings, images)}, device)
    done, rate = settings.r1_every * settings.batch_size, counter.get_total_flops()
    print(f"pretraining, batch {settings.batch_size}: {done / seconds['ours']:.0f} images/s, "
          f"{seconds['plain'] / seconds['ours']:.2f} times a plain float32 loop; "
          f"{rate / seconds['ours'] / attainable_rate(device, amp):.0%} of the rate of a large "
          "convolution", flush=True)

    settings = replace(ewc_gan.ADAPT[arch], fisher_samples=8)
    G = model.G = copy.deepcopy(model.G_ema).requires_grad_(True)
    theta_S = {name: p.detach().clone() for name, p in G.named_parameters()}
    F = ewc_gan.source_fisher(model, settings)
    pull = ewc_gan.pull_of("ewc", settings.lam, theta_S, F)
    seconds = medians({"finetune": training(model, settings, amp, images[:10])[0],
                       "ewc": training(model, settings, amp, images[:10], pull)[0]}, device, 21)
    print(f"adaptation, batch {settings.batch_size}: "
          f"{settings.r1_every * settings.batch_size / seconds['ewc']:.0f} images/s, "
          f"{seconds['ewc'] / seconds['finetune']:.3f} times a step without the penalty",
          flush=True)

    z = torch.randn(32, model.z_dim, device=device)

    def passes():
        for z_i in z.split(1):
            torch.autograd.grad(model.D(G(z_i)).sum(), list(G.parameters()))

    seconds = medians({"passes": passes,
                       "loop": lambda: ewc_gan.fisher_diagonal(G, model.D, z),
                       "chunked": lambda: ewc_gan.fisher_diagonal_chunked(G, model.D, z)}, device)
    print(f"Fisher information: {1000 * seconds['loop'] / len(z):.1f} ms a sample one by one, "
          f"{seconds['loop'] / seconds['passes']:.2f} times its forward and backward pass; "
          f"{1000 * seconds['chunked'] / len(z):.1f} ms in chunks")
    print(f"peak memory: {peak_memory(device):.0f} MiB")


def main(argv=None):
    ewc_gan.exit_cleanly("pretrain_source.py", lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    main()
