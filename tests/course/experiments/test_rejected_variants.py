"""Each idea that was dropped computes what the reference computes, or its time would say nothing; and the record says
what the course tells of it.
"""

import json

import matplotlib.pyplot as plt
import pytest
import torch

from course.experiments import cpu_variants as ideas
from course.experiments import rejected_variants
from course.figures import cpu_variant_times
from dsa.bench import cpu
from dsa.kernels import ops, reference
from dsa.kernels.fp8 import QuantizedTensor, quantize_int8
from dsa.record import as_of_today
from project import DATA

T, S = 12, 1024
S2 = cpu.SHAPES["s1"]()  # the smaller of the two shapes
NARROW = {"index in bf16", "index in int8"}


@pytest.fixture(scope="module")
def given():
    return rejected_variants.sparse_layer(S2, T, S)


def expected(given, q, k, w):
    selected = reference.index_topk(q, k, w, given.top_k)
    return reference.sparse_attention(given.q, given.kv, selected, given.scale, given.latent)


@pytest.mark.parametrize("name", sorted(ideas.SPARSE.keys() - NARROW))
def test_sparse_ideas_compute_the_reference(given, name):
    right = expected(given, given.index_q, given.index_k, given.w)
    torch.testing.assert_close(ideas.SPARSE[name](given), right, atol=1e-5, rtol=1e-5)


def test_eight_bits_compute_the_reference_of_what_the_codes_stand_for(given):
    q, k = (QuantizedTensor(*quantize_int8(x)).dequantize() for x in (given.index_q, given.index_k))
    found, right = ideas.in_int8(given), expected(given, q, k, given.w)
    assert ((found - right).flatten(2).norm(dim=-1) < 1e-3).float().mean() > 0.9  # a near-tie may fall otherwise


def test_bf16_chooses_nearly_the_same(given, monkeypatch):
    chosen = []
    monkeypatch.setattr(ideas.Sparse, "attended", lambda given, selected, backend=None: chosen.append(selected))
    ideas.in_bf16(given), ideas.candidate(given)
    shared = [len(set(a) & set(b)) for a, b in zip(*(c[0].tolist() for c in chosen), strict=True)]
    assert min(shared) > 0.9 * given.top_k


@pytest.mark.parametrize("name", list(ideas.DENSE))
def test_dense_ideas_compute_the_reference(name):
    block = rejected_variants.dense_layer(S2, 16, 100)
    right = reference.dense_attention(block.q, block.k, block.v, block.scale)
    torch.testing.assert_close(ideas.DENSE[name](block), right, atol=1e-5, rtol=1e-5)


def test_the_ideas_differ_in_how_they_do_it(given, monkeypatch):
    """Whole rows go to `topk` or they do not; masks are built or they are not."""
    seen, plain = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **b: seen.append(x.shape[-1]) or plain(x, *a, **b))
    widths = {}
    for name in ("whole scores, plain topk", "whole scores, neighbours"):
        seen.clear()
        ideas.SPARSE[name](given)
        widths[name] = seen[0]
    assert widths == {"whole scores, plain topk": S, "whole scores, neighbours": S // 8}
    calls = []
    monkeypatch.setattr(ops, "sparse_attention", lambda *a, backend=None: calls.append(backend) or given.q)
    ideas.masked(given), ideas.candidate(given)
    assert calls == ["reference", None]


def test_rows_are_held_against_ours_and_the_command_writes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        rejected_variants, "cpu_seconds", lambda calls, repeats: {n: 6.0 + 2 * i for i, n in enumerate(calls)}
    )
    monkeypatch.setattr(rejected_variants, "QUERIES", 4)
    monkeypatch.setattr(rejected_variants, "BLOCK", 8)
    out = tmp_path / "cpu_tried.json"
    rejected_variants.main(["--keys", "2048", "--repeats", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["tried"] for row in found["rows"]] == [*ideas.SPARSE, *ideas.DENSE]
    assert found["rows"][0] | {"faults": 0} == {
        "attention": "sparse", "tried": "ours", "seconds": 1.5, "times": 1, "faults": 0,
    }  # fmt: skip
    assert found["rows"][1]["times"] == 1.33
    assert found["command"].startswith("python -m course.experiments.rejected_variants --keys 2048")
    assert "masked" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rejected_variants.main(["--out", str(out)])
    rejected_variants.main(["--keys", "2048", "--repeats", "1"])  # only prints, as in `make bench`


def test_the_record_says_what_the_course_tells():
    found = json.loads((DATA / "measurements/cpu_tried.json").read_text("utf-8"))
    times = {(row["attention"], row["tried"]): row["times"] for row in found["rows"]}
    assert list(times) == [("sparse", name) for name in ideas.SPARSE] + [("dense", name) for name in ideas.DENSE]
    candidate = found["rows"][0]["seconds"]
    dense = next(row["seconds"] for row in found["rows"] if row["attention"] == "dense" and row["tried"] == "ours")
    assert times["sparse", "masked"] * candidate > 2 * dense  # dearer than attending to everything
    assert times["sparse", "four lines"] > 2 and times["sparse", "fresh tensors"] > 1
    assert times["dense", "mask of a chunk"] > 1.3 and times["dense", "values unpadded"] > 2
    assert max(times[("sparse", name)] for name in NARROW) < 1
    assert (
        found["machine"]
        and found["date"]
        and as_of_today(found["command"]).startswith("python -m course.experiments.rejected_variants")
    )


def test_the_picture_has_a_bar_for_each_idea_and_tells_its_faults():
    rows = [
        {"attention": kind, "tried": name, "seconds": 1.0, "times": times, "faults": page_faults}
        for kind, name, times, page_faults in (
            ("sparse", "ours", 1.0, 0), ("sparse", "masked", 18.0, 1234), ("dense", "ours", 1.0, None),
        )
    ]  # fmt: skip
    fig, words = cpu_variant_times.draw_rejected_variants({"rows": rows})
    assert [len(ax.patches) for ax in fig.axes] == [2, 1] and "masked 18.00 times ours" in words
    assert [text.get_text() for text in fig.axes[0].texts] == ["1.00", "18.00, 1,234 page faults"]
    plt.close(fig)
    with pytest.raises(ValueError, match="no rows for attention='dense'"):
        cpu_variant_times.draw_rejected_variants({"rows": rows[:2]})
