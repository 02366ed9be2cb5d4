"""Contractions of per-example gradients, each against the dense gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels import cross_entropy_gram, gram

SHAPES = [(3, 2, 5, 7, 9), (4, 1, 1, 6, 2), (2, 3, 4, 1, 5)]
"""Examples, outputs, tokens, width of the inputs, width of the cotangents."""

LARGE = (6, 2, 96, 320, 1100)
"""The gradients have 4.2 million elements, which go through in uneven chunks."""


def draw(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def pairs(gradient):
    n, c, _ = gradient.shape
    flat = gradient.reshape(n * c, -1)
    return (flat @ flat.T).reshape(n, c, n, c)


def dense_pairs(gradient):
    gradient = np.asarray(gradient, np.float64)
    flat = gradient.reshape(gradient.shape[0] * gradient.shape[1], -1)
    return (flat @ flat.T).reshape(*gradient.shape[:2], *gradient.shape[:2])


def worst(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_weight_gradients(shape, dtype, tolerance):
    with jax.enable_x64(True):
        b, c, t, d, e = shape
        left, right = draw(b, t, d, dtype=dtype), draw(b, c, t, e, dtype=dtype)
        want = dense_pairs(np.einsum("btd,bcte->bcde", left, right, dtype=np.float64, optimize=True))
        got = gram.reduce_weight_gradients(left, right, pairs)
        assert got.dtype == dtype
        assert worst(got, want) < tolerance
        chunked = gram.reduce_weight_gradients(left, right, pairs, chunk_bytes=1)  # as small as chunks get
        assert worst(chunked, want) < tolerance
        first = np.einsum("icjc->ij", want[:, :1, :, :1])
        single = gram.reduce_weight_gradients(left, right[:, :1], lambda g: g[:, 0] @ g[:, 0].T)
        assert worst(single, first) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_token_pairs(shape):
    with jax.enable_x64(True):
        b, c, t, d, e = shape
        left, right = draw(b, t, d), draw(b, c, t, e)
        want = dense_pairs(np.einsum("btd,bcte->bcde", left, right))
        got = gram.token_gram(left[:1], right[:1], left[1:], right[1:])
        np.testing.assert_allclose(got, want[:1, :, 1:], rtol=0, atol=1e-12 * np.abs(want).max())


@pytest.mark.parametrize("height", [7, 300])
def test_looked_up_rows(height):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        ids, right = jnp.asarray(rng.integers(0, height, (4, 6))), draw(4, 2, 6, 5)
        dense = np.zeros((4, 2, height, 5))
        for b in range(4):
            for t in range(6):
                dense[b, :, ids[b, t]] += right[b, :, t]
        want = dense_pairs(dense)
        got = gram.row_gram(ids[:3], right[:3], ids[3:], right[3:])
        np.testing.assert_allclose(got, want[:3, :, 3:], rtol=0, atol=1e-12 * np.abs(want).max())
        added = gram.add_rows(jnp.zeros((4, 2, 5, 5)), ids - 2, right)  # rows 2 to 6 of the table
        np.testing.assert_allclose(added, dense[:, :, 2:7], rtol=1e-12)
        left = draw(4, 3, height)
        product = draw(4, 2, 3, 5)
        both = gram.crossed_gram(lambda i: left[i][:, ids], product, right)
        other = np.einsum("btv,bcte->bcve", left, product).reshape(8, -1) @ dense.reshape(8, -1).T
        np.testing.assert_allclose(both, other.reshape(4, 2, 4, 2), rtol=0, atol=1e-12 * np.abs(other).max())


def test_sums_of_products_and_rows():
    with jax.enable_x64(True):
        first, second = (draw(3, 4, 70), draw(3, 2, 4, 5)), (draw(3, 2, 6, 70, seed=1), draw(3, 6, 5, seed=1))
        plus = draw(3, 2, 70, 5)
        dense = np.einsum("btv,bcte->bcve", *first) + np.einsum("bctv,bte->bcve", *second) + np.asarray(plus)
        for chunk_bytes in (1, 2**21):  # in chunks of 32, 32 and 6 rows, and in one
            got = gram.reduce_products([first, second], plus, pairs, chunk_bytes=chunk_bytes)
            assert worst(got, dense_pairs(dense)) < 1e-12


def head_inputs(rows, vocabulary, width, dtype):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, vocabulary, (3, rows))
    labels[0, 0] = -100
    return draw(3, rows, width, dtype=dtype), draw(vocabulary, width, dtype=dtype) * 0.3, jnp.asarray(labels)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "dtype", "tolerance"),
    [(5, 11, 4, np.float64, 1e-12), (40, 10_007, 24, np.float32, 1e-5)],
)
@pytest.mark.parametrize("keep", [False, True])
def test_fused_head(rows, vocabulary, width, dtype, tolerance, keep, monkeypatch):
    with jax.enable_x64(True):
        if rows == 5:  # several chunks of tokens and of the vocabulary even here
            monkeypatch.setattr(cross_entropy_gram, "LOGIT_BYTES", 500)
            monkeypatch.setattr(gram, "LEAST_COLUMNS", 1)
        hidden, weight, labels = head_inputs(rows, vocabulary, width, dtype)
        cotangents = draw(3, 2, rows, dtype=dtype)

        def losses(h, w):
            logits = jnp.asarray(h, float) @ jnp.asarray(w, float).T
            gold = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
            return jnp.where(labels == -100, 0.0, -gold)

        wide = (hidden.astype(float), weight.astype(float))
        flat = (hidden.reshape(-1, width), weight, labels.reshape(-1))
        got, normalizers, logits = cross_entropy_gram.head_losses(*flat, keep=keep)
        assert (logits is not None) == keep
        assert worst(got.reshape(labels.shape), losses(*wide)) < tolerance
        logits = logits.reshape(*labels.shape, -1) if keep else None
        known = (hidden, weight, labels, normalizers.reshape(labels.shape), logits)
        hidden_cotangents, contribution = cross_entropy_gram.cross_entropy_vjp(*known, cotangents, pairs)
        again, by_tokens = cross_entropy_gram.cross_entropy_vjp_token_gram(*known, cotangents, rows=1)
        for c in range(2):
            (into_hidden,) = jax.vjp(lambda h: losses(h, wide[1]), wide[0])[1](cotangents[:, c].astype(float))
            assert worst(hidden_cotangents[:, c], into_hidden) < tolerance
            assert worst(again[:, c], into_hidden) < tolerance
        softmax = jax.nn.softmax(wide[0] @ wide[1].T)
        left = jnp.where((labels == -100)[..., None], 0, softmax - jax.nn.one_hot(labels, vocabulary))
        right = cotangents.astype(float)[..., None] * wide[0][:, None]
        flat = jnp.einsum("btv,bctd->bcvd", left, right).reshape(6, -1)
        want = np.asarray(flat @ flat.T).reshape(3, 2, 3, 2)
        assert worst(contribution, want) < tolerance
        assert worst(by_tokens, want[:1, :, 1:]) < tolerance
        first = cross_entropy_gram.cross_entropy_vjp_token_gram(*known, cotangents[:, :1], rows=None)
        assert worst(first[0], np.asarray(hidden_cotangents[:, :1])) < tolerance
        assert worst(first[1], want[:, :1, :, :1]) < tolerance
        assert cross_entropy_gram.cross_entropy_vjp(*known, cotangents, None)[1] is None


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((5, 1, 3, 4, 6), np.float64, 1e-12),
        ((1, 1, 3, 4, 6), np.float64, 1e-12),
        ((3, 2, 3, 4, 6), np.float64, 1e-12),
        ((9, 1, 96, 1300, 1100), np.float32, 1e-5),  # more than 2^20 inputs, token pairs that fit
        ((30, 1, 160, 40, 50), np.float32, 1e-5),  # token pairs that do not fit at once
    ],
)
def test_symmetric_token_pairs(shape, dtype, tolerance):
    b, c, t, d, e = shape
    with jax.enable_x64(True):
        left, right = draw(b, t, d, dtype=dtype), draw(b, c, t, e, dtype=dtype)
        got = gram.symmetric_token_gram(left, right)
        want = dense_pairs(np.einsum("btd,bcte->bcde", left, right, dtype=np.float64, optimize=True))
        assert got.dtype == dtype
        assert worst(got, want) < tolerance


@pytest.mark.parametrize("rows", [1, 7, 257, 601])
def test_gram_matrix(rows):
    x = draw(rows, 4200, dtype=np.float32)
    want = np.asarray(x, np.float64) @ np.asarray(x, np.float64).T
    assert worst(gram.gram_matrix(x), want) < 1e-5
    blocks = gram.symmetric_blocks(rows)
    covered = np.zeros((rows, rows), int)
    for of_rows, of_columns in blocks:
        covered[of_rows, of_columns] += 1
    assert covered.max() == 1
    assert ((covered + covered.T) > 0).all()


LARGE_PAIRS = (20, 17, 1, 62, 48, 1100)
"""Examples on each side, outputs, tokens, widths: 1.3 million cotangents, as many token pairs, in uneven groups."""


def large_factors():
    n, m, c, t, d, e = LARGE_PAIRS
    rng = np.random.default_rng(11)
    left1, left2 = rng.normal(size=(n, t, d)), rng.normal(size=(m, t, d))
    right1, right2 = rng.normal(size=(n, c, t, e)), rng.normal(size=(m, c, t, e))
    assert right1.size > 2**20
    assert n * m * t * t > 2**20
    return left1, right1, left2, right2


def single(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def test_large_token_pairs_in_float32():
    left1, right1, left2, right2 = large_factors()
    first, second = (np.einsum("btd,bcte->bcde", a, b, optimize=True) for a, b in ((left1, right1), (left2, right2)))
    want = np.einsum("icde,jkde->icjk", first, second, optimize=True)
    assert worst(gram.token_gram(*single(left1, right1, left2, right2)), want) < 1e-5


def test_large_lookups_in_float32():
    """Rows with rows, and rows with a dense gradient of the same table."""
    left1, right1, _, right2 = large_factors()
    rng, height = np.random.default_rng(12), 40
    ids1, ids2 = (rng.integers(0, height, x.shape[:1] + x.shape[2:3]) for x in (right1, right2))
    rows1, rows2 = (np.einsum("btv,bcte->bcve", np.eye(height)[i], x, optimize=True) for i, x in
                    ((ids1, right1), (ids2, right2)))  # fmt: skip
    want = np.einsum("icve,jkve->icjk", rows1, rows2, optimize=True)
    assert worst(gram.row_gram(jnp.asarray(ids1), *single(right1), jnp.asarray(ids2), *single(right2)), want) < 1e-5
    left = left1[..., :height]  # the dense gradient of example i is left[i].T @ right1[i]
    dense = np.einsum("btv,bcte->bcve", left, right1, optimize=True)
    looked_up, factor = jnp.asarray(ids2), jnp.asarray(left, jnp.float32)
    got = gram.crossed_gram(lambda i: factor[i][:, looked_up], *single(right1, right2))
    want = np.einsum("icve,jkve->icjk", dense, rows2, optimize=True)
    assert worst(got, want) < 1e-5
