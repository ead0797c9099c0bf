"""python -m training: one command for every step from an empty folder to a published model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def vae(arguments: argparse.Namespace) -> int:
    """train the small video autoencoder, or go on with a run that was stopped"""
    from training.config import load_config
    from training.trainer import train
    from training.vae import VAEObjective, VAERun

    config = load_config(VAERun, arguments.config, arguments.overrides)
    objective = VAEObjective(config.model, config.objective, config.run.batch_size, config.run.seed)
    return train(objective, config.run, config.optim, config)


def vae_finish(arguments: argparse.Namespace) -> int:
    """measure a trained autoencoder's latents and store it for use: vae-finish SOURCE TARGET"""
    from training.vae import finish

    finish(arguments.source, arguments.target)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for run in (vae,):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("config", nargs="?", default=run.__name__, help="YAML file, or a name in training/configs")
        command.add_argument("overrides", nargs="*", help="settings to change, such as optim.lr=1e-4")
        command.set_defaults(run=run)
    command = commands.add_parser("vae-finish", help=vae_finish.__doc__)
    command.add_argument("source", type=Path, help="the weights folder of the run")
    command.add_argument("target", type=Path, help="the folder to write")
    command.set_defaults(run=vae_finish)
    arguments = parser.parse_args(argv)
    if "=" in getattr(arguments, "config", ""):
        arguments.overrides.insert(0, arguments.config)
        arguments.config = arguments.command
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped at once; the last checkpoint is kept.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
