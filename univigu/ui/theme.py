"""The app's looks: one theme in light and dark, on the viewer's palette, with fonts that every system has."""

from __future__ import annotations

from importlib import resources

import gradio as gr

PALETTE = (resources.files("univigu") / "ui" / "viewer" / "palette.css").read_text(encoding="utf-8")

CSS = (
    PALETTE
    + """
.gradio-container { width: 100%; max-width: 1440px !important; margin: 0 auto !important; }
.gradio-container > .main { width: 100%; }
.gradio-container .html-container { padding: 0; }
.app-title h1 { margin: 0; font-size: 28px; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
.app-title p { margin: 4px 0 0; color: var(--uvg-muted); font-size: 16px; max-width: 70ch; }
.app-title .v { color: var(--uvg-video); font-weight: 600; }
.app-title .t { color: var(--uvg-text); font-weight: 600; }

.app-controls { flex: 0 0 310px !important; min-width: min(310px, 100%) !important; }
.app-controls .queue { height: 24px; min-height: 24px; margin: -6px 0; }
.app-view { min-width: min(320px, 100%) !important; }
.app-controls table { font-size: 14px; }
@media (max-width: 900px) { .app-controls { flex-basis: 100% !important; } }
@media (max-width: 640px) {
  .gradio-container > .main.app { padding: 12px 14px !important; }
  .app-title h1 { font-size: 24px; }
}
"""
)


def theme() -> gr.themes.Base:
    system = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    base = gr.themes.Base(
        font=system,
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
        radius_size="lg",
        neutral_hue="stone",
    )
    colours = {
        "body_background_fill": "var(--uvg-ground)",
        "body_text_color": "var(--uvg-ink)",
        "body_text_color_subdued": "var(--uvg-muted)",
        "background_fill_primary": "var(--uvg-panel)",
        "background_fill_secondary": "var(--uvg-ground)",
        "border_color_primary": "var(--uvg-line)",
        "border_color_accent": "var(--uvg-ink)",
        "block_background_fill": "var(--uvg-panel)",
        "block_border_color": "var(--uvg-line)",
        "block_label_background_fill": "var(--uvg-panel)",
        "block_label_text_color": "var(--uvg-muted)",
        "block_title_text_color": "var(--uvg-muted)",
        "block_info_text_color": "var(--uvg-muted)",
        "input_background_fill": "var(--uvg-panel)",
        "input_border_color": "var(--uvg-line)",
        "input_border_color_focus": "var(--uvg-focus)",
        "input_placeholder_color": "var(--uvg-muted)",
        "color_accent": "var(--uvg-ink)",
        "color_accent_soft": "var(--uvg-ground)",
        "slider_color": "var(--uvg-ink)",
        "checkbox_background_color_selected": "#0b6e75",  # its tick is white in both themes
        "checkbox_border_color_selected": "#0b6e75",
        "button_primary_background_fill": "var(--uvg-ink)",
        "button_primary_background_fill_hover": "var(--uvg-video)",
        "button_primary_text_color": "var(--uvg-panel)",
        "button_primary_border_color": "var(--uvg-ink)",
        "button_secondary_background_fill": "var(--uvg-panel)",
        "button_secondary_background_fill_hover": "var(--uvg-ground)",
        "button_secondary_text_color": "var(--uvg-ink)",
        "button_secondary_border_color": "var(--uvg-line)",
        "link_text_color": "var(--uvg-video)",
        "table_even_background_fill": "var(--uvg-panel)",
        "table_odd_background_fill": "var(--uvg-panel)",
        "table_row_focus": "var(--uvg-ground)",
    }
    takes = gr.themes.Base().set.__code__.co_varnames
    dark = {f"{name}_dark": value for name, value in colours.items() if f"{name}_dark" in takes}
    return base.set(
        **colours, **dark, block_shadow="none", block_label_text_weight="600", block_title_text_weight="600"
    )
