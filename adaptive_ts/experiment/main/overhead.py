"""What a sampler costs: wall-clock and FLOPs per step, over uniform, in one run.

``adaptive-ts overhead [ROW] [--field.path VALUE ...] [--configs DIR]`` (default row: ``overhead``,
the adaptive sampler). Whole cycles of f_S steps, uniform and the other in turn, so that a machine
whose speed drifts slows both; the ratio is taken cycle by cycle. Images per second are
``throughput``'s.
"""

from adaptive_ts.experiment.commands import Parser
from adaptive_ts.experiment.config.command_line import parse, split_row


def make_parser() -> Parser:
    """The command's options."""
    parser = Parser(prog="adaptive-ts overhead", description=__doc__)
    parser.add_argument("--configs", help="folder of rows")
    return parser


def main(argv: list[str]) -> int:
    """The command."""
    row, rest = split_row(argv, "overhead")
    args, overrides = make_parser().parse_known_args(rest)
    _, config = parse([row, *overrides], configs_dir=args.configs)
    from adaptive_ts.experiment.costs.overhead import measure, text

    print(text(measure(config), config))
    return 0
