"""Generation from the cache is the full forward pass, one argmax at a time, alone or in company."""

import pytest
import small
import torch

import dsa


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
