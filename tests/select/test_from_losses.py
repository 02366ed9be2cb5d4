import json
import re
from pathlib import Path

import numpy as np
import pytest

import lensjax
from lensjax.errors import InputError
from lensjax.losses.table import read_losses
from lensjax.metrics import pear_corr, rel_acc
from lensjax.report.schema import problems
from lensjax.select.cli import main
from lensjax.selectors import SELECTORS


def test_thirty_models_are_ranked_from_published_losses(command, tmp_path):
    status, text = command("--losses", "published:flan", "--method", "lens", "--json", tmp_path / "all.json")
    assert status == 0
    document = json.loads((tmp_path / "all.json").read_text())
    ranking = document["methods"]["lens"]["ranking"]
    assert [r["rank"] for r in ranking] == list(range(1, 31))
    assert {r["name"] for r in ranking} == set(read_losses("published:flan").names)
    assert text.startswith(
        f"Fine-tune {ranking[0]['name']}: expected test loss {ranking[0]['predicted_loss']:.4f} nats"
    )
    predicted = [r["predicted_loss"] for r in ranking]
    assert predicted == sorted(predicted)
    for row in ranking:
        # What is printed must be the law at the target, and the phase must follow from D* = F^(1/beta).
        law = row["B"] / (row["F"] + 1638400 ** row["beta"]) + row["E"]
        assert row["predicted_loss"] == pytest.approx(law, rel=1e-9)
        assert row["transition"] == pytest.approx(row["F"] ** (1 / row["beta"]), rel=1e-9)
        assert row["phase"] == ("power" if row["transition"] <= 204800 else "pre-power")


def test_the_default_says_how_sure_it_is(command, tmp_path):
    status, text = command("--losses", "published:gigaword", "--json", tmp_path / "j.json")
    assert status == 0
    document = json.loads((tmp_path / "j.json").read_text())
    assert document["method"] == "averaged"
    found = document["methods"]["averaged"]
    assert sum(row["best_probability"] for row in found["ranking"]) == pytest.approx(1)
    for row in found["ranking"]:
        low, high = row["interval"]
        assert 0 < low < row["predicted_loss"] < high
    by_name = {row["name"]: row["best_probability"] for row in found["ranking"]}
    likely = [by_name[name] for name in found["credible_set"]]
    assert sum(likely) >= found["certainty"] == 0.9
    assert sum(likely[:-1]) < 0.9
    low, high = found["ranking"][0]["interval"]
    assert f"90 % interval {low:.4f} to {high:.4f}; google/t5-v1_1-base is the best of all with probability" in text
    assert "P(best)  measured" in text


def test_one_size_is_enough_for_a_guess(command, tmp_path):
    status, text = command("--losses", table(tmp_path), "--target", "1e6", "--visible", "200")
    assert status == 0
    assert text.count("one size only: a guess") == 3


def test_cost_is_six_n_d_over_the_sizes_used(command, tmp_path):
    command("--losses", "published:flan", "--method", "subtuning", "--visible", "400", "--json", tmp_path / "j.json")
    document = json.loads((tmp_path / "j.json").read_text())
    parameters = read_losses("published:flan").parameters
    assert document["methods"]["subtuning"]["flops"] == pytest.approx(6 * 400 * parameters.sum())
    assert document["full_flops"] == pytest.approx(6 * 1638400 * parameters.sum())
    visible = ("--losses", "published:flan", "--method", "subtuning", "--visible", "400")
    command(*visible, "--json", tmp_path / "k.json", "--tokens-per-sample", "30")
    more = json.loads((tmp_path / "k.json").read_text())
    assert more["methods"]["subtuning"]["flops"] == pytest.approx(30 * 6 * 400 * parameters.sum())


