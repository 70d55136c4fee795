"""Every injected bug is caught, and each is invisible exactly where the list says so.

A check that passes with the bug in place proves nothing. So the check against the oracle and the check of the
gradients run once as they are and once with each bug switched on, and then must fail. Two circumstances have to
be made on purpose: index keys of small variance (or a LayerNorm's eps is lost in rounding) and negative biases.
"""

import pytest
import torch

import dsa
import oracle
import small
from course.bugs import injected_bugs
from dsa.kernels import loops
from dsa.model.rope import Rope

T = 40
LOGITS = [m for m in injected_bugs.BUGS if m.visible_when != injected_bugs.GRADIENTS]
GRADIENT_BUGS = [m for m in injected_bugs.BUGS if m.visible_when == injected_bugs.GRADIENTS]


def named(some):
    return pytest.mark.parametrize("bug", some, ids=lambda m: m.name)


def shrink_keys(model):
    """Index keys of variance 1e-6 before their norm, as large as its eps."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.indexer.wk.weight *= 1e-3
    return model


CIRCUMSTANCES = {
    "usual": lambda: small.model(1),
    injected_bugs.SMALL_KEYS: lambda: shrink_keys(small.model(1)),
    injected_bugs.NEGATIVE_BIAS: lambda: small.model(1, gate_bias=-3.0),
    "no yarn": lambda: small.model(1, small.config(yarn=None)),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Per circumstance: our model, and what the oracle says to the same tokens."""
    made = {}
    for name, make in CIRCUMSTANCES.items():
        folder = tmp_path_factory.mktemp("model")
        dsa.save_pretrained(make(), folder)
        made[name] = dsa.from_pretrained(folder), oracle.theirs(oracle.load(folder), small.tokens(2, T))
    return made


def complaints(case):
    """The compact check of test_oracle.py."""
    model, expected = case
    return oracle.differences(oracle.ours(model, small.tokens(2, T)), expected)


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_without_a_mistake_the_oracle_agrees(circumstance, cases):
    assert complaints(cases[circumstance]) == []


@named(LOGITS)
def test_the_oracle_catches_it_where_the_list_says(bug, cases):
    needed = bug.visible_when if bug.visible_when in cases else "usual"
    with bug.apply():
        assert complaints(cases[needed])
    assert complaints(cases[needed]) == []  # and nothing of it stays behind


@named(
    [m for m in LOGITS if m.visible_when in (injected_bugs.SMALL_KEYS, injected_bugs.NEGATIVE_BIAS, injected_bugs.YARN)]
)
def test_it_is_invisible_without_its_circumstance(bug, cases):
    with bug.apply():
        assert complaints(cases["no yarn" if bug.visible_when == injected_bugs.YARN else "usual"]) == []


@named(LOGITS)
def test_with_all_tokens_selected_the_indexers_mistakes_are_invisible(bug, cases):
    """Which is why nothing here is tested with K >= S alone."""
    model, _ = cases[bug.visible_when if bug.visible_when in cases else "usual"]
    tokens, top_k = small.tokens(2, T), model.top_k
    try:
        model.top_k = T
        right = model(tokens)
        with bug.apply():
            same = torch.allclose(model(tokens), right, atol=5e-5, rtol=0)
    finally:
        model.top_k = top_k
    assert same == bug.visible_when.startswith(injected_bugs.SPARSE)


# ---- what only gradients show


def written_out_loss(model, tokens):
    """The indexers' loss from the definition: per layer, keys expanded, one softmax per head, heads summed, KL."""
    inputs, losses = {}, []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for layer in model.model.layers
    ]
    _, trace = model(tokens, trace=True)
    for hook in hooks:
        hook.remove()
    rope = Rope.at(model.config, 0, tokens.shape[1])
    for attention, seen in zip(inputs, trace, strict=True):
        with torch.no_grad():
            q, latent = attention.queries(inputs[attention], rope)
            k, _ = attention.expand_kv(attention.compress_kv(inputs[attention], rope))
        selected = seen.selected if model.attention == "sparse" else None
        mass = loops.attention_mass(q, k, attention.scale, selected)
        scores = loops.index_scores(*attention.indexer(inputs[attention].detach(), latent, rope))
        if selected is not None:
            scores = scores.gather(-1, selected.clamp(min=0)).masked_fill(selected == loops.EMPTY, float("-inf"))
        log_i = scores.log_softmax(-1)
        live = mass > 0
        losses.append((mass[live] * (mass[live].log() - log_i[live])).sum() / tokens.numel())
    return torch.stack(losses)


def indexer_training_errors(attention):
    """What is wrong with the training of the indexer, in words; empty if nothing is."""
    model, tokens, words = small.model(1), small.tokens(1, 10), []
    model.attention = attention
    index = {name: p for name, p in model.named_parameters() if ".indexer." in name}
    _, losses = model(tokens, indexer_loss=True)
    losses.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    if strangers := sorted(found.keys() - index.keys()):
        words.append(f"the indexer's loss reaches {strangers[0]}")
    if idle := sorted(index.keys() - found.keys()):
        words.append(f"nothing teaches {idle[0]}")
    expected = written_out_loss(model, tokens)
    if not torch.allclose(losses, expected, atol=1e-5):
        words.append(f"the loss is {losses.tolist()}, by definition {expected.tolist()}")
    model.zero_grad()
    expected.sum().backward()
    if any(not torch.allclose(found.get(name, torch.zeros(())), p.grad, atol=1e-5) for name, p in index.items()):
        words.append("gradients are not those of the definition")
    return words


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_indexer_learns_what_the_definition_says(attention):
    assert indexer_training_errors(attention) == []


@named(GRADIENT_BUGS)
def test_gradients_catch_what_logits_cannot(bug, cases):
    model, _ = cases["usual"]
    right = model(small.tokens(2, T))
    with bug.apply():
        assert torch.equal(model(small.tokens(2, T)), right)
        assert indexer_training_errors("sparse")
    assert indexer_training_errors("sparse") == []


def test_the_list_is_complete_enough_to_read():
    names = [m.name for m in injected_bugs.BUGS]
    assert len(set(names)) == len(names) >= 20
    for bug in injected_bugs.BUGS:
        assert bug.what.endswith(".") and bug.tempting.endswith(".") and bug.apply.replacement.__name__
        assert injected_bugs.find_bug(bug.name) is bug
    with pytest.raises(ValueError, match="no mistake 'x'; these are known: neighbours in the indexer"):
        injected_bugs.find_bug("x")
    with pytest.raises(KeyError), injected_bugs.BUGS[0].apply():
        raise KeyError  # a mistake is taken back even if the code under it fails
    test = injected_bugs.BUGS[0].apply
    assert test.owner.__dict__[test.name] is not test.replacement
