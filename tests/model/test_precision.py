"""A model ranks and remembers in eight bits: stage by stage, since one flipped choice may change any logit.

Every stage is held against the rules in `kernels.fp8`: what the cache stores, what attention reads back, what the
indexer compares. Logits of random models are compared only where nothing is rounded differently.
"""

import pytest
import torch

import dsa
import small
from dsa.kernels import fp8, ops
from dsa.model.cache import LayerCache
from dsa.model.precision import CACHE, FULL_PRECISION, INDEX, Precision, index_codec, latent_codec
from dsa.model.rope import Rope

T = 24
EIGHT = Precision("fp8", "fp8")


@pytest.fixture
def model():
    return small.model()


def inputs(model, length=T):
    """What the first layer's attention gets: hidden state, query latent, angles."""
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, length, 48, generator=torch.Generator().manual_seed(0))
    rope = Rope.at(model.config, 0, length)
    return attention, x, attention.queries(x, rope)[1], rope


# ---- bytes


@pytest.mark.parametrize(("precision", "latent", "key"), [(FULL_PRECISION, 1152, 256), (EIGHT, 656, 132)])
def test_bytes_of_a_token_and_layer_at_the_real_sizes(precision, latent, key):
    tokens = 3 * 100
    cache = LayerCache(dsa.Config.v32_exp(), 3, 100, torch.bfloat16, "cpu", precision)
    assert (cache.latents.nbytes, cache.index_keys.nbytes) == (latent * tokens, key * tokens)
    assert 61 * (latent + key) in (85_888, 48_068)  # all layers


def test_what_the_bytes_are():
    cache = LayerCache(dsa.Config.v32_exp(), 1, 10, torch.bfloat16, "cpu", EIGHT)
    found = [(part.dtype, part.shape[-1]) for part in (*cache.latents.parts, *cache.index_keys.parts)]
    e4m3, fp32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    assert found == [(e4m3, 512), (fp32, 4), (bf16, 64), (e4m3, 128), (fp32, 1)]
    whole_numbers = LayerCache(dsa.Config.v32_exp(), 1, 10, torch.bfloat16, "cpu", Precision("int8"))
    assert whole_numbers.index_keys.nbytes == 1320 and whole_numbers.index_keys.parts[0].dtype == torch.int8


# ---- the latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_latents_are_rounded_in_groups_and_rotary_keys_to_bf16(dtype):
    x = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = latent_codec(EIGHT, 200)
    codes, scale, rotary = codec.encode(x)
    right, right_scale = fp8.quantize(x[..., :200], fp8.GROUP)
    assert torch.equal(codes.view(torch.uint8), right.view(torch.uint8)) and torch.equal(scale, right_scale)
    back = codec.rounded(x)
    assert back.dtype == dtype and scale.shape == (2, 5, 2) and rotary.dtype == torch.bfloat16
    assert torch.equal(back[..., :200], fp8.dequantize(codes, scale).to(dtype))
    assert torch.equal(back[..., 200:], rotary.to(dtype))


@torch.no_grad()
def test_with_and_without_a_cache_attention_reads_the_same_rounded_latents(model, monkeypatch):
    model.cache_precision = "fp8"
    read = []
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "select", lambda self, context, q, kv, index: read.append(kv)
    )
    tokens = small.tokens(2, T)
    model(tokens)
    model(tokens, model.new_cache(2, T + 3))
    whole, cached = read[:3], read[3:]
    assert all(torch.equal(a, b.dequantize(a.dtype)) for a, b in zip(whole, cached, strict=True))
    rounded = latent_codec(EIGHT, model.config.kv_lora_rank).rounded(whole[0])
    assert torch.equal(rounded, whole[0])  # already on the grid


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * T, [7, 1, 10, 6]], ids=str)
def test_chunks_store_the_codes_of_the_whole_prompt(pieces):
    codec = latent_codec(EIGHT, 40)
    x = torch.randn(2, T, 48, generator=torch.Generator().manual_seed(0))
    config = small.config(kv_lora_rank=40)
    cache = LayerCache(config, 2, T, torch.float32, "cpu", EIGHT)
    keys = torch.randn(2, T, config.index_head_dim, generator=torch.Generator().manual_seed(1))
    start = 0
    for chunk, key in zip(x.split(pieces, 1), keys.split(pieces, 1), strict=True):
        latent, index_key = cache.append_latent(start, chunk), cache.append_index_key(start, key)
        start += chunk.shape[1]
    assert torch.equal(latent.dequantize(x.dtype), codec.rounded(x))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(latent, cache.latent, strict=True))
    whole = fp8.QuantizedTensor(*index_codec(EIGHT).encode(keys)).dequantize()
    assert torch.equal(index_key.dequantize(), whole) and torch.equal(whole, cache.index_key.dequantize())


# ---- the indexer


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_an_fp8_indexer_scores_by_the_published_rule(model, cached):
    attention, x, latent, rope = inputs(model)
    q, k, w = attention.indexer(x, latent, rope)
    cache = LayerCache(model.config, 2, T, torch.float32, "cpu", EIGHT) if cached else None
    found = ops.index_scores(*attention.indexer(x, latent, rope, cache, 0, EIGHT), backend="reference")
    codes = *fp8.quantize(fp8.hadamard(q)), *fp8.quantize(fp8.hadamard(k))
    assert torch.equal(found, fp8.index_scores(*codes, w))  # powers of two: bit for bit
    full = ops.index_scores(q, k, w)
    seen = ~full.isinf()
    error = float((found - full)[seen].norm() / full[seen].norm())
    assert 0.001 < error < 0.08


