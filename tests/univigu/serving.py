"""The app on a free port, for tests that talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny import tiny_pipeline

from univigu.ui.page import EXAMPLES, build, launch_options


def tiny_model(folder: Path, **config) -> str:
    """A saved pipeline of random weights."""
    pipe = tiny_pipeline()
    pipe.register_to_config(**config)
    pipe.fit_previewer()
    pipe.save_pretrained(folder)
    return str(folder)


@contextmanager
def served(model: str, examples: Path = EXAMPLES) -> Iterator[str]:
    """The address of the running app."""
    demo = build(model, "cpu", examples)
    demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        yield demo.local_url
    finally:
        demo.close(verbose=False)
