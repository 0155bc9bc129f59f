"""ProductQuantizer: each formula against a slow loop, a closed form, a symmetry and illegal input."""

import logging
import math

import pytest
import torch

from tcq_hf.model.quantization_tcq import ProductQuantizer, spherical_kmeans

EPS = torch.finfo(torch.float32).eps
N, M, K, D = 20, 3, 8, 12
SUB = D // M
# A float32 dot product of d terms between unit vectors errs by at most d eps (Higham, 3.1); scaling both vectors to
# unit norm in float32 adds at most (d / 2 + 2) eps each.
DOT = (2 * SUB + 4) * EPS


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(num_codebooks=M, codebook_size=K, sub_dim=SUB, scale=5.0, seed=1) -> ProductQuantizer:
    quantizer = ProductQuantizer(num_codebooks, codebook_size, sub_dim, scale)
    # Lengths from tiny to large: only the direction of a codeword may count.
    lengths = torch.logspace(-3, 3, codebook_size)[:, None]
    quantizer.codebooks.data = draw(num_codebooks, codebook_size, sub_dim, seed=seed) * lengths
    return quantizer


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def loop_codebooks(quantizer) -> list:
    return [[unit(word) for word in book] for book in quantizer.codebooks.tolist()]


def clumps(num_points, num_clumps, width, spread=0.02, seed=0):
    centres = draw(num_clumps, width, seed=seed)
    return centres[torch.arange(num_points) % num_clumps] + spread * draw(num_points, width, seed=seed + 1)


# normalize


def test_normalize_equals_a_slow_loop():
    vectors = draw(N, D)
    expected = [[x for m in range(M) for x in unit(row[m * SUB : (m + 1) * SUB])] for row in vectors.tolist()]
    assert torch.allclose(make().normalize(vectors), torch.tensor(expected), rtol=0, atol=(SUB / 2 + 2) * EPS)


def test_normalize_of_three_four_is_six_tenths_eight_tenths():
    quantizer = ProductQuantizer(2, 2, 2, 1.0)
    vectors = torch.tensor([[3.0, 4.0, 0.0, -7.0]])
    assert torch.allclose(quantizer.normalize(vectors), torch.tensor([[0.6, 0.8, 0.0, -1.0]]), rtol=0, atol=EPS)


@pytest.mark.parametrize("scale", [2.0**-20, 0.5, 4.0, 2.0**40])
def test_normalize_is_bit_equal_under_a_power_of_two_for_each_sub_vector(scale):
    vectors = draw(N, D)
    scaled = vectors.clone()
    scaled[:, SUB : 2 * SUB] *= scale
    assert torch.equal(make().normalize(scaled), make().normalize(vectors))


def test_normalize_of_a_zero_vector_stays_finite():
    assert make().normalize(torch.zeros(2, D)).eq(0).all()


@pytest.mark.parametrize("width", [D - 1, D + M, 1])
def test_normalize_refuses_a_wrong_width(width):
    with pytest.raises(RuntimeError):
        make().normalize(draw(N, width))


# lookup table


def test_lookup_table_equals_a_slow_loop():
    quantizer = make()
    embeddings = quantizer.normalize(draw(N, D))
    table = quantizer.lookup_table(embeddings).detach()
    assert table.shape == (N, M, K)
    books = loop_codebooks(quantizer)
    for n, row in enumerate(embeddings.tolist()):
        for m in range(M):
            for k in range(K):
                expected = sum(row[m * SUB + j] * books[m][k][j] for j in range(SUB))
                assert abs(float(table[n, m, k]) - expected) <= DOT


def test_lookup_table_is_one_at_the_codeword_itself_and_never_more():
    quantizer = make()
    embeddings = quantizer.normalized_codebooks().transpose(0, 1).flatten(1)  # row k holds codeword k of every book
    table = quantizer.lookup_table(embeddings)
    assert torch.allclose(table[torch.arange(K), :, torch.arange(K)], torch.ones(K, M), rtol=0, atol=DOT)
    assert table.max() <= 1 + DOT


