"""The model is one function however it is called, and its parts keep the promises that their docstrings make.

Whole prompts, chunks and single tokens agree; expanded and absorbed attention agree; selecting everything is dense
attention; what is traced is what was computed; losses reach the parameters they are meant for and no others; and every
wrong call is answered with the value, the limit and the remedy.
"""

import pytest
import torch
import torch.nn.functional as F

import dsa
import small
from dsa.kernels import ops
from dsa.kernels.reference import causal_mask, selection_mask
from dsa.model import baselines, moe, rope
from dsa.model.config import Config, Yarn
from dsa.model.transformer import Transformer

T = 24


@pytest.fixture(scope="module")
def shared():
    """A model that a test may switch as it likes, if it switches all that it needs."""
    return small.model()


def set_to(model, attention, top_k=6):
    model.attention, model.top_k = attention, top_k
    return model


def gap(a, b):
    return (a - b).abs().max().item()


# ---- one function, many ways to call it


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
@torch.no_grad()
def test_mha_and_mqa_mode_are_the_same(dtype, tolerance):
    model = small.model().to(dtype)
    attention, angles = model.model.layers[0].self_attn, rope.Rope.at(model.config, 3, T)
    x = torch.randn(2, T, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    q, kv = attention.queries(x, angles)[0], attention.compress_kv(x, angles)
    expanded, absorbed = attention.attend_mha(q, kv), attention.attend_mqa(q, kv)
    assert expanded.dtype == dtype and gap(expanded, absorbed) < tolerance
    mass = ops.attention_mass(q, attention.expand_kv(kv)[0], attention.scale)
    assert gap(mass, attention.attention_probs(q, kv)) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("top_k", [T, 10 * T])
def test_everything_selected_is_dense_attention(shared, top_k):
    tokens = small.tokens(2, T)
    sparse = set_to(shared, "sparse", top_k)(tokens)
    assert gap(sparse, set_to(shared, "dense")(tokens)) < 5e-5
    assert gap(sparse, set_to(shared, "sparse", 3)(tokens)) > 1e-2  # and otherwise it is not


@torch.no_grad()
@pytest.mark.parametrize("attention", [kind for kind in baselines.KINDS if kind != "random"])
@pytest.mark.parametrize("pieces", [[1] * T, [7, 1, 10, 6], [T - 1, 1], [1, T - 1]], ids=str)
def test_chunks_and_single_tokens_equal_the_whole_prompt(shared, attention, pieces):
    model, tokens = set_to(shared, attention), small.tokens(2, T)
    cache = model.new_cache(2, T + 5)
    parts = [model(chunk, cache) for chunk in tokens.split(pieces, dim=1)]
    assert gap(torch.cat(parts, dim=1), model(tokens)) < 5e-5 and cache.length == T


@torch.no_grad()
def test_later_tokens_change_nothing_before_them(shared):
    tokens = small.tokens(1, T)
    changed = tokens.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 61
    for attention in baselines.KINDS:
        model = set_to(shared, attention)
        a, b = model(tokens), model(changed)
        assert gap(a[:, :15], b[:, :15]) < 1e-5 < gap(a[:, 15:], b[:, 15:]), attention


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other(shared):
    tokens = small.tokens(3, T)
    for attention in ("sparse", "dense", "window", "oracle"):
        model = set_to(shared, attention)
        assert gap(model(tokens)[1:2], model(tokens[1:2])) < 5e-5, attention


# ---- caches refuse what they cannot hold


def test_a_cache_refuses_what_does_not_fit(shared):
    model, cache = set_to(shared, "sparse"), shared.new_cache(2, 10)
    with pytest.raises(ValueError, match="batch of 2, not 3"):
        model(small.tokens(3, 4), cache)
    model(small.tokens(2, 8), cache)
    with pytest.raises(ValueError, match="holds 8 of at most 10 tokens, so 3 more do not fit: make one with a larger"):
        model(small.tokens(2, 3), cache)
    assert cache.length == 8  # a refused pass leaves no trace
    model(small.tokens(2, 2), cache)
    with pytest.raises(ValueError, match="129 tokens exceeds the model's max_position_embeddings=128"):
        model.new_cache(1, 129)


def test_a_cache_read_densely_has_no_index_keys(shared):
    cache = shared.new_cache(1, 10)
    set_to(shared, "dense")(small.tokens(1, 4), cache)
    with pytest.raises(ValueError, match=r"holds 4 tokens but only 0 index keys.*start again with a new cache"):
        set_to(shared, "sparse")(small.tokens(1, 1), cache)
    cache = shared.new_cache(1, 10)
    tokens = small.tokens(1, 6)
    shared(tokens[:, :5], cache)  # sparse; the other way round is fine
    dense = set_to(shared, "dense")(tokens[:, 5:], cache)
    assert dense.isfinite().all()


# ---- what a trace holds


@torch.no_grad()
@pytest.mark.parametrize("attention", baselines.KINDS)
def test_a_trace_is_what_was_computed(shared, attention):
    model, tokens = set_to(shared, attention), small.tokens(2, T)
    logits, trace = model(tokens, trace=True)
    assert torch.equal(logits, model(tokens)) and len(trace) == 3
    visible = causal_mask(T, T).expand(2, -1, -1)
    for layer in trace:
        assert torch.equal(layer.scores > float("-inf"), visible)
        assert gap(layer.mass.sum(-1), torch.ones(2, T)) < 1e-5 and (layer.mass[~visible] == 0).all()
        assert layer.selected.shape == (2, T, 6)
        kept = selection_mask(layer.selected, T)
        assert torch.equal(kept.sum(-1), torch.arange(1, T + 1).clamp(max=6).expand(2, -1))
        assert not (kept & ~visible).any()
        if attention in ("sparse", "dense"):  # under dense attention: what the indexer would keep
            assert torch.equal(kept, selection_mask(ops.select(layer.scores, 6, backend="loops"), T))


@torch.no_grad()
def test_stand_ins_choose_what_they_say(shared):
    tokens = small.tokens(2, T)
    kept = {kind: set_to(shared, kind)(tokens, trace=True)[1] for kind in ("window", "random", "oracle")}
    own, key = torch.arange(T)[:, None], torch.arange(T)
    assert (selection_mask(kept["window"][0].selected, T) == ((key <= own) & (key > own - 6))).all()
    again = set_to(shared, "random")(tokens, trace=True)[1]
    assert torch.equal(kept["random"][1].selected, again[1].selected)
    assert not torch.equal(kept["random"][0].selected, kept["random"][1].selected)  # each layer for itself
    for kind in ("window", "random"):
        share = baselines.attention_recall(kept["oracle"][0].mass, kept[kind][0].selected)
        best = baselines.attention_recall(kept["oracle"][0].mass, kept["oracle"][0].selected)
        assert (share <= best + 1e-6).all() and best.mean() > share.mean() + 0.1


@torch.no_grad()
def test_random_keys_are_drawn_anew_for_each_decoded_token(shared):
    """With one seed for all of them each would look at the same places."""
    model, cache = set_to(shared, "random"), shared.new_cache(1, 60)
    model(small.tokens(1, 50), cache, trace=True)
    kept = [model(token, cache, trace=True)[1][0].selected for token in small.tokens(1, 10, seed=1).split(1, dim=1)]
    assert len(torch.cat(kept).unique()) > 25  # about 39 of 60 by chance


@torch.no_grad()
def test_a_trace_through_the_cache_is_the_last_rows(shared):
    model, tokens = set_to(shared, "sparse"), small.tokens(2, T)
    whole = model(tokens, trace=True)[1]
    cache = model.new_cache(2, T)
    model(tokens[:, :20], cache)
    part = model(tokens[:, 20:], cache, trace=True)[1]
    for a, b in zip(part, whole, strict=True):
        assert torch.equal(selection_mask(a.selected, T), selection_mask(b.selected, T)[:, 20:])
        assert gap(a.mass, b.mass[:, 20:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", [kind for kind in baselines.KINDS if kind != "random"])
def test_a_decoded_token_sees_and_is_traced_under_an_fp8_cache_as_in_a_prompt(attention):
    """A decoded token fetches its K latents only, but a trace has the mass of every key."""
    model, tokens = set_to(small.model().double(), attention), small.tokens(2, T)  # in fp64 no code flips
    model.cache_precision = "fp8"
    logits, whole = model(tokens, trace=True)
    cache, plain = model.new_cache(2, T), model.new_cache(2, T)
    model(tokens[:, :-2], cache, trace=True), model(tokens[:, :-2], plain)
    for t in (T - 2, T - 1):
        found, part = model(tokens[:, t : t + 1], cache, trace=True)
        for some in (found, model(tokens[:, t : t + 1], plain)):
            assert gap(some, logits[:, t : t + 1]) < 1e-9
        for a, b in zip(part, whole, strict=True):
            seen = slice(t, t + 1), slice(t + 1)
            assert gap(a.scores, b.scores[:, *seen]) < 1e-9 and gap(a.mass, b.mass[:, *seen]) < 1e-9
            assert torch.equal(selection_mask(a.selected, T), selection_mask(b.selected, T)[:, seen[0]])


def test_a_trace_that_would_not_fit_is_refused_with_its_size():
    with torch.device("meta"):
        model = Transformer(small.config(max_position_embeddings=100_000))
        with pytest.raises(ValueError, match=r"20000 queries and 20000 keys in 3 layers takes 8\.9 GiB.*limit is 1"):
            model(torch.zeros(1, 20_000, dtype=torch.long), trace=True)
        model.top_k = 20_000  # the selection then takes as much again
        with pytest.raises(ValueError, match=r"20000 queries and 20000 keys in 3 layers takes 17\.9 GiB"):
            model(torch.zeros(1, 20_000, dtype=torch.long), trace=True)
        cache = model.new_cache(1, 99_000)
        cache.length = 98_000  # as if so many had been read
        with pytest.raises(ValueError, match=r"1000 queries and 99000 keys in 3 layers takes 2\.7 GiB"):
            model(torch.zeros(1, 1000, dtype=torch.long), cache, trace=True)


# ---- precision


@torch.no_grad()
def test_in_half_precision_the_residual_stream_and_norms_stay_wide(tmp_path):
    dsa.save_pretrained(small.model(), tmp_path)
    model, wide = dsa.from_pretrained(tmp_path, dtype=torch.bfloat16), dsa.from_pretrained(tmp_path)
    seen = {}
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0].dtype))
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda _, args: seen.update(attention=args[0].dtype))
    logits = model(small.tokens(2, T))
    assert seen == {"stream": torch.float32, "attention": torch.bfloat16} and logits.dtype == torch.float32
    kinds = {name: p.dtype for name, p in model.state_dict().items()}
    for name, kind in kinds.items():
        wide_too = any(part in name for part in ("norm", "correction", "lm_head", "weights_proj"))
        assert kind == (torch.float32 if wide_too else torch.bfloat16), name
    for attention in baselines.KINDS:
        model.attention = attention
        assert model(small.tokens(2, T)).isfinite().all()
    model.attention = wide.attention = "dense"  # a flipped selection would be no rounding error
    assert F.cosine_similarity(model(small.tokens(2, T)), wide(small.tokens(2, T)), dim=-1).mean() > 0.99


