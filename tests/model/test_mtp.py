"""The extra layer computes what it should, is stored as published, learns, and speeds decoding up without changing it.

Its layer is held against `transformers`, which has no multi-token prediction but can run the same decoder layer on the
same input. Speculative decoding writes the greedy tokens whoever guesses: a layer that was never trained, one that
was, or one that is always wrong.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsa
import oracle
import published_style
import small
from dsa.checkpoint.index import SINGLE, CheckpointError
from dsa.checkpoint.mtp import load_mtp
from dsa.datasets.recall_tasks import Episodes
from dsa.generation.speculative import Drafter, speculate
from dsa.model.mtp import MTP
from dsa.model.transformer import Transformer
from dsa.training.losses import language_loss, multi_token_loss


def with_mtp(seed=0, **changes):
    """A random model and a random extra layer, nothing at a harmless default."""
    model = small.model(seed, small.config(**changes))
    mtp = MTP(model.config).tie_embeddings(model)
    mtp.reset_parameters(seed + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in mtp.named_parameters():
            if p.ndim == 1:
                p.copy_(("bias" not in name) + 0.3 * torch.randn(p.shape, generator=generator))
    return model, mtp.eval()


# ---- what it computes


@pytest.mark.parametrize("sizes", [{}, small.DENSE], ids=["sparse", "dense"])
@torch.no_grad()
def test_its_layer_is_that_of_the_oracle(sizes, tmp_path):
    """A model of one layer with the extra layer's weights, given the projected pair in place of an embedding."""
    model, mtp = with_mtp(**sizes)
    alone = Transformer(model.config.replace(num_hidden_layers=1, first_k_dense_replace=0))
    own = {n: t for n, t in mtp.state_dict().items() if n.startswith(("self_attn", "mlp", "input_l", "post_"))}
    ends = {
        "model.norm": mtp.shared_head.norm,
        "lm_head": model.lm_head,
        "model.embed_tokens": model.model.embed_tokens,
    }
    alone.load_state_dict(
        {f"model.layers.0.{n}": t for n, t in own.items()} | {f"{n}.weight": m.weight for n, m in ends.items()}
    )
    dsa.save_pretrained(alone, tmp_path)
    other, tokens = oracle.load(tmp_path), small.tokens(2, 40)
    hidden = model.run_layers(tokens).hidden

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weight

    embedded = model.model.embed_tokens.weight[tokens[:, 1:]]  # of the token after
    pair = torch.cat([normed(embedded, mtp.enorm.weight), normed(hidden[:, :-1], mtp.hnorm.weight)], dim=-1)
    expected = other(inputs_embeds=pair @ mtp.eh_proj.weight.T, use_cache=False).logits
    state = mtp.forward_mtp(hidden[:, :-1], tokens[:, 1:], model.context(0, 39, tokens.device)).hidden
    assert (mtp.logits(state) - expected).abs().max() < 5e-5 * max(1, expected.std().item() / 2)


@pytest.mark.parametrize("cache_precision", ["full", "fp8"])
@torch.no_grad()
def test_position_by_position_it_computes_the_same(cache_precision):
    model, mtp = with_mtp(1)
    model.cache_precision = cache_precision
    tokens = small.tokens(2, 31)
    hidden = model.run_layers(tokens).hidden
    whole = mtp.forward_mtp(hidden[:, :-1], tokens[:, 1:], model.context(0, 30, tokens.device)).hidden
    drafter = Drafter(model, mtp, 2, 30)
    parts = [drafter.read(hidden[:, t : t + 1], tokens[:, t + 1 : t + 2]) for t in range(30)]
    assert (mtp.logits(torch.cat(parts, dim=1)) - mtp.logits(whole)).abs().max() < 5e-5
    assert drafter.length == 30


@torch.no_grad()
def test_guesses_leave_no_trace():
    model, mtp = with_mtp(2)
    tokens = small.tokens(1, 21)
    hidden = model.run_layers(tokens).hidden
    drafter, other = (Drafter(model, mtp, 1, 40) for _ in range(2))
    state = drafter.read(hidden[:, :-1], tokens[:, 1:])
    other.read(hidden[:, :-1], tokens[:, 1:])
    assert drafter.guess(state, 5).shape == (1, 5)
    more = model.run_layers(small.tokens(1, 9, seed=7)).hidden, small.tokens(1, 9, seed=8)
    assert torch.equal(drafter.read(*more), other.read(*more))