def test_lookup_table_is_unchanged_when_embeddings_and_codebooks_turn_together():
    quantizer, turned = make(), make()
    rotation = torch.linalg.qr(draw(M, SUB, SUB, seed=3).double()).Q
    embeddings = quantizer.normalize(draw(N, D))
    turned.codebooks.data = (quantizer.codebooks.double() @ rotation).float()
    rotated = torch.einsum("nmd,mde->nme", embeddings.view(N, M, SUB).double(), rotation).flatten(1).float()
    assert torch.allclose(turned.lookup_table(rotated), quantizer.lookup_table(embeddings), rtol=0, atol=2 * DOT)


def test_permuting_the_codebooks_permutes_table_codes_and_reconstruction():
    quantizer, permuted = make(), make()
    order = torch.tensor([2, 0, 1])
    permuted.codebooks.data = quantizer.codebooks.data[order]
    embeddings = quantizer.normalize(draw(N, D))
    table = quantizer.lookup_table(embeddings)
    moved = permuted.lookup_table(embeddings.view(N, M, SUB)[:, order].flatten(1))
    assert torch.allclose(moved, table[:, order], rtol=0, atol=2 * DOT)
    codes = quantizer.codes(table)
    assert torch.equal(permuted.codes(moved), codes[:, order])
    expected = quantizer.reconstruct(codes).view(N, M, SUB)[:, order].flatten(1)
    assert torch.equal(permuted.reconstruct(codes[:, order]), expected)


@pytest.mark.parametrize("width", [D - 1, D + M, 1])
def test_lookup_table_refuses_a_wrong_width(width):
    with pytest.raises(RuntimeError):
        make().lookup_table(draw(N, width))


# codes


def test_codes_are_the_l2_nearest_codewords_and_the_largest_inner_products():
    quantizer = make()
    embeddings = quantizer.normalize(draw(500, D))
    table = quantizer.lookup_table(embeddings)
    codes = quantizer.codes(table)
    assert codes.dtype == torch.uint8
    assert codes.shape == (500, M)
    books = quantizer.normalized_codebooks().detach().double()
    points = embeddings.view(500, M, SUB).double()
    distance = (points[:, :, None] - books[None]).square().sum(-1)
    inner = (points[:, :, None] * books[None]).sum(-1)
    # Where the two best differ by less than the error of a float32 table either answer is right.
    best = inner.topk(2, dim=-1).values
    clear = (best[..., 0] - best[..., 1]) > 2 * DOT
    assert clear.double().mean() > 0.99
    assert torch.equal(codes[clear], distance.argmin(-1)[clear].to(torch.uint8))
    assert torch.equal(codes[clear], inner.argmax(-1)[clear].to(torch.uint8))


def test_codes_of_the_codewords_are_their_own_numbers_up_to_255():
    quantizer = make(codebook_size=256, sub_dim=16)
    embeddings = quantizer.normalized_codebooks().transpose(0, 1).flatten(1)
    codes = quantizer.codes(quantizer.lookup_table(embeddings))
    assert codes.tolist() == [[k] * M for k in range(256)]


