"""One rule for all sources: the same runs, as each tool would have left them, are the same losses."""

import csv
import json
import math
import sqlite3

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.losses import read

NAN = math.nan
RUNS = (
    ("a", 200, "finished", ((0, 4.0), (10, 3.5), (20, 3.2), (30, 3.3))),
    ("a", 400, "finished", ((10, 3.1), (20, NAN))),
    ("b", 200, "finished", ((0, 4.5), (10, 3.6), (10, 3.6))),
    ("b", 400, "killed", ((10, 1.0),)),
    ("c", 200, "finished", ((10, NAN),)),
    ("c", 400, "finished", ((10, 3.0),)),
)
LOSSES = [[4.0, 3.2, 3.1], [4.5, 3.6, NAN], [NAN, NAN, 3.0]]
TWICE = (
    ("a", 200, "finished", ((10, 3.5), (20, 3.2), (20, 1.1))),
    ("b", 200, "finished", ((10, 3.4),)),
)


def trainer(root, runs):
    for model, samples, state, losses in runs:
        place = root / model / f"n{samples}"
        last = max(step for step, _ in losses)
        if state != "finished":
            place = place / f"checkpoint-{last}"
        place.mkdir(parents=True)
        log = [{"step": step, "eval_loss": loss, "epoch": step / 10} for step, loss in losses]
        whole = {"global_step": last, "max_steps": last if state == "finished" else 3 * last, "log_history": log}
        (place / "trainer_state.json").write_text(json.dumps(whole))
    return root


def chart(root, runs):
    """Write a chart over train/global_step; it holds no states, so runs that did not finish are left out by hand."""
    kept = [run for run in runs if run[2] == "finished"]
    path = root / "chart.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["train/global_step", *(f"{model}-n{samples} - eval/loss" for model, samples, _, _ in kept)])
        for column, (_, _, _, losses) in enumerate(kept):
            for step, loss in losses:
                out.writerow(
                    [
                        step,
                        *(
                            "NaN" if math.isnan(loss) and i == column else loss if i == column else ""
                            for i in range(len(kept))
                        ),
                    ]
                )
    return path


def files(root, runs):
    numbers = {"running": 1, "finished": 3, "failed": 4, "killed": 5}
    for number, (model, samples, state, losses) in enumerate(runs):
        run = root / "mlruns" / "1" / f"r{number}"
        for kind in ("params", "tags", "metrics"):
            (run / kind).mkdir(parents=True)
        (run / "params" / "model").write_text(model)
        (run / "params" / "samples").write_text(str(samples))
        (run / "tags" / "mlflow.runName").write_text(f"sneaky-shark-{number}")
        lines = (f"{1_700_000_000_000 + i} {loss} {step}\n" for i, (step, loss) in enumerate(losses))
        (run / "metrics" / "eval_loss").write_text("".join(lines))
        (run / "meta.yaml").write_text(f"lifecycle_stage: active\nrun_id: r{number}\nstatus: {numbers[state]}\n")
    return root / "mlruns"


def database(root, runs):
    """Write the tables of MLflow 3's database that hold runs, in the types that they have there."""
    path = root / "mlflow.db"
    with sqlite3.connect(path) as made:
        made.executescript(
            "CREATE TABLE experiments (experiment_id INTEGER PRIMARY KEY, name VARCHAR, lifecycle_stage VARCHAR);"
            "CREATE TABLE runs (run_uuid VARCHAR PRIMARY KEY, name VARCHAR, status VARCHAR, start_time BIGINT,"
            " lifecycle_stage VARCHAR, experiment_id INTEGER);"
            'CREATE TABLE metrics ("key" VARCHAR, value FLOAT NOT NULL, timestamp BIGINT, run_uuid VARCHAR,'
            ' step BIGINT, is_nan BOOLEAN, PRIMARY KEY ("key", timestamp, step, run_uuid, value, is_nan));'
            'CREATE TABLE params ("key" VARCHAR, value VARCHAR, run_uuid VARCHAR);'
            'CREATE TABLE tags ("key" VARCHAR, value VARCHAR, run_uuid VARCHAR);'
            "INSERT INTO experiments VALUES (1, 'tuning', 'active'), (2, 'old', 'deleted');"
        )
        for number, (model, samples, state, losses) in enumerate(runs):
            run = f"r{number}"
            values = (run, f"sneaky-shark-{number}", state.upper(), number, "active", 1)
            made.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", values)
            made.executemany(
                "INSERT INTO params VALUES (?, ?, ?)", [("model", model, run), ("samples", str(samples), run)]
            )
            rows = [(0.0 if math.isnan(x) else x, i, run, step, math.isnan(x)) for i, (step, x) in enumerate(losses)]
            made.executemany("INSERT INTO metrics VALUES ('eval_loss', ?, ?, ?, ?, ?)", rows)
        for run, stage, experiment in (("gone", "deleted", 1), ("older", "active", 2)):
            made.execute("INSERT INTO runs VALUES (?, ?, 'FINISHED', 9, ?, ?)", (run, run, stage, experiment))
            made.execute("INSERT INTO metrics VALUES ('eval_loss', 0.5, 1, ?, 1, 0)", (run,))
    made.close()
    return path


