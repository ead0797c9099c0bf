"""The one training loop: runs any objective to a step count and can be stopped, killed and resumed at any point.

An objective is a module whose forward turns a batch into a loss, plus the data it learns from and ways to look at its
progress. The trainer owns everything else: processes and precision (accelerate), optimiser, learning rate, average of
the weights, checkpoints, validation times and logs. It knows nothing of video, text or flows.

A batch is a pure function of its position, and so is the noise drawn for it, so a run that resumes is the run that was
never stopped, bit for bit. Positions count micro-batches, whoever computes them: a run may go on with another number of
processes, and differs from before by rounding alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from diffusers.training_utils import EMAModel
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from training.config import OptimConfig, RunConfig, config_to_dict
from training.muon import Muon, split
from training.onednn import products_by_onednn
from training.sharded import load_state, local, save_state, shard, share_context, whole, whole_weights
from training.zero import read_moments, write_moments, zero_plugin

STOPPED_BY_SIGNAL = 130
_PARTIAL = ".partial-"


class Objective(Protocol):
    """What the trainer needs to know; the object is also a torch module."""

    # An endless list: item i is example i, whatever was read before. With `gives_batches` it is micro-batch i, and the
    # trainer sets its `micro_batches`, their number in a step.
    train_data: Dataset

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
    """Where a run stands; everything else in a checkpoint is tensors. Processes that share examples count as one."""

    step: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 0  # of a step, over all processes
    processes: int = 1
    average_steps: int = 0


def train(objective: Any, run: RunConfig, optim: OptimConfig, settings: Any = None) -> int:
    """Train to `run.steps`, from the newest whole checkpoint in `run.folder` if there is one; returns an exit code.

    `settings` is the configuration stored with the run. Raises ValueError where training cannot go on.
    """
    if not run.folder:
        raise ValueError("run.folder is empty: name the folder that the run is kept in.")
    with products_by_onednn() if run.onednn else contextlib.nullcontext():
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
    """The example numbers of one group of processes from a step onwards: step by step, group by group."""

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
        plugin = zero_plugin(run, optim) if run.deepspeed else None
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # nothing to share, as under run.fsdp
            plugin = None
        self.zero = plugin is not None
        # autocast's cache would keep a rounded copy of every gathered weight to the end of the pass
        handlers = [AutocastKwargs(cache_enabled=not run.fsdp)]
        if plugin and not torch.accelerator.is_available():  # where accelerate knows of no backend for DeepSpeed
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        try:
            self.accelerator = Accelerator(
                # DeepSpeed is told of it by itself: accelerate would have it round the weights too
                mixed_precision="no" if plugin else run.mixed_precision,
                deepspeed_plugin=plugin,
                gradient_accumulation_steps=1,  # counted here, so that a checkpoint always falls between two steps
                kwargs_handlers=handlers,
                log_with=run.trackers or None,
                project_dir=self.folder,
                # else several processes without a GPU do not find each other; DeepSpeed's do by the handler above
                cpu=not (torch.accelerator.is_available() or plugin),
            )
        except (ImportError, ValueError) as error:
            raise ValueError(f"run.trackers or run.mixed_precision cannot be used here: {error}") from None
        self.progress = Progress(settings=config_to_dict(settings) if settings is not None else {})
        torch.manual_seed(run.seed)
        self.objective = objective
        for part in objective.modules():
            if any(p.requires_grad for p in part.parameters()):
                if run.checkpointing and getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing(_recomputed)
                if run.compile and getattr(part, "_repeated_blocks", None):
                    # a batch that is drawn on the accelerator has one size
                    is_fixed = getattr(objective.train_data, "resident", False)
                    part.compile_repeated_blocks(dynamic=False if is_fixed else None)
        # Processes that share their examples are one group; without context parallel a group is one process.
        self.groups = self.accelerator.num_processes // run.context_parallel
        self.group = self.accelerator.process_index // run.context_parallel
        if run.context_parallel > 1:
            if self.accelerator.num_processes == 1:
                raise ValueError(f"run.context_parallel={run.context_parallel} needs as many processes or more.")
            share_context(objective, self.accelerator.device, run.context_parallel)
        self.sharded = run.fsdp and self.accelerator.num_processes > 1
        if self.sharded:
            if run.mixed_precision == "fp16" or optim.name != "adamw":
                raise ValueError("run.fsdp takes optim.name=adamw and run.mixed_precision bf16 or no.")
            shard(objective, self.accelerator.device)
            self.model, self.optimizer = objective, _optimizer(objective, optim)
        else:
            self.model, self.optimizer = self.accelerator.prepare(objective, _optimizer(objective, optim))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = EMAModel([local(p) for p in self.parameters], decay=run.ema_decay, foreach=True)
        self.accumulate = optim.accumulate
        self.stop_signal: int | None = None
        self.unchecked: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._resume()
        self.progress.processes = self.groups
        self.progress.micro_batches = self.accumulate * self.groups

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
        step = self.progress.step
        share = learning_rate_share(step, self.run.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = share * getattr(self.optim, group["rate"])
        device = self.accelerator.device
        generator = torch.Generator(device)
        totals: dict[str, torch.Tensor] = {}
        for micro in range(self.accumulate):
            seed = (self.run.seed * 1_000_003 + step) * 4096 + micro * self.groups + self.group
            generator.manual_seed(seed)
            torch.manual_seed(seed)  # for what draws without being given a generator
            batch = _to_device(self._next(batches), device)
            with self._reducing(micro == self.accumulate - 1):
                loss, figures = self.model(batch, generator)
                if self.zero:  # accelerate would step after each
                    self.model.backward(loss / self.accumulate)
                else:
                    self.accelerator.backward(loss / self.accumulate)
            for name, value in {"loss": loss, **figures}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / self.accumulate
        if self.sharded:
            norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.grad_clip))
        elif self.zero:
            self.model.step()  # clips too
            norm = torch.as_tensor(self.model.get_global_grad_norm())
        else:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.optim.grad_clip)
        self._check_last()  # of the step before: an accelerator then has this one at hand and need not wait
        self.unchecked = (step, totals["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.step([local(p) for p in self.parameters])
        return {**totals, "gradient_norm": norm, "lr": torch.tensor(share * self.optim.lr)}

    def _check_last(self) -> None:
        """Nothing is saved before its step is checked. A norm is taken over all processes, so all of them stop."""
        if self.unchecked is None:
            return
        (step, loss, norm), self.unchecked = self.unchecked, None
        if not torch.isfinite(norm):
            kept = find_checkpoints(self.folder)
            raise ValueError(
                f"Step {step + 1} gave a loss of {float(loss)} and a gradient of norm {float(norm)}: lower optim.lr or "
                "lengthen optim.warmup_steps; "
                + (f"{kept[-1]} is the last good checkpoint." if kept else "there is no checkpoint yet.")
            )

    @contextlib.contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """A micro-batch's passes; the gradients of all processes are added up in the last one."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            with self.accelerator.autocast():
                yield
        elif self.zero:
            self.model.set_gradient_accumulation_boundary(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except ValueError as error:  # a worker's carries a traceback before its own last line
            reason = str(error).strip().rpartition("\nValueError: ")[2]
            kept = ""
            if self.accelerator.num_processes == 1:
                self.optimizer.zero_grad(set_to_none=True)
                self._save()
                kept = f" Step {self.progress.step} is saved, and a resumed run starts there."
            raise ValueError(f"{reason}{kept}") from None

    def _batches(self) -> DataLoader:
        data, per_step = self.objective.train_data, self.progress.micro_batches
        workers = 0 if getattr(data, "resident", False) else self.run.workers
        whole_batches = getattr(data, "gives_batches", False)
        if whole_batches:
            data.micro_batches = per_step
        size = 1 if whole_batches else self.run.batch_size
        first, last = self.progress.step * self.accumulate, self.run.steps * self.accumulate
        return DataLoader(
            data,
            batch_size=None if whole_batches else size,
            sampler=_Positions(first, last, size, self.group, self.groups),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_start_worker if workers else None,
            generator=torch.Generator(),  # else the loader draws from the global one and a resumed run differs
        )

    def _look(self, bar: tqdm) -> None:
        """Validate, draw and export with the averaged weights, then put the trained ones back."""
        main = self.accelerator.is_main_process
        self.model.eval()
        try:
            # compiled blocks are for training's sizes; for each of those that follow they would be compiled anew
            with self._averaged(), torch.compiler.set_stance("force_eager"):
                with torch.no_grad(), torch.random.fork_rng(), self.accelerator.autocast(), self._gathered():
                    figures = self.objective.validate()
                    if main:
                        self._log({f"validation/{name}": value for name, value in figures.items()})
                        bar.write(
                            f"step {self.progress.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()),
                            file=sys.stderr,
                        )
                    with tempfile.TemporaryDirectory() as elsewhere:
                        samples = self.folder / "samples" if main else Path(elsewhere)
                        samples.mkdir(exist_ok=True)
                        # where weights or positions are shared out, every process has to take every step
                        if main or self.sharded or self.run.context_parallel > 1:
                            self.objective.draw_samples(samples, self.progress.step)
                with whole_weights(self.objective, main):
                    if main:
                        self.objective.export(self.folder / "weights")
        finally:
            self.model.train()
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones."""
        weights = [local(p).detach() for p in self.parameters]
        trained = [weight.cpu().clone() for weight in weights]
        try:
            for weight, average in zip(weights, self.average.shadow_params, strict=True):
                weight.copy_(average)
            yield
        finally:
            for weight, before in zip(weights, trained, strict=True):
                weight.copy_(before)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """Whole weights outside the blocks, which gather their own: validation does not go through `forward`."""
        if self.sharded:
            self.model.unshard()
        try:
            yield
        finally:
            if self.sharded:
                self.model.reshard()

    def _save(self) -> None:
        """A checkpoint under a temporary name, flushed to the disk and then renamed: it is there whole or not at all."""  # noqa: E501
        self._check_last()
        step, checkpoints = self.progress.step, self.folder / "checkpoints"
        final, partial = checkpoints / f"step-{step:08d}", checkpoints / f"{_PARTIAL}step-{step:08d}"
        if final.exists() and _damage(final) is None:
            return
        self.accelerator.wait_for_everyone()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            optimizer = _bare(self.optimizer)
            if self.zero:
                optimizer = read_moments(self.model, self.parameters)
            save_state(partial, self.objective, optimizer, self.average.shadow_params)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.progress.average_steps = self.average.optimization_step
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
        self._share_work(stored)
        try:
            if (
                checkpoints[-1] / "model.safetensors"
            ).is_file():  # written by accelerate, before processes could differ
                self.accelerator.register_for_checkpointing(self.average)
                self.accelerator.load_state(str(checkpoints[-1]))
                self.average.to(self.accelerator.device)
            else:
                optimizer = SimpleNamespace(state=defaultdict(dict)) if self.zero else _bare(self.optimizer)
                load_state(checkpoints[-1], self.objective, optimizer, self.average.shadow_params)
                if self.zero:
                    write_moments(self.model, optimizer.state)
                self.average.optimization_step = stored.average_steps
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{checkpoints[-1]} does not fit this run: {reason}.") from None
        self.progress.step, self.progress.seconds = stored.step, stored.seconds
        if self.accelerator.is_main_process:
            print(f"Resuming {self.folder} from step {stored.step}.")

    def _share_work(self, stored: Progress) -> None:
        """With another number of processes, a step stays the same number of micro-batches."""
        groups, micro_batches = self.groups, stored.micro_batches
        if groups == stored.processes or micro_batches == self.accumulate * groups:
            return
        what = "processes" if self.run.context_parallel == 1 else f"groups of {self.run.context_parallel} processes"
        if micro_batches % groups:
            raise ValueError(
                f"{self.folder} takes {micro_batches} micro-batches a step, which {groups} {what} cannot share "
                "evenly; use a number that divides it."
            )
        self.accumulate = micro_batches // groups
        if self.accelerator.is_main_process:
            print(f"A step stays {micro_batches} micro-batches: {self.accumulate} in each of {groups} {what}.")

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


def _optimizer(objective: torch.nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Each group's `rate` names the setting that holds its learning rate."""
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    slow = {}
    if optim.prompt_encoder_lr is not None:
        slow = {id(p): p for name, p in trained.items() if "prompt_encoder" in name.split(".")}
        if not slow:
            raise ValueError("optim.prompt_encoder_lr is set, but no prompt encoder is trained: leave it out.")
    groups = [{"params": [p for p in trained.values() if id(p) not in slow], "rate": "lr"}]
    if optim.name == "muon":
        matrices, rest = ([p for p in part if id(p) not in slow] for part in split(objective))
        groups = [{"params": matrices, "rate": "matrix_lr", "matrix": True}, {"params": rest, "rate": "lr"}]
    if slow:
        groups.append({"params": list(slow.values()), "rate": "prompt_encoder_lr"})
    if optim.name == "muon":
        return Muon(groups, optim.lr, optim.betas)
    kind = torch.optim.AdamW
    if optim.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError:
            raise ValueError("optim.name=adamw8bit needs the package bitsandbytes: pip install bitsandbytes.") from None
    return kind(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def _recomputed(block: torch.nn.Module, *arguments: Any) -> torch.Tensor:
    """Keep a block's input alone, and compute the rest again in the backward pass, with the same kind of attention."""
    attention = _cur_sdpa_kernel_backends()
    return checkpoint(
        block, *arguments, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), sdpa_kernel(attention))
    )


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


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