def test_codes_do_not_depend_on_the_lengths_of_vectors_and_codewords():
    quantizer, longer = make(), make()
    longer.codebooks.data = quantizer.codebooks.data * torch.tensor([0.25, 2.0] * (K // 2))[:, None]
    vectors = draw(N, D)
    codes = quantizer.codes(quantizer.lookup_table(quantizer.normalize(vectors)))
    assert torch.equal(longer.codes(longer.lookup_table(longer.normalize(16 * vectors))), codes)


# assignments


def test_assignments_equal_a_slow_loop_of_exponentials():
    quantizer = make(scale=5.0)
    table = quantizer.lookup_table(quantizer.normalize(draw(N, D)))
    assignments = quantizer.assignments(table)
    for row, given in zip(table.flatten(0, 1).tolist(), assignments.flatten(0, 1).tolist(), strict=True):
        exponentials = [math.exp(5.0 * x) for x in row]
        # Relative error of exp in float32: the rounding of its argument, at most 2 * 5, a few ulps, K terms summed.
        for value, exponential in zip(given, exponentials, strict=True):
            assert math.isclose(value, exponential / sum(exponentials), rel_tol=(2 * 10 + K + 8) * EPS)


def test_assignments_sum_to_one():
    assignments = make().assignments(draw(N, M, K))
    assert torch.allclose(assignments.sum(-1), torch.ones(N, M), rtol=0, atol=K * EPS)
    assert (assignments > 0).all()


def test_assignments_closed_form_for_two_codewords_is_the_sigmoid_of_the_scaled_difference():
    quantizer = make(codebook_size=2, scale=3.0)
    table = draw(N, M, 2).clamp(-1, 1)
    expected = torch.sigmoid(3.0 * (table[..., 0] - table[..., 1]).double()).float()
    # Softmax subtracts the maximum first: arguments up to 6, rounded twice, then exp and a division.
    assert torch.allclose(quantizer.assignments(table)[..., 0], expected, rtol=(2 * 6 + 8) * EPS, atol=0)


def test_assignments_of_equal_scores_are_uniform_and_bit_equal():
    assert torch.equal(make().assignments(torch.full((1, M, K), 0.3)), torch.full((1, M, K), 1 / K))


def test_assignments_follow_a_permutation_of_the_codewords():
    quantizer, order = make(), torch.randperm(K, generator=torch.Generator().manual_seed(0))
    table = draw(N, M, K)
    moved = quantizer.assignments(table[..., order])
    assert torch.allclose(moved, quantizer.assignments(table)[..., order], rtol=2 * K * EPS, atol=0)


def test_assignments_stay_finite_at_a_very_large_scale():
    assignments = make(scale=1e6).assignments(draw(N, M, K).clamp(-1, 1))
    assert assignments.isfinite().all()
    assert torch.equal(assignments.argmax(-1), draw(N, M, K).clamp(-1, 1).argmax(-1))


# reconstruction


def test_reconstruct_equals_a_slow_loop_bit_by_bit():
    quantizer = make()
    codes = torch.randint(0, K, (N, M), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    books = quantizer.normalized_codebooks().tolist()
    expected = [[x for m, k in enumerate(row) for x in books[m][k]] for row in codes.tolist()]
    assert torch.equal(quantizer.reconstruct(codes), torch.tensor(expected))


def test_reconstruct_reaches_codeword_255_from_a_byte():
    quantizer = make(codebook_size=256)
    rebuilt = quantizer.reconstruct(torch.full((1, M), 255, dtype=torch.uint8))
    assert torch.equal(rebuilt, quantizer.normalized_codebooks()[:, 255].flatten()[None])


def test_reconstruct_then_encode_gives_the_codes_back():
    quantizer = make()
    codes = torch.randint(0, K, (N, M), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    assert torch.equal(quantizer.codes(quantizer.lookup_table(quantizer.reconstruct(codes))), codes)


def test_score_from_the_table_is_the_inner_product_with_the_reconstruction():
    quantizer = make()
    embeddings = quantizer.normalize(draw(N, D))
    table = quantizer.lookup_table(embeddings)
    codes = quantizer.codes(table)
    scores = table.gather(-1, codes.long()[..., None]).sum((1, 2))
    assert torch.allclose(scores, (embeddings * quantizer.reconstruct(codes)).sum(-1), rtol=0, atol=2 * M * DOT)


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(torch.full((1, M), K), id="code K"),
        pytest.param(torch.zeros(1, M + 1, dtype=torch.long), id="M + 1 columns"),
        pytest.param(torch.zeros(N, 1, dtype=torch.long), id="one column"),
    ],
)
def test_reconstruct_refuses_illegal_codes(codes):
    with pytest.raises((IndexError, ValueError)):
        make().reconstruct(codes)


# float32 whatever runs around it; gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_and_no_dtype(dtype):
    quantizer, vectors = make(), draw(N, D)

    def everything():
        embeddings = quantizer.normalize(vectors)
        table = quantizer.lookup_table(embeddings)
        codes = quantizer.codes(table)
        return embeddings, table, codes, quantizer.assignments(table), quantizer.reconstruct(codes)

    plain = everything()
    with torch.autocast("cpu", dtype=dtype):
        cast = everything()
    for before, after in zip(plain, cast, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_bfloat16_weights_and_vectors_still_give_float32_unit_vectors():
    quantizer = make().to(torch.bfloat16)
    embeddings = quantizer.normalize(draw(N, D).to(torch.bfloat16))
    table = quantizer.lookup_table(embeddings)
    codes = quantizer.codes(table)
    results = (embeddings, table, quantizer.assignments(table), quantizer.reconstruct(codes))
    assert {result.dtype for result in results} == {torch.float32}
    for vectors in (embeddings.view(N, M, SUB), quantizer.normalized_codebooks()):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]), rtol=0, atol=(SUB + 2) * EPS)


