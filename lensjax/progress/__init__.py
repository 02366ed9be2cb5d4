"""Progress of a selection or a fine-tuning: its state, lines of text, and a live view on a terminal."""
