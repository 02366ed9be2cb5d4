"""Checkpoints: finding them, checking them, reading them tensor by tensor, writing them."""