@pytest.mark.parametrize("result", ["lookup_table", "assignments", "reconstruct"])
def test_gradient_reaches_every_codeword_that_takes_part(result):
    quantizer = make()
    embeddings = quantizer.normalize(draw(200, D))
    table = quantizer.lookup_table(embeddings)
    codes = quantizer.codes(table)
    given = {
        "lookup_table": table,
        "assignments": quantizer.assignments(table),
        "reconstruct": quantizer.reconstruct(codes),
    }[result]
    (given * draw(*given.shape, seed=5)).sum().backward()
    used = torch.ones(M, K, dtype=torch.bool)
    if result == "reconstruct":
        used = torch.stack([torch.bincount(codes[:, m], minlength=K) > 0 for m in range(M)])
    assert torch.equal(quantizer.codebooks.grad.norm(dim=-1) > 0, used)


def test_gradient_of_the_table_equals_central_differences():
    quantizer = ProductQuantizer(2, 3, 3, 1.0)
    quantizer.codebooks.data = draw(2, 3, 3)
    weights, embeddings = draw(4, 2, 3, seed=4), quantizer.normalize(draw(4, 6, seed=5))
    (quantizer.lookup_table(embeddings) * weights).sum().backward()
    books = quantizer.codebooks.detach().double()
    points = embeddings.view(4, 2, 3).double()

    def value(flat):
        unit_books = torch.nn.functional.normalize(flat.view_as(books), dim=-1)
        return (torch.einsum("nmd,mkd->nmk", points, unit_books) * weights).sum()

    step = 1e-5
    shifts = step * torch.eye(books.numel(), dtype=torch.float64)
    slopes = torch.stack([(value(books.flatten() + s) - value(books.flatten() - s)) / (2 * step) for s in shifts])
    # The float32 gradient sums 4 weighted terms over d = 3 and divides by the norm; 100 eps bounds it with room, while
    # a missing projection onto the tangent space would be of order one.
    tolerance = 100 * EPS * slopes.abs().max()
    assert (quantizer.codebooks.grad.flatten() - slopes).abs().max() <= tolerance


def test_gradient_is_orthogonal_to_the_codeword():
    quantizer = make()
    quantizer.codebooks.data = quantizer.normalized_codebooks().detach()
    (quantizer.lookup_table(quantizer.normalize(draw(N, D))) * draw(N, M, K, seed=6)).sum().backward()
    along = (quantizer.codebooks.grad * quantizer.codebooks).sum(-1).abs()
    assert (along <= 4 * (N + SUB) * EPS * quantizer.codebooks.grad.norm(dim=-1).max()).all()


# k-means


def objective(quantizer, vectors) -> float:
    return float(quantizer.lookup_table(quantizer.normalize(vectors)).detach().max(-1).values.mean())


