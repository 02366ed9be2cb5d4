import numpy as np
import pytest

from lensjax.metrics import pear_corr, rel_acc, rmse, training_flops


def test_pear_corr_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    score, loss = rng.normal(size=(2, 20))
    want = np.mean((score - score.mean()) * (loss - loss.mean())) / (score.std() * loss.std())
    assert pear_corr(score, loss) == pytest.approx(want, rel=1e-12)
    assert pear_corr(-score, loss) == pytest.approx(-want, rel=1e-12)


def test_pear_corr_leaves_unknown_candidates_out_and_is_nan_where_undefined():
    assert pear_corr([1, 2, np.nan, 4], [1, 2, 3, 4]) == pytest.approx(1)
    assert np.isnan(pear_corr([1, 1], [1, 2]))
    assert np.isnan(pear_corr([1], [1]))
    with pytest.raises(ValueError, match="vectors of one length"):
        pear_corr([1, 2], [1, 2, 3])


def test_rel_acc_measures_the_choice_from_the_worst():
    loss = [2.0, 1.0, 1.5]
    assert rel_acc([3, 1, 2], loss) == 1.0
    assert rel_acc([1, 2, 3], loss) == 0.0
    assert rel_acc([3, 2, 1], loss) == 0.5
    assert rel_acc([np.nan, 2, 1], loss) == 0.5
    assert np.isnan(rel_acc([1, 2], [1, 1]))
    assert np.isnan(rel_acc([np.nan, np.nan], [1, 2]))


def test_rmse():
    assert rmse([1, 2, np.nan], [2, 4, 9]) == pytest.approx(np.sqrt(2.5))
    assert np.isnan(rmse([np.nan], [1]))


def test_training_flops_are_six_per_weight_and_token():
    np.testing.assert_allclose(training_flops([10.0, 20.0], 5), [300.0, 600.0])
