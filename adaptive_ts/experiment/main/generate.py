"""Images of a trained run: as many as wanted, by any solver, from any of its checkpoints.

``adaptive-ts generate RUN [--num_images N] [--batch_size B] [--solver NAME]
[--steps N] [--eta X] [--spacing NAME] [--guidance W] [--labels C [C ...]] [--seed S] [--step K]
[--data_dir DIR] [--out DIR] [--no_png]``

RUN is the folder of a run; what is not given is as in the run. Its averaged weights make
image i from the seed and from i alone, so a longer row of images begins with the shorter one, and
without options the first are those that the run made at its end. A model that is told classes makes
them in turn, or those given. Leaves in OUT: ``000000.png``, .., ``images.npz`` (``images``, uint8
(N, H, W, C), and ``labels``, int32 (N,), if there are any), ``grid.png``, and last ``info.json``.
"""

import argparse
from pathlib import Path

from adaptive_ts.experiment.commands import Parser, check_empty, usable
from adaptive_ts.experiment.generate.request import add_options, options


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="adaptive-ts generate", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, its --workdir")
    add_options(parser)
    add("--out", type=Path, help="folder of the images, new or empty; default: RUN/generated/..")
    add("--no_png", action="store_true", help="no file for each image")
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    args = make_parser().parse_args(argv)
    from adaptive_ts.experiment.devices import sharding
    from adaptive_ts.experiment.devices.compiling import keep_compiled
    from adaptive_ts.experiment.generate.making import describe, make_images
    from adaptive_ts.experiment.generate.trained import load_trained, read_config
    from adaptive_ts.experiment.generate.writing import folder_name, write_images

    run = args.run.expanduser().resolve()
    config = options(read_config(run), args)
    if args.out is not None:
        check_empty(args.out)  # before anything slow
    keep_compiled()
    mesh = sharding.make_mesh()
    trained = load_trained(run, config, mesh, step=args.step)
    images = make_images(config, trained, mesh, args)
    out = args.out or run / "generated" / folder_name(config, trained, args)
    check_empty(out)
    info = describe(config, trained, args)
    with usable(out):
        out.mkdir(parents=True, exist_ok=True)
        write_images(out, images, info, png=not args.no_png)
    print(f"{info['num_images']:,} images of {run} at step {trained.step:,}: {out}")
    return 0