def test_initialize_with_one_seed_gives_one_set_of_codebooks_and_another_seed_another():
    vectors, first, again, other = draw(300, D), make(seed=1), make(seed=2), make(seed=1)
    first.initialize(vectors, seed=7)
    torch.rand(3)  # the global generator takes no part
    again.initialize(vectors, seed=7)
    other.initialize(vectors, seed=8)
    assert torch.equal(first.codebooks, again.codebooks)
    assert not torch.equal(first.codebooks, other.codebooks)


def test_initialize_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make().initialize(draw(100, D))
    assert torch.equal(torch.get_rng_state(), before)


def test_initialize_gives_unit_norm_codewords():
    quantizer = make()
    quantizer.initialize(draw(300, D))
    assert torch.allclose(quantizer.codebooks.norm(dim=-1), torch.ones(M, K), rtol=0, atol=(SUB + 2) * EPS)


def test_initialize_beats_random_codebooks_in_every_seed():
    vectors = draw(400, D)
    for seed in range(5):
        fitted, random = make(), make(seed=seed)
        fitted.initialize(vectors, seed=seed)
        assert objective(fitted, vectors) > objective(random, vectors)


def test_initialize_ends_at_a_fixed_point_of_the_slow_loop():
    # Wide gaps between the clumps: the rounds converge, and no cluster is empty.
    points = torch.nn.functional.normalize(clumps(240, 4, SUB), dim=-1)
    quantizer = make(num_codebooks=1, codebook_size=4)
    quantizer.initialize(points, iterations=100)
    groups = [[] for _ in range(4)]
    books = quantizer.codebooks[0].tolist()
    for point in points.tolist():
        scores = [sum(x * y for x, y in zip(point, word, strict=True)) for word in books]
        groups[scores.index(max(scores))].append(point)
    for group, word in zip(groups, books, strict=True):
        mean = unit([sum(column) for column in zip(*group, strict=True)])
        # Sum of at most n unit vectors in float32, divided by its length n (1 - small), then normalised.
        assert all(abs(x - y) <= 2 * len(points) * EPS for x, y in zip(mean, word, strict=True))


def test_initialize_on_k_distinct_directions_finds_exactly_these():
    words = torch.nn.functional.normalize(draw(K, M, SUB), dim=-1)
    rows = torch.arange(10 * K) % K
    lengths = torch.linspace(0.5, 2, 10 * K)[:, None]
    quantizer = make()
    quantizer.initialize(words.flatten(1)[rows] * lengths)
    for m in range(M):
        similarity = words[:, m] @ quantizer.codebooks[m].T
        assert torch.allclose(similarity.max(-1).values, torch.ones(K), rtol=0, atol=20 * SUB * EPS)
        assert sorted(similarity.argmax(-1).tolist()) == list(range(K))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_points", "num_clumps"), [(300, 3), (300, 1), (40, 5)])
def test_no_codeword_is_dead_on_a_few_dense_clumps_of_distinct_points(num_points, num_clumps, seed):
    quantizer = make(codebook_size=32)
    vectors = clumps(num_points, num_clumps, D, seed=seed)
    quantizer.initialize(vectors, seed=seed)
    codes = quantizer.codes(quantizer.lookup_table(quantizer.normalize(vectors)))
    assert [len(codes[:, m].unique()) for m in range(M)] == [32] * M


@pytest.mark.parametrize(("iterations", "width", "num_centroids"), [(1, 3, 256), (25, 3, 256), (25, 2, 32)])
def test_no_centroid_is_dead_where_plain_k_means_leaves_some(iterations, width, num_centroids):
    # Without revival these draws leave two to six dead centroids, and without the last round of it four.
    for seed in range(20):
        spread = {3: 0.05, 2: 0.1}[width]
        vectors = clumps({3: 1000, 2: 300}[width], 3, width, spread, seed)
        points = torch.nn.functional.normalize(vectors, dim=-1)
        generator = torch.Generator().manual_seed(seed)
        centroids = spherical_kmeans(points, num_centroids, generator, iterations)
        assert len((points @ centroids.T).argmax(1).unique()) == num_centroids, seed


