"""The figures of a selection, as SVG and as PNG."""
