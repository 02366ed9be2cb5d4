"""The program transformation behind kernels: reading, analysing and rewriting a function's jaxpr."""