def journal(root, runs):
    """Write a journal of ours: a record has one loss; what a run logged twice is a record twice."""
    records = []
    for model, samples, state, losses in runs:
        run = {"key": f"{model}{samples}", "candidate": model, "size": samples, "facts": {}}
        before = [loss for step, loss in losses if step == 0]
        records += [run | {"key": f"{model}0", "size": 0, "test_loss": loss} for loss in before]
        finite = [loss for step, loss in losses if step and not math.isnan(loss)]
        last = [loss for step, loss in losses if step == losses[-1][0] and not math.isnan(loss)]
        kept = last if len(last) > 1 else [min(finite, default=NAN)]
        records += [run | {"test_loss": loss if state == "finished" else None} for loss in kept]
    path = root / "runs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


SOURCES = (trainer, chart, files, database, journal)
every_source = pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)


@every_source
def test_the_same_runs_are_the_same_losses(tmp_path, write):
    curves = read(write(tmp_path, RUNS))
    assert curves.names == ("a", "b", "c")[: len(curves)]
    np.testing.assert_array_equal(curves.sizes, [0, 200, 400])
    np.testing.assert_array_equal(curves.losses, LOSSES)
    said = " ".join(curves.notes)
    assert ("b at 400 samples is not counted: " in said) == (write is not chart)
    assert "c at 200 samples is not counted: its loss is not finite" in said
    if write is not journal:
        assert "the loss of a at 400 samples rises from 3.1 to what is not finite: it diverged; 3.1 counts" in said


@every_source
def test_losses_that_differ_at_one_step_are_refused(tmp_path, write):
    source = write(tmp_path, TWICE)
    with pytest.raises(
        InputError, match=r"2 different losses at step \d+, 3\.2 and 1\.1: of other data, or of another"
    ):
        read(source)
    assert read(source, same_step="first").at(200).tolist() == [3.2, 3.4]
    assert read(source, same_step="last").at(200).tolist() == [1.1, 3.4]
    with pytest.raises(InputError, match="same_step='best' is not known; choose 'refuse', 'first' or 'last'"):
        read(source, same_step="best")


@every_source
def test_seeds_of_one_size_are_put_together_as_asked(tmp_path, write):
    runs = [(m, 200, "finished", ((10, loss),)) for m, loss in (("a", 3.0), ("b", 2.0))]
    if write is trainer:
        for seed, shift in ((1, 0.0), (2, 0.5)):
            shifted = [(m, n, s, ((10, losses[0][1] + shift),)) for m, n, s, losses in runs]
            trainer(tmp_path / f"seed{seed}", shifted)
        source, options = tmp_path, {"pattern": "seed*/{model}/n{samples}"}
    elif write is journal:
        lines = [
            {"key": f"{m}{seed}", "candidate": m, "size": n, "test_loss": losses[0][1] + seed / 2, "facts": {}}
            for seed in (0, 1)
            for m, n, _, losses in runs
        ]
        source, options = tmp_path / "runs.jsonl", {}
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif write is chart:
        source, options = tmp_path / "chart.csv", {"pattern": "{model}-n{samples}-seed*"}
        header = ",".join(f"{m}-n200-seed{s} - eval/loss" for m in "ab" for s in (1, 2))
        source.write_text(f"train/global_step,{header}\n10,3.0,3.5,2.0,2.5\n")
    else:
        again = [(m, n, s, ((10, losses[0][1] + 0.5),)) for m, n, s, losses in runs]
        source, options = write(tmp_path, [*runs, *again]), {}
    with pytest.raises(InputError, match=r"a at 200 samples is also in .*repeats='mean' or 'lowest' \(--repeats\)"):
        read(source, **options)
    assert read(source, repeats="mean", **options).at(200).tolist() == [3.25, 2.25]
    assert read(source, repeats="lowest", **options).at(200).tolist() == [3.0, 2.0]


