"""The one training loop: runs any objective to a step count and can be stopped, killed and resumed at any point.

An objective is a module whose forward turns a batch into a loss, plus the data it learns from and ways to look at its
progress. The trainer owns everything else: processes and precision (accelerate), optimiser, learning rate, average of
the weights, checkpoints, validation times and logs. It knows nothing of video, text or flows.

A batch is a pure function of its position, and so is the noise drawn for it, so a run that resumes is the run that was
never stopped, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from training.config import OptimConfig, RunConfig, config_to_dict
from training.muon import Muon

STOPPED_BY_SIGNAL = 130
_PARTIAL = ".partial-"


class Objective(Protocol):
    """What the trainer needs to know; the object is also a torch module."""

    train_data: Dataset  # an endless list: item i is example i, whatever was read before

    def __call__(self, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch and figures to log."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, with the weights as they are."""

    def draw_samples(self, folder: Path, step: int) -> None:
        """Pictures or texts that show where training stands."""

    def export(self, folder: Path) -> None:
        """The trained parts in the form that inference loads."""


@dataclass
class Progress:
    """Where a run stands; everything else in a checkpoint is tensors."""

    step: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


def train(objective: Any, run: RunConfig, optim: OptimConfig, settings: Any = None) -> int:
    """Train to `run.steps`, from the newest whole checkpoint in `run.folder` if there is one; returns an exit code.

    `settings` is the configuration stored with the run. Raises ValueError where training cannot go on.
    """
    if not run.folder:
        raise ValueError("run.folder is empty: name the folder that the run is kept in.")
    return _Run(objective, run, optim, settings).until_done()