@torch.no_grad()
def test_a_cache_that_went_back_has_forgotten():
    model, tokens = small.model(), small.tokens(2, 30)
    cache, other = model.new_cache(2, 40), model.new_cache(2, 40)
    model.run_layers(tokens, cache)
    cache.rewind(17)
    model.run_layers(tokens[:, :17], other)
    assert (model(tokens[:, 20:24], cache) - model(tokens[:, 20:24], other)).abs().max() < 5e-5
    with pytest.raises(ValueError, match=r"cannot go back from 21 tokens to 22: give 0 to that many"):
        cache.rewind(22)
    cache.rewind(10)
    model.attention = "dense"
    model.run_layers(
        tokens[:, :4], cache
    )  # leaves no index keys, and those of earlier tokens must not be taken for theirs
    model.attention = "sparse"
    with pytest.raises(ValueError, match="14 tokens but only 10 index keys"):
        model.run_layers(tokens[:, :1], cache)


# ---- in a folder


def test_it_is_stored_as_published(tmp_path):
    """The hand-made folder's names, types and numbers; the writer's folder has the same."""
    config, twin = published_style.write(tmp_path / "published")
    model = dsa.from_pretrained(tmp_path / "published")
    mtp = load_mtp(tmp_path / "published", model)
    start = f"model.layers.{config.num_hidden_layers}."
    assert {start + name for name in mtp.state_dict()} == {name for name in twin if name.startswith(start)}
    assert all(torch.equal(tensor, twin[start + name]) for name, tensor in mtp.state_dict().items())
    assert mtp.embed_tokens is model.model.embed_tokens and mtp.shared_head.head is model.lm_head

    dsa.save_pretrained(model, tmp_path / "ours", torch.bfloat16, fp8=True, mtp=mtp)
    ours = load_file(tmp_path / "ours" / SINGLE)
    theirs = {n: t for path in (tmp_path / "published").glob("*.safetensors") for n, t in load_file(path).items()}
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    back = load_mtp(tmp_path / "ours", dsa.from_pretrained(tmp_path / "ours"))
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in mtp.state_dict().items())


@torch.no_grad()
def test_kept_in_fp8_it_guesses_the_same(tmp_path):
    published_style.write(tmp_path)
    prompt, found = small.tokens(1, 9), []
    for keep in (True, False):
        model = dsa.from_pretrained(tmp_path, keep_fp8=keep)
        mtp = load_mtp(tmp_path, model, keep_fp8=keep)
        hidden = model.run_layers(prompt).hidden
        state = mtp.forward_mtp(hidden, prompt, model.context(0, 9, prompt.device)).hidden
        found.append(mtp.logits(state))
    assert mtp.eh_proj.weight.dtype == torch.float32 and torch.equal(*found)


def test_transformers_gets_a_folder_without_it(tmp_path):
    model, mtp = with_mtp()
    dsa.save_pretrained(model, tmp_path / "without")
    dsa.save_pretrained(model, tmp_path / "with", mtp=mtp)
    extra = f"model.layers.{model.config.num_hidden_layers}."
    assert not any(name.startswith(extra) for name in load_file(tmp_path / "without" / SINGLE))
    tokens = small.tokens(2, 30)
    expected = oracle.theirs(oracle.load(tmp_path / "without"), tokens)
    for folder in ("with", "without"):
        assert not oracle.differences(oracle.ours(dsa.from_pretrained(tmp_path / folder), tokens), expected)


@pytest.fixture
def folder(tmp_path):
    model, mtp = with_mtp()
    dsa.save_pretrained(model, tmp_path, mtp=mtp)
    return tmp_path


