"""Each alternative to DSA computes its own definition, token by token, and none looks into the future."""

import math

import pytest
import torch

import dsa
import small
from course.experiments.attention_variants import blocks, delta, moba, msa, nsa, quest, sinks, sparq
from course.experiments.attention_variants.selective_attention import Budget, convert
from dsa.kernels import reference
from dsa.model.transformer import Transformer

DESIGNS = {"sinks": sinks.Sinks, "moba": moba.Moba, "quest": quest.Quest, "nsa": nsa.Nsa, "sparq": sparq.Sparq}
BUDGET = Budget(keys=12, block=4, sinks=2, components=5)
B, H, C, R = 2, 3, 6, 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(T, S, seed=0):
    return random(B, T, H, C + R, seed=seed), random(B, S, C + R, seed=seed + 1)


def rows(selected):
    """The chosen keys of each query, as sets; a repeat is an error."""
    found = []
    for row in selected.flatten(0, 1).tolist():
        kept = [key for key in row if key >= 0]
        assert len(kept) == len(set(kept)), "a key is chosen twice"
        found.append(set(kept))
    return found


def softmax(values):
    top = max(values)
    shares = [math.exp(value - top) for value in values]
    return [share / sum(shares) for share in shares]


def chosen_blocks(T, S, size, count, score):
    """By hand: own block and the best past ones; score(b, t, block) -> one number per head."""
    found = []
    for b in range(B):
        for t in range(T):
            own = (S - T + t) // size
            heads = [score(b, t, n) for n in range(own)]
            total = [sum(h) for h in zip(*(softmax(column) for column in zip(*heads, strict=True)), strict=True)]
            best = sorted(range(own), key=lambda n: -total[n])[: count - 1]
            tokens = {n * size + i for n in [own, *best] for i in range(size)}
            found.append({s for s in tokens if s <= S - T + t})
    return found


def own(design, q, kv):
    """The choice of a design on bare tensors, scale 0.5."""
    layer = design.__new__(design)
    torch.nn.Module.__init__(layer)
    layer.budget, layer.scale = BUDGET, 0.5
    return layer.choose(q, kv, None)


@pytest.mark.parametrize(("T", "S"), [(22, 22), (3, 22), (1, 9), (4, 7)])
def test_pooled_blocks_are_those_of_best_mean(T, S):
    q, kv = factors(T, S)

    def score(b, t, n):
        mean = sum(kv[b, 4 * n + i] for i in range(4)) / 4
        return [float(0.5 * (q[b, t, h] @ mean)) for h in range(H)]

    assert rows(own(moba.Moba, q, kv)) == chosen_blocks(T, S, 4, 3, score)


@pytest.mark.parametrize(("T", "S"), [(22, 22), (3, 22)])
def test_bounded_blocks_are_those_of_highest_bound(T, S):
    q, kv = factors(T, S)

    def score(b, t, n):
        keys = kv[b, 4 * n : 4 * n + 4]
        best = torch.maximum(q[b, t] * keys.amin(0), q[b, t] * keys.amax(0))  # (H, C + R)
        return [float(0.5 * x) for x in best.sum(-1)]

    assert rows(own(quest.Quest, q, kv)) == chosen_blocks(T, S, 4, 3, score)


def test_no_key_beats_its_blocks_bound():
    q, kv = factors(12, 12, seed=5)
    bound = quest.bounds(q, kv, 4, 0.5)
    best = blocks.cut(0.5 * torch.einsum("bthw,bsw->bsth", q, kv), 4).amax(2)  # (B, N, T, H)
    assert (bound >= best.permute(0, 2, 3, 1) - 1e-12).all()
    assert (moba.mean_logits(q, kv, 4, 0.5) <= best.permute(0, 2, 3, 1) + 1e-12).all()


def test_a_block_is_worth_its_best_token():
    scores = random(B, 10, 10).masked_fill(~reference.causal_mask(10, 10), float("-inf"))
    found = msa.best_token(scores, 4)
    for b in range(B):
        for t in range(10):
            assert found[b, t].tolist() == [float(scores[b, t, n : n + 4].max()) for n in (0, 4, 8)]


@pytest.mark.parametrize(("T", "S"), [(16, 16), (1, 16)])
def test_short_products_use_the_largest_components_and_choose_the_best_tokens(T, S):
    q, kv = factors(T, S)
    expected = []
    for b in range(B):
        for t in range(T):
            total = sum(q[b, t, h].abs() for h in range(H)).tolist()
            top = sorted(range(C + R), key=lambda i: -total[i])[:5]
            shares = [0.0] * (S - T + t + 1)
            for h in range(H):
                held = sum(abs(q[b, t, h, i]) for i in top) / q[b, t, h].abs().sum()
                logits = [
                    float(0.5 * sum(q[b, t, h, i] * kv[b, s, i] for i in top) / held.sqrt()) for s in range(len(shares))
                ]
                shares = [a + x for a, x in zip(shares, softmax(logits), strict=True)]
            expected.append(set(sorted(range(len(shares)), key=lambda s: -shares[s])[:12]))
    assert rows(own(sparq.Sparq, q, kv)) == expected


