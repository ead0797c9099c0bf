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


def pretrain(arguments: argparse.Namespace) -> int:
    """train the small text-to-video generator that stands in for Wan"""
    return _stage(arguments)


def recall(arguments: argparse.Namespace) -> int:
    """Knowledge Recall: grow the caption stream on a generator and learn to say the prompt again"""
    return _stage(arguments)


def refine(arguments: argparse.Namespace) -> int:
    """Capability Refinement: learn the detailed caption"""
    return _stage(arguments)


def captioner(arguments: argparse.Namespace) -> int:
    """train the autoregressive captioner that the evaluation compares with"""
    from training.baselines import CaptionerObjective, CaptionerRun
    from training.config import load_config
    from training.trainer import train

    config = load_config(CaptionerRun, arguments.config, arguments.overrides)
    return train(CaptionerObjective(config), config.run, config.optim, config)


def synthesize(arguments: argparse.Namespace) -> int:
    """make captioned clips from prompts, as in section 4.1"""
    from training.config import load_config
    from training.synthesize import SynthesisConfig
    from training.synthesize import synthesize as run

    config = load_config(SynthesisConfig, arguments.config, arguments.overrides)
    return run(config, arguments.phase, arguments.shard)


def _stage(arguments: argparse.Namespace) -> int:
    from training.config import load_config
    from training.stages import StageRun, build_stage
    from training.trainer import train

    config = load_config(StageRun, arguments.config, arguments.overrides)
    if config.stage.name != arguments.command:
        raise ValueError(f"This is a configuration of {config.stage.name}: start it with that command.")
    return train(build_stage(config), config.run, config.optim, config)


def vae_finish(arguments: argparse.Namespace) -> int:
    from training.vae import finish

    finish(arguments.source, arguments.target)
    return 0


def toybox(arguments: argparse.Namespace) -> int:
    import cv2

    from training.toybox import contact_sheet

    sheet = contact_sheet(arguments.seed, arguments.count, arguments.split)
    if not cv2.imwrite(str(arguments.target), sheet[..., ::-1]):
        raise ValueError(f"'{arguments.target}' cannot be written.")
    return 0


def toybox_cache(arguments: argparse.Namespace) -> int:
    from training.toybox.dataset import fill_cache

    counts = {"train": arguments.train, "held_out": arguments.held_out}
    fill_cache(arguments.vae, arguments.target, counts, processes=arguments.processes)
    return 0


def toybox_finish(arguments: argparse.Namespace) -> int:
    from training.toybox.publish import publish

    publish(arguments.source, arguments.target)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from training.evaluate import EvaluationConfig, evaluate

    baselines = {"captioner": arguments.captioner, "generator": arguments.generator}
    settings = EvaluationConfig(
        count=arguments.count,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        processes=arguments.processes,
        **baselines,
    )
    evaluate(arguments.folder, arguments.target or arguments.folder / "evaluation", settings)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for run in (vae, pretrain, recall, refine, captioner, synthesize):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("config", nargs="?", default=run.__name__, help="YAML file, or a name in training/configs")
        command.add_argument("overrides", nargs="*", help="settings to change, such as optim.lr=1e-4")
        command.set_defaults(run=run)
        if run is synthesize:
            command.add_argument("--phase", choices=("all", "clips", "captions", "merge"), default="all")
            command.add_argument("--shard", default="0/1", help="i/n: the i-th of n launches that share the work")

    command = commands.add_parser("vae-finish", help="measure a trained autoencoder's latents and store it for use")
    command.add_argument("source", type=Path, help="the weights folder of the run")
    command.add_argument("target", type=Path, help="the folder to write")
    command.set_defaults(run=vae_finish)

    command = commands.add_parser("toybox", help="draw a contact sheet of the toy world")
    command.add_argument("target", type=Path, help="the picture to write (.png)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--count", type=int, default=16)
    command.add_argument("--split", default="train", help="train or held_out")
    command.set_defaults(run=toybox)

    command = commands.add_parser("toybox-cache", help="encode the toy world's clips once; run it again to go on")
    command.add_argument("vae", type=Path, help="the folder of a finished autoencoder")
    command.add_argument("target", type=Path, help="the cache's folder")
    command.add_argument("--train", type=int, default=49152, help="training clips")
    command.add_argument("--held-out", type=int, default=1024, help="held-out clips")
    command.add_argument("--processes", type=int, default=1)
    command.set_defaults(run=toybox_cache)

    command = commands.add_parser(
        "toybox-finish", help="store a trained model for use: previews, half precision, shards"
    )
    command.add_argument("source", type=Path, help="the weights folder of the run")
    command.add_argument("target", type=Path, help="the pipeline folder to write")
    command.set_defaults(run=toybox_finish)

    command = commands.add_parser("evaluate", help="the figures of a model of the toy world, as JSON and Markdown")
    command.add_argument("folder", type=Path, help="the pipeline's folder")
    command.add_argument("--target", type=Path, help="receives evaluation.json and evaluation.md [FOLDER/evaluation]")
    command.add_argument("--count", type=int, default=512, help="held-out scenes")
    command.add_argument("--seed", type=int, default=1, help="of the scenes, prompts and noise")
    command.add_argument("--steps", type=int, default=30)
    command.add_argument("--guidance", type=float, default=3.0)
    command.add_argument("--captioner", type=Path, help="the folder of the autoregressive captioner to compare with")
    command.add_argument("--generator", type=Path, help="the folder of the video-only generator to compare with")
    command.add_argument("--processes", type=int, default=1, help="for reading clips with the oracle")
    command.set_defaults(run=evaluate)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
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