@torch.no_grad()
def test_an_int8_indexer_scores_by_its_rule(model):
    attention, x, latent, rope = inputs(model)
    q, k, w = attention.indexer(x, latent, rope)
    found = ops.index_scores(*attention.indexer(x, latent, rope, precision=Precision("int8")))
    codes = *fp8.quantize_int8(fp8.hadamard(q)), *fp8.quantize_int8(fp8.hadamard(k))
    torch.testing.assert_close(found, fp8.index_scores(*codes, w), atol=1e-5, rtol=1e-5)
    full = ops.index_scores(q, k, w)
    seen = ~full.isinf()
    assert 0.0005 < float((found - full)[seen].norm() / full[seen].norm()) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_rank_in_eight_bits_too(model, dtype):
    attention, x, latent, rope = inputs(model)
    attention.indexer.to(dtype)
    q, k, w = attention.indexer(x.to(dtype), latent.to(dtype), rope, precision=EIGHT)
    assert ops.index_topk(q, k, w, 6).shape == (2, T, 6) and q.dtype == fp8.E4M3


# ---- the switches


def test_by_default_nothing_is_rounded(model):
    assert (model.index_precision, model.cache_precision) == ("full", "full")
    tokens = small.tokens(2, T)
    before = model(tokens)
    for index in INDEX:
        for cache in CACHE:
            model.index_precision, model.cache_precision = index, cache
            assert (model.index_precision, model.cache_precision) == (index, cache)
            assert torch.equal(model(tokens), before) == ((index, cache) == ("full", "full"))
    model.index_precision, model.cache_precision = "full", "full"
    assert torch.equal(model(tokens), before)


@torch.no_grad()
def test_the_index_precision_changes_nothing_where_all_tokens_are_selected(model):
    model.top_k = T
    tokens = small.tokens(2, T)
    before = model(tokens)
    model.index_precision = "fp8"
    assert torch.allclose(model(tokens), before, atol=5e-5)
    model.attention = "dense"
    dense = model(tokens)
    model.index_precision = "full"
    assert torch.equal(model(tokens), dense)


def test_generation_runs_in_eight_bits(model):
    model.index_precision = model.cache_precision = "fp8"
    prompt = small.tokens(2, 10)
    written = dsa.generate(model, prompt, max_new_tokens=6)
    assert written.shape == (2, 16) and torch.equal(written[:, :10], prompt)
    cache = model.new_cache(2, 16)
    model(prompt, cache)
    assert cache.precision == EIGHT and cache.layers[0].index_keys.parts[0].dtype == fp8.E4M3


def test_a_dense_model_has_a_cache_in_eight_bits_and_no_index():
    model = small.model(sizes=small.config(**small.DENSE))
    model.cache_precision = "fp8"
    cache = model.new_cache(1, 8)
    assert model(small.tokens(1, 8), cache).isfinite().all() and cache.layers[0].index_keys.nbytes == 0
    with pytest.raises(ValueError, match="dense and has no indexer whose precision"):
        model.index_precision = "fp8"


def test_wrong_settings_are_refused_with_the_remedy(model):
    with pytest.raises(ValueError, match="index_precision='fp4' is unknown: use one of full, fp8, int8"):
        model.index_precision = "fp4"
    with pytest.raises(ValueError, match="cache_precision='int8' is unknown: use one of full, fp8"):
        model.cache_precision = "int8"
    assert (model.index_precision, model.cache_precision) == ("full", "full")
    odd = small.model(sizes=small.config(index_head_dim=24))
    with pytest.raises(ValueError, match=r"an index_head_dim that is a power of two .* not 24: leave it 'full'"):
        odd.index_precision = "fp8"
    wide = dsa.Transformer(small.config(index_head_dim=256))
    with pytest.raises(ValueError, match="at most 128"):
        wide.index_precision = "int8"


def test_a_cache_keeps_its_precision(model):
    cache = model.new_cache(1, 8)
    model.index_precision = "fp8"
    with pytest.raises(
        ValueError, match=r"made for .*index='full'.* set to .*index='fp8'.*start again with a new cache"
    ):
        model(small.tokens(1, 4), cache)
    assert cache.length == 0


def test_nothing_is_trained_through_rounding_unawares(model):
    model.cache_precision = "fp8"
    with pytest.raises(RuntimeError, match=r"no gradient: set model\.cache_precision = 'full' to train"):
        model(small.tokens(1, 8)).sum().backward()
    model.cache_precision, model.index_precision = "full", "fp8"
    model(small.tokens(1, 8)).sum().backward()  # choosing passes no gradient anyway
    assert model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.any()


def test_an_indexer_cannot_be_trained_through_rounding(model):
    model.index_precision = "fp8"
    with pytest.raises(ValueError, match="rounding passes no gradient"):
        model(small.tokens(1, 8), indexer_loss=True)
