import numpy as np
import pytest

from lensjax import models
from lensjax.tasks import bucket_lengths, encode, load_task


@pytest.fixture(scope="module")
def setting(tiny_models, tiny_task):
    """A tiny model, (train, validation, test) and the padded lengths."""
    task = load_task(tiny_task, input_field="input", target_field="target", validation=20, test=20)
    model, tokenizer = models.from_pretrained(tiny_models[0])
    sets = [encode(part, tokenizer, 64) for part in (task.train, task.validation, task.test)]
    return model, sets, bucket_lengths(np.concatenate([s.lengths for s in sets]))
