"""The app: `python app.py`, or a Hugging Face Space.

Reads the options, builds the page, serves it. `--help` lists the options; UNIVIGU_MODEL names the model where a command
line cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  before torch: on ZeroGPU it stands in for CUDA

import torch

from univigu.ui.page import EXAMPLES, build, launch_options


def main() -> None:
    options = argparse.ArgumentParser(description="Uni-ViGU in the browser.")
    options.add_argument(
        "--model",
        default=os.environ.get("UNIVIGU_MODEL", "toybox"),
        help="toybox (embedded), wan2.1-1.3b, wan2.1-14b, released, or any folder, checkpoint or Hub id",
    )
    options.add_argument("--device", help="cpu, cuda, cuda:1 …; a GPU where there is one, if not given")
    options.add_argument("--host", help="address to listen on; 0.0.0.0 for other machines, 127.0.0.1 if not given")
    options.add_argument("--port", type=int, help="port to listen on; a free one from 7860 up, if not given")
    options.add_argument(
        "--examples",
        type=Path,
        default=EXAMPLES,
        help="folder of clips to offer, and of saved runs to show before the first: generate.json, joint.json …",
    )
    given = options.parse_args()
    # A core for the server and for a browser on the same machine: torch's threads wait for one another by spinning, and
    # beside a browser on two cores a run of 30 steps takes a third of the time with one of them.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    try:
        demo = build(given.model, given.device, given.examples)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    demo.launch(server_name=given.host, server_port=given.port, **launch_options())


if __name__ == "__main__":
    main()
