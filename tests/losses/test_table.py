import dataclasses

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.table import read_losses


@pytest.fixture
def write(tmp_path):
    def write(text, name="table.csv"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_published_tables_hold_thirty_models_at_fifteen_sizes():
    for name in ("flan", "gigaword", "wmt19"):
        curves = read_losses(f"published:{name}")
        assert curves.losses.shape == (30, 15)
        assert curves.sizes.tolist() == [0, *(200 * 2**k for k in range(14))]
        assert np.isfinite(curves.losses).all()
        assert (curves.parameters > 1e7).all()
    assert curves.at(200)[curves.names.index("gpt2")] == pytest.approx(curves.losses[17, 1])


def test_wide_table_sorts_sizes_and_keeps_missing_points(write):
    curves = read_losses(write("model,400,0,200,parameters,family\na,1.5,3,2,1e6,x\nb,,2.5,1.75,2e6,y\n"))
    assert curves.names == ("a", "b")
    assert curves.sizes.tolist() == [0, 200, 400]
    np.testing.assert_array_equal(curves.losses, [[3, 2, 1.5], [2.5, 1.75, np.nan]])
    assert curves.parameters.tolist() == [1e6, 2e6]
    assert curves.families == ("x", "y")


def test_long_table_equals_the_wide_one(write):
    wide = read_losses(write("model,0,200,400,parameters\na,3,2,1.5,1e6\nb,2.5,1.75,,2e6\n"))
    rows = "a,400,1.5,1e6\na,0,3,1e6\nb,0,2.5,2e6\nb,200,1.75,2e6\na,200,2,\nb,400,,2e6\n"
    long = read_losses(write("model,samples,loss,parameters\n" + rows, "long.csv"))
    assert long.names == wide.names
    np.testing.assert_array_equal(long.sizes, wide.sizes)
    np.testing.assert_array_equal(long.losses, wide.losses)
    np.testing.assert_array_equal(long.parameters, wide.parameters)


def test_facts_of_models_are_read_from_wide_and_long_tables(write):
    header = "Log_ME,model,pl_alpha,0,200,size\n"
    wide = read_losses(write(header + "-0.5,a,2.25,3,2,1e6\n,b,3.5,2.5,1.75,2e6\n"))
    assert wide.names == ("a", "b")
    assert wide.sizes.tolist() == [0, 200]
    assert wide.parameters.tolist() == [1e6, 2e6]
    assert list(wide.facts) == ["pl_alpha", "log_me"]
    np.testing.assert_array_equal(wide.facts["log_me"], [-0.5, np.nan])
    rows = "a,0,3,,2.25\na,200,2,-0.5,\nb,0,2.5,,3.5\nb,200,1.75,,3.5\n"
    long = read_losses(write("model,samples,loss,log_me,pl_alpha\n" + rows))
    for curves in (long, wide.visible(0), wide.rows([0, 1])):
        for name, values in wide.facts.items():
            np.testing.assert_array_equal(curves.facts[name], values)
    assert wide.rows([1]).facts["pl_alpha"].tolist() == [3.5]
    assert dataclasses.replace(wide, source="x").facts["pl_alpha"].tolist() == [2.25, 3.5]
    # Without a column called model, the first that is nothing else holds the names.
    assert read_losses(write("log_me,what,0,200\n1,a,3,2\n2,b,2,1\n")).names == ("a", "b")
    assert read_losses(write("model,0,200\na,3,2\nb,2,1\n")).facts == {}


def test_a_long_table_may_call_the_samples_size(write):
    curves = read_losses(write("model,size,loss\na,0,3\na,200,2\nb,0,2\nb,200,1\n"))
    assert curves.sizes.tolist() == [0, 200]
    assert curves.parameters is None


def test_thousands_may_be_separated(write):
    assert read_losses(write('model,0,"1,600",3_200\na,3,2,1\nb,2,1,1\n')).sizes.tolist() == [0, 1600, 3200]


def test_tab_separated_table_and_byte_order_mark(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes("﻿model\t0\t200\na\t3\t2\nb\t2\t1\n".encode())
    assert read_losses(str(path)).losses.tolist() == [[3, 2], [2, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table.csv: the file is empty; it needs a header and at least two models."),
        ("model,0,200\na,3,0\nb,2,1\n", "loss of a at 200 samples is 0; it must be positive and finite"),
        ("model,0,200\na,3,-1\nb,2,1\n", "loss of a at 200 samples is -1; it must be positive"),
        ("model,0,200\na,3,1\nb,nan,1\n", "loss of b at 0 samples is nan; it must be positive"),
        ("model,0,200\na,3,1\nb,inf,1\n", "loss of b at 0 samples is inf; it must be positive"),
        ("model,0,200\na,3,1\nb,two,1\n", "loss of b at 0 samples is 'two', not a number"),
        ("model,0,200\na,3,1\na,2,1\n", "model a has more than one row"),
        ("model,200,2e2\na,3,1\nb,2,1\n", "size 200 has more than one column"),
        ("model,0,200\na,3,1\n", "1 model(s); choosing needs at least two candidates"),
        ("model,loss\na,3\nb,2\n", "no size column. Name columns after the number of training samples"),
        ("0,200\n3,1\n2,1\n", "no column with the models' names"),
        ("model,-200\na,1\nb,1\n", "column '-200' is -200; a number of training samples is a whole number"),
        ("model,0,200\na,3\nb,2,1\n", "row 2: 2 cells, but the header has 3 columns"),
        ("model,0,200\n,3,1\nb,2,1\n", "row 2: the model has no name"),
        (
            "model,0,200,size\na,3,1,-5\nb,2,1,5\n",
            "size of a is -5; it must be positive and finite (number of weights)",
        ),
        ("model,samples,loss\na,0,3\na,0,3\nb,0,2\n", "row 3: a at 0 samples is there twice"),
        ("model,samples,loss\na,x,3\nb,0,2\n", "row 2: samples is 'x', not a number"),
        ("model,samples,loss\n,0,3\nb,0,2\n", "row 2: the model has no name"),
        (
            "model,samples,loss,params\na,0,3,5\na,1,3,6\nb,0,2,1\n",
            "row 3: a has 6 parameters here and 5 above; use one number.",
        ),
        ("samples,loss\n0,3\n1,2\n", "no column with the models' names"),
        ("model,0,1600 samples\na,3,1\nb,2,1\n", "column '1600 samples' is not a number of samples"),
        ("model,0,1e400\na,3,1\nb,2,1\n", "column '1e400' is inf; a number of training samples is a whole number"),
        ("model,0,200,log_me\na,3,1,x\nb,2,1,1\n", "log_me of a is 'x', not a number; leave the cell empty if"),
        ("model,0,200,pl_alpha\na,3,1,2\nb,2,1,inf\n", "pl_alpha of b is inf; it must be finite. Leave the cell"),
        (
            "model,samples,loss,log_me\na,0,3,1\na,1,3,2\nb,0,2,1\n",
            "row 3: log_me of a is 2 here and 1 above; use one.",
        ),
        ("log_me,0,200\n1,3,2\n2,2,1\n", "no column with the models' names; add a column 'model'"),
        ("model,0,200\n\n\na,3\nb,2,1\n", "row 4: 2 cells, but the header has 3 columns"),
    ],
)
def test_a_bad_table_gets_one_clear_message(write, text, message):
    with pytest.raises(InputError) as error:
        read_losses(write(text))
    assert message in str(error.value)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv: no such file\. Give a CSV file"):
        read_losses(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match=r"published:mars: no such published table\. There are: published:flan"):
        read_losses("published:mars")
    # Of whichever kind it is.
    with pytest.raises(InputError, match=r"published:Novel: no such published table.*Did you mean live:novels\?$"):
        read_losses("published:Novel")
    with pytest.raises(InputError, match=r"flam: no such file.*Did you mean published:flan\?$"):
        read_losses(tmp_path / "flam")
    with pytest.raises(InputError, match="is a directory"):
        read_losses(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not a readable CSV file"):
        read_losses(path)


def test_visible_hides_what_lies_above():
    curves = read_losses("published:flan")
    seen = curves.visible(3200)
    assert seen.sizes.tolist() == [0, 200, 400, 800, 1600, 3200]
    assert seen.losses.shape == (30, 6)
    assert np.isnan(seen.at(6400)).all()
    assert curves.rows([2, 0]).names == (curves.names[2], curves.names[0])


def test_curves_refuse_impossible_arrays():
    with pytest.raises(InputError, match="sizes must be ascending"):
        Curves(("a",), np.array([2.0, 1.0]), np.ones((1, 2)))
    with pytest.raises(InputError, match="losses have shape"):
        Curves(("a",), np.array([1.0, 2.0]), np.ones((2, 2)))
    with pytest.raises(InputError, match="loss of a at 2 samples is -1"):
        Curves(("a",), np.array([1.0, 2.0]), np.array([[1.0, -1.0]]))
    for values in ([1.0, 2.0], [np.inf]):
        with pytest.raises(
            InputError, match=r"curves: log_me is .*; it must be one finite number for each of the 1 can"
        ):
            Curves(("a",), np.array([1.0]), np.array([[1.0]]), facts={"log_me": values})
