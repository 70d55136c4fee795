"""Generation from the cache is the full forward pass, one argmax at a time, alone or in company.

However a prompt is read (at once, in chunks, beside longer ones), the tokens are the same, and what a pass needs does
not grow with the prompt. What will not fit is refused before the cache is made, with what would.
"""

import re

import pytest
import torch

import dsa
import small
from dsa.bench.memory import peak_bytes
from dsa.generation import memory
from dsa.generation.decode import next_logits
from dsa.generation.generate import stream
from dsa.generation.sampling import Sampling
from dsa.kernels import fp8, ops
from dsa.model import rope
from dsa.model.cache import Cache
from dsa.model.config import Config
from dsa.model.precision import Precision
from dsa.model.transformer import Transformer


@pytest.fixture(scope="module")
def model():
    return small.model()


@pytest.mark.parametrize("attention", ["sparse", "dense", "window", "oracle"])
@torch.no_grad()
def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass(model, attention):
    model.attention = attention
    prompt = small.tokens(2, 15)
    out = dsa.generate(model, prompt, max_new_tokens=20)
    assert out.shape == (2, 35) and torch.equal(out[:, :15], prompt)
    assert torch.equal(out[:, 15:], model(out)[:, 14:-1].argmax(-1))
    model.attention = "sparse"


def test_the_switches_count(model):
    prompt = small.tokens(1, 40)
    sparse = dsa.generate(model, prompt, 30)
    model.top_k = 1
    assert not torch.equal(dsa.generate(model, prompt, 30), sparse)
    model.top_k = 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_list_of_prompts_is_each_of_them_alone(model, temperature):
    prompts = [small.tokens(1, n, seed=n)[0] for n in (3, 11, 7)]
    mixed = [prompts[0].tolist(), tuple(prompts[1].tolist()), prompts[2]]
    together = dsa.generate(model, mixed, 8, temperature, seed=4)
    assert isinstance(together, list) and [len(one) for one in together] == [11, 19, 15]
    for one, prompt in zip(together, prompts, strict=True):
        assert torch.equal(one, dsa.generate(model, prompt[None], 8, temperature, seed=4)[0])
    assert dsa.generate(model, [], 8) == []


