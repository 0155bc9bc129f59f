"""shadow: two 4-bit words for each codeword, against a slow search and cases that are known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tcq_hf.index.shadow import make_shadow, restore_shadow


def unit(*shape, seed=0):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def restored(shadow, codes):
    """Sums of the words of codes `[n, M]`, `[n, M, d]`."""
    words = shadow.words[np.arange(len(shadow.words)), codes]
    if shadow.levels == 1:
        return shadow.books[np.arange(len(shadow.books)), words]
    first, second = shadow.books[0::2], shadow.books[1::2]
    books = np.arange(len(first))
    return first[books, words & 15] + second[books, words >> 4]


@pytest.mark.parametrize("codebook_size", [2, 4, 8, 16])
def test_small_codebooks_are_their_own_shadow(codebook_size):
    codebooks = unit(3, codebook_size, 4)
    shadow = make_shadow(codebooks, np.ones((3, codebook_size)))
    codes = np.random.default_rng(1).integers(0, codebook_size, (50, 3))
    assert shadow.levels == 1
    assert_array_equal(restored(shadow, codes), codebooks[np.arange(3), codes])


@pytest.mark.parametrize("codebook_size", [32, 256])
def test_each_codeword_has_its_nearest_sum(codebook_size):
    codebooks = unit(2, codebook_size, 6)
    shadow = make_shadow(codebooks, np.ones((2, codebook_size)))
    for book in range(2):
        first, second = shadow.books[2 * book], shadow.books[2 * book + 1]
        sums = {(i, j): first[i] + second[j] for i in range(16) for j in range(16)}
        for number in range(0, codebook_size, 7):
            word = codebooks[book, number]
            pair = shadow.words[book, number] & 15, shadow.words[book, number] >> 4
            best = min(((word - each) ** 2).sum() for each in sums.values())
            # float64 inside, float32 here: the squares are below 4.
            assert ((word - sums[pair]) ** 2).sum() <= best + 1e-6


def test_codewords_that_are_sums_are_found_again():
    """Sixteen directions, each with the same sixteen small changes: rounding alone is lost."""
    codebook = (unit(16, 8, seed=3)[:, None] + 0.05 * unit(16, 8, seed=4)).reshape(1, 256, 8).astype(np.float32)
    shadow = make_shadow(codebook, np.ones((1, 256)))
    assert_allclose(restored(shadow, np.arange(256)[:, None])[:, 0], codebook[0], atol=1e-5)


def test_refined_sums_are_nearer_than_clusters_of_clusters():
    codebooks = unit(4, 256, 8)
    shadow = make_shadow(codebooks, np.ones((4, 256)))
    codes = np.tile(np.arange(256)[:, None], (1, 4))
    error = ((restored(shadow, codes) - codebooks.transpose(1, 0, 2)) ** 2).sum(axis=2).mean()
    # 16 of 256 random directions in 8 dimensions alone leave about 0.55, two greedy levels 0.30.
    assert error < 0.27


def test_words_that_are_used_more_are_nearer():
    codebooks, usage = unit(1, 256, 8), np.ones((1, 256))
    usage[0, :20] = 1000
    errors = []
    for weights in (np.ones((1, 256)), usage):
        found = restored(make_shadow(codebooks, weights), np.arange(20)[:, None])[:, 0]
        errors.append(((found - codebooks[0, :20]) ** 2).sum(axis=1).mean())
    assert errors[1] < errors[0] / 2


def test_seeds_repeat_and_books_restore_the_shadow():
    codebooks, usage = unit(2, 64, 4), np.arange(128).reshape(2, 64)
    first, again = (make_shadow(codebooks, usage, seed=5) for _ in range(2))
    assert_array_equal(first.books, again.books)
    restored_again = restore_shadow(codebooks, first.books)
    assert_array_equal(restored_again.words, first.words)


@pytest.mark.parametrize(("num_codebooks", "codebook_size"), [(4, 16), (3, 8), (4, 256), (3, 32)])
def test_packed_codes_are_a_little_endian_string_of_four_bits(num_codebooks, codebook_size):
    shadow = make_shadow(unit(num_codebooks, codebook_size, 4), np.ones((num_codebooks, codebook_size)))
    codes = np.random.default_rng(2).integers(0, codebook_size, (9, num_codebooks))
    packed = shadow.packed(codes)
    for row, code in zip(packed.tolist(), codes.tolist(), strict=True):
        halves = []
        for book, number in enumerate(code):
            word = int(shadow.words[book, number])
            halves.extend([word] if shadow.levels == 1 else [word & 15, word >> 4])
        halves += [0] * (len(halves) % 2)
        assert row == [low | high << 4 for low, high in zip(halves[0::2], halves[1::2], strict=True)]


def test_sums_are_symmetric_in_their_scale():
    codebooks = unit(1, 64, 4)
    shadow = make_shadow(codebooks, np.ones((1, 64)))
    scaled = restore_shadow(2 * codebooks, 2 * shadow.books)
    assert_array_equal(scaled.words, shadow.words)
    assert_allclose(scaled.books, 2 * shadow.books)