def learning_rate_share(step: int, steps: int, optim: OptimConfig) -> float:
    """The share of the learning rate at a step, counted from 0: linear warm-up, then constant or a cosine to its floor."""  # noqa: E501
    warm = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    if optim.schedule == "constant":
        return warm
    progress = min(1.0, max(0, step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    floor = optim.final_lr_share
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def find_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; says which damaged ones it passes over."""
    found = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        reason = _damage(path)
        if reason:
            print(f"Passing over {path}: {reason}.", file=sys.stderr)
        else:
            found.append(path)
    return found


def _damage(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / "files.json").read_text())
    except (OSError, ValueError):
        return "its list of files is missing or unreadable"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


class _Positions(torch.utils.data.Sampler):
    """The example numbers of one process from a step onwards: step by step, process by process."""

    def __init__(self, first_step: int, last_step: int, per_step: int, rank: int, world: int):
        self.range = range(first_step * per_step * world, last_step * per_step * world)
        self.per_step, self.rank, self.world = per_step, rank, world

    def __iter__(self) -> Iterator[int]:
        for start in self.range[:: self.per_step * self.world]:
            mine = start + self.rank * self.per_step
            yield from range(mine, mine + self.per_step)

    def __len__(self) -> int:
        return len(self.range) // self.world


class _Run:
    def __init__(self, objective: Any, run: RunConfig, optim: OptimConfig, settings: Any):
        self.run, self.optim = run, optim
        self.folder = Path(run.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"The run's folder {self.folder} cannot be made: {error.strerror}.") from None
        try:
            self.accelerator = Accelerator(
                mixed_precision=run.mixed_precision,
                gradient_accumulation_steps=1,  # counted here, so that a checkpoint always falls between two steps
                log_with=run.trackers or None,
                project_dir=self.folder,
            )
        except (ImportError, ValueError) as error:
            raise ValueError(f"run.trackers or run.mixed_precision cannot be used here: {error}") from None
        self.progress = Progress(settings=config_to_dict(settings) if settings is not None else {})
        torch.manual_seed(run.seed)
        if optim.name == "muon":
            optimizer = Muon(objective, optim.lr, optim.matrix_lr, optim.betas)
        else:
            parameters = [p for p in objective.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
        self.objective = objective
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = EMAModel(self.parameters, decay=run.ema_decay, foreach=True)
        self.accelerator.register_for_checkpointing(self.average)
        self.stop_signal: int | None = None
        self._resume()

    def until_done(self) -> int:
        run = self.run
        self._log_settings()
        previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        batches = iter(self._batches())
        self.started = time.monotonic() - self.progress.seconds
        bar = tqdm(
            total=run.steps,
            initial=self.progress.step,
            desc=self.folder.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=1.0 if sys.stderr.isatty() else 60.0,
        )
        try:
            while self.progress.step < run.steps and self.stop_signal is None:
                figures = self._step(batches)
                self.progress.step += 1
                self.progress.seconds = time.monotonic() - self.started
                bar.update()
                step, last = self.progress.step, self.progress.step == run.steps
                if step % run.log_every == 0 or last:
                    values = {name: float(value) for name, value in figures.items()}
                    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                    self._log(values)
                if step % run.save_every == 0 or last:
                    self._save()
                if step % run.validate_every == 0 or last:
                    self._look(bar)
            if self.stop_signal is not None:
                self._save()
                name = signal.Signals(self.stop_signal).name
                print(f"\nStopped by {name} at step {self.progress.step}; saved, the same command goes on from here.")
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.accelerator.end_training()
        return 0 if self.stop_signal is None else STOPPED_BY_SIGNAL

    def _step(self, batches: Iterator[Any]) -> dict[str, torch.Tensor]:
        step, accumulate = self.progress.step, self.optim.accumulate
        share = learning_rate_share(step, self.run.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = share * (self.optim.matrix_lr if group.get("matrix") else self.optim.lr)
        device, rank = self.accelerator.device, self.accelerator.process_index
        generator = torch.Generator(device).manual_seed((self.run.seed * 1_000_003 + step) * 4096 + rank)
        totals: dict[str, torch.Tensor] = {}
        for micro in range(accumulate):
            batch = _to_device(next(batches), device)
            last = micro == accumulate - 1
            with _nothing() if last else self.accelerator.no_sync(self.model):
                loss, figures = self.model(batch, generator)
                self.accelerator.backward(loss / accumulate)
            for name, value in {"loss": loss, **figures}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / accumulate
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.optim.grad_clip)
        if not torch.isfinite(norm):  # the norm is taken over all processes, so all of them stop
            kept = find_checkpoints(self.folder)
            raise ValueError(
                f"Step {step + 1} gave a loss of {float(totals['loss'])} and a gradient of norm {float(norm)}: lower "
                f"optim.lr or lengthen optim.warmup_steps; "
                + (f"{kept[-1]} is the last good checkpoint." if kept else "there is no checkpoint yet.")
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.step(self.parameters)
        return {**totals, "gradient_norm": norm, "lr": torch.tensor(share * self.optim.lr)}

    def _batches(self) -> DataLoader:
        workers, accumulate = self.run.workers, self.optim.accumulate
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        positions = _Positions(
            self.progress.step * accumulate, self.run.steps * accumulate, self.run.batch_size, rank, world
        )
        return DataLoader(
            self.objective.train_data,
            batch_size=self.run.batch_size,
            sampler=positions,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_start_worker if workers else None,
            generator=torch.Generator(),  # else the loader draws from the global one and a resumed run differs
        )

    def _look(self, bar: tqdm) -> None:
        """Validate, draw and export with the averaged weights, then put the trained ones back."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        self.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                figures = self.objective.validate()
                if self.accelerator.is_main_process:
                    self._log({f"validation/{name}": value for name, value in figures.items()})
                    bar.write(
                        f"step {self.progress.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()),
                        file=sys.stderr,
                    )
                    samples = self.folder / "samples"
                    samples.mkdir(exist_ok=True)
                    self.objective.draw_samples(samples, self.progress.step)
                    self.objective.export(self.folder / "weights")
        finally:
            self.model.train()
            self.average.restore(self.parameters)

    def _save(self) -> None:
        """A checkpoint under a temporary name, flushed to the disk and then renamed: it is there whole or not at all."""  # noqa: E501
        step, checkpoints = self.progress.step, self.folder / "checkpoints"
        final, partial = checkpoints / f"step-{step:08d}", checkpoints / f"{_PARTIAL}step-{step:08d}"
        if final.exists() and _damage(final) is None:
            return
        self.accelerator.wait_for_everyone()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (partial / "progress.json").write_text(json.dumps(vars(self.progress)))
                files = sorted(p for p in partial.rglob("*") if p.is_file())
                sizes = {str(p.relative_to(partial)): p.stat().st_size for p in files}
                (partial / "files.json").write_text(json.dumps(sizes))
                for path in [*files, partial / "files.json", partial]:
                    _flush(path)
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                _flush(checkpoints)
        except Exception as error:  # torch, safetensors and the system each report a full disk in a class of their own
            shutil.rmtree(partial, ignore_errors=True)
            kept = find_checkpoints(self.folder)
            raise ValueError(
                f"The checkpoint of step {step} could not be written to {checkpoints} ({' '.join(str(error).split())}); "  # noqa: E501
                + (f"{kept[-1].name} is kept and a resumed run starts there." if kept else "there is none before it.")
            ) from None
        if self.accelerator.is_main_process:
            for old in find_checkpoints(self.folder)[: -self.run.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            for partial in (self.folder / "checkpoints").glob(f"{_PARTIAL}*"):
                shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        checkpoints = find_checkpoints(self.folder)
        if not checkpoints:
            return
        stored = Progress(**json.loads((checkpoints[-1] / "progress.json").read_text()))
        for part in ("model", "stage"):
            ours, theirs = self.progress.settings.get(part), stored.settings.get(part)
            if ours != theirs:
                raise ValueError(
                    f"{self.folder} holds a run whose {part!r} settings differ ({_difference(theirs, ours)}): "
                    "give the settings it was started with, or another run.folder."
                )
        if stored.step > self.run.steps:
            raise ValueError(f"{self.folder} already stands at step {stored.step}, beyond run.steps={self.run.steps}.")
        try:
            self.accelerator.load_state(str(checkpoints[-1]))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{checkpoints[-1]} does not fit this run: {reason}") from None
        self.average.to(self.accelerator.device)
        self.progress.step, self.progress.seconds = stored.step, stored.seconds
        if self.accelerator.is_main_process:
            print(f"Resuming {self.folder} from step {stored.step}.")

    def _log_settings(self) -> None:
        if self.accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.progress.settings, sort_keys=False))
            trained = sum(p.numel() for p in self.parameters)
            self._log({"event": "resume" if self.progress.step else "start", "trained_parameters": trained})
        if self.run.trackers:
            self.accelerator.init_trackers(self.folder.name)

    def _log(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            line = {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **values}
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if self.run.trackers and "event" not in values:
            self.accelerator.log(values, step=self.progress.step)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self.stop_signal is not None:  # asked twice: now
            raise KeyboardInterrupt
        self.stop_signal = number


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    return batch


def _start_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer ends its workers itself
    torch.set_num_threads(1)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{theirs} there, {ours} now"
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return f"{keys[0]} is {theirs.get(keys[0])!r} there, {ours.get(keys[0])!r} now"