def test_the_seed_decides_and_temperature_flattens(model):
    prompt = small.tokens(1, 10)
    a, b, c = (dsa.generate(model, prompt, 30, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    greedy = dsa.generate(model, prompt, 30)
    assert torch.equal(dsa.generate(model, prompt, 30, temperature=1e-3), greedy)  # nearly frozen
    many = prompt.expand(300, -1)
    kinds = [len(dsa.generate(model, many, 1, temperature=t)[:, -1].unique()) for t in (0.3, 1.0, 100.0)]
    assert kinds[0] < kinds[1] < kinds[2] > 50  # of 61 tokens


def test_drawn_tokens_follow_the_softmax(model):
    prompt = small.tokens(1, 10)
    drawn = dsa.generate(model, prompt.expand(4_000, -1), 1, temperature=0.7)[:, -1]
    with torch.no_grad():
        expected = (model(prompt)[0, -1] / 0.7).softmax(-1)
    assert (drawn.bincount(minlength=61) / 4_000 - expected).abs().max() < 0.03


def test_nothing_new_is_the_prompt_itself(model):
    prompt = small.tokens(2, 5)
    assert torch.equal(dsa.generate(model, prompt, 0), prompt)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((small.tokens(1, 5), -1), "max_new_tokens=-1 must be at least 0"),
        ((small.tokens(1, 5), 1, -0.5), r"temperature=-0\.5 must be at least 0"),
        ((small.tokens(1, 5), 1, float("nan")), "temperature=nan must be at least 0"),
        ((small.tokens(1, 120), 9), "129 tokens exceeds the model's max_position_embeddings=128: ask for fewer"),
        ((torch.zeros(1, 0, dtype=torch.long), 4), "empty: give at least one"),
        (([[1, 2], []], 4), "empty: give at least one"),
        (([[1, 2], [61]], 4), "the vocabulary from 0 to 60"),
        ((torch.tensor([1, 2, 3]), 4), r"whole numbers \(B, T\)"),
        (([1, 2, 3], 4), r"a list must hold prompts.*for one prompt give \[ids\]"),
        (([[0.5]], 4), "whole numbers"),
        ((torch.tensor([[61]]), 0), "the vocabulary from 0 to 60"),
    ],
    ids=lambda part: part if isinstance(part, str) else "-",
)
def test_wrong_calls_are_refused(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        dsa.generate(model, *arguments)


# ---- what a step does without


def test_ids_are_checked_once_and_angles_are_looked_up(model, monkeypatch):
    """What the model has chosen itself is not read back from the device, and no token computes its own angles."""
    checked, right = [], Transformer.check_tokens
    monkeypatch.setattr(Transformer, "check_tokens", lambda *given: (checked.append(given[1].shape), right(*given))[1])
    prompt = small.tokens(1, 9)
    dsa.generate(model, prompt, 12)
    made = rope.rotary_table.cache_info().misses
    dsa.generate(model, prompt, 12)
    assert checked == [prompt.shape] * 2 and rope.rotary_table.cache_info().misses == made


# ---- company


def passes(model, monkeypatch):
    """The shapes of all forward passes to come."""
    shapes, right = [], Transformer.run_layers

    def hidden(self, tokens, *rest):
        shapes.append(tuple(tokens.shape))
        return right(self, tokens, *rest)

    monkeypatch.setattr(Transformer, "run_layers", hidden)
    return shapes


def test_prompts_of_different_lengths_share_their_passes(model, monkeypatch):
    shapes = passes(model, monkeypatch)
    dsa.generate(model, [small.tokens(1, n)[0] for n in (9, 3, 7)], 8)
    assert shapes == [(3, 3)] + 13 * [(3, 1)]  # the shortest prompt, then 6 positions more and 8 new, the last unread


def test_prompts_too_different_go_apart(model, monkeypatch):
    prompts = [small.tokens(1, n, seed=n)[0] for n in (60, 4, 5, 58)]
    shapes = passes(model, monkeypatch)
    together = dsa.generate(model, prompts, 4)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 4), (2, 58)]
    assert all(torch.equal(one, dsa.generate(model, p[None], 4)[0]) for one, p in zip(together, prompts, strict=True))
    assert [len(one) for one in dsa.generate(model, prompts, 0)] == [60, 4, 5, 58]


# ---- ends


def test_a_stop_token_ends_a_list_s_sequences(model):
    prompts = [small.tokens(1, n, seed=n)[0] for n in (12, 5, 9)]
    plain = dsa.generate(model, prompts, 12)
    stop = int(plain[1][5 + 3])  # what the second writes as its fourth token
    for one, long, prompt in zip(dsa.generate(model, prompts, 12, stop=stop), plain, prompts, strict=True):
        new = long[len(prompt) :].tolist()
        count = new.index(stop) + 1 if stop in new else 12
        assert torch.equal(one, long[: len(prompt) + count])


def test_a_stop_token_in_a_prompt_ends_nothing(model):
    prompts = [small.tokens(1, n, seed=n)[0] for n in (6, 9)]
    stop = [int(token) for token in prompts[1][6:]]
    plain = dsa.generate(model, prompts, 3)
    cut = dsa.generate(model, prompts, 3, stop=stop)
    assert torch.equal(cut[1], plain[1]) or int(cut[1][-1]) in stop
    assert len(cut[1]) > 9


def test_rows_that_stopped_wait_for_the_others(model):
    prompt = small.tokens(3, 10)
    plain = dsa.generate(model, prompt, 12)[:, 10:]
    stop = {int(plain[0, 1]), int(plain[1, 4]), int(plain[2, 6])}
    found = dsa.generate(model, prompt, 12, stop=stop)[:, 10:]
    ends = [next(i for i, token in enumerate(row.tolist()) if token in stop) for row in plain]
    assert found.shape == (3, max(ends) + 1)
    for row, whole, end in zip(found, plain, ends, strict=True):
        assert torch.equal(row[: end + 1], whole[: end + 1]) and (row[end:] == whole[end]).all()


