"""How good a trained run is: its images against real ones, its held-out bound, its diagnostics.

``adaptive-ts evaluate RUN [options of generate] [--features NAME]
[--inception_weights PATH] [--preprocess NAME] [--reference FILE] [--split NAME] [--images FILE]
[--num_likelihood N] [--diagnostics] [--out DIR]``

RUN is the folder of a run. Its images (or those of FILE, an ``images.npz``) are compared with
a split of its data set, in the features of a classifier trained on that set or in Inception's, the
default for colour; then the distance is FID. Leaves in OUT: ``evaluation.npz``, pictures by
timestep and, last, ``evaluation.json``. The same command again prints the numbers that are there.
"""

import argparse
from pathlib import Path

from adaptive_ts.experiment.commands import Parser, check_empty, usable
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.generate import request

_LIKELIHOOD_IMAGES = 256
_OF_GENERATED = ("num_images", "solver", "steps", "eta", "spacing", "guidance", "labels")


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="adaptive-ts evaluate", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, its --workdir")
    request.add_options(parser)
    add(
        "--features",
        choices=("classifier", "inception"),
        help="what images are compared in; default: inception for colour, else a classifier",
    )
    add("--inception_weights", help="Inception's file; default: $ADAPTIVE_TS_INCEPTION_WEIGHTS")
    add("--preprocess", choices=("ref", "tf"), help="of Inception's images; default: ref")
    add("--reference", type=Path, help=".npz of mu and sigma, instead of the data set's images")
    add("--split", help="of the data set, that images are compared with; default: train")
    add("--images", type=Path, help="images.npz of generate to evaluate, instead of new images")
    add(
        "--num_likelihood",
        type=int,
        default=_LIKELIHOOD_IMAGES,
        help=f"held-out images of the bound; default: {_LIKELIHOOD_IMAGES}",
    )
    add("--diagnostics", action="store_true", help="gradient noise, effects of steps, p(t)")
    add("--out", type=Path, help="folder of the results, new or empty; default: RUN/evaluation/..")
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    import jax

    from adaptive_ts.experiment.devices import sharding
    from adaptive_ts.experiment.devices.compiling import keep_compiled
    from adaptive_ts.experiment.evaluate.evaluation import conditions_of, folder_name, measure
    from adaptive_ts.experiment.evaluate.inputs import read_inputs
    from adaptive_ts.experiment.evaluate.report import report_lines, write_results
    from adaptive_ts.experiment.files import read_json
    from adaptive_ts.experiment.generate.trained import load_trained, read_config
    from adaptive_ts.experiment.quality.reference import everywhere

    run, first = args.run.expanduser().resolve(), jax.process_index() == 0
    log = print if first else lambda line: None
    own = read_config(run)
    config = request.options(own, args)
    _check(args, parser, config)
    keep_compiled()
    mesh = sharding.make_mesh()
    inputs = read_inputs(args, config, mesh, log)
    trained = load_trained(run, config, mesh, step=args.step, log=log)
    conditions = conditions_of(args, run, own, config, trained, inputs)
    out = args.out or run / "evaluation" / folder_name(conditions)
    with usable(out):
        stored = read_json(out / "evaluation.json")
    if everywhere(stored is not None):
        log(f"{out} has these numbers already; to measure again, give another --out.")
    else:
        measured = measure(args, config, trained, inputs, mesh, log)
        if first:
            with usable(out):
                stored = write_results(out, run, trained.built.parts.grid, conditions, measured)
    if first:
        print("\n".join(report_lines(stored, out)))
    return 0


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser, config: Config) -> None:
    """Raises UserError for options out of range, or that mean nothing beside others."""
    from adaptive_ts.experiment.quality.scores import LEAST_IMAGES

    for name, value, least in (
        ("num_images", config.generate.num_images, LEAST_IMAGES),
        ("num_likelihood", args.num_likelihood, 2),
    ):
        if value < least:
            raise UserError(f"--{name}: {value} is out of range: must be at least {least}")
    if args.images is not None:
        for name in _OF_GENERATED:
            if getattr(args, name, None) != parser.get_default(name):
                raise UserError(f"--{name}: means nothing with --images: leave one of them out")
    if args.reference is not None and args.split is not None:
        raise UserError("--split: means nothing with --reference: leave one of them out")
    if args.out is not None:
        check_empty(args.out)
