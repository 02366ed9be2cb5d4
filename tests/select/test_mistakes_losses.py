"""Mistakes in losses that were measured already, and in what is asked of them."""

import json
from pathlib import Path

import pytest

HEADER = "model,0,200,400,800\n"
ROWS = "a,4,3,2.5,2.2\nb,5,4,3.5,3.2\n"
PUBLISHED = "published:flan, published:gigaword, published:wmt19."
LIVE = "live:definitions, live:novels, live:packages."
PACKAGED = f"{PUBLISHED[:-1]}, {LIVE}"
UNMEASURED = "Leave the cell empty if it was not measured."
COMMAS = "save it with commas between columns and points in numbers."
NO_SIZES = (
    "no size column. Name columns after the number of training samples (0, 200, 400, ...), or use the columns model, "
    "samples, loss. Found:"
)
NAMES = "as {model}/{samples} or {model}-{samples} or {model}_{samples} does."


@pytest.fixture
def table(mistake):
    """Return the message about a table: text, options -> message."""

    def table(text, *options, name="my.csv"):
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return mistake("--losses", name, *(options or ("--target", 10000)), good=False)

    return table


def test_tables_that_are_not_there(mistake):
    Path("tabel.csv").write_text(HEADER + ROWS)

    def message(source):
        return mistake("--losses", source, "--target", 10000, good=False)

    assert message("table.csv") == (
        f"table.csv: no such file. Give a CSV file of losses or one of {PACKAGED} Did you mean tabel.csv?"
    )
    assert message("flan") == (
        f"flan: no such file. Give a CSV file of losses or one of {PACKAGED} Did you mean published:flan?"
    )
    missing = "no such published table. There are:"
    assert message("published:flam") == f"published:flam: {missing} {PUBLISHED} Did you mean published:flan?"
    assert message("published:WMT19") == f"published:WMT19: {missing} {PUBLISHED} Did you mean published:wmt19?"
    assert message("published:mars") == f"published:mars: {missing} {PUBLISHED}"
    missing = "no such live table. There are:"
    assert message("live:novel") == f"live:novel: {missing} {LIVE} Did you mean live:novels?"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("-2.5", f"-2.5; it must be positive and finite (nats per token). {UNMEASURED}"),
        ("0", f"0; it must be positive and finite (nats per token). {UNMEASURED}"),
        ("nan", f"nan; it must be positive and finite (nats per token). {UNMEASURED}"),
        ("n/a", "'n/a', not a number. Use nats per token; leave the cell empty if it was not measured."),
        (
            '"2,5"',
            "'2,5', not a number. Use nats per token; leave the cell empty if it was not measured. Write 2.5: the "
            "decimal sign is a point.",
        ),
        (
            "25%",
            "'25%', not a number. Use nats per token; leave the cell empty if it was not measured. It is a percentage.",
        ),
    ],
)
def test_cells_that_are_no_losses(table, cell, message):
    assert table(HEADER + ROWS.replace("2.5", cell)) == f"my.csv: loss of a at 400 samples is {message}"


@pytest.mark.parametrize(
    ("rows", "ends"),
    [("a,30,40,50,60\nb,31,42,51,66\n", "30 to 60"), ("a,,.4,.5,.6\nb,.31,.42,.51,.66\n", "0.4 to 0.6")],
)
def test_accuracies_instead_of_losses(table, rows, ends):
    assert table(HEADER + rows) == (
        f"my.csv: the losses of all 2 models rise with the number of samples (the first from {ends}); are they "
        "accuracies? Give test losses: mean cross-entropy, nats per token. If they are losses, say so: "
        "--lower-is-better."
    )