def test_a_stream_yields_what_generate_returns_as_it_is_made(model, monkeypatch):
    prompt = small.tokens(2, 10)
    for words in ({}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}):
        streamed = torch.stack(list(stream(model, prompt, 9, **words)), dim=1)
        assert torch.equal(streamed, dsa.generate(model, prompt, 9, **words)[:, 10:])
    shapes = passes(model, monkeypatch)
    tokens = stream(model, prompt, 9)
    assert not shapes and next(tokens).shape == (2,)
    assert shapes == [(2, 10)]
    with pytest.raises(ValueError, match="empty: give at least one"):
        stream(model, prompt[:, :0])  # at once


# ---- drawing


def test_top_p_keeps_the_likeliest_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, kept in ((0.4, [[1], [0]]), (0.5, [[1], [0, 1]]), (0.6, [[1, 3], [0, 1]]), (0.95, [[0, 1, 2, 3]] * 2)):
        found = Sampling(temperature=1.0, top_p=top_p).log_probabilities(logits).exp()
        for row, tokens in enumerate(kept):
            expected = torch.zeros(4).index_copy(0, torch.tensor(tokens), logits[row, tokens].exp())
            assert torch.allclose(found[row], expected / expected.sum()), (top_p, row)


def test_drawn_tokens_stay_in_the_nucleus(model):
    prompt = small.tokens(1, 10)
    drawn = dsa.generate(model, prompt.expand(2_000, -1), 1, temperature=1.0, top_p=0.5)[:, -1]
    with torch.no_grad():
        likely, order = model(prompt)[0, -1].softmax(-1).sort(descending=True)
    count = int((likely.cumsum(0) < 0.5).sum()) + 1
    assert set(drawn.tolist()) == set(order[:count].tolist()) and 1 < count < 30
    assert torch.equal(dsa.generate(model, prompt, 20, 1.0, top_p=1e-6), dsa.generate(model, prompt, 20))


# ---- memory


@pytest.mark.parametrize("setting", [{}, {"attention": "dense"}, {"cache_precision": "fp8", "index_precision": "fp8"}])
def test_reading_in_chunks_changes_no_token(setting):
    model = small.model(3)
    for name, value in setting.items():
        setattr(model, name, value)
    prompt = small.tokens(2, 50)
    whole = dsa.generate(model, prompt, 10)
    for chunk in (2, 14, 34, 100):
        assert torch.equal(dsa.generate(model, prompt, 10, chunk=chunk), whole), chunk


def test_a_chunk_counts_the_tokens_of_all_rows(model, monkeypatch):
    shapes = passes(model, monkeypatch)
    dsa.generate(model, small.tokens(4, 20), 1, chunk=32)
    assert shapes == [(4, 8), (4, 8), (4, 4)]


def test_a_long_prompt_needs_no_more_memory_than_a_short_one():
    model = small.model(0, small.config(max_position_embeddings=4096))
    caches = {T: model.new_cache(1, T) for T in (512, 4096)}
    peaks = {
        T: peak_bytes(lambda T=T, cache=cache: next_logits(model, small.tokens(1, T), cache, chunk=128))
        for T, cache in caches.items()
    }
    scores = 128 * 4096 * 4  # of one tile of queries: they and what choosing from them takes grow, and are not kept
    assert peaks[4096] < peaks[512] + 8 * scores
    whole = peak_bytes(lambda: model.run_layers(small.tokens(1, 4096)))
    assert whole > 3 * peaks[4096]


def test_a_token_leaves_as_many_bytes_as_deployed():
    real = Config.v32_exp()
    sizes = {
        words: Cache(real, 1, 1, torch.bfloat16, precision=Precision(*words)).nbytes
        for words in (("full", "full"), ("fp8", "fp8"))
    }
    assert sizes == {("full", "full"): 85_888, ("fp8", "fp8"): 48_068}
    model = small.model()
    assert memory.token_bytes(model) * 7 * 3 == model.new_cache(3, 7).nbytes


