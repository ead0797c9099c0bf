"""The Gradio app: one file per tab, one folder for the trajectory viewer. It knows nothing of tensors."""