DAMAGE = {
    "no layer": (lambda t: [t.pop(n) for n in list(t) if ".layers.3." in n], "has no multi-token-prediction layer"),
    "no projection": (lambda t: t.pop("model.layers.3.eh_proj.weight"), r"eh_proj\.weight, expected with .*\(48, 96\)"),
    "another size": (
        lambda t: t.update({"model.layers.3.enorm.weight": torch.ones(47)}), r"enorm.weight has shape \(47,\)",
    ),
    "something more": (
        lambda t: t.update({"model.layers.3.fnorm.weight": torch.ones(48)}), r"unknown tensor model\.layers\.3\.fnorm",
    ),
    "another head": (
        lambda t: t["model.layers.3.shared_head.head.weight"].add_(1), r"3\.shared_head\.head.* is not the copy of lm",
    ),
    "another embedding": (
        lambda t: t["model.layers.3.embed_tokens.weight"].mul_(2), "is not the copy of model.embed_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_layer_is_refused_and_the_model_loads_all_the_same(damage, folder):
    harm, words = DAMAGE[damage]
    tensors = load_file(folder / SINGLE)
    harm(tensors)
    save_file(tensors, folder / SINGLE)
    model = dsa.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=words):
        load_mtp(folder, model)


def test_copies_may_be_left_out(folder):
    tensors = load_file(folder / SINGLE)
    for name in ("embed_tokens", "shared_head.head"):
        del tensors[f"model.layers.3.{name}.weight"]
    save_file(tensors, folder / SINGLE)
    model = dsa.from_pretrained(folder)
    assert load_mtp(folder, model).embed_tokens is model.model.embed_tokens


# ---- speculative decoding


@pytest.mark.parametrize(
    ("batch", "drafts", "setting"),
    [
        (1, 1, {}), (1, 3, {}), (2, 2, {}), (3, 1, {"attention": "dense"}), (1, 2, {"top_k": 1}),
        (2, 1, {"cache_precision": "fp8", "index_precision": "fp8"}), (1, 2, {"attention": "window"}),
    ],
)  # fmt: skip
def test_the_output_is_the_greedy_one_whoever_guesses(batch, drafts, setting):
    model, mtp = with_mtp(3)
    for name, value in setting.items():
        setattr(model, name, value)
    prompt = small.tokens(batch, 11)
    expected = dsa.generate(model, prompt, 25)
    for chunk in (4, 1000):
        found = speculate(model, mtp, prompt, 25, drafts=drafts, chunk=chunk)
        assert torch.equal(found.tokens, expected)
        assert len(found.accepted) + sum(found.accepted) == 24  # the first token is the prompt's
    for new in (1, 2, 3):
        assert torch.equal(speculate(model, mtp, prompt, new, drafts=drafts).tokens, expected[:, : 11 + new])


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_accepted_lengths_count_right_guesses(right, monkeypatch):
    """A guesser that knows the answers and gives some of them wrong: rejection must restore both caches."""
    model, mtp = with_mtp(4)
    prompt = small.tokens(1, 8)
    truth = dsa.generate(model, prompt, 50)[0]
    chance = torch.Generator().manual_seed(0)

    def guess(drafter, state, count):
        known = truth[drafter.length + 1 :][:count]
        wrong = torch.rand(len(known), generator=chance) >= right
        return torch.where(wrong, (known + 1) % 61, known)[None]

    monkeypatch.setattr(Drafter, "guess", guess)
    found = speculate(model, mtp, prompt, 50, drafts=3)
    assert torch.equal(found.tokens[0], truth)
    full = found.accepted[:-1]
    if right in (0.0, 1.0):
        assert set(full) == {int(3 * right)}
    else:
        assert {0, 1, 3} <= set(full) and 1.3 < found.accepted_length < 2.7


def test_stop_tokens_end_it_where_they_end_generate():
    model, mtp = with_mtp(5)
    prompt = small.tokens(3, 10)
    plain = dsa.generate(model, prompt, 20)[:, 10:]
    stop = {int(plain[0, 2]), int(plain[1, 9]), int(plain[2, 5])}
    expected = dsa.generate(model, prompt, 20, stop=stop)
    assert torch.equal(speculate(model, mtp, prompt, 20, drafts=2, stop=stop).tokens, expected)
    one = int(plain[0, 2])
    assert torch.equal(
        speculate(model, mtp, prompt[:1], 20, drafts=4, stop=one).tokens, dsa.generate(model, prompt[:1], 20, stop=one)
    )


def test_the_context_is_used_to_its_last_token():
    model, mtp = with_mtp(6)
    prompt = small.tokens(1, 100)
    assert torch.equal(speculate(model, mtp, prompt, 28, drafts=4).tokens, dsa.generate(model, prompt, 28))
    for words, message in (
        ({"max_new_tokens": 29}, "129 tokens exceeds"),
        ({"drafts": 0}, "drafts=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            speculate(model, mtp, prompt, **words)


# ---- learning


def counting(generator, size, length=20):
    """An easy language: each sequence counts in steps of its own, modulo 32; what the step is takes two tokens."""
    first, by = (torch.randint(low, high, (size, 1), generator=generator) for low, high in ((0, 32), (1, 6)))
    tokens = (first + by * torch.arange(length)) % 32
    counts = torch.ones_like(tokens, dtype=torch.bool)
    counts[:, :2] = False
    return Episodes(tokens, counts, tokens[:, :0], tokens[:, :0])


def test_the_loss_is_that_of_the_token_after_the_next():
    model, mtp = with_mtp(7)
    model.attention = "dense"
    episodes = counting(torch.Generator().manual_seed(0), 3, 12)
    total, extra = multi_token_loss(model, mtp, episodes, weight=0.1)
    hidden = model.run_layers(episodes.tokens).hidden
    nats = []
    for row, tokens in enumerate(episodes.tokens):
        for t in range(10):
            step = model.context(0, t + 1, tokens.device)
            state = mtp.forward_mtp(hidden[row : row + 1, : t + 1], tokens[None, 1 : t + 2], step).hidden
            nats.append(-mtp.logits(state)[0, -1].log_softmax(-1)[tokens[t + 2]])
    assert torch.allclose(extra, torch.stack(nats).mean(), atol=1e-5)
    main = language_loss(model(episodes.tokens), episodes)
    assert torch.allclose(total, main + 0.1 * extra, atol=1e-5)
    total.backward()
    assert mtp.eh_proj.weight.grad.abs().sum() > 0 and model.model.layers[0].self_attn.o_proj.weight.grad is not None
    assert not extra.requires_grad


def test_under_sparse_attention_every_indexer_learns_the_extra_layers_too():
    model, mtp = with_mtp(7, index_topk=5)
    episodes = counting(torch.Generator().manual_seed(0), 3, 12)
    total, extra = multi_token_loss(model, mtp, episodes, weight=0.1)
    logits, divergences = model(episodes.tokens, indexer_loss=True)
    hidden = model.run_layers(episodes.tokens).hidden
    context = model.context(0, 10, episodes.tokens.device, "indexer_loss")
    own = mtp.forward_mtp(hidden[:, :-2], episodes.tokens[:, 1:-1], context).indexer_loss
    expected = language_loss(logits, episodes) + 0.1 * extra + divergences.sum() + own
    assert own > 0.01 and torch.allclose(total, expected, atol=1e-5)
    total.backward()
    for indexer in [layer.self_attn.indexer for layer in [*model.model.layers, mtp]]:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in indexer.parameters())


def test_indexers_that_rounding_keeps_from_learning_are_refused():
    model, mtp = with_mtp(7)
    model.index_precision = "int8"
    with pytest.raises(ValueError, match="cannot train: set both to 'full'"):
        multi_token_loss(model, mtp, counting(torch.Generator().manual_seed(0), 3, 12))


@pytest.mark.slow
def test_a_trained_layer_is_believed():
    """Both are trained together from nothing, on the published objective, and then decode in half the passes."""
    sizes = {
        "vocab_size": 32,
        "yarn": None,
        "num_hidden_layers": 2,
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    model, mtp = with_mtp(8, **sizes, **small.DENSE)
    prompt = counting(torch.Generator().manual_seed(99), 4).tokens[:, :4]
    before = [speculate(model, mtp, one[None], 40).accepted_length for one in prompt]
    model.train(), mtp.train()
    parameters = [*model.parameters(), *mtp.own_parameters()]
    assert len({id(p) for p in parameters}) == len(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    chance = torch.Generator().manual_seed(1)
    for _ in range(120):
        loss, extra = multi_token_loss(model, mtp, counting(chance, 16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert extra < 0.1
    model.eval(), mtp.eval()
    for one, poor in zip(prompt, before, strict=True):
        found = speculate(model, mtp, one[None], 40)
        assert torch.equal(found.tokens, dsa.generate(model, one[None], 40))
        assert found.accepted_length > 1.8 > 1.3 > poor
    assert speculate(model, mtp, prompt[:1], 40, drafts=3).accepted_length > 2.2  # from its own states it guesses worse
