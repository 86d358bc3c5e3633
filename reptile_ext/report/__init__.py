"""What a run leaves for the eye: tables, curves, the page, a model card."""
