"""Samples are what model and tool said, training reads what sampling wrote, and what the sampler chose can be kept."""

import pytest
import torch

from dsa.datasets import rl_domains, rl_symbols, rl_transcripts
from dsa.datasets.rl_symbols import PAD
from dsa.datasets.rl_transcripts import LENGTH, PROMPT, demonstration
from dsa.model.transformer import DecoderOutput
from dsa.training import rollout
from rl import ALL, EXPERTS, seeded, shift_biases, small


def test_samples_are_what_the_model_and_the_tool_said():
    model = small()
    problems = rl_transcripts.sample_problems(seeded(), ALL, 25)
    found = rollout.sample(model, problems, seeded(4), temperature=1.5)
    assert torch.equal(found.tokens[:, :PROMPT], rl_transcripts.prompts(problems))
    assert not found.completion_mask[:, :PROMPT].any() and found.tokens.shape[1] <= LENGTH
    for one, tokens, own in zip(found.transcripts(), found.tokens, found.completion_mask, strict=True):
        said = list[int]()
        waiting = list[int]()
        for token, mine in zip(one.tokens, one.completion_mask, strict=True):
            assert mine != bool(waiting), "the tool speaks at once, and nobody else meanwhile"
            if mine:
                said.append(token)
                waiting = list(rl_domains.tool_reply(one.problem, tuple(said)))
            else:
                assert token == waiting.pop(0)
        after = PROMPT + len(one.tokens)
        assert (tokens[after:] == PAD).all() and not own[after:].any()
    assert (found.lengths == torch.tensor([len(one.completion) for one in found.transcripts()])).all()


class Scripted(torch.nn.Module):
    """A model that writes worked transcripts by heart, those of the tool's turns included."""

    def __init__(self, problems):
        super().__init__()
        self.rows = [[*demonstration(problem).tokens, *[PAD] * LENGTH] for problem in problems]

    def new_cache(self, batch, capacity):
        self.turn = -1

    def run_layers(self, tokens, cache):
        self.turn += 1
        return DecoderOutput(tokens[:, :, None], [], [])

    def logits(self, hidden):
        wanted = torch.tensor([[row[self.turn]] for row in self.rows])
        return 50.0 * torch.nn.functional.one_hot(wanted, rl_symbols.VOCAB)


def test_a_right_script_is_recognised_as_right():
    problems = rl_transcripts.sample_problems(seeded(5), ALL, 30)
    found = rollout.sample(Scripted(problems), problems, seeded())
    assert [one.completion for one in found.transcripts()] == [rl_domains.solve(p) for p in problems]
    assert [one.tokens for one in found.transcripts()] == [demonstration(p).tokens for p in problems]
    assert all(one.correct for one in found.transcripts()) and found.ended.all()


def test_sampling_is_repeatable_and_leaves_the_model_as_it_was():
    model = small().train()
    problems = rl_transcripts.sample_problems(seeded(), ALL, 6)
    first, again, other = (rollout.sample(model, problems, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert model.training
    greedy = [rollout.sample(model, problems, seeded(s), temperature=0).tokens for s in (1, 2)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("attention", ["sparse", "dense", "window"])
def test_training_reads_what_sampling_wrote(attention):
    """The known trap: the same keys are selected token by token and all at once."""
    model = small()
    model.attention = attention
    found = rollout.sample(model, rl_transcripts.sample_problems(seeded(), ALL, 20), seeded(1))
    same = rollout.train_infer_mismatch(model, found)
    assert same["logprob"] < 1e-4 and same["ratio"] < 1e-5
    if attention == "sparse":
        model.top_k = 3
        assert rollout.train_infer_mismatch(model, found)["ratio"] > 1e-3, "another K must show"


def test_impossible_sampling_is_refused():
    problems = rl_transcripts.sample_problems(seeded(), ALL, 1)
    for settings, words in [
        ({"temperature": -1}, "temperature=-1"), ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"top_p": 0}, "top_p=0"), ({"keep_routing": True}, "no experts"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            rollout.sample(small(), problems, seeded(), **settings)


def test_top_p_leaves_the_likeliest_and_the_mask_says_which():
    model, problems = small(), rl_transcripts.sample_problems(seeded(), ALL, 10)
    found = rollout.sample(model, problems, seeded(1), top_p=0.6, keep_sampling_mask=True)
    own, mask = found.completion_mask, found.sampling_mask
    assert mask.shape == (*found.tokens.shape, rl_symbols.VOCAB) and mask[~own].all()
    assert mask[own].gather(1, found.tokens[own][:, None]).all(), "what was drawn was to be had"
    likely = model(found.tokens)[:, :-1].softmax(-1)[own[:, 1:]]  # of the token at each own place
    left = (likely * mask[own]).sum(-1)
    least = likely.masked_fill(~mask[own], 2).amin(-1)
    assert (left >= 0.6 - 1e-5).all() and (left - least < 0.6 + 1e-5).all(), "without the last it would be too few"
    assert (likely.masked_fill(mask[own], 0).amax(-1) <= least + 1e-6).all()
    drawn = likely.gather(1, found.tokens[own][:, None])[:, 0]
    assert torch.allclose(found.logprobs[own], (drawn / left).log(), atol=1e-4)


def test_without_its_mask_a_truncated_sample_looks_unlikelier_than_it_was():
    model, problems = small(), rl_transcripts.sample_problems(seeded(), ALL, 10)
    kept, lost = (
        rollout.sample(model, problems, seeded(1), top_p=0.6, keep_sampling_mask=keep) for keep in (True, False)
    )
    assert torch.equal(kept.tokens, lost.tokens) and lost.sampling_mask is None
    assert rollout.train_infer_mismatch(model, kept)["ratio"] < 1e-5
    assert 0.2 < rollout.train_infer_mismatch(model, lost)["ratio"] < 0.4, "what top-p cut off: up to 0.4"
    assert rollout.sample(model, problems, seeded(1), keep_sampling_mask=True).sampling_mask is None, "nothing was cut"


def test_routing_is_kept_and_replayed():
    model, problems = small(**EXPERTS), rl_transcripts.sample_problems(seeded(), ALL, 10)
    found = rollout.sample(model, problems, seeded(1), keep_routing=True)
    B, T = found.tokens.shape
    assert found.routing.shape == (B, T, 2, 2) and (found.routing[:, -1] == -1).all()

    def chosen_now():
        with rollout.recorded_routing(model) as chosen:
            model(found.tokens)
        return torch.stack([one.view(B, T, 2) for (one,) in chosen], dim=2)

    assert torch.equal(chosen_now()[:, :-1].sort(-1)[0], found.routing[:, :-1].sort(-1)[0])
    shift_biases(model)
    assert not torch.equal(chosen_now()[:, :-1].sort(-1)[0], found.routing[:, :-1].sort(-1)[0])
    assert rollout.train_infer_mismatch(model, found)["logprob"] < 1e-4, "the experts of then"
    with rollout.replayed_routing(model, found.routing):
        replayed = chosen_now()
    assert torch.equal(replayed[:, :-1], found.routing[:, :-1])
    assert (replayed[:, -1] >= 0).all(), "the token that nobody had read goes where it is sent now"
    assert all(gate.replay is None and not gate._forward_hooks for gate in model.gates())
    assert rollout.sample(model, problems, seeded(1)).routing is None
