"""What chapter 07 shows: formats and blocks round as they say, overlap counts sets, and the panel works everywhere."""

import matplotlib.pyplot as plt
import pytest
import torch

import dsa
from course.figures import fp8_figures as figures
from course.figures import rounding
from course.ui.panel import Choice, Panel, Slider
from dsa.kernels import fp8, loops, ops
from project import DATA

SPARSE = DATA / "sparse"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(B=1, T=80, J=2, W=16):
    return normal(B, T, J, W), normal(B, T, W, seed=1), normal(B, T, J, seed=2)


@pytest.mark.parametrize("name", [name for name in rounding.FORMATS if name != "bf16"])
@pytest.mark.parametrize("block", rounding.BLOCKS.values(), ids=list(rounding.BLOCKS))
def test_a_block_holds_no_more_numbers_than_its_format_has(name, block):
    x, form = normal(2, 70, 24), rounding.FORMATS[name]
    left = rounding.rounded(x, name, block)
    rows, columns = (min(b, s) for b, s in zip(block, (70, 24), strict=True))
    part, original = left[0, :rows, :columns], x[0, :rows, :columns]
    assert len(part.abs().unique()) <= 2 ** (form.bits - 1)
    assert torch.isclose(part.abs().max(), original.abs().max())  # the largest is on the grid
    assert torch.equal(rounding.rounded(-x, name, block), -left)


def test_formats_are_the_packages_own():
    x = normal(3, 200)
    one = (1, 128)
    assert torch.equal(rounding.rounded(x, "e4m3", one), fp8.dequantize(*fp8.quantize(x, ue8m0=False)))
    codes, scale = fp8.quantize_int8(x)
    assert torch.equal(rounding.rounded(x, "int8"), codes * scale)
    assert torch.equal(rounding.rounded(x, "bf16"), x.bfloat16().float())
    assert {abs(v) for v in rounding.FORMATS["e2m1"].round(torch.linspace(-9, 9, 999)).tolist()} == {
        0, 0.5, 1, 1.5, 2, 3, 4, 6,
    }  # fmt: skip
    with pytest.raises(ValueError, match="format 'e9m9' is unknown: use one of bf16, int8"):
        rounding.rounded(x, "e9m9")


def test_factors_are_rounded_query_by_query():
    q, k, w = factors()
    q8, k8, same = rounding.round_factors((q, k, w), "int8")
    assert torch.equal(q8[0, 5, 1], rounding.rounded(q[0, 5, 1][None], "int8")[0])
    assert torch.equal(k8[0, 9], rounding.rounded(k[0, 9][None], "int8")[0]) and same is w
    turned = rounding.round_factors((q, k, w), "bf16", turn=True)
    torch.testing.assert_close(ops.index_scores(*turned), ops.index_scores(q, k, w), atol=0.2, rtol=0.05)


def test_overlap_counts_common_members():
    a = torch.tensor([[[0, -1], [0, 1], [2, 1]]])
    b = torch.tensor([[[0, -1], [1, 0], [0, 1]]])
    assert rounding.overlap(a, b) == pytest.approx(4 / 5) and rounding.overlap(a, b, first=2) == 0.5
    assert rounding.overlap(a, a) == 1.0


def test_relative_error_leaves_the_future_out():
    exact = torch.tensor([[3.0, float("-inf")], [0.0, 4.0]])
    found = torch.tensor([[3.0, float("-inf")], [3.0, 4.0]])
    assert rounding.relative_error(found, exact) == pytest.approx(0.6)


def test_an_outlier_that_is_undone_changes_no_score():
    plain, changed = factors(), rounding.with_outlier(factors(), 1024.0, place=3)
    assert torch.equal(ops.index_topk(*plain, 16), ops.index_topk(*changed, 16))
    assert changed[1][..., 3].abs().max() > 1000


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_factors_are_what_the_model_compares(attention):
    model = dsa.from_pretrained(SPARSE)
    model.attention, model.index_precision = attention, "fp8"
    tokens = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    found = rounding.index_factors(model, tokens)
    assert model.index_precision == "fp8" and len(found) == 3
    model.index_precision = "full"
    with torch.no_grad():
        _, trace = model(tokens, trace=True)
    by_definition = loops.index_scores(*(x[:, :40] for x in found[0]))
    torch.testing.assert_close(by_definition, trace[0].scores, atol=1e-4, rtol=1e-4)


