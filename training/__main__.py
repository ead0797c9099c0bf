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
    objective = VAEObjective(config.model, config.objective, config.run.batch_size, config.run.seed, config.start)
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

    config = load_config(StageRun, arguments.config, arguments.overrides, arguments.command)
    if config.stage.name != arguments.command:
        raise ValueError(f"This is a configuration of {config.stage.name}: start it with that command.")
    if arguments.dry_run:
        from training.dry_run import dry_run

        first = load_config(StageRun, arguments.config, arguments.overrides, "recall")
        dry_run(config, first, arguments.gpus, arguments.tflops)
        return 0
    return train(build_stage(config), config.run, config.optim, config)


def example(arguments: argparse.Namespace) -> int:
    from training.example import make_example

    make_example(arguments.folder, arguments.clips)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """read every row of the training data and tell all that is wrong at once"""
    from training.cache import load_tokenizer
    from training.data import check as look

    config, data, needs = _clips(arguments)
    report = look(data, load_tokenizer(config.stage.start), needs)
    report.print(data.source)
    return 1 if report.problems else 0


def cache(arguments: argparse.Namespace) -> int:
    """encode the clips and prompts once; any number of processes share the work, and a stopped one goes on"""
    from training.cache import fill, load_encoders
    from training.ledger import shard_of

    config, data, needs = _clips(arguments)
    return fill(data, load_encoders(config.stage.start, config.model.pipeline), needs, shard_of(arguments.shard))


def _clips(arguments: argparse.Namespace) -> tuple:
    """The run, its data, and the texts that it needs. Both stages read one cache, made with what the first starts from."""  # noqa: E501
    from training.config import build_config, load_config
    from training.data import DataConfig
    from training.stages import StageRun

    config = load_config(StageRun, arguments.config, arguments.overrides, "recall")
    if config.data.get("kind") != "clips":
        raise ValueError("data.kind must be clips: the toy world's data is made by toybox-cache.")
    data = build_config(DataConfig, {k: v for k, v in config.data.items() if k != "kind"}, "data.")
    return config, data, ("prompt", "caption") if arguments.stage == "refine" else ("prompt",)


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
    fill_cache(arguments.vae, arguments.target, counts, processes=arguments.processes, tokenizer=arguments.tokenizer)
    return 0


def toybox_finish(arguments: argparse.Namespace) -> int:
    from training.toybox.publish import publish

    publish(arguments.source, arguments.target, arguments.decoder, arguments.caption_shift)
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


def curves(arguments: argparse.Namespace) -> int:
    from training.curves import draw

    runs = {}
    for run in arguments.runs:
        label, separator, folder = run.partition("=")
        if not separator:
            label, folder = Path(run).name, run
        runs[label] = Path(folder) / "log.jsonl"
    draw(arguments.target, runs, arguments.values.split(","), arguments.until)
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
        if run in (pretrain, recall, refine):
            command.add_argument(
                "--dry-run", action="store_true", help="show size, memory and time, take one tiny step"
            )
            command.add_argument("--gpus", type=int, default=1, help="of the dry run: how many share the work")
            command.add_argument("--tflops", type=float, default=989.0, help="of the dry run: of one GPU [H100: 989]")

    for run in (check, cache):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("config", help="YAML file of the training run, or a name in training/configs")
        command.add_argument("overrides", nargs="*", help="settings to change, such as data.source=clips")
        command.add_argument("--stage", choices=("recall", "refine"), default="refine", help="recall needs no captions")
        command.set_defaults(run=run)
    command.add_argument("--shard", default="0/1", help="i/n: the i-th of n launches that share the work")

    command = commands.add_parser("example", help="make a few clips and a tiny generator to try the commands on")
    command.add_argument("folder", type=Path, help="receives clips/ and generator/")
    command.add_argument("--clips", type=int, default=12)
    command.set_defaults(run=example)

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
    command.add_argument(
        "--tokenizer", type=Path, help="a tokenizer's folder, to keep words with the clips, as data.resident needs"
    )
    command.set_defaults(run=toybox_cache)

    command = commands.add_parser(
        "toybox-finish", help="store a trained model for use: previews, half precision, shards"
    )
    command.add_argument("source", type=Path, help="the weights folder of the run")
    command.add_argument("target", type=Path, help="the pipeline folder to write")
    command.add_argument("--decoder", type=Path, help="an autoencoder whose decoder has learned on: its weights folder")
    command.add_argument("--caption-shift", type=float, help="the captions' time shift in sampling, if not training's")
    command.set_defaults(run=toybox_finish)

    command = commands.add_parser("curves", help="draw values that runs have logged")
    command.add_argument("target", type=Path, help="the figure to write (.svg, .png)")
    command.add_argument("values", help="what to draw, such as loss,validation/attributes")
    command.add_argument("runs", nargs="+", help="folders of runs, or label=folder")
    command.add_argument("--until", type=int, help="the last step to show")
    command.set_defaults(run=curves)

    command = commands.add_parser("evaluate", help="the figures of a model of the toy world, as JSON and Markdown")
    command.add_argument("folder", type=Path, help="the pipeline's folder")
    command.add_argument("--target", type=Path, help="receives evaluation.json and evaluation.md [FOLDER/evaluation]")
    command.add_argument("--count", type=int, default=512, help="held-out scenes")
    command.add_argument("--seed", type=int, default=1, help="of the scenes, prompts and noise")
    command.add_argument("--steps", type=int, default=30)
    command.add_argument("--guidance", type=float, help="of the prompt; left out, the model's own")
    command.add_argument("--captioner", type=Path, help="the folder of the autoregressive captioner to compare with")
    command.add_argument("--generator", type=Path, help="the folder of the video-only generator to compare with")
    command.add_argument("--processes", type=int, default=1, help="that share out the scenes")
    command.set_defaults(run=evaluate)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option, which argparse does not put with those before it
        arguments.overrides.extend(rest)
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