def test_the_best_weights_evaluated_once_more_are_no_second_loss(tmp_path):
    """As `load_best_model_at_end` and a last `evaluate` leave it."""
    runs = [("a", 200, "finished", ((10, 3.5), (20, 3.2), (30, 3.4), (30, 3.2001))), *TWICE[1:]]
    assert read(trainer(tmp_path, runs)).at(200).tolist() == [3.2, 3.4]
    assert read(tmp_path, which="last").at(200).tolist() == [3.4, 3.4]


def test_a_run_that_diverged_is_told(tmp_path):
    runs = [("a", 200, "finished", ((10, 3.97), (20, 9.87))), *TWICE[1:]]
    curves = read(trainer(tmp_path, runs))
    assert curves.at(200).tolist() == [3.97, 3.4]
    assert [note.partition(": ")[2] for note in curves.notes] == [
        "the loss of a at 200 samples rises from 3.97 to 9.87: it diverged; 3.97 counts"
    ]


@pytest.mark.parametrize("state", ["crashed", "failed", "killed", "running", "preempted"])
def test_runs_of_a_table_that_did_not_finish(tmp_path, state):
    path = tmp_path / "runs.csv"
    path.write_text(
        f"Name,State,model,samples,eval/loss\nx,finished,a,200,3\ny,{state},a,400,low\nz,finished,b,200,2\n"
    )
    curves = read(path)
    np.testing.assert_array_equal(curves.losses, [[3.0, NAN], [2.0, NAN]])
    assert curves.notes == (f"{path}, row 3: a at 400 samples is not counted: {state}",)


@pytest.mark.parametrize(
    ("extra", "counts"),
    [
        ({}, False),
        ({"max_steps": 100}, True),
        ({"max_steps": -1}, True),
        ({"save_steps": 50}, False),
        ({"save_steps": 100, "max_steps": 150}, True),  # the last checkpoint that an old Trainer leaves
        ({"save_steps": 500, "max_steps": 300}, False),  # saved after each epoch
        ({"stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": True}}}}, True),
        ({"stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": False}}}}, False),
        (
            {
                "stateful_callbacks": {
                    "EarlyStoppingCallback": {
                        "args": {"early_stopping_patience": 2},
                        "attributes": {"early_stopping_patience_counter": 2},
                    }
                }
            },
            True,
        ),
    ],
)
def test_whether_a_run_that_left_checkpoints_came_to_its_end(tmp_path, extra, counts):
    trainer(tmp_path, [("a", 400, "finished", ((10, 3.0),)), ("b", 200, "finished", ((10, 2.0),))])
    place = tmp_path / "a" / "n200" / "checkpoint-100"
    place.mkdir(parents=True)
    state = {"global_step": 100, "max_steps": 300, "log_history": [{"step": 100, "eval_loss": 2.5}]} | extra
    (place / "trainer_state.json").write_text(json.dumps(state))
    curves = read(tmp_path)
    np.testing.assert_array_equal(curves.at(200), [2.5 if counts else NAN, 2.0])
    assert any("killed or running (step 100 of 300)" in note for note in curves.notes) == (not counts)


def checkpoint(run, step, losses, own=False):
    place = run if own else run / f"checkpoint-{step}"
    place.mkdir(parents=True, exist_ok=True)
    log = [{"step": at, "eval_loss": loss} for at, loss in losses]
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": step, "log_history": log}))


