"""The Generate tab: a prompt becomes a clip (equation 17)."""

from __future__ import annotations

import gradio as gr

from univigu.ui.prompted import prompted_tab
from univigu.ui.runs import Runs

EXAMPLES = [
    "a red ball bounces over a meadow",
    "a blue boat moves left at sea at sunset",
    "a yellow star spins in the snow at night",
]


def build(runs: Runs, model: gr.State, config) -> dict:
    return prompted_tab("generate", runs, model, config, EXAMPLES, button="Generate")
