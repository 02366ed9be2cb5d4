"""Losses from other tools' files; the fixtures are small files in the formats those tools write."""

import json

import numpy as np
import pytest

from lensjax import losses as losses_module
from lensjax.errors import InputError
from lensjax.losses import read, read_journal, read_mlflow, read_trainer_states, read_wandb


def trainer_state(path, evaluations, *, metric="eval_loss", training=True):
    """Write what transformers' TrainerState.save_to_json writes: (step, loss) -> trainer_state.json."""
    history = []
    for step, loss in evaluations:
        if training and step:
            log = {"epoch": step / 10, "grad_norm": 0.7, "learning_rate": 1e-4, "loss": loss + 0.3, "step": step}
            history.append(log)
        evaluation = {"epoch": step / 10, metric: loss, "eval_runtime": 1.5, "eval_samples_per_second": 100.0}
        history.append({**evaluation, "eval_steps_per_second": 12.5, "step": step})
    last = max((step for step, _ in evaluations), default=0)
    state = {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 2.0,
        "eval_steps": 50,
        "global_step": last,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": history,
        "logging_steps": 10,
        "max_steps": last,
        "num_train_epochs": 2,
        "save_steps": 50,
        "stateful_callbacks": {},
        "total_flos": 7.8e15,
        "train_batch_size": 8,
        "trial_name": None,
        "trial_params": None,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def test_trainer_states_of_several_checkpoints_are_one_run(tmp_path):
    for model, base in (("facebook/opt", 3.0), ("gpt2", 2.5)):
        for size in (200, 400):
            run = tmp_path / model / str(size)
            first, second = (50, base + 0.2), (100, base - size / 1000)
            trainer_state(run / "checkpoint-50", [(0, base + 1), first])
            trainer_state(run / "checkpoint-100", [(0, base + 1), first, second, (150, base + 0.5)])
    curves = read_trainer_states(tmp_path, parameters={"gpt2": 124e6})
    assert curves.names == ("facebook/opt", "gpt2")
    np.testing.assert_array_equal(curves.sizes, [0, 200, 400])
    np.testing.assert_allclose(curves.losses, [[4.0, 2.8, 2.6], [3.5, 2.3, 2.1]])
    np.testing.assert_array_equal(curves.parameters, [np.nan, 124e6])
    last = read_trainer_states(tmp_path, which="last")
    np.testing.assert_allclose(last.losses[:, 1], [3.5, 3.0])
    assert last.parameters is None
    np.testing.assert_array_equal(read(tmp_path).losses, curves.losses)


def test_trainer_states_by_name(tmp_path):
    for name in ("opt-125m_seed1_n1.6k", "pythia_seed1_n200"):
        trainer_state(tmp_path / name, [(10, 2.0)], metric="eval_test_loss")
    curves = read_trainer_states(tmp_path, pattern="{model}_n{samples}", metric="eval_test_loss")
    assert curves.names == ("opt-125m_seed1", "pythia_seed1")
    np.testing.assert_array_equal(curves.sizes, [200, 1600])
    np.testing.assert_array_equal(curves.losses, [[np.nan, 2.0], [2.0, np.nan]])


def test_training_that_did_harm_is_no_zero_shot_loss(tmp_path):
    trainer_state(tmp_path / "a-n200", [(0, 1.0), (10, 2.0)])
    trainer_state(tmp_path / "b-n200", [(0, 3.0), (10, 2.5)])
    np.testing.assert_array_equal(read(tmp_path).losses, [[1.0, 2.0], [3.0, 2.5]])


def test_runs_that_diverged_are_not_measured(tmp_path):
    trainer_state(tmp_path / "a-n200", [(10, float("nan"))])
    trainer_state(tmp_path / "a-n400", [(10, 2.0), (20, float("inf"))])
    trainer_state(tmp_path / "b-n400", [(10, 2.5)])
    curves = read(tmp_path)
    np.testing.assert_array_equal(curves.losses, [[np.nan, 2.0], [np.nan, 2.5]])
    np.testing.assert_array_equal(read(tmp_path, which="last").losses, [[np.nan, np.nan], [np.nan, 2.5]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a-n200/trainer_state.json: not readable as JSON (Expecting property name"),
        ("[" * 100_000, "a-n200/trainer_state.json: not readable as JSON (maximum recursion depth"),
        ("[]", "a-n200/trainer_state.json: no list 'log_history', so not a Trainer's state. Leave this file out."),
        (
            '{"log_history": [{"loss": 2.0, "step": 10}], "global_step": 10}',
            "a-n200/trainer_state.json: log_history has no 'eval_loss'. Evaluate while training (eval_strategy), or "
            "say which metric to take; there are: loss.",
        ),
        (
            '{"log_history": [{"eval_loss": "low", "step": 10}]}',
            "a-n200/trainer_state.json: eval_loss is 'low', not a number. Mend it or leave the run out.",
        ),
        (
            '{"log_history": [{"eval_loss": -1.5, "step": 10}]}',
            "a-n200/trainer_state.json: eval_loss is -1.5; losses are positive (nats per token). Is it the right",
        ),
        ('{"log_history": [{"eval_loss": 1.5, "step": null}]}', "a-n200/trainer_state.json: step is 'None', not a num"),
        ('{"log_history": [], "global_step": {}}', "a-n200/trainer_state.json: global_step is '{}', not a number"),
    ],
)
def test_malformed_trainer_states(tmp_path, content, message):
    trainer_state(tmp_path / "b-n200", [(10, 2.0)])
    (tmp_path / "a-n200").mkdir()
    (tmp_path / "a-n200" / "trainer_state.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_trainer_states(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_names_that_say_nothing(tmp_path):
    trainer_state(tmp_path / "opt" / "final", [(10, 2.0)])
    with pytest.raises(
        InputError, match=r"the name 'opt/final' does not say model and number of samples as \{model\}/"
    ):
        read_trainer_states(tmp_path)
    with pytest.raises(InputError, match=r"pattern '\{model\}' must hold \{model\} and \{samples\} once each"):
        read_trainer_states(tmp_path, pattern="{model}")
    with pytest.raises(InputError, match="one run makes no curve"):
        read(tmp_path / "opt" / "final" / "trainer_state.json")
    with pytest.raises(InputError, match=r"no trainer_state\.json in it"):
        read_trainer_states(tmp_path / "nowhere")


def test_the_same_run_twice(tmp_path):
    trainer_state(tmp_path / "x" / "a-n200", [(10, 2.0)])
    trainer_state(tmp_path / "y" / "a-n200", [(10, 3.0)])
    trainer_state(tmp_path / "y" / "b-n200", [(10, 2.2)])
    options = {"pattern": "x/{model}-{samples}"}
    with pytest.raises(InputError, match="does not say"):
        read_trainer_states(tmp_path, **options)
    table = tmp_path / "t.csv"
    table.write_text(
        "Name,State,model,samples,eval/loss\nr1,finished,a,200,2\nr2,finished,a,200,3\nr3,finished,b,200,1\n"
    )
    with pytest.raises(InputError, match=r"row 3: a at 200 samples is also in .*row 2\. Leave one out, or say what"):
        read(table)
    assert read(table, repeats="mean").at(200).tolist() == [2.5, 1.0]
    assert read(table, repeats="lowest").at(200).tolist() == [2.0, 1.0]
    with pytest.raises(InputError, match="repeats='best' is not known"):
        read(table, repeats="best")


RUNS = """\
"Name","State","Notes","User","Tags","Created","Runtime","Sweep","_name_or_path","max_train_samples","eval/loss",\
"model/num_parameters"
"dry-sun-1","finished","-","me","","2026-01-01T00:00:00.000Z","100","","gpt2","200","3.5","124439808"
"wet-sea-2","finished","-","me","","2026-01-01T00:00:00.000Z","100","","gpt2","400","3.1","124439808"
"old-oak-3","finished","-","me","","2026-01-01T00:00:00.000Z","100","","facebook/opt-125m","200","3.4",""
"red-fox-4","crashed","-","me","","2026-01-01T00:00:00.000Z","100","","facebook/opt-125m","400","9.9",""
"""


def test_a_runs_table_of_wandb(tmp_path):
    path = tmp_path / "wandb_export.csv"
    path.write_text(RUNS)
    curves = read(path)
    assert curves.names == ("gpt2", "facebook/opt-125m")
    np.testing.assert_array_equal(curves.losses, [[3.5, 3.1], [3.4, np.nan]])
    np.testing.assert_array_equal(curves.parameters, [124439808, np.nan])
    by_runtime = read_wandb(path, metric="Runtime", model="name", samples="runtime")
    assert by_runtime.names == ("dry-sun-1", "wet-sea-2", "old-oak-3", "red-fox-4")


CHART = """\
"Step","gpt2-n200 - eval/loss","gpt2-n200 - eval/loss__MIN","gpt2-n200 - eval/loss__MAX","opt-1.3b-n200 - eval/loss",\
"opt-1.3b-n200 - eval/loss__MIN","opt-1.3b-n200 - eval/loss__MAX"
"50","3.5","3.5","3.5","","",""
"60","","","","3.3","3.3","3.3"
"100","3.2","3.2","3.2","3.1","3.1","3.1"
"150","3.4","3.4","3.4","NaN","NaN","NaN"
"""


def test_a_chart_of_wandb(tmp_path):
    path = tmp_path / "wandb_chart.csv"
    path.write_text(CHART)
    curves = read(path)
    assert curves.names == ("gpt2", "opt-1.3b")
    np.testing.assert_array_equal(curves.losses, [[3.2], [3.1]])
    np.testing.assert_array_equal(read(path, which="last").losses, [[3.4], [np.nan]])
    with pytest.raises(InputError, match=r"no metric 'test/loss'; there are: eval/loss\. Name one: metric="):
        read(path, metric="test/loss")
    with pytest.raises(InputError, match="which='first' is not known; choose 'lowest' or 'last'"):
        read(path, which="first")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no runs in it; it needs a header and a row for each run or step."),
        ("Name,State\n", "no runs in it"),
        ("Name,State,eval/loss\na-200,finished\n", "row 2: 2 cells, but the header has 3 columns."),
        ("Name,State,accuracy\na-200,finished,1\n", "no column of losses (test_loss, test/loss, eval_loss, eval/loss"),
        (
            "Name,State,eval/loss\nrun1,finished,1\n",
            "row 2: the name 'run1' does not say model and number of samples as",
        ),
        ("Name,State,eval/loss\na-200,finished,low\n", "row 2: eval/loss is 'low', not a number."),
        ("Name,State,eval/loss\na-200,finished,0\n", "row 2: eval/loss is 0; losses are positive"),
        (
            "Name,State,model,samples,eval/loss\nr,finished,a,many,1\n",
            "row 2: 'many' is not a number of training samples",
        ),
        (
            "Name,State,model,samples,eval/loss\nr,finished,a,1.5,1\n",
            "row 2: '1.5' is not a number of training samples",
        ),
        ("Name,State,model,samples,eval/loss\nr,finished,,200,1\n", "row 2: the run has no model; fill 'model'"),
        ("Name,State,model,samples,eval/loss\nr,finished,a,200,1\n", "1 model(s); choosing needs at least two"),
        ("State,eval/loss\nfinished,1\n", "no column says the model, and runs have no names. Name it: model="),
        ("Step,a-200 - x,b-200 - y\n1,2,3\n", "it is not clear which metric is the loss; there are: x, y. Name one"),
        (
            "Name,State,model,samples,eval/loss,parameters\nr,finished,a,2,1,-5\ns,finished,b,2,1,5\n",
            "row 2: parameters of a are -5; they are above 0.",
        ),
    ],
)
def test_malformed_wandb_exports(tmp_path, text, message):
    path = tmp_path / "w.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_wandb(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


def test_columns_that_are_not_there(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text(RUNS)
    with pytest.raises(InputError, match=r"no column 'teacher' \(model\); there are: Name, State, Notes, .*"):
        read_wandb(path, model="teacher")
    with pytest.raises(InputError, match=r"nothing\.csv: no such file"):
        read_wandb(tmp_path / "nothing.csv")
    path.write_bytes(b"Name,State\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="not a readable CSV file"):
        read_wandb(path)


def mlflow_run(store, identity, params, metrics, *, name="run", stage="active"):
    """Write a run as MLflow's file store does: files of parameters and tags, lines of "timestamp value step"."""
    run = store / "123" / identity
    for kind, values in (("params", params), ("tags", {"mlflow.runName": name, "mlflow.user": "me"})):
        (run / kind).mkdir(parents=True)
        for key, value in values.items():
            (run / kind / key).write_text(str(value))
    for key, values in metrics.items():
        file = run / "metrics" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{1_700_000_000_000 + step} {value} {step}\n" for step, value in values))
    (run / "meta.yaml").write_text(
        f"artifact_uri: file:///x\nend_time: 1\nentry_point_name: ''\nexperiment_id: '123'\nlifecycle_stage: {stage}\n"
        f"run_id: {identity}\nrun_name: {name}\nstatus: 3\n"
    )


@pytest.fixture
def store(tmp_path):
    found = tmp_path / "mlruns"
    (found / "123").mkdir(parents=True)
    (found / "123" / "meta.yaml").write_text("experiment_id: '123'\nlifecycle_stage: active\nname: tuning\n")
    losses = [(20, 3.3), (30, 3.1), (10, 3.0)]  # in the order of their arrival, not of their steps
    for number, (model, size) in enumerate([("gpt2", 200), ("gpt2", 400), ("opt", 200)]):
        params = {"model_name_or_path": model, "max_train_samples": size}
        shifted = [(step, loss + size / 1000) for step, loss in losses]
        mlflow_run(found, f"r{number}", params, {"eval_loss": shifted}, name=f"{model}-{size}")
    mlflow_run(
        found, "r9", {"model_name_or_path": "x", "max_train_samples": 1}, {"eval_loss": [(1, 1)]}, stage="deleted"
    )
    return found


def test_a_store_of_mlflow(store):
    curves = read(store)
    assert curves.names == ("gpt2", "opt")
    np.testing.assert_allclose(curves.losses, [[3.2, 3.4], [3.2, np.nan]])
    np.testing.assert_allclose(read_mlflow(store, which="last").losses, [[3.3, 3.5], [3.3, np.nan]])
    by_name = read_mlflow(store, model="mlflow.runName")
    assert by_name.names == ("gpt2-200", "gpt2-400", "opt-200")


def test_a_store_of_mlflow_with_slashes_in_names_and_runs_named_by_pattern(tmp_path):
    for size in (200, 400):
        for model in ("a", "b"):
            mlflow_run(tmp_path, f"{model}{size}", {}, {"eval/loss": [(1, 2.0)]}, name=f"{model}_{size}")
    np.testing.assert_array_equal(read(tmp_path).losses, np.full((2, 2), 2.0))


def test_malformed_stores_of_mlflow(store, tmp_path):
    (store / "123" / "r0" / "metrics" / "eval_loss").write_text("1700000000000 3.0 1\nnonsense\n")
    with pytest.raises(InputError, match=r"metrics/eval_loss, line 2: 'nonsense' is not 'timestamp value step'"):
        read(store)
    with pytest.raises(InputError, match="no runs of MLflow in it"):
        read_mlflow(tmp_path / "mlruns" / "123" / "r0" / "params")


def test_a_table_of_mlflow(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(
        "run_id,experiment_id,status,metrics.eval_loss,params.model,params.train_samples,params.num_parameters,"
        "tags.mlflow.runName\n"
        "r1,123,FINISHED,3.0,gpt2,200,1000,one\n"
        "r2,123,FINISHED,2.9,opt,200,,two\n"
        "r3,123,FAILED,9.0,opt,400,,three\n"
    )
    curves = read(path)
    assert curves.names == ("gpt2", "opt")
    np.testing.assert_array_equal(curves.losses, [[3.0, np.nan], [2.9, np.nan]])
    np.testing.assert_array_equal(curves.parameters, [1000, np.nan])
    page = tmp_path / "page.csv"
    page.write_text(
        "Start Time,Duration,Run ID,Name,Source Type,Source Name,User,Status,model,samples,eval_loss\n"
        "2026,1min,x1,bold-fish-1,LOCAL,train.py,me,FINISHED,gpt2,200,3.0\n"
        "2026,1min,x2,cold-fish-2,LOCAL,train.py,me,FINISHED,opt,200,2.9\n"
    )
    assert read(page).at(200).tolist() == [3.0, 2.9]


def journal(directory, runs, end="\n"):
    directory.mkdir()
    records = [
        {"key": k, "candidate": c, "size": s, "test_loss": loss, "steps": 5, "tokens": 9, "flops": 1.0, "seconds": 1.0}
        | {"reason": "patience", "facts": {"parameters": n, "test_loss_per_byte": None if loss is None else loss / 4}}
        for k, c, s, loss, n in runs
    ]
    (directory / "runs.jsonl").write_text("\n".join(json.dumps(r) for r in records) + end)
    return directory


def test_our_own_journal(tmp_path):
    runs = [("k1", "a", 0, 4.0, 100), ("k2", "a", 50, None, 100), ("k2", "a", 50, 3.0, 100), ("k3", "b", 50, 2.0, 200)]
    directory = journal(tmp_path / "run", runs, end='\n{"key": "k4", "cand')
    curves = read(directory)
    assert curves.names == ("a", "b")
    np.testing.assert_array_equal(curves.losses, [[4.0, 3.0], [np.nan, 2.0]])
    np.testing.assert_array_equal(curves.parameters, [100, 200])
    np.testing.assert_array_equal(read(directory / "runs.jsonl", metric="test_loss_per_byte").losses[:, 1], [0.75, 0.5])
    more = journal(tmp_path / "more", [("k5", "b", 0, 5.0, 200)])
    assert read_journal(directory, more).at(0).tolist() == [4.0, 5.0]


def test_what_the_journal_of_a_selection_holds_is_what_is_read(tmp_path):
    from lensjax.journal import Journal, Run

    log = Journal(tmp_path / "out", {"sizes": [50]})
    for name in ("a", "b"):
        log.append(Run(f"t{name}", name, 50, 2.9, facts={"parameters": 10}, part_of=f"k{name}"))
        log.append(Run(f"k{name}", name, 50, 2.5, facts={"parameters": 10}))
    log.close()
    curves = read(tmp_path / "out")
    assert curves.names == ("a", "b")
    assert curves.at(50).tolist() == [2.5, 2.5]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"key": "k", "candidate": "a", "size": "x", "test_loss": 1}']
)
def test_malformed_journals(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"runs\.jsonl, line 1: not a run record\. Remove that line\."):
        read(path)


def test_what_is_none_of_these(tmp_path):
    with pytest.raises(InputError, match="a directory without runs"):
        read(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_journal(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "x.csv")
    table = tmp_path / "t.csv"
    table.write_text("model,0,200\na,3,2\nb,4,3\n")
    assert read(table).at(200).tolist() == [2, 3]
    assert read("published:flan").names[0]
    assert set(losses_module.__all__) == {n for n in dir(losses_module) if n.startswith("read") and n != "read_losses"}