def test_a_checkpoint_of_an_older_run_does_not_outvote_the_run(tmp_path):
    trainer(tmp_path, TWICE[1:])
    run = tmp_path / "a" / "n200"
    checkpoint(run, 300, [(100, 2.5), (200, 2.3), (300, 2.2)], own=True)
    checkpoint(run, 200, [(100, 2.5), (200, 2.3)])
    checkpoint(run, 700, [(100, 4.4), (700, 1.5)])
    curves = read(tmp_path)
    assert curves.at(200).tolist() == [2.2, 3.4]
    assert len(curves.notes) == 1
    assert (
        "what other runs left beside it does not: checkpoint-700 (4.4 at step 100 there and 2.5 here)"
        in curves.notes[0]
    )
    # Without the run's own word, nobody can tell.
    (run / "trainer_state.json").unlink()
    with pytest.raises(
        InputError, match=r"checkpoint-200 and checkpoint-700 are of two runs: eval_loss is 2\.5 at step"
    ):
        read(tmp_path)


@pytest.mark.parametrize("axis", ["train/global_step", "epoch", "Wall time", "tokens seen", "Relative Time (Process)"])
def test_charts_over_any_axis(tmp_path, axis):
    path = tmp_path / "chart.csv"
    path.write_text(f'"{axis}","a-n200 - eval/loss","b-n200 - eval/loss"\n"10","3.5",""\n"20","3.1","2.9"\n')
    assert read(path).at(200).tolist() == [3.1, 2.9]
    path.write_text('"Wall time","a-n200 - eval/loss","b-n200 - eval/loss"\n"2026-11-30 23:55:25","3.5","2.9"\n')
    assert read(path).at(200).tolist() == [3.5, 2.9]
    path.write_text('"Wall time","a-n200 - eval/loss","b-n200 - eval/loss"\n"noon","3.5","2.9"\n')
    with pytest.raises(InputError, match="row 2: Wall time is 'noon', neither a number nor a date"):
        read(path)