def test_no_codeword_is_dead_when_almost_all_points_are_one():
    vectors = torch.cat([draw(1, D).expand(500, D), draw(40, D, seed=1)])
    quantizer = make(codebook_size=32)
    quantizer.initialize(vectors)
    codes = quantizer.codes(quantizer.lookup_table(quantizer.normalize(vectors)))
    assert [len(codes[:, m].unique()) for m in range(M)] == [32] * M


def test_fewer_distinct_points_than_codewords_warns_and_stays_finite_and_unit(caplog):
    quantizer = make()
    with caplog.at_level(logging.WARNING):
        quantizer.initialize(draw(3, D).repeat(50, 1))
    assert "only 3 distinct sub-vectors for 8 codewords: 5 codewords stay random" in caplog.text
    assert "codebook_size" in caplog.text
    assert quantizer.codebooks.isfinite().all()
    assert torch.allclose(quantizer.codebooks.norm(dim=-1), torch.ones(M, K), rtol=0, atol=(SUB + 2) * EPS)
    assert len(quantizer.codebooks[0].unique(dim=0)) == K


def test_enough_distinct_points_give_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        make().initialize(draw(100, D))
    assert not caplog.records


def test_sub_vectors_of_width_one_become_the_two_signs():
    quantizer = ProductQuantizer(2, 2, 1, 1.0)
    quantizer.initialize(draw(50, 2))
    assert quantizer.codebooks.flatten(1).sort().values.tolist() == [[-1.0, 1.0]] * 2


def test_initialize_draws_at_most_256_rows_a_codeword():
    vectors = draw(256 * 2 + 300, 4)
    full, drawn = (ProductQuantizer(1, 2, 4, 1.0) for _ in range(2))
    rows = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: 256 * 2]
    full.initialize(vectors)
    changed = vectors.clone()
    left_out = torch.ones(len(vectors), dtype=torch.bool)
    left_out[rows] = False
    changed[left_out] = 1e3 * draw(int(left_out.sum()), 4, seed=9)
    drawn.initialize(changed)
    assert torch.equal(full.codebooks, drawn.codebooks)


def test_initialize_refuses_a_wrong_width():
    with pytest.raises(RuntimeError):
        make().initialize(draw(100, D + 1))


def test_defect_7_scaling_one_sub_vector_of_a_query_leaves_its_ranking():
    quantizer = ProductQuantizer(4, 16, 8, 10.0)
    torch.nn.init.normal_(quantizer.codebooks, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    codes = torch.randint(16, (200, 4), generator=torch.Generator().manual_seed(2))
    scaled = query.clone()
    scaled[:, 8:16] *= 10
    tables = [quantizer.lookup_table(quantizer.normalize(vectors))[0] for vectors in (query, scaled)]
    scores = [table[torch.arange(4), codes].sum(dim=1) for table in tables]
    torch.testing.assert_close(*scores, atol=1e-6, rtol=0)


def test_soft_reconstruction_equals_the_loop_and_is_the_codeword_of_a_certain_assignment():
    quantizer = ProductQuantizer(3, 8, 4, 10.0)
    torch.nn.init.normal_(quantizer.codebooks, generator=torch.Generator().manual_seed(0))
    words = quantizer.normalized_codebooks()
    assignments = torch.rand(5, 3, 8, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    found = quantizer.soft_reconstruct(assignments)
    for n in range(5):
        for m in range(3):
            mean = sum(float(assignments[n, m, k]) * words[m, k] for k in range(8))
            torch.testing.assert_close(found[n, 4 * m : 4 * m + 4], mean, atol=1e-6, rtol=0)
    codes = torch.randint(8, (5, 3), generator=torch.Generator().manual_seed(2))
    certain = torch.nn.functional.one_hot(codes, 8).float()
    torch.testing.assert_close(quantizer.soft_reconstruct(certain), quantizer.reconstruct(codes), atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer.soft_reconstruct(certain).dtype == torch.float32
