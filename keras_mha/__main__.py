"""The command line: `keras-mha`, or `python -m keras_mha`."""

import argparse
import sys
from pathlib import Path

import keras

from keras_mha import bench, demo, info


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: List of strings, the arguments, or `None` for the process's own.

    Returns:
        The exit code: 0 when all went well, 1 when something failed or an extra is not
        installed. Wrong usage raises `SystemExit(2)`, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (info.MissingExtra, info.ChildProcessFailed, OSError) as error:
        print(f"keras-mha: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # what a shell reports of a command that was interrupted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-mha", description="Multi-head attention for Keras 3."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_demo(commands)
    command = commands.add_parser(
        "info", help="print versions, backends and attention's choices for bug reports"
    )
    command.set_defaults(run=_info)
    _add_bench(commands)
    return parser


def _add_bench(commands) -> None:
    command = commands.add_parser(
        "bench",
        help="time our layer beside Keras's on this machine (under two minutes)",
    )
    command.add_argument(
        "--backend",
        type=_installed_backend,
        action="append",
        help=f"a backend to measure ({', '.join(info.BACKENDS)}), more than once for "
        "several (default: every installed one)",
    )
    command.set_defaults(run=_bench)


def _add_demo(commands) -> None:
    command = commands.add_parser(
        "demo",
        help="train on handwritten digits, load the file under every backend",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--backend",
        type=_installed_backend,
        default=keras.backend.backend(),
        help=f"the backend to train on: {', '.join(info.BACKENDS)}",
    )
    command.add_argument(
        "--epochs",
        type=_integer_from(1),
        default=demo.EPOCHS,
        help="passes over the training digits",
    )
    command.add_argument(
        "--output",
        type=_folder,
        default="keras-mha-demo",
        metavar="DIR",
        help="where to put the model and the picture",
    )
    command.add_argument(
        "--seed", type=_integer_from(0), default=0, help="of weights and batches"
    )
    command.set_defaults(run=_demo)


def _installed_backend(name: str) -> str:
    if name not in info.BACKENDS:
        raise argparse.ArgumentTypeError(
            f"unknown backend {name!r}, expected one of {', '.join(info.BACKENDS)}"
        )
    if info.backend_version(name) is None:
        raise argparse.ArgumentTypeError(
            f"{name} is not installed, {info.install_hint(name)} installs it"
        )
    return name


def _integer_from(smallest: int):
    def integer(text: str) -> int:
        # 32 bits are what NumPy's generator takes for a seed.
        if not text.isdecimal() or not smallest <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected an integer from {smallest} to {2**32 - 1}"
            )
        return int(text)

    return integer


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, expected a folder")
    return path


def _demo(arguments: argparse.Namespace) -> int:
    return demo.run(
        arguments.backend, arguments.epochs, arguments.output, arguments.seed
    )


def _bench(arguments: argparse.Namespace) -> int:
    installed = [name for name in info.BACKENDS if info.backend_version(name)]
    return bench.run(arguments.backend or installed)


def _info(arguments: argparse.Namespace) -> int:
    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