@pytest.mark.parametrize("rows", ["a,1,1.2,1.4,1.6\nb,1.1,1.15,1.3,1.5\n", "a,.4,.5,.6,.7\nb,.9,.8,.7,.6\n"])
def test_losses_of_models_that_overfit_are_no_mistake(tmp_path, command, rows):
    file = tmp_path / "overfit.csv"
    file.write_text(HEADER + rows)
    status, text = command("--losses", file, "--target", 10000, "--lower-is-better")
    assert status == 0
    assert text.startswith("Fine-tune b")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("model,0,200,400,1k", "column '1k' is not a number of samples; write the number alone, e.g. 1600."),
        ("model,0,200,400,D800", "column 'D800' is not a number of samples; write the number alone, e.g. 1600."),
        (
            "model,0,200,400,800 samples",
            "column '800 samples' is not a number of samples; write the number alone, e.g. 1600.",
        ),
        ("model,zero-shot,200,400,800", "column 'zero-shot' is not a number of samples; write 0."),
        ("model,none,few,more,most", f"{NO_SIZES} model, none, few, more, most."),
        ("model,0,200,200,800", "size 200 has more than one column; keep one."),
        ("model,0,200,400,-800", "column '-800' is -800; a number of training samples is a whole number, 0 or more."),
        ("0,200,400,800,1600", "no column with the models' names; add a column 'model'."),
    ],
)
def test_columns(table, header, message):
    assert table(f"{header}\n{ROWS}") == f"my.csv: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": the file is empty; it needs a header and at least two models."),
        (HEADER, ": 0 model(s); choosing needs at least two candidates."),
        (HEADER + "a,4,3,2.5,2.2\n", ": 1 model(s); choosing needs at least two candidates."),
        (HEADER + ROWS + "a,4,3,2.5,2.1\n", ": model a has more than one row; give each candidate one name."),
        (HEADER + ROWS.replace("b", ""), ", row 3: the model has no name."),
        (
            HEADER + ROWS.replace(",2.2", ""),
            ", row 2: 4 cells, but the header has 5 columns. Leave a cell empty, not out, where nothing was measured.",
        ),
        (
            ROWS,
            ": column '2.5' is 2.5; a number of training samples is a whole number, 0 or more. Does the first line "
            "name the columns?",
        ),
        (
            "samples,gpt2,opt\n0,4,5\n200,3,4\n",
            f": {NO_SIZES} samples, gpt2, opt. If its columns are models, turn it: a row for each model.",
        ),
        (
            (HEADER + ROWS).replace(",", ";"),
            f": semicolons separate its columns ('model;0;200;400;800'); {COMMAS}",
        ),
        (
            (HEADER + ROWS).replace(",", ";").replace(".", ","),
            f": semicolons separate its columns ('model;0;200;400;800'); {COMMAS}",
        ),
        (
            (HEADER + ROWS).replace(",", "\t"),
            f": tabs separate its columns ('model\\t0\\t200\\t400\\t800'); {COMMAS}",
        ),
        ((HEADER + ROWS).encode("utf-16"), ": not a readable CSV file: it is UTF-16 text: save it as UTF-8."),
        (
            (HEADER + ROWS.replace("b", "\xe9")).encode("latin-1"),
            ": not a readable CSV file: line 3 has the byte 0xe9, which is '\xe9' in Latin-1: save it as UTF-8 text.",
        ),
        (
            "model,parameters,200,400\na,124M,3,2\nb,350M,3,2\n",
            ": parameters of a is '124M', not a number. Use number of weights; leave the cell empty if it was not "
            "measured. Write 124000000.",
        ),
        (
            "model,parameters,200,400\na,0,3,2\nb,350,3,2\n",
            f": parameters of a is 0; it must be positive and finite (number of weights). {UNMEASURED}",
        ),
        (
            "model,samples,loss\na,1.5k,3\nb,1k,4\n",
            ", row 2: samples is '1.5k', not a number of training samples. Write 1500.",
        ),
        (
            "model,samples,loss\na,200,3\na,200,4\nb,200,3\n",
            ", row 3: a at 200 samples is there twice; keep one row (or their mean: --repeats mean).",
        ),
        ("model,samples,accuracy\na,200,.3\nb,200,.4\n", f": {NO_SIZES} model, samples, accuracy."),
    ],
)
def test_tables_in_another_shape(table, text, message):
    assert table(text) == f"my.csv{message}"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("my.xlsx", "export the sheet as CSV in UTF-8"),
        ("selection.json", "write its losses as CSV"),
        ("my.parquet", "save it as CSV"),
    ],
)
def test_tables_of_another_kind(table, name, remedy):
    assert table(b"PK\x03\x04\xff", name=name) == (
        f"{name}: {remedy}; a table of losses is a CSV file (.csv, or .tsv with tabs)."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--method", "averaged"),
            "my.csv: say for how many training samples you will fine-tune the chosen model: --target N.",
        ),
        (
            ("--target", 300),
            "--target 300 lies below sizes that were measured (0, 200, 400, 800). Raise --target, or hide sizes with "
            "--visible N.",
        ),
        (
            ("--target", 400, "--visible", 800),
            "--target 400 is not above the largest visible size 800. Raise --target, or hide sizes with --visible N.",
        ),
        (
            ("--target", 800, "--visible", 800),
            "--target 800 is not above the largest visible size 800. Raise --target, or hide sizes with --visible N.",
        ),
        (
            ("--target", 10000, "--visible", 100),
            "my.csv: a has no visible loss above 0 samples, but method averaged needs one. Fine-tune it on a small "
            "subset, make more of its losses visible (--visible), or leave it out.",
        ),
        (
            ("--target", 10000, "--visible", 400, "--method", "lens"),
            "my.csv: a has 2 visible loss(es) above 0 samples, but method lens needs 3. Measure it at more sizes, make "
            "more of them visible (--visible), or leave it out.",
        ),
        (
            ("--target", 10000, "--method", "model_size"),
            "my.csv: the number of parameters of a is not known, which method model_size needs. Add a column "
            "'parameters'.",
        ),
        (
            ("--target", 10000, "--method", "nlp_metrics"),
            "my.csv: pl_alpha of a is not known, which method nlp_metrics needs. Add a column 'pl_alpha' "
            "(lensjax.selectors.nlp_metrics finds it from the weights), or choose another method.",
        ),
        (
            ("--target", 10000, "--method", "log_me"),
            "my.csv: log_me of a is not known, which method log_me needs. Add a column 'log_me' "
            "(lensjax.selectors.log_me finds it from features and target tokens), or choose another method.",
        ),
        (
            ("--target", 10000, "--method", "lensllm"),
            "method 'lensllm' is unknown; there are: averaged, lens, ats, rectified, power, subtuning, zero_shot, "
            "model_size, nlp_metrics, log_me and all. Did you mean lens?",
        ),
        (
            ("--target", 10000, "--tokens-per-sample", 0),
            "--tokens-per-sample is 0; it must be positive.",
        ),
    ],
)
def test_questions_that_a_table_does_not_answer(table, options, message):
    assert table(HEADER + ROWS, *options) == message


