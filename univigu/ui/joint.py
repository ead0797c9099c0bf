"""The Joint tab: a prompt becomes a clip and its detailed caption, both at once (equation 18)."""

from __future__ import annotations

import gradio as gr

from univigu.ui.prompted import prompted_tab
from univigu.ui.runs import Runs

EXAMPLES = [
    "a boat at sunset",
    "a red ball bounces over a meadow",
    "a white bird rises over the sea",
]


def build(runs: Runs, model: gr.State, config) -> dict:
    return prompted_tab("joint", runs, model, config, EXAMPLES, button="Make both")
