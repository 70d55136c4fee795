"""The closed form of the indexer's loss is autograd's gradient, and needs no memory for it; its benchmark runs.

That all backends agree on small shapes in fp64 is in `test_kernels`. Here: each hand-written derivative for itself, the
sizes of a long text in fp32, and the memory.
"""

import json

import pytest
import torch

from dsa.bench import indexer_loss as bench
from dsa.bench.memory import peak_bytes
from dsa.kernels import indexer_loss, ops, reference


def gradients(index, q, k, selected, backend, scale=bench.WIDTH**-0.5):
    leaves = [x.detach().clone().requires_grad_() for x in index]
    loss = ops.indexer_loss(*leaves, q, k, scale, selected, backend=backend)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


def some_selection(index, K):
    with torch.no_grad():
        return ops.index_topk(*index, K)


@pytest.mark.parametrize("K", [None, 64])
def test_gradients_are_autograds_over_the_full_matrix(K):
    """At real proportions in fp32: 1e-5 of the largest entry. The same in fp64: 1e-13, so that it is rounding."""
    torch.manual_seed(0)
    index, q, k = bench.inputs(600)  # five tiles, the last one short
    q = 3 * q  # a peaked target
    selected = None if K is None else some_selection(index, K)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-13)]:
        cast = [x.detach().to(dtype) for x in index]
        found, expected = (gradients(cast, q.to(dtype), k.to(dtype), selected, b) for b in ("tiled", "reference"))
        for ours, autograds in zip(found, expected, strict=True):
            assert (ours - autograds).abs().max() < tolerance * autograds.abs().max()


@pytest.mark.parametrize("K", [None, 3])
@pytest.mark.parametrize("numbers", [1, 40, 10**6])
def test_any_size_of_tile_gives_the_same(K, numbers, monkeypatch):
    monkeypatch.setattr(indexer_loss, "MAX_TILE_ELEMENTS", numbers)
    torch.manual_seed(0)
    index = [torch.randn(2, 7, 3, 4).double(), torch.randn(2, 9, 4).double(), torch.randn(2, 7, 3).double()]
    q, k = torch.randn(2, 7, 5, 6).double(), torch.randn(2, 9, 1, 6).double()
    selected = None if K is None else some_selection(index, K)
    for ours, autograds in zip(*(gradients(index, q, k, selected, b) for b in ("tiled", "reference")), strict=True):
        assert torch.allclose(ours, autograds, rtol=0, atol=1e-13)


def test_the_gradient_of_the_divergence_is_softmax_minus_p():
    scores = torch.randn(2, 3, 5).double().masked_fill(torch.tensor([0, 0, 0, 0, 1]).bool(), float("-inf"))
    mass = torch.cat([torch.randn(2, 3, 4).double().softmax(-1), torch.zeros(2, 3, 1).double()], -1)
    leaf = scores.clone().requires_grad_()
    expected = reference.kl_divergence(mass, leaf).sum()
    expected.backward()
    loss, dlogits = indexer_loss.kl_and_grad(mass, scores)
    assert torch.allclose(loss, expected) and torch.allclose(dlogits, leaf.grad)
    assert torch.allclose(dlogits, scores.softmax(-1) - mass)


def test_eq_1_backwards_is_autograds():
    products, w, dlogits = (
        torch.randn(2, 3, 4, 5).double(),
        torch.randn(2, 3, 4).double(),
        torch.randn(2, 3, 5).double(),
    )
    leaves = [products.clone().requires_grad_(), w.clone().requires_grad_()]
    scores = torch.einsum("btj,btjs->bts", leaves[1], leaves[0].relu())
    wanted = torch.autograd.grad(scores, leaves, dlogits)
    assert torch.allclose(indexer_loss.score(products, w), scores)
    grad_w, grad_products = indexer_loss.score_backward(dlogits, products, w)
    assert torch.allclose(grad_products, wanted[0]) and torch.allclose(grad_w, wanted[1])


def test_8192_tokens_need_less_than_150_megabytes():
    """A matrix of T x S for each of the 4 index heads, as autograd keeps it, would be 1 GB."""
    step = bench.candidates(8192)["closed form"]
    assert peak_bytes(step) < 60e6  # the target is 150


def test_the_benchmark_measures_three_equal_ways(monkeypatch):
    torch.manual_seed(0)
    ways = [call() for call in bench.candidates(200).values()]
    assert all(torch.allclose(loss, ways[0], rtol=1e-5) for loss in ways)
    monkeypatch.setattr(bench, "WHOLE_UP_TO", 32)
    table = bench.measure(lengths=(32, 64), repeats=1)
    assert [list(row) for row in table.values()] == [list(bench.COLUMNS), ["closed form", "by chunks"]]
    assert all(cell["seconds"] > 0 and cell["megabytes"] > 0 for row in table.values() for cell in row.values())
    assert "At 32 tokens autograd at once takes" in bench.format_table(table)
    assert len(bench.rows(table)) == 5


def test_its_command_writes_where_the_numbers_come_from(tmp_path, capsys):
    bench.main(["--lengths", "32", "64", "--repeats", "1", "--out", str(tmp_path / "a.json")])
    noted = json.loads((tmp_path / "a.json").read_text())
    assert noted["command"].startswith("dsa bench indexer-loss --lengths 32 64")
    assert noted["machine"] and noted["versions"]["torch"] == torch.__version__ and len(noted["rows"]) == 6
    assert "At 64 tokens autograd at once takes" in capsys.readouterr().out
