"""A figure from the logs of runs: one panel for each named value, one line for each run.

What is drawn is what `log.jsonl` holds; nothing is smoothed or left out. It knows nothing of what was trained.
"""

from __future__ import annotations

import json
from pathlib import Path


def read_values(log: Path, name: str) -> tuple[list[int], list[float]]:
    """The steps at which a run logged a value, and the value."""
    try:
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        raise ValueError(f"'{log}' is not the log of a run: give its log.jsonl.") from None
    found = {record["step"]: float(record[name]) for record in records if name in record}  # a resumed run repeats steps
    if not found:
        known = sorted({key for record in records for key in record} - {"step"})
        raise ValueError(f"'{log}' holds no {name}: it holds {', '.join(known)}.")
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def draw(target: Path, runs: dict[str, Path], names: list[str], until: int | None = None) -> None:
    """Draw `names` of `runs` (label: log) into an SVG or PNG; `until` is the last step shown."""
    from matplotlib.figure import Figure

    lines = {(label, name): read_values(log, name) for name in names for label, log in runs.items()}
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (label, which), (steps, values) in lines.items():
            if which == name:
                axes.plot(steps, values, label=label, linewidth=1.4)
        axes.set(xlabel="step", title=name, xlim=(0, until))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{target}' cannot be drawn: {error}") from None