def test_no_loss_before_fine_tuning(table):
    message = table("model,200,400\na,3,2\nb,4,3\n", "--target", 10000, "--method", "zero_shot")
    assert message == (
        "my.csv: a has no loss at 0 samples, which method zero_shot needs. Evaluate it before fine-tuning, or choose "
        "another method."
    )


@pytest.fixture
def runs(mistake):
    """Return the message about a directory of Trainer runs: name -> log_history, options -> message."""

    def runs(histories, source="runs_of_mine"):
        for name, history in histories.items():
            directory = Path("runs_of_mine", name)
            directory.mkdir(parents=True)
            state = history if isinstance(history, str) else json.dumps({"global_step": 9, "log_history": history})
            (directory / "trainer_state.json").write_text(state)
        return mistake("--losses", source, "--target", 10000, good=False)

    return runs


EVALUATED = [{"step": 9, "eval_loss": 2.0}]


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (
            {"first": EVALUATED, "second": EVALUATED},
            "runs_of_mine/first: the name 'first' does not say model and number of samples "
            f"{NAMES} Rename the run, or say how names are made: pattern='{{model}}-n{{samples}}', say (--pattern; * "
            "for what is to be left out).",
        ),
        (
            {"a-n200": [{"step": 9, "loss": 2.0}], "b-n200": EVALUATED},
            "runs_of_mine/a-n200/trainer_state.json: log_history has no 'eval_loss'. Evaluate while training "
            "(eval_strategy), or say which metric to take; there are: loss.",
        ),
        (
            {"a-n200": [{"step": 9, "eval_loss": -2.0}], "b-n200": EVALUATED},
            "runs_of_mine/a-n200/trainer_state.json: eval_loss is -2; losses are positive (nats per token). Is it the "
            "right metric?",
        ),
        (
            {"a-n200": "{", "b-n200": EVALUATED},
            "runs_of_mine/a-n200/trainer_state.json: not readable as JSON (Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)). Leave this run out or make it again.",
        ),
        ({"a-n200": EVALUATED}, "runs_of_mine: 1 model(s); choosing needs at least two candidates."),
    ],
)
def test_runs_of_a_trainer(runs, histories, message):
    assert runs(histories) == message


def test_one_run_of_a_trainer(runs):
    file = "runs_of_mine/a-n200/trainer_state.json"
    assert runs({"a-n200": EVALUATED}, file) == (
        f"{file}: one run makes no curve. Name the directory that holds the runs of all models, laid out as "
        "MODEL/SAMPLES/trainer_state.json."
    )


def test_other_directories_and_files(mistake):
    def message(source, text):
        Path("d").mkdir(exist_ok=True)
        Path(source).write_text(text)
        return mistake("--losses", source if source.endswith(".csv") else "d", "--target", 10000, good=False)

    kinds = "a directory without runs.jsonl, trainer_state.json files or an MLflow store."
    assert message("d/notes.txt", "") == f"d: {kinds} Name one with those, or a CSV file of losses."
    assert message("d/runs.jsonl", "{\n{}\n") == "d/runs.jsonl, line 1: not a run record. Remove that line."
    assert message("chart.csv", "Step,a-n200 - eval/loss,a-n200 - train/loss\n1,2,3\n") == (
        "chart.csv: it is not clear which metric is the loss; there are: eval/loss, train/loss. Name one: metric=... "
        "(--metric)."
    )
    assert message("runs.csv", "Name,State,eval_loss\nfirst,finished,2\nsecond,finished,3\n") == (
        f"runs.csv, row 2: the name 'first' does not say model and number of samples {NAMES} Rename the run, or say "
        "how names are made: pattern='{model}-n{samples}', say (--pattern; * for what is to be left out)."
    )