@pytest.mark.parametrize("batch", [1, 5])
def test_what_does_not_fit_is_refused_before_it_is_allocated(batch, model, monkeypatch):
    each = memory.token_bytes(model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200 * each)
    made = []
    right = Transformer.new_cache
    monkeypatch.setattr(Transformer, "new_cache", lambda *a: (made.append(a[1:]), right(*a))[1])
    monkeypatch.setattr(Transformer, "run_layers", lambda *_: pytest.fail("the prompt was read"))
    prompt = small.tokens(batch, 100)
    if batch == 1:
        monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * each)
    with pytest.raises(ValueError, match=r"cache for .* of 110 tokens, prompt included, takes .* GiB") as error:
        dsa.generate(model, prompt, 10)
    assert set(made) == {(1, 1)}
    ways = str(error.value).partition("What would fit: ")[2]
    assert re.search("1 of 90 tokens" if batch == 1 else "5 of 36 tokens; 1 of 110 tokens", ways)
    assert "cache_precision = 'fp8'" in ways


def test_what_is_said_to_fit_fits(model, monkeypatch):
    each = memory.token_bytes(model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200 * each)
    assert dsa.generate(model, small.tokens(5, 30), 6).shape == (5, 36)
    assert dsa.generate(model, small.tokens(1, 100), 10).shape == (1, 110)
    with pytest.raises(ValueError, match="takes"):
        dsa.generate(model, small.tokens(5, 31), 6)
    with pytest.raises(ValueError, match="takes"):
        dsa.generate(model, [list(range(31))] * 5, 6)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # a system that does not tell
    assert dsa.generate(model, small.tokens(5, 31), 6).shape == (5, 37)


def test_this_machine_s_memory_is_known():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert memory.free_bytes(torch.device("meta")) is None


def eight_bit_model(T):
    model = small.model(0, small.config(max_position_embeddings=T))
    model.cache_precision = "fp8"
    return model


def test_reading_only_what_is_selected_changes_nothing(monkeypatch):
    model, prompt = eight_bit_model(128), small.tokens(3, 20)

    def logits(cache):
        model.run_layers(prompt, cache)
        return torch.stack([model(token, cache) for token in small.tokens(3, 12, seed=4).split(1, dim=1)])

    with torch.no_grad():
        few = logits(model.new_cache(3, 40))
        everything = lambda kv, selected, dtype: (kv.dequantize(dtype), selected)  # noqa: E731
        monkeypatch.setattr(ops, "dequantize_selected", everything)
        assert torch.equal(few, logits(model.new_cache(3, 40)))
    assert prompt.shape[1] > model.top_k


def test_a_step_expands_the_selected_latents_and_no_others(monkeypatch):
    model, expanded = eight_bit_model(128), []
    right = fp8.dequantize
    monkeypatch.setattr(fp8, "dequantize", lambda codes, *a: (expanded.append(codes.shape[1]), right(codes, *a))[1])
    with torch.no_grad():
        cache = model.new_cache(2, 100)
        model.run_layers(small.tokens(2, 90), cache)
        expanded.clear()
        model.run_layers(small.tokens(2, 1), cache)
    assert expanded == 3 * [model.top_k]


def test_an_empty_slot_stays_empty():
    cache = eight_bit_model(128).new_cache(1, 9).layers[0]
    written = torch.randn(1, 9, 28, generator=torch.Generator().manual_seed(0))
    stored = cache.append_latent(0, written)
    rows, places = ops.dequantize_selected(stored, torch.tensor([[[7, -1, 2]]]), torch.float32)
    assert places.tolist() == [[[0, -1, 2]]] and torch.equal(
        rows[0, [0, 2]], stored.dequantize(torch.float32)[0, [7, 2]]
    )