def test_with_all_components_the_choice_is_the_oracles():
    q, kv = factors(12, 12)
    logits = sparq.short_products(q, kv, C + R, 0.5)
    assert torch.allclose(logits, 0.5 * torch.einsum("bthw,bsw->bths", q, kv))


def test_sinks_and_window_by_hand():
    found = rows(sinks.sinks_and_window(1, 12, 12, keys=5, sinks=2))
    assert found == [{s for s in range(t + 1) if s < 2 or s > t - 3} for t in range(12)]
    assert rows(sinks.sinks_and_window(1, 1, 12, keys=5, sinks=0)) == [{7, 8, 9, 10, 11}]


# in the model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warmed():
    """A model with indexers, and tokens (B, T) for it."""
    return small.model().double(), small.tokens(2, 23)


def built(warmed, name):
    model, _ = warmed
    model.attention = "sparse" if name == "msa" else "dense"
    grown = convert(model, {**DESIGNS, "msa": msa.Msa}[name], BUDGET).double()
    return grown.eval()


@pytest.mark.parametrize("name", [*DESIGNS, "msa"])
def test_the_past_does_not_depend_on_the_future(warmed, name):
    model, tokens = built(warmed, name), warmed[1]
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % small.SIZES["vocab_size"]
    assert torch.allclose(model(tokens)[:, :15], model(changed)[:, :15], atol=1e-9)
    assert not torch.allclose(model(tokens)[:, 15:], model(changed)[:, 15:], atol=1e-3)


@pytest.mark.parametrize("name", [*DESIGNS, "msa"])
def test_a_cache_changes_nothing(warmed, name):
    model, tokens = built(warmed, name), warmed[1]
    cache, parts = model.new_cache(2, 23), []
    with torch.no_grad():
        for part in tokens.split([11, 1, 6, 5], dim=1):
            parts.append(model(part, cache))
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-8)


@pytest.mark.parametrize("name", ["sinks", "moba", "quest", "sparq", "msa"])
def test_a_budget_for_everything_is_dense_attention(warmed, name):
    model, tokens = warmed
    model.attention = "sparse" if name == "msa" else "dense"
    everything = convert(model, {**DESIGNS, "msa": msa.Msa}[name], Budget(keys=24, block=4, sinks=2)).double()
    model.attention = "dense"
    assert torch.allclose(everything(tokens), model(tokens), atol=1e-8)


