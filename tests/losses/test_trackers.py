"""Losses from other tools' files; the fixtures are small files in the formats those tools write."""

import numpy as np
import pytest

from lensjax import losses as losses_module
from lensjax.errors import InputError
from lensjax.losses import read, read_journal, read_trainer_states, read_wandb
from support.trainer_states import trainer_state


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
