"""Models from the Hugging Face hub: a stub of it on this machine, with huggingface_hub's own client in front."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lensjax.models import init_model, save_pretrained
from lensjax.models.checkpoints.saving import export_tensors
from support.paths import SOURCES
from support.torch_files import whole, write

SMALL = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
NAME = "someone/model"
BRANCHES = {"main": "a" * 40, "v2": "b" * 40, "pickled": "c" * 40}
PROGRAM = """
import json, sys
import jax, numpy as np
from flax import nnx
from lensjax.errors import InputError
from lensjax.models import from_pretrained, load_config

found = []
for name, revision in json.loads(sys.argv[1]):
    try:
        load_config(name, revision=revision)
        model, tokenizer = from_pretrained(name, revision=revision)
    except InputError as error:
        found.append(str(error))
    else:
        total = sum(float(np.abs(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(nnx.state(model)))
        found.append([total, tokenizer("two one")["input_ids"]])
print(json.dumps(found))
"""


class Hub(ThreadingHTTPServer):
    """Serves folders as revisions of one repository: `revisions` maps a commit to its folder."""

    def __init__(self, revisions):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions = revisions
        self.requests = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path))
        info, tree, resolve = f"api/models/{NAME}/revision/", f"api/models/{NAME}/tree/", f"{NAME}/resolve/"
        body, headers, problem = None, {}, "RepoNotFound"
        if path.startswith((info, tree)):
            commit = self.commit(path.removeprefix(info).removeprefix(tree))
            problem = "RevisionNotFound"
            if commit is not None:
                files = sorted(self.server.revisions[commit].iterdir())
                listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
                named = {"_id": "0", "id": NAME, "sha": commit, "private": False, "tags": [], "siblings": []}
                body = json.dumps(listed if path.startswith(tree) else named).encode()
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            commit = self.commit(revision)
            file = None if commit is None else self.server.revisions[commit] / name
            if file is not None and file.is_file():
                body = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        if body is None:
            body, headers = b"", {"X-Error-Code": problem}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def commit(self, revision):
        commit = BRANCHES.get(revision, revision)
        return commit if commit in self.server.revisions else None


@pytest.fixture
def repository(tmp_path):
    """Three revisions of a model: one file, shards beside a pickle, and a pickle alone.

    Returns commit -> folder, branch -> sum of all absolute weights.
    """
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    folders, totals = {}, {}
    for number, (branch, limit) in enumerate((("main", "1GB"), ("v2", 1000), ("pickled", "1GB"))):
        model = init_model(SMALL, jax.random.key(number))
        folders[BRANCHES[branch]] = tmp_path / branch
        save_pretrained(model, tmp_path / branch, tokenizer, max_shard_size=limit)
        totals[branch] = sum(float(np.abs(array.astype(np.float64)).sum()) for array in export_tensors(model).values())
    (tmp_path / "v2" / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    tensors = {name: whole(array) for name, array in export_tensors(model).items()}
    write(tmp_path / "pickled" / "pytorch_model.bin", tensors)
    assert len(list((tmp_path / "v2").glob("model-*.safetensors"))) > 2
    return folders, totals


@pytest.fixture
def hub(repository):
    with Hub(repository[0]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def load(asked, cache, hub=None):
    """Load models in a process of its own, for the client reads its settings when it is imported."""
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, SOURCES)),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if hub is None else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}" if hub else "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", PROGRAM, json.dumps(asked)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_models_come_from_the_hub_and_then_from_its_cache(hub, repository, tmp_path):
    _, totals = repository
    cache = tmp_path / "cache"
    asked = [[NAME, None], [NAME, "v2"], [NAME, BRANCHES["main"]], [NAME, "v3"], ["someone/else", None]]
    main, sharded, commit, *missing = load(asked, cache, hub)
    assert main == commit == [pytest.approx(totals["main"], rel=1e-6), [2, 1]]
    assert sharded == [pytest.approx(totals["v2"], rel=1e-6), [2, 1]]
    assert totals["main"] != pytest.approx(totals["v2"], rel=1e-3)
    problems = ("RevisionNotFoundError", "RepositoryNotFoundError")
    for message, (name, _), problem in zip(missing, asked[3:], problems, strict=True):
        expected = f"{name}: is no directory here and could not be had from the Hugging Face hub ({problem}: 404 "
        assert message.startswith(expected)
    fetched = [path for command, path in hub.requests if command == "GET"]
    assert any(path.endswith(".safetensors") for path in fetched)
    assert not any(path.endswith(".bin") for path in fetched)

    (from_pickle,) = load([[NAME, "pickled"]], cache, hub)
    assert from_pickle == [pytest.approx(totals["pickled"], rel=1e-6), [2, 1]]

    before = len(hub.requests)
    assert load([[NAME, "pickled"]], cache) == [from_pickle]
    main, sharded, other = load([[NAME, None], [NAME, "v2"], ["someone/else", None]], cache)
    assert main == [pytest.approx(totals["main"], rel=1e-6), [2, 1]]
    assert sharded == [pytest.approx(totals["v2"], rel=1e-6), [2, 1]]
    assert other.startswith("someone/else: is no directory here and could not be had from the Hugging Face hub (")
    assert other.endswith("Check the id and the network, or download the model and name its directory.")
    assert len(hub.requests) == before