def test_block_designs_choose_whole_blocks_and_their_own(warmed):
    for name in ("moba", "quest", "msa"):
        _, trace = built(warmed, name)(warmed[1], trace=True)
        for layer in trace:
            for t, keys in enumerate(rows(layer.selected[:1])):
                assert set(range(t // 4 * 4, t + 1)) <= keys and len(keys) <= BUDGET.keys
                assert all({n * 4 + i for i in range(4)} <= keys for n in {s // 4 for s in keys} - {t // 4})


def test_msa_without_an_indexer_says_what_it_needs():
    model = small.model(sizes=small.config(**small.DENSE))
    with pytest.raises(ValueError, match="this design asks the indexer: give the model one"):
        convert(model, msa.Msa, BUDGET)(small.tokens(1, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keys": 30}, "30 keys in blocks of 8: give a multiple of the block, at least 16"),
        ({"keys": 8}, "8 keys in blocks of 8"),
        ({"sinks": 32}, "sinks=32 must lie in 0 ... 31"),
        ({"block": 0}, "block=0: a query reads at least 1"),
    ],
)
def test_a_budget_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Budget(**values)


# NSA ------------------------------------------------------------------------------------------------------------------


def test_nsa_by_hand(warmed):
    """One query, one head at a time: three attentions written out, mixed by the gates."""
    model = built(warmed, "nsa")
    layer, size = model.model.layers[1].self_attn, BUDGET.block
    with torch.no_grad():  # nothing may be left at its harmless start
        layer.pool.outer.weight.copy_(0.3 * random(*layer.pool.outer.weight.shape))
        layer.gates.weight.copy_(random(*layer.gates.weight.shape))
    seen = []
    layer.register_forward_hook(lambda _, got, gave: seen.append((*got[:2], gave[0])))
    with torch.no_grad():
        model(warmed[1])
        x, context, out = seen[0]
        q, kv = layer.absorb_query(layer.queries(x, context.rope)[0]), layer.compress_kv(x, context.rope)
        w_v, C, b = layer.up_projections(torch.float64)[1], layer.latent, 0
        for t in (2, 9, 22):
            past = t // size
            keys = [layer.pool(kv[b : b + 1, None, n * size : (n + 1) * size])[0, 0] for n in range(past)]
            shares = [softmax([float(layer.scale * (q[b, t, h] @ k)) for k in keys]) if keys else [] for h in range(4)]
            rank = sorted(range(past), key=lambda n: -sum(s[n] for s in shares))
            picked = [n * size + i for n in [past, *rank[:1]] for i in range(size) if n * size + i <= t]
            recent = range(max(0, t - size + 1), t + 1)
            gates = layer.gates(x[b, t]).sigmoid().view(3, 4)
            heads = []
            for h in range(4):
                coarse = sum((s * k[:C] for s, k in zip(shares[h], keys, strict=True)), torch.zeros(C).double())
                fine, near = (
                    sum(
                        s * kv[b, key, :C]
                        for s, key in zip(
                            softmax([float(layer.scale * (q[b, t, h] @ kv[b, key])) for key in which]),
                            which,
                            strict=True,
                        )
                    )
                    for which in (picked, list(recent))
                )
                heads.append(w_v[h] @ (gates[0, h] * coarse + gates[1, h] * fine + gates[2, h] * near))
            assert torch.allclose(layer.o_proj(torch.cat(heads)), out[b, t], atol=1e-8)


def test_nsa_refuses_a_budget_that_selects_nothing(warmed):
    with pytest.raises(ValueError, match="8 keys are 2 blocks of 4: NSA needs at least 3"):
        convert(warmed[0], nsa.Nsa, Budget(keys=8, block=4))


def test_nsas_proxy_learns_from_the_language_loss_alone(warmed):
    model = built(warmed, "nsa")
    model(warmed[1]).square().sum().backward()
    layer = model.model.layers[0].self_attn
    assert layer.pool.outer.weight.grad.abs().sum() > 0 and layer.gates.weight.grad.abs().sum() > 0


# Gated DeltaNet -------------------------------------------------------------------------------------------------------


def rule(T, seed=0):
    q, k, v = (random(2, T, 3, width, seed=seed + i) for i, width in enumerate((8, 8, 5)))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return q, k, v, -random(2, T, 3, seed=9).abs(), random(2, T, 3, seed=8).sigmoid()


@pytest.mark.parametrize("T", [1, 7, 32, 70])
def test_chunks_compute_the_recurrence_and_its_gradients(T):
    inputs = [x.requires_grad_() for x in rule(T)]
    slow, fast = delta.recurrent(*inputs), delta.chunked(*inputs, chunk=16)
    assert torch.allclose(slow, fast, atol=1e-10)
    weight = random(*slow.shape, seed=4)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (slow, fast)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients, strict=True))


def test_strong_forgetting_does_not_overflow():
    q, k, v, log_a, b = (x.float() for x in rule(64))
    inputs = [x.requires_grad_() for x in (q, k, v, 60 * log_a, b)]
    out = delta.chunked(*inputs)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_the_rule_is_qwen3_nexts():
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").torch_recurrent_gated_delta_rule
    q, k, v, log_a, b = (x.float() for x in rule(20))
    assert torch.allclose(delta.recurrent(q * 8**-0.5, k, v, log_a, b), theirs(q, k, v, log_a, b)[0], atol=1e-5)


def test_the_memory_holds_what_was_written_last_for_a_key():
    """With b = 1 and no forgetting the rule is an exact dictionary of orthogonal keys; writing again overwrites."""
    k = torch.eye(4)[[0, 1, 2, 1]][None, :, None]  # (1, T, 1, W)
    v = torch.tensor([[1.0], [2.0], [3.0], [7.0]])[None, :, None]
    read = torch.eye(4)[1].expand(1, 4, 1, 4)
    out = delta.recurrent(read, k, v, torch.zeros(1, 4, 1), torch.ones(1, 4, 1))
    assert out.flatten().tolist() == [0, 2, 2, 7]


@pytest.fixture(scope="module")
def three():
    return small.model(sizes=small.config())


def test_a_hybrid_keeps_one_full_layer_in_four_and_what_it_took_over(three):
    hybrid = delta.hybrid(three)
    kinds = [type(layer.self_attn).__name__ for layer in hybrid.model.layers]
    assert kinds == ["GatedDeltaNet"] * 3 + ["Attention"]
    theirs, ours = three.model.layers[2].self_attn.q_b_proj.weight, hybrid.model.layers[3].self_attn.q_b_proj.weight
    assert torch.equal(theirs, ours) and hybrid.model.layers[3].self_attn.indexer is None
    x, step = torch.randn(1, 5, 48), None
    added = hybrid.model.layers[2]
    assert added.mlp(x).abs().max() == 0 and added.self_attn(x, step)[0].abs().max() == 0


def test_a_hybrid_does_not_see_the_future_and_refuses_a_cache(three):
    hybrid, tokens = delta.hybrid(three).eval(), small.tokens(1, 40)
    changed = tokens.clone()
    changed[:, 25:] = 3
    assert torch.allclose(hybrid(tokens)[:, :25], hybrid(changed)[:, :25], atol=1e-4)
    with pytest.raises(ValueError, match="has none: run it without a cache"):
        hybrid(tokens, hybrid.new_cache(1, 40))
    with pytest.raises(ValueError, match="made here from 3 layers, not 4"):
        delta.hybrid(hybrid)


def test_converting_copies_and_leaves_the_model_alone(three):
    before = {name: p.clone() for name, p in three.state_dict().items()}
    grown = convert(three, moba.Moba, BUDGET)
    with torch.no_grad():
        for p in grown.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in three.state_dict().items())
    assert isinstance(grown, Transformer) and isinstance(grown.config, dsa.Config)