def test_what_is_logged_first_is_not_known_to_be_before_training(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text("Step,a-n200 - eval/loss,b-n200 - eval/loss\n0,3.5,2.9\n1,3.1,2.8\n")
    with pytest.raises(
        InputError, match=r"run 'a-n200' has a loss at Step 0, where its log begins: .* over train/global"
    ):
        read(path)


def test_the_word_null_is_an_empty_cell(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("Name,State,model,samples,eval/loss,parameters\nx,finished,a,200,3,null\ny,finished,b,200,null,5\n")
    curves = read(path)
    np.testing.assert_array_equal(curves.losses, [[3.0], [NAN]])
    np.testing.assert_array_equal(curves.parameters, [NAN, 5])


def test_values_of_mlflow_without_steps_are_after_training(tmp_path):
    runs = [(m, 200, "finished", ((0, loss),)) for m, loss in (("a", 3.0), ("b", 2.0))]
    for write in (files, database):
        curves = read(write(tmp_path, runs))
        assert curves.sizes.tolist() == [200]
        assert curves.at(200).tolist() == [3.0, 2.0]


def test_databases_that_are_none_of_mlflow(tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as made:
        made.execute("CREATE TABLE t (x)")
    made.close()
    with pytest.raises(InputError, match=r"other\.db: not readable as a database of MLflow \(no such table: runs\)"):
        read(other)
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"SQLite format 3\0" + b"\xff" * 500)
    with pytest.raises(InputError, match=r"broken\.db: not readable as a database of MLflow"):
        read(broken)
    place = tmp_path / "both"
    place.mkdir()
    database(place, TWICE[1:])
    with pytest.raises(InputError, match=r"1 model\(s\)"):
        read(place)
    before = (place / "mlflow.db").read_bytes()
    files(place, TWICE)
    with pytest.raises(InputError, match=r"holds both mlflow\.db and a file store of MLflow\. Name the one you mean"):
        read(place)
    assert (place / "mlflow.db").read_bytes() == before
    empty = tmp_path / "empty"
    empty.mkdir()
    database(empty, ())
    with pytest.raises(InputError, match=r"mlflow\.db: no runs of MLflow in it"):
        read(empty)


@pytest.mark.parametrize(
    "metric", ["eval_accuracy", "eval/acc", "test_f1", "rouge1", "exact_match", "eval_bleu", "score"]
)
def test_metrics_that_are_no_losses_by_name(tmp_path, metric):
    path = tmp_path / "runs.csv"
    path.write_text(f"Name,State,model,samples,{metric}\nx,finished,a,200,.3\ny,finished,b,200,.4\n")
    message = f"the metric {metric} is by its name no loss: higher is better there"
    with pytest.raises(InputError, match=message):
        read(path, metric=metric)
    with pytest.raises(InputError, match=message):
        read(trainer(tmp_path, TWICE), metric=metric)
    with pytest.raises(InputError, match="the metric eval_perplexity is a perplexity by its name; give losses"):
        read(tmp_path, metric="eval_perplexity")


def test_options_that_a_source_does_not_have(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("model,0,200\na,3,2\nb,4,3\n")
    with pytest.raises(InputError, match=r"table\.csv: pattern does not apply to a table of losses; remove it"):
        read(path, pattern="{model}-{samples}")
    with pytest.raises(InputError, match="samples does not apply to runs of a Trainer; remove it"):
        read(trainer(tmp_path, TWICE), samples="n")


def test_seeds_in_a_long_table(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("model,samples,loss\na,200,3\na,200,\na,200,4\nb,200,2\n")
    with pytest.raises(
        InputError, match=r"row 3: a at 200 samples is there twice; keep one row \(or their mean: --rep"
    ):
        read(path)
    assert read(path, repeats="mean").at(200).tolist() == [3.5, 2.0]
    assert read(path, repeats="lowest").at(200).tolist() == [3.0, 2.0]
    with pytest.raises(InputError, match="repeats='best' is not known"):
        read(path, repeats="best")


def test_a_long_journal_is_read(tmp_path):
    lines, path = 40_000, tmp_path / "runs.jsonl"
    with path.open("w") as file:
        for i in range(lines):
            model = "ab"[i % 2]
            file.write(f'{{"key":"k{i}","candidate":"{model}","size":{i // 2 + 1},"test_loss":2.5,"facts":{{}}}}\n')
    curves = read(path)
    assert curves.losses.shape == (2, lines // 2)
    assert (curves.losses == 2.5).all()


def test_a_loss_at_step_0_that_is_the_lowest_is_told(tmp_path):
    """Who counts steps from 0 has the first loss after training there."""
    runs = [("a", 200, "finished", ((0, 2.0), (1, 3.5), (2, 3.2))), *TWICE[1:]]
    curves = read(trainer(tmp_path, runs))
    np.testing.assert_array_equal(curves.losses, [[2.0, 3.2], [NAN, 3.4]])
    assert [note.partition(": ")[2] for note in curves.notes] == [
        "the loss of a at 200 samples at step 0, which is before training, is 2, and the lowest after it is 3.2"
    ]


def test_losses_of_one_model_before_training_that_differ_are_told(tmp_path):
    runs = [("a", n, "finished", ((0, loss), (10, 3.0))) for n, loss in ((200, 4.0), (400, 4.5))]
    curves = read(trainer(tmp_path, [*runs, *TWICE[1:]]))
    assert curves.at(0)[0] == 4.0
    assert len(curves.notes) == 1
    assert curves.notes[0].startswith("the loss of a before training is 4 in ")
    assert " which counts, and 4.5 in " in curves.notes[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"step": 10, "eval_loss": true}', "is 'True', not a number"),
        ('{"step": 1' + "0" * 400 + ', "eval_loss": 2.0}', "step is larger than any number can be"),
        ('{"step": 10, "eval_loss": 1' + "0" * 400 + "}", "is larger than any number can be"),
        ('{"step": NaN, "eval_loss": 2.0}', "step is nan; steps are numbers"),
    ],
)
def test_numbers_of_a_trainer_that_are_none(tmp_path, entry, message):
    trainer(tmp_path, TWICE[1:])
    place = tmp_path / "a" / "n200"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(f'{{"global_step": 10, "log_history": [{entry}]}}')
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_a_loss_that_is_null_is_none(tmp_path):
    runs = [("a", 200, "finished", ((10, 3.5), (20, None))), *TWICE[1:]]
    assert read(trainer(tmp_path, runs)).at(200).tolist() == [3.5, 3.4]


def test_models_that_mlflow_logged_are_no_runs(tmp_path):
    store = files(tmp_path, [("a", 200, "finished", ((10, 3.5),)), ("b", 200, "finished", ((10, 3.4),))])
    logged = store / "1" / "models" / "m-1"
    (logged / "metrics").mkdir(parents=True)
    (logged / "metrics" / "eval_loss").write_text("1 1.0 1\n")
    (logged / "meta.yaml").write_text("model_id: m-1\nname: m\n")
    assert read(store).at(200).tolist() == [3.5, 3.4]