def test_all_methods_are_compared_with_the_truth(command, tmp_path):
    status, text = command("--losses", "published:wmt19", "--method", "all", "--json", tmp_path / "j.json")
    assert status == 0
    document = json.loads((tmp_path / "j.json").read_text())
    assert [*document["methods"], "nlp_metrics", "log_me"] == list(SELECTORS)
    # Nobody published weights' spectra and features with these losses.
    assert set(document["refused_methods"]) == {"nlp_metrics", "log_me"}
    assert "  log_me: published:wmt19: log_me of MBZUAI/LaMini-GPT-124M is not known, which method log_me" in text
    curves = read_losses("published:wmt19")
    truth = curves.at(1638400)
    for name, found in document["methods"].items():
        scores = SELECTORS[name](curves.visible(204800), 1638400)
        assert found["metrics"]["PearCorr"] == pytest.approx(pear_corr(scores.score, truth))
        assert found["metrics"]["RelAcc"] == pytest.approx(rel_acc(scores.score, truth))
        line = next(x for x in text.splitlines() if re.match(rf"\s+{name}\s", x))
        assert f"{100 * rel_acc(scores.score, truth):.1f}" in line
    assert "RelAcc" in text


def test_facts_in_a_table_make_other_methods_possible(command, tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("model,0,200,400,800,pl_alpha,log_me\na,5,4,3.4,3,2.5,-0.25\nb,5,4.1,3.5,3.2,3.5,0.5\n")
    status, text = command("--losses", path, "--target", 1e4, "--method", "all", "--json", tmp_path / "j.json")
    assert status == 0
    found = json.loads((tmp_path / "j.json").read_text())
    assert found["methods"]["nlp_metrics"]["best"] == "a"
    assert found["methods"]["log_me"]["best"] == "b"
    assert [entry["score"] for entry in found["methods"]["log_me"]["ranking"]] == [-0.5, 0.25]
    assert problems(found) == []
    # An empty cell: the method says of whom, and the others go on.
    path.write_text(path.read_text().replace(",0.5\n", ",\n"))
    assert command("--losses", path, "--target", 1e4, "--method", "nlp_metrics")[1].startswith("Fine-tune a ")
    text = command("--losses", path, "--target", 1e4, "--method", "all")[1]
    assert "  log_me: " + str(path) + ": log_me of b is not known" in text


def table(tmp_path, sizes=(0, 200, 400, 800, 1600), models=3):
    rows = ["model," + ",".join(map(str, sizes)) + ",parameters"]
    for m in range(models):
        losses = [2 + m / 10 + 3 / (2 + d**0.3) for d in sizes]
        rows.append(f"m{m}," + ",".join(f"{x:.6f}" for x in losses) + f",{10 ** (6 + m)}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_table_without_truth_is_ranked_for_a_target_above_it(command, tmp_path):
    status, text = command("--losses", table(tmp_path), "--target", "1e6")
    assert status == 0
    assert text.startswith("Fine-tune m0: expected test loss")
    assert "at 1,000,000 samples" in text
    assert "RelAcc" not in text


def test_a_target_inside_the_table_is_a_rehearsal_from_the_sizes_below_it(command, tmp_path):
    command("--losses", table(tmp_path), "--target", "1600", "--json", tmp_path / "j.json")
    document = json.loads((tmp_path / "j.json").read_text())
    assert document["sizes"] == [0, 200, 400, 800]
    assert document["candidates"][0]["true_loss"] == pytest.approx(2 + 3 / (2 + 1600**0.3), abs=1e-5)
    assert document["methods"]["averaged"]["metrics"]["RelAcc"] == 1.0


def test_methods_that_the_losses_do_not_allow_are_listed(command, tmp_path):
    status, text = command("--losses", table(tmp_path), "--target", "1e6", "--visible", "800", "--method", "all")
    assert status == 0
    assert "Methods that these losses do not allow:\n  power:" in text
    assert re.search(r"power: .*m0 has 3 visible loss\(es\) above 0 samples, but method power needs 4\.", text)


def test_a_file_that_cannot_be_written_does_not_lose_the_result(tmp_path, capsys):
    arguments = ["--losses", str(table(tmp_path)), "--target", "1e6", "--json", "/proc/none.json"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Fine-tune m0")
    assert captured.err.startswith("lensjax.select: /proc/none.json: No such file or directory.")


def test_a_special_file_is_written_to_not_replaced(command, tmp_path):
    status, _ = command("--losses", table(tmp_path), "--target", "1e6", "--json", "/dev/null")
    assert status == 0
    assert Path("/dev/null").is_char_device()


def test_a_missing_point_is_allowed(command, tmp_path):
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    cells[2] = ""
    lines[1] = ",".join(cells)
    path.write_text("\n".join(lines))
    status, text = command("--losses", path, "--target", "1e6")
    assert status == 0
    assert "m0" in text


def test_an_unknown_cost_is_said_to_be_unknown(command, tmp_path):
    path = table(tmp_path)
    path.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    status, text = command("--losses", path, "--target", "1e6", "--json", tmp_path / "j.json")
    assert status == 0
    assert "Cost: unknown" in text
    assert json.loads((tmp_path / "j.json").read_text())["full_flops"] is None


def test_every_number_of_the_json_is_finite_or_null(command, tmp_path):
    command("--losses", table(tmp_path), "--target", "1e6", "--method", "all", "--json", tmp_path / "j.json")
    text = (tmp_path / "j.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say for how many training samples you will fine-tune the chosen model: --target N."),
        (
            ["--target", "500"],
            "--target 500 lies below sizes that were measured (0, 200, 400, 800, 1600). Raise --target",
        ),
        (["--target", "800", "--visible", "1600"], "--target 800 is not above the largest visible size 1600."),
        (["--target", "200"], "m0 has no visible loss above 0 samples, but method averaged needs one."),
        (
            ["--target", "1e6", "--visible", "400", "--method", "lens"],
            "m0 has 2 visible loss(es) above 0 samples, but method lens needs 3.",
        ),
        (["--target", "1e6", "--visible", "400", "--method", "rectified"], "m0 has 3 visible loss(es), but method"),
        (["--target", "1e6", "--visible", "0.5"], "argument --visible: 0.5 is not a whole number above 0."),
        (["--target", "none"], "argument --target: 'none' is not a number."),
        (
            ["--target", "1e6", "--method", "magic"],
            "method 'magic' is unknown; there are: averaged, lens, ats, ",
        ),
        (["--target", "1e6", "--gamma", "2"], "gamma is 2; a line needs at least 3 points"),
        (["--target", "1e6", "--tau", "-1"], "tau is -1; the deviation allowed is a positive number."),
        (["--target", "1e6", "--models", "a", "b"], "--models belongs to selection by fine-tuning; remove --models or"),
        (["--target", "1e6", "--tokens-per-sample", "0"], "--tokens-per-sample is 0; it must be positive."),
        (["--target", "1e6", "--json", "nowhere/x.json"], "--json nowhere/x.json: there is no directory nowhere"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate. See python -m lensjax.select --help."),
    ],
)
def test_bad_options_get_one_clear_message(refused, tmp_path, options, message):
    assert message in refused("--losses", table(tmp_path), *options)


def test_a_bad_table_gets_one_clear_message(refused, tmp_path):
    assert "nowhere.csv: no such file." in refused("--losses", tmp_path / "nowhere.csv", "--target", "1e6")
    path = tmp_path / "t.csv"
    path.write_text("model,0,200\na,1,0\nb,2,1\n")
    assert "loss of a at 200 samples is 0; it must be positive" in refused("--losses", path, "--target", "1e6")


def test_methods_that_need_missing_facts_say_so(refused, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("model,200,400,800,1600\na,4,3,2.5,2.2\nb,5,4,3,\n")
    target = ("--target", "1e6")
    assert "a has no loss at 0 samples" in refused("--losses", path, *target, "--method", "zero_shot")
    assert "the number of parameters of a is not known" in refused("--losses", path, *target, "--method", "model_size")
    assert "b has no loss at 1600 samples" in refused("--losses", path, *target, "--method", "subtuning")


def test_stopping_rule_of_the_options_reaches_the_methods(command, tmp_path):
    used = []
    for tau in ("0.5", "1000000"):
        command("--losses", "published:flan", "--method", "lens", "--tau", tau, "--json", tmp_path / "j.json")
        ranking = json.loads((tmp_path / "j.json").read_text())["methods"]["lens"]["ranking"]
        used.append(np.mean([len(r["sizes_used"]) for r in ranking]))
    assert used[0] < used[1]


def runs(tmp_path):
    """Runs of two models, one better by one metric and the other by the other."""
    lines = ["Name,State,model,samples,eval_loss,eval_nll"]
    for size in (200, 400, 800):
        low, high = 2 + 3 / (2 + size**0.3), 3 + 3 / (2 + size**0.3)
        lines += [f"x,finished,a,{size},{low},{high}", f"y,finished,b,{size},{high},{low}"]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_metric_that_is_the_loss_can_be_named(command, tmp_path):
    path, document, page = runs(tmp_path), tmp_path / "j.json", tmp_path / "p.html"
    _, text = command("--losses", path, "--target", 1e4, "--json", document, "--html", page)
    assert text.startswith("Fine-tune a:")
    assert "metric" not in text
    assert "metric" not in json.loads(document.read_text())["facts"]
    _, text = command("--losses", path, "--target", 1e4, "--metric", "eval_nll", "--json", document, "--html", page)
    assert text.startswith("Fine-tune b:")
    assert f"\nThe losses are the metric eval_nll of {path}.\n" in text
    found = json.loads(document.read_text())
    assert (found["facts"]["metric"], found["loss_unit"], problems(found)) == ("eval_nll", "nats per token", [])
    assert "<dt>Metric</dt>\n<dd>eval_nll</dd>" in page.read_text()


def test_losses_per_byte_of_our_own_runs_have_their_unit(command, tmp_path):
    lines = []
    for number, (name, size) in enumerate((n, s) for n in "ab" for s in (200, 400)):
        facts = {"test_loss_per_byte": (1.1, 1.0, 1.3, 1.2)[number]}
        line = {"key": str(number), "candidate": name, "size": size, "test_loss": 4 - number / 10}
        lines.append({**line, "facts": facts})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--target", 1e4, "--method", "subtuning")
    assert command("--losses", tmp_path, *options)[1].startswith("Fine-tune b")
    file = tmp_path / "j.json"
    assert command("--losses", tmp_path, *options, "--metric", "test_loss_per_byte", "--json", file)[1].startswith(
        "Fine-tune a"
    )
    assert json.loads(file.read_text())["loss_unit"] == "nats per byte"


def test_metrics_that_are_not_there(refused, tmp_path):
    metric = ("--target", 1e6, "--metric", "eval_nll")
    path, tabs = table(tmp_path), tmp_path / "table.tsv"
    tabs.write_text(path.read_text().replace(",", "\t"))
    for source in ("published:flan", tabs):
        message = f"--metric eval_nll: {source} is a table of losses and nothing else; remove --metric."
        assert refused("--losses", source, *metric) == message
    message = "no column 'eval_nll' (metric); there are: model, 0, 200"
    assert refused("--losses", path, *metric).startswith(f"{path}: {message}")
    line = {"key": "k", "candidate": "a", "size": 200, "test_loss": 3.0, "facts": {}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"key": "l", "candidate": "b"}))
    message = f"--metric eval_nll: no run in {tmp_path} has it. Name one that is recorded there."
    assert refused("--losses", tmp_path, *metric) == message
    assert refused(*metric) == "--metric needs --losses; remove --metric."


@pytest.mark.parametrize(
    ("rows", "which", "ends"),
    [
        ("a,3,5,8,11\nb,4,6,9,12\n", "all 2 models", "3 to 11"),
        ("a,.6,.62,.61,.64\nb,.5,.55,.6,.61\nc,.7,.72,.73,.69\n", "2 of 3 models", "0.6 to 0.64"),
        ("a,0.1,0.1,0.2,0.3\nb,1.1,1.15,1.3,1.5\n", "all 2 models", "0.1 to 0.3"),
    ],
)
def test_curves_most_of_which_rise_are_not_taken_for_losses(refused, command, tmp_path, rows, which, ends):
    path = tmp_path / "accuracies.csv"
    path.write_text("model,200,400,800,1600\n" + rows)
    assert refused("--losses", path, "--target", 1e4) == (
        f"{path}: the losses of {which} rise with the number of samples (the first from {ends}); are they accuracies? "
        "Give test losses: mean cross-entropy, nats per token. If they are losses, say so: --lower-is-better."
    )
    assert command("--losses", path, "--target", 1e4, "--lower-is-better")[0] == 0


def test_what_to_know_of_the_losses_is_said(command, tmp_path):
    path, document, page = tmp_path / "runs.csv", tmp_path / "j.json", tmp_path / "p.html"
    rows = [("a", 200, 4.2), ("a", 400, 3.97), ("a", 800, 9.87), ("b", 200, 4.1), ("b", 400, 4.0), ("b", 800, 3.9)]
    lines = [f"{model}-{size},finished,{loss}" for model, size, loss in rows]
    path.write_text("\n".join(["Name,State,eval_loss", *lines, "b-1600,crashed,1.0"]) + "\n")
    _, text = command("--losses", path, "--target", 1e4, "--json", document, "--html", page)
    notes = [
        "the numbers of samples (200, 400, 800, 1600) are those at the ends of the runs' names",
        f"{path}, row 8: b at 1600 samples is not counted: crashed",
        "the loss of a rises from 3.97 at 400 samples to 9.87 at 800: if that run diverged, leave it out or make it "
        "again",
    ]
    assert text.endswith("\n\nMind, of these losses:\n" + "".join(f"  {note}.\n" for note in notes))
    found = json.loads(document.read_text())
    assert (found["facts"]["notes"], problems(found)) == (notes, [])
    assert "if that run diverged, leave it out or make it again</li>" in page.read_text()


def test_the_loss_of_a_model_before_training_is_no_run_that_diverged(command, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("model,0,200,400\na,1.5,2.5,2.4\nb,3,2.6,2.3\n")
    assert "Mind" not in command("--losses", path, "--target", 1e4)[1]


def test_options_say_how_runs_are_read(command, refused, tmp_path):
    path, target = tmp_path / "runs.csv", ("--target", 1e4)
    lines = [
        f"word-{i},finished,{model},{size},{10 - i / 10},{10 + i / 10}"
        for i, (model, size) in enumerate((m, s) for m in "ab" for s in (200, 200, 400))
    ]
    path.write_text("\n".join(["Name,State,net,rows,eval_loss,own", *lines]) + "\n")
    assert "the number at the end of 'word-0' may count runs" in refused("--losses", path, *target)
    columns = ("--samples-column", "rows", "--model-column", "net")
    message = "a at 200 samples is also in"
    assert message in refused("--losses", path, *target, *columns)
    document = tmp_path / "j.json"
    for repeats, first in (("mean", 9.95), ("lowest", 9.9)):
        command("--losses", path, *target, *columns, "--repeats", repeats, "--json", document)
        found = json.loads(document.read_text())
        assert found["candidates"][0]["losses"] == pytest.approx([first, 9.8])
    status, text = command("--losses", path, *target, "--pattern", "{model}-{samples}", "--model-column", "net")
    assert status == 0
    assert text.startswith("Fine-tune b")
    table_of = table(tmp_path)
    assert "no column of losses (test_loss" in refused("--losses", table_of, *target, "--samples-column", "rows")
    for option in (("--pattern", "x"), ("--samples-column", "x"), ("--repeats", "mean"), ("--same-step", "first")):
        assert refused(*target, *option) == f"{option[0]} needs --losses; remove {option[0]}."
    message = "same_step does not apply to a table of losses; remove it."
    assert refused("--losses", table_of, *target, "--same-step", "first") == f"{table_of}: {message}"


def test_losses_that_are_there_already():
    curves = lensjax.read_losses("published:flan")
    by_table = lensjax.select_from_losses(curves, 1_638_400, visible=51_200, method="ats")
    by_name = lensjax.select_from_losses("published:flan", visible=51_200, method="ats")
    assert by_table.best == by_name.best
    assert by_table.target == by_name.target
    with pytest.raises(InputError, match="say for how many training samples"):
        lensjax.select_from_losses(lensjax.Curves(("a", "b"), [1, 2], [[2.0, 1.0], [3.0, 2.0]]))
