"""The families of models, a file each; `lensjax.models.registry` says what a family brings and finds it."""