@pytest.fixture
def half(tmp_path):
    """A model as it is loaded in bf16, and a hidden state (2, T, D)."""
    dsa.save_pretrained(small.model(), tmp_path)
    x = torch.randn(2, T, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    return dsa.from_pretrained(tmp_path, dtype=torch.bfloat16), x


@torch.no_grad()
def test_in_half_precision_the_index_keys_norm_is_fp32(half):
    model, x = half
    index = model.model.layers[1].self_attn.indexer
    norm = index.k_norm
    assert norm.weight.dtype == norm.bias.dtype == torch.float32
    expected = F.layer_norm(index.wk(x).double(), (16,), norm.weight.double(), norm.bias.double(), 1e-6)
    assert_rounded_once(index._key(x), expected)


@torch.no_grad()
def test_in_half_precision_head_and_index_weights_are_fp32(half):
    """In bf16 the likeliest tokens tie: 8 bits are too few to tell logits of one size apart."""
    model, x = half
    many = torch.randn(40, 100, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = model.logits(many)
    assert gap(logits, many.double() @ model.lm_head.weight.double().T) < 1e-5
    tied = (logits.bfloat16() == logits.bfloat16().amax(-1, keepdim=True)).sum(-1) > 1
    assert tied.any() and not ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any()
    indexer = model.model.layers[1].self_attn.indexer
    angles = rope.Rope.at(model.config, 0, T)
    w = indexer(x, torch.randn(2, T, 24).bfloat16(), angles).w
    exact = x.double() @ indexer.weights_proj.weight.double().T * (indexer.heads * indexer.width) ** -0.5
    assert w.dtype == torch.float32 and gap(w, exact) < 1e-6


@torch.no_grad()
def test_in_half_precision_the_router_is_fp32(half):
    model, x = half
    gate = model.model.layers[1].mlp.gate
    tokens = x.flatten(0, 1)
    logits = tokens.double() @ gate.weight.double().T
    chosen, weights = gate(tokens)
    expected, expected_weights = moe.route(logits, gate.e_score_correction_bias.double(), model.config)
    assert torch.equal(chosen, expected)
    assert weights.dtype == torch.float32 and gap(weights, expected_weights) < 1e-5


@torch.no_grad()
def test_in_half_precision_experts_are_summed_in_fp32(half):
    model, x = half
    layer = model.model.layers[1].mlp
    tokens = x.flatten(0, 1)
    chosen, weights = layer.gate(tokens)
    every = torch.stack([expert(tokens) for expert in layer.experts], dim=1).double()  # (n, E, D), each in bf16
    picked = every.gather(1, chosen[..., None].expand(-1, -1, 48))
    expected = (picked * weights[..., None]).sum(1) + layer.shared_experts(tokens).double()
    assert_rounded_once(layer(x).flatten(0, 1), expected)
    assert_rounded_once(torch.cat([layer(token[None]) for token in tokens]), expected)  # as decoding has them


@torch.no_grad()
def test_in_half_precision_norms_and_gated_products_are_fp32(half):
    model, x = half
    norm = model.model.layers[1].self_attn.q_a_layernorm
    latent = x[..., :24]
    exact = latent.double() / (latent.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert_rounded_once(norm(latent), exact)
    mlp, seen = model.model.layers[0].mlp, []
    mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mlp(x)
    assert_rounded_once(seen[0], F.silu(mlp.gate_proj(x).double()) * mlp.up_proj(x).double())


def assert_rounded_once(found, exact):
    """As near to the exact numbers as bf16 comes: within half a unit in its eighth bit."""
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_rotary_and_norm_keep_fp32_under_half_inputs():
    x = torch.randn(1, 4, 1, 8).bfloat16()
    angles = rope.Rope.at(small.config(), 1000, 4)
    assert angles.cos.dtype == torch.float32
    for turn in (angles.interleaved, angles.half_split):
        assert turn(x).dtype == torch.bfloat16 and torch.equal(turn(x), turn(x.float()).bfloat16())


# ---- who learns from what


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_each_loss_reaches_its_own_parameters_only(attention):
    model = set_to(small.model(), attention).train()
    tokens = small.tokens(2, T)

    def reached(loss):
        model.zero_grad()
        loss.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    index = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert len(index) == len(model.indexer_parameters()) == 3 * 5
    _, losses = model(tokens, indexer_loss=True)
    assert losses.shape == (3,) and (losses > 0).all()
    assert reached(losses.sum()) == index
    language = reached(F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    others = {name for name, _ in model.named_parameters()} - index
    assert not language & index and len(others - language) < 0.2 * len(others)  # an expert may get no token


# ---- rotary frequencies and scale


@pytest.mark.parametrize(("width", "theta"), [(64, 10_000.0), (16, 1000.0)])
def test_frequencies_are_the_published_ones_to_the_last_bit(width, theta):
    """One over the power. The power of minus differs in the last bit, and 163,839 positions multiply that."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    published = 1.0 / theta**exponent
    assert torch.equal(rope.frequencies(width, theta, None), published)
    if width == 64:
        assert not torch.equal(theta**-exponent, published)


def test_real_yarn_numbers():
    config = Config.v32_exp()
    assert abs(config.softmax_scale - 0.135234) < 5e-7
    plain, stretched = rope.frequencies(64, 1e4, None), rope.frequencies(64, 1e4, config.yarn)
    ratio = plain / stretched
    assert torch.allclose(ratio[:11], torch.ones(11)) and torch.allclose(ratio[23:], torch.full((9,), 40.0))
    assert (ratio[10:24].diff() > 0).all()  # the ramp lies between pairs 10 and 23
    assert small.config(yarn=None).softmax_scale == 16**-0.5 == small.config(yarn=Yarn(1, 16)).softmax_scale


def test_rotation_depends_on_distance_only_and_starts_at_zero():
    x, y = torch.randn(2, 1, 1, 1, 8)
    for turn in ("interleaved", "half_split"):
        at = [getattr(rope.Rope.at(small.config(), p, 1), turn) for p in range(60)]
        assert torch.equal(at[0](x), x)
        assert gap((at[20](x) * at[13](y)).sum(), (at[50](x) * at[43](y)).sum()) < 1e-4
    angles = rope.Rope.at(small.config(yarn=None), 1, 1)
    first = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).view(1, 1, 1, 8)
    assert angles.interleaved(first).nonzero()[:, -1].tolist() == [0, 1]
    assert angles.half_split(first).nonzero()[:, -1].tolist() == [0, 4]


@torch.no_grad()
def test_index_scores_are_equation_1_written_out(shared):
    """With its scale: a wrong one changes no selection, but it changes what the indexer's loss teaches."""
    model = set_to(shared, "sparse")
    attention, inputs = model.model.layers[1].self_attn, {}
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    _, trace = model(small.tokens(1, 9), trace=True)
    hook.remove()
    x, index, angles = inputs["x"][0], attention.indexer, rope.frequencies(8, 1e4, model.config.yarn)
    norm = torch.nn.functional.layer_norm
    k = norm(x @ index.wk.weight.T, (16,), index.k_norm.weight, index.k_norm.bias, 1e-6)  # (T, W)
    q = attention.q_a_layernorm(x @ attention.q_a_proj.weight.T) @ index.wq_b.weight.T
    q, w = q.view(9, 16, 16), x @ index.weights_proj.weight.T  # (T, J, W), (T, J)

    def turned(v, position):
        z = torch.complex(v[:4], v[4:8]) * torch.polar(torch.ones(4), position * angles)  # dimension i with i + R/2
        return torch.cat([z.real, z.imag, v[8:]])

    for t in range(9):
        for s in range(t + 1):
            products = torch.stack([turned(head, t) @ turned(k[s], s) for head in q[t]])
            expected = (w[t] * 16**-0.5 * 16**-0.5 * products.relu()).sum()
            assert abs(trace[1].scores[0, t, s] - expected) < 1e-5


# ---- experts


ROUTER = small.config(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5)


def test_routing_rules_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.6, 0.2, 0.3, 0.7, 0.4]])  # groups score 1.0, 1.1, 0.5, 1.1
    chosen, weights = moe.route(scores.logit(), torch.zeros(8), ROUTER)
    assert chosen[0].tolist() == [6, 3, 2]  # the best expert of all, 0, is in a group that was dropped
    assert torch.allclose(weights, 2.5 * torch.tensor([[0.7, 0.6, 0.5]]) / 1.8)
    bias = torch.tensor([0.0, 0.7, 0, 0, 0, 0, 0, 0])
    chosen, weights = moe.route(scores.logit(), bias - 5, ROUTER)  # now groups 0 and 1 or 3; all scores negative
    assert chosen[0, :2].sort().values.tolist() == [0, 1]
    assert torch.allclose(weights.sum(-1), torch.tensor([2.5]))
    picked = scores.gather(-1, chosen)
    assert torch.allclose(weights, 2.5 * picked / picked.sum())  # the bias chose and weighs nothing
    faint = moe.route(scores.logit() - 20, torch.zeros(8), ROUTER)[1]  # experts that hardly want the token
    assert torch.allclose(faint.sum(-1), torch.tensor([2.5]))
    plain = moe.route(scores.logit(), bias, ROUTER.replace(norm_topk_prob=False, routed_scaling_factor=1.0))
    assert torch.allclose(plain[1], scores.gather(-1, plain[0]))


def test_the_bias_moves_toward_unused_experts():
    torch.manual_seed(0)
    gate = moe.Gate(ROUTER).train()
    tokens = torch.randn(200, 48) + 1  # a common part, which some experts like
    gate(tokens)
    load = gate.load.double()
    assert load.sum() == 200 * 3
    gate.balance(0.01)
    assert torch.allclose(gate.e_score_correction_bias, 0.01 * (load.mean() - load).sign().float())
    assert not gate.load.any()
    start = load.std()
    for _ in range(200):
        gate(tokens)
        load = gate.load.double()
        gate.balance(0.005)
    assert load.std() < 0.3 * start
    gate.eval()(tokens)
    assert not gate.load.any()  # evaluation is not counted
    gate.bfloat16().train()(tokens.repeat(20, 1).bfloat16())
    assert gate.load.sum() == 20 * 200 * 3  # counts do not round in half precision


@torch.no_grad()
def test_experts_see_their_own_tokens_only_and_are_weighed():
    layer = small.model().model.layers[1].mlp
    x = torch.randn(2, 5, 48)
    chosen, weights = layer.gate(x.flatten(0, 1))
    expected = layer.shared_experts(x).flatten(0, 1)
    for row, token in enumerate(x.flatten(0, 1)):
        for number, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            expected[row] += weight * layer.experts[number](token)
    assert gap(layer(x).flatten(0, 1), expected) < 1e-5


# ---- wrong calls


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[0, 61]]), "ids run from 0 to 61, the vocabulary from 0 to 60"),
        (torch.tensor([[-1, 3]]), "ids run from -1 to 3"),
        (torch.tensor([1, 2]), r"whole numbers \(B, T\), not torch.int64 of shape \(2,\)"),
        (torch.tensor([[0.5]]), "whole numbers .* not torch.float32"),
        (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\) are empty: give at least one"),
        (torch.zeros(1, 129, dtype=torch.long), "129 tokens exceed the model's context of 128: shorten the text"),
    ],
    ids=["too large", "negative", "no batch", "fractions", "empty", "too long"],
)
def test_bad_tokens_are_refused(shared, tokens, words):
    with pytest.raises(ValueError, match=words):
        set_to(shared, "sparse")(tokens)


def test_switches_refuse_what_does_not_exist(shared):
    for bad in (0, -3, 1.5, True, None, "16"):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            shared.top_k = bad
    with pytest.raises(ValueError, match="attention='fast' is unknown: use one of dense, sparse, window"):
        shared.attention = "fast"
    dense = small.model(sizes=small.config(**small.DENSE))
    assert dense.attention == "dense"
    with pytest.raises(ValueError, match=r"no indexer.*dsa adopt"):
        dense.attention = "sparse"
    with pytest.raises(ValueError, match="no indexer to compute a loss for"):
        dense(small.tokens(1, 4), indexer_loss=True)
    dense.attention, dense.top_k = "oracle", 4
    _, trace = dense(small.tokens(1, 8), trace=True)
    assert trace[0].scores is None and trace[0].selected.shape == (1, 8, 4)
    dense.attention = "dense"
    assert dense(small.tokens(1, 8), trace=True)[1][0].selected is None