def test_the_panel_draws_at_every_position():
    draw = rounding.draw_outlier(factors())
    panel = Panel(
        draw,
        outlier=Slider("outlier, 2 to the power of", 0, 12, 4),
        block=Choice("one scale for", list(rounding.BLOCKS), "a row"),
        format=Choice("format", list(rounding.FORMATS), "int8"),
    )
    positions = list(panel.grid(200))
    assert 50 < len(positions) <= 200
    for position in positions:
        figure, sentence = draw(**position)
        plt.close(figure)
        assert f"With {position['format']}, one scale for {position['block']}" in sentence
        assert f"{2 ** position['outlier']:,}: " in sentence


def test_the_panels_numbers_are_those_of_a_computation_by_hand():
    given = factors()
    _, sentence = rounding.draw_outlier(given, first=64)(4, "a row", "e2m1")
    exact = loops.index_topk(*given, 16)[0, 64:]
    q, k, w = rounding.with_outlier(given, 16.0)
    form = rounding.FORMATS["e2m1"]

    def by_hand(x):
        scale = x.abs().amax(-1, keepdim=True) / 6
        return form.round(x / scale) * scale

    rounded = loops.index_topk(by_hand(q), by_hand(k), w, 16)[0, 64:]
    common = sum(len({*a.tolist()} & {*b.tolist()}) for a, b in zip(exact, rounded, strict=True))
    assert f": {common / exact.numel():.0%} of the chosen tokens stay" in sentence
    plt.close("all")


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ((13, "a row", "int8"), "outlier = 13 lies outside 0 to 12"),
        ((1.5, "a row", "int8"), "outlier = 1.5 is not a whole number"),
        ((1, "a column", "int8"), "'a column', 'int8': use one of 8 numbers, a row"),
        ((1, "a row", "fp3"), "'a row', 'fp3': use one of"),
    ],
)
def test_what_cannot_be_drawn_is_refused(position, says):
    with pytest.raises(ValueError, match=says):
        rounding.draw_outlier(factors())(*position)


def test_places_of_newcomers_count_larger_scores():
    scores = torch.tensor([[[9.0, 8.0, 7.0, 7.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]]])
    chosen = torch.tensor([[[0, 3], [4, 2]]])
    assert rounding.ranks_of_newcomers(scores, chosen).tolist() == [3, 5, 3]  # the two sevens share place 3
    assert rounding.ranks_of_newcomers(scores, chosen, first=1).tolist() == [5, 3]
    assert rounding.rank_quantile(torch.arange(1, 101)) == 96


def test_places_agree_with_a_count_by_hand():
    given = factors()
    scores, rows = loops.index_scores(*given), ops.index_topk(*rounding.round_factors(given, "int2"), 16)
    by_hand = [int((scores[0, t] > scores[0, t, s]).sum()) + 1 for t in range(20, 80) for s in rows[0, t]]
    assert rounding.ranks_of_newcomers(scores, rows, first=20).tolist() == [at for at in by_hand if at > 16]


def words_of(drawn):
    figure, words = drawn
    plt.close(figure)
    return words


def test_words_of_pictures_are_computed():
    assert "lie 2 apart at the top and 2^-1 apart" in words_of(
        figures.draw_numbers(torch.tensor([0, 0.5, 1, 3]), (3, 1))
    )
    x = normal(200, 300)
    x[3, 5] = 500
    assert "of 128 numbers to 1 or more with runs, of 16,384 with squares" in words_of(figures.draw_scales(x))
    assert "than: e4m3 18." in words_of(figures.draw_newcomers({"e4m3": torch.tensor([17, 18])}, queries=2))
    assert "here 10.0% without, 20.0% with" in words_of(figures.draw_pairs({"here": (0.1, 0.2)}))
    assert "in bytes. Dense: 1,152; sparse: 1,408." in words_of(
        figures.draw_bytes({"dense": (1024, 128, 0), "sparse": (1152, 0, 256)})
    )
    figure = figures.draw_lines({"a": {"int8": 0.9, "e4m3": 0.8}}, "share")
    assert [line.get_label() for line in figure.axes[0].lines] == ["a"]
    plt.close(figure)


def test_numbers_vanish_below_half_a_step():
    figure, vanish = figures.draw_relative_errors(("int8", "e4m3"))
    assert vanish == {"int8": pytest.approx(0.5 / 127, rel=0.01), "e4m3": pytest.approx(2**-10 / 448, rel=0.01)}
    plt.close(figure)
