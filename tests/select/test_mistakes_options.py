"""Mistakes in options: names, values, units, and options that contradict each other."""

import pytest

HELP = "See python -m lensjax.select --help."
BUDGETS = (
    "is no amount that can be spent; give it as 0.05 or 5% (of fine-tuning all on all samples), 2e16 (FLOPs), 3h, "
    "90min, or 20000samples."
)
METHODS = (
    "there are: averaged, lens, ats, rectified, power, subtuning, zero_shot, model_size, nlp_metrics, log_me and all."
)
VALUES = "Each value follows the option that it is for; options that are switched on or off take none."
CHEAPER = "Raise --budget, or lower --smallest or --max-epochs."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "one"), f"unrecognized arguments: --model one. Did you mean --models? {HELP}"),
        (("--learningrate", 1), f"unrecognized arguments: --learningrate 1. Did you mean --learning-rate? {HELP}"),
        (("--input_field", "q"), f"unrecognized arguments: --input_field q. Did you mean --input-field? {HELP}"),
        (("--batch-size=8", "--epochs=3"), f"unrecognized arguments: --epochs=3. Did you mean --max-epochs? {HELP}"),
        (("--lr", 0.1), f"unrecognized arguments: --lr 0.1. Did you mean --learning-rate? {HELP}"),
        (("--output-dir", "x"), f"unrecognized arguments: --output-dir x. Did you mean --out? {HELP}"),
        (("--device", "cuda"), f"unrecognized arguments: --device cuda. {HELP}"),
        (("-seed", 3), f"unrecognized arguments: -seed 3. Did you mean --seed? {HELP}"),
        (("\N{EN DASH}seed", 3), f"unrecognized arguments: \N{EN DASH}seed 3. Did you mean --seed? {HELP}"),
        (("my.jsonl",), f"unrecognized arguments: my.jsonl. {VALUES} {HELP}"),
        (("--dropout", 0.1), f"unrecognized arguments: 0.1. {VALUES} {HELP}"),
        (("--verify", "yes"), f"unrecognized arguments: yes. {VALUES} {HELP}"),
        (("--task",), f"argument --task: expected one argument. {HELP}"),
        (("--models",), f"argument --models: expected at least one argument. {HELP}"),
    ],
)
def test_options_that_do_not_exist(mistake, options, message):
    assert mistake(*options) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "avraged"), f"method 'avraged' is unknown; {METHODS} Did you mean averaged?"),
        (("--method", "LENS"), f"method 'LENS' is unknown; {METHODS} Did you mean lens?"),
        (("--method", "zero-shot"), f"method 'zero-shot' is unknown; {METHODS} Did you mean zero_shot?"),
        (("--method", "bayes"), f"method 'bayes' is unknown; {METHODS}"),
        (
            ("--schedule", "cosin"),
            "argument --schedule: invalid choice: 'cosin' (choose from constant, linear, cosine). Did you mean cosine? "
            f"{HELP}",
        ),
        (
            ("--precision", "fp16"),
            f"argument --precision: invalid choice: 'fp16' (choose from auto, float32, bfloat16). {HELP}",
        ),
        (
            ("--loss-unit", "bytes"),
            f"argument --loss-unit: invalid choice: 'bytes' (choose from token, byte). Did you mean byte? {HELP}",
        ),
        (
            ("--sharding", "fsdp"),
            f"argument --sharding: invalid choice: 'fsdp' (choose from auto, none, data, full). {HELP}",
        ),
        (
            ("--figures", "d", "--figure-format", "pdf"),
            f"argument --figure-format: invalid choice: 'pdf' (choose from svg, png). {HELP}",
        ),
    ],
)
def test_values_that_do_not_exist(mistake, options, message):
    assert mistake(*options) == message


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("5,5%", "The decimal sign is a point."),
        ("1,5h", "The decimal sign is a point."),
        ("5", "5 FLOPs buy nothing: name the unit."),
        ("120%", "A share is below 100 %."),
        ("3 weeks", "'weeks' is no unit."),
        ("30 USD", "'USD' is no unit."),
        ("2hrs", "'hrs' is no unit. Did you mean hours?"),
        ("1h30", ""),
        ("10k samples", ""),
        ("2e16 FLOP/s", ""),
        ("0", ""),
    ],
)
def test_budgets(mistake, budget, reason):
    space = " " if reason else ""
    assert mistake("--budget", budget) == f"argument --budget: {budget} {BUDGETS}{space}{reason} {HELP}"


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "0.05%",
            "--budget (0.0005 of fine-tuning all on all samples): training every candidate on 10, 20 samples alone may "
            f"cost up to 0.3 of fine-tuning all on all samples. {CHEAPER}",
        ),
        (
            "100samples",
            "--budget (100 samples): training every candidate on 10, 20 samples alone may cost up to 1,200 samples. "
            f"{CHEAPER}",
        ),
    ],
)
def test_budgets_that_pay_for_nothing(mistake, budget, message):
    assert mistake("--budget", budget) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--target", "1,5e6"),
            "argument --target: '1,5e6' is not a number. Write 1.5e6: the decimal sign is a point.",
        ),
        (("--target", "1.000.000"), "argument --target: '1.000.000' is not a number. Write 1000000."),
        (("--target", "10k"), "argument --target: '10k' is not a number. Write 10000."),
        (("--target", "all"), "argument --target: 'all' is not a number."),
        (("--target", 0), "argument --target: 0 is not a whole number above 0."),
        (("--visible", 0.5), "argument --visible: 0.5 is not a whole number above 0."),
        (("--smallest", -10), "argument --smallest: -10 is not a whole number above 0."),
        (("--batch-size", 0), "argument --batch-size: 0 is not a whole number above 0."),
        (("--max-length", 0), "argument --max-length: 0 is not a whole number above 0."),
        (("--gamma", 3.5), "argument --gamma: 3.5 is not a whole number above 0."),
        (("--seed", -1), "argument --seed: -1 is not a whole number, 0 or more."),
        (("--seed", "random"), "argument --seed: random is not a whole number, 0 or more."),
        (
            ("--learning-rate", "0,001"),
            "argument --learning-rate: '0,001' is not a number. Write 0.001: the decimal sign is a point.",
        ),
        (
            ("--learning-rate", "1e-3,3e-3"),
            "argument --learning-rate: '1e-3,3e-3' is not a number. Put spaces between several.",
        ),
        (("--tau", "5,0"), "argument --tau: '5,0' is not a number. Write 5.0: the decimal sign is a point."),
        (("--weight-decay", "1%"), "argument --weight-decay: '1%' is not a number. It is a percentage."),
    ],
)
def test_values_that_are_no_numbers(mistake, options, message):
    assert mistake(*options) == f"{message} {HELP}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tau", 0), "tau is 0; the deviation allowed is a positive number. The paper uses 1 to 5."),
        (("--tau", "nan"), "tau is nan; the deviation allowed is a positive number. The paper uses 1 to 5."),
        (("--gamma", 2), "gamma is 2; a line needs at least 3 points to have residuals. The paper uses 3 to 5."),
        (("--learning-rate", 0), "--learning-rate is 0; it must be positive and finite."),
        (("--learning-rate", 0.1, -0.001), "--learning-rate is -0.001; it must be positive and finite."),
        (("--learning-rate", "nan"), "--learning-rate is nan; it must be positive and finite."),
        (("--learning-rate", 0.1, 0.1), "learning rates 0.1, 0.1: one is named twice; name each once."),
        (("--weight-decay", -1), "--weight-decay is -1; it must be 0 or more, and finite."),
        (
            ("--batch-size", 8, "--micro-batch", 3),
            "micro-batch 3 does not divide the batch size 8; choose one of its divisors.",
        ),
    ],
)
def test_values_out_of_their_range(mistake, options, message):
    assert mistake(*options) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--smallest", 400, "--visible", 40),
            "the task has 100 training samples, fewer than the smallest subset (400). Add samples, set fewer aside "
            "(--validation, --test), or lower --smallest.",
        ),
        (("--smallest", 50), "--visible 40 is below the smallest subset (50); lower --smallest."),
        (("--visible", 400), "--visible 400: the task has 100 training samples; lower it."),
        (
            ("--target", 20),
            "--target 20 is not above the largest visible subset (40). Raise --target or lower --visible.",
        ),
        (
            ("--visible", 20, "--method", "lens"),
            "2 subset size(s) (10, 20) are too few: method lens needs 3. Lower --smallest or raise --visible.",
        ),
        (
            ("--target", 500, "--verify"),
            "--verify: the target is 500 samples, but the task has 100 to fine-tune on.",
        ),
        (("--tangents", 1000), "--tangents 1000: the largest subset has 40 samples; lower it."),
        (
            ("--test", 139),
            "task: 140 distinct samples, but 20 are set aside for validation and 139 for the test loss. Add samples or "
            "lower --validation and --test.",
        ),
        (("--tokens-per-sample", 3), "--tokens-per-sample needs --losses; remove --tokens-per-sample."),
    ],
)
def test_values_that_contradict_each_other_or_the_data(mistake, options, message):
    assert mistake(*options) == message


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (("--models", "one", "two"), "--models"),
        (("--task", "task.jsonl"), "--task"),
        (("--budget", "5%"), "--budget"),
        (("--out", "out"), "--out"),
        (("--verify",), "--verify"),
    ],
)
def test_options_of_fine_tuning_for_losses_that_are_there(mistake, options, flag):
    assert mistake("--losses", "published:flan", *options, good=False) == (
        f"{flag} belongs to selection by fine-tuning; remove {flag} or --losses."
    )
