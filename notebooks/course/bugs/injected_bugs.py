"""Injected bugs: what people get wrong in DeepSeek Sparse Attention, each as a patch to switch on.

    with find_bug("neighbours in the indexer").apply():
        wrong = model(tokens)

One list serves two readers. `bug_catalogue` shows what each bug does, and the tests switch every one on and demand
that the checks of this package then fail: a check that passes with the bug in place proves nothing. The model itself
carries no switches; a bug replaces a function of it for a while. `visible_when` says what it takes to see one at all.
Most need K < S, because when every token is selected a broken indexer selects every token, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from course.bugs import bug_patches
from dsa.kernels import ops
from dsa.model import moe, rope
from dsa.model.attention import Attention
from dsa.model.indexer import Indexer
from dsa.model.rope import Rope

ALWAYS = "always"
SPARSE = "K < S"
SMALL_KEYS = "K < S and index keys of small variance"
NEGATIVE_BIAS = "negative router biases"
YARN = "a yarn rope"
GRADIENTS = "gradients"


@dataclass(frozen=True)
class Patch:
    """`with patch():` lets `owner.name` be `replacement` for a while."""

    owner: Any
    name: str
    replacement: Callable[..., Any]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Replace, and put back whatever happens in between."""
        right = self.owner.__dict__[self.name]  # not getattr: a class's own function, unbound
        setattr(self.owner, self.name, self.replacement)
        try:
            yield
        finally:
            setattr(self.owner, self.name, right)


@dataclass(frozen=True)
class Bug:
    """One injected bug.

    Attributes:
        name: a few words.
        what: one plain sentence: what is computed instead.
        tempting: where it happened, or why one would write it.
        visible_when: the circumstance without which nothing differs; "gradients" if no logit ever does.
        apply: makes the context in which the bug is in force; `apply.replacement` is the code that then runs.
    """

    name: str
    what: str
    tempting: str
    visible_when: str
    apply: Patch


def find_bug(name: str) -> Bug:
    """Look up a bug; ValueError lists the known names."""
    for bug in BUGS:
        if bug.name == name:
            return bug
    raise ValueError(f"there is no mistake {name!r}; these are known: {', '.join(m.name for m in BUGS)}")


BUGS = (
    Bug(
        "neighbours in the indexer",
        "The indexer rotates neighbouring dimensions, as MLA does, instead of halves.",
        "It was in the first published code, and copies of that still circulate.",
        SPARSE, Patch(Indexer, "_rotate", bug_patches.rotate_neighbours),
    ),
    Bug(
        "index layout reversed",
        "The indexer rotates its last R dimensions, [nope | rope], instead of its first.",
        "MLA, a few lines away, is laid out that way.",
        SPARSE, Patch(Indexer, "_rotate", bug_patches.rotate_last),
    ),
    Bug(
        "no ReLU",
        "Index scores sum the heads' products as they are, negative ones included.",
        "The formula looks like a bilinear form, and without ReLU it runs faster.",
        SPARSE, Patch(ops, "index_topk", bug_patches.linear_topk),
    ),
    Bug(
        "LayerNorm with eps 1e-5",
        "The index key's LayerNorm adds 1e-5 to the variance instead of 1e-6.",
        "1e-5 is the default of torch.nn.LayerNorm.",
        SMALL_KEYS, Patch(Indexer, "_key", bug_patches.key_with_large_eps),
    ),
    Bug(
        "RMSNorm for the index key",
        "The index key is normalised without subtracting its mean and without a bias.",
        "Every other norm of the model is an RMSNorm.",
        SPARSE, Patch(Indexer, "_key", bug_patches.key_with_rms_norm),
    ),
    Bug(
        "unnormalised query latent",
        "The indexer gets MLA's query latent before its norm instead of after it.",
        "The latent is `q_a_proj(x)`, and its norm looks like MLA's own business.",
        SPARSE, Patch(Attention, "queries", bug_patches.raw_query_latent),
    ),
    Bug(
        "softmax over head weights",
        "The index heads' weights are turned into positive numbers that sum to one.",
        "Weights of a mixture usually are; these may be negative.",
        SPARSE, Patch(Indexer, "forward", bug_patches.changed_factors(bug_patches.softmaxed_weights)),
    ),
    Bug(
        "Hadamard on the query only",
        "The query is multiplied by the Hadamard matrix and the key is not.",
        "The two multiplications stand far apart; together they cancel, alone they do not.",
        SPARSE, Patch(Indexer, "forward", bug_patches.changed_factors(bug_patches.transformed_query)),
    ),
    Bug(
        "mask after top-k",
        "Top-k chooses among all keys, and only then are those of the future dropped, so slots are lost.",
        "It is the order of two lines, and a decoded token, which has no future, does not show it.",
        SPARSE, Patch(ops, "index_topk", bug_patches.select_then_mask),
    ),
    Bug(
        "mask with 0",
        "Future keys get the score 0 instead of minus infinity, and so beat every negative score.",
        "After a ReLU nothing seems to be negative; but a head's weight may be.",
        SPARSE, Patch(ops, "index_topk", bug_patches.masked_with_zero),
    ),
    Bug(
        "fillers not masked again",
        "Where fewer than K keys are visible, top-k fills up with future keys, and attention sees them.",
        "The scores were masked, so the selection seems to need no mask.",
        ALWAYS, Patch(ops, "index_topk", bug_patches.topk_with_fillers),
    ),
    Bug(
        "group mask 0",
        "Expert groups that were not chosen are masked with 0 instead of minus infinity.",
        "Sigmoids are positive; with the bias added they may be negative. Such code is in circulation.",
        NEGATIVE_BIAS, Patch(moe, "route", bug_patches.route_by(dropped_score=0.0)),
    ),
    Bug(
        "bias in the routing weights",
        "The router's bias weighs the experts' outputs as well as choosing them.",
        "It is one `gather` from the wrong one of two tensors.",
        ALWAYS, Patch(moe, "route", bug_patches.route_by(weigh_biased=True)),
    ),
    Bug(
        "softmax gate",
        "Experts are scored by a softmax over all of them instead of a sigmoid each.",
        "DeepSeek-V2 and most other mixtures do so.",
        ALWAYS, Patch(moe, "route", bug_patches.route_by(scored=lambda logits: logits.softmax(-1))),
    ),
    Bug(
        "routing weights not normalised",
        "The chosen experts' weights do not sum to one before the scaling.",
        "With a softmax over the chosen experts they would do so by themselves.",
        ALWAYS, Patch(moe, "route", bug_patches.route_by(normalise=False)),
    ),
    Bug(
        "route scale forgotten",
        "The experts' sum is not multiplied by routed_scaling_factor.",
        "It looks like a training detail, and its default is 1.",
        ALWAYS, Patch(moe, "route", bug_patches.route_by(scaled=False)),
    ),
    Bug(
        "mscale once",
        "The softmax scale is multiplied by mscale once instead of twice.",
        "mscale belongs to query and to key, and one sees only one of them.",
        YARN, Patch(Attention, "forward", bug_patches.forward_with_mscale_once),
    ),
    Bug(
        "halves in MLA",
        "MLA rotates halves, as most models do, instead of neighbours.",
        "It is the usual convention, and the indexer's.",
        ALWAYS, Patch(Rope, "interleaved", Rope.half_split),
    ),
    Bug(
        "YaRN forgotten",
        "Rotary frequencies are not stretched.",
        "The prompt is shorter than the original context, so YaRN seems not to apply yet.",
        YARN, Patch(rope, "rotary_table", bug_patches.plain_table),
    ),
    Bug(
        "indexer not detached",
        "The indexer's loss flows into the main model, which learns to be predictable.",
        "One `detach()` is missing, and every number of the forward pass is right.",
        GRADIENTS, Patch(Indexer, "forward", bug_patches.attached_forward),
    ),
    Bug(
        "one-headed teacher",
        "The indexer imitates one attention head instead of the sum of all.",
        "Attention has one distribution per head, the indexer has one: taking the first fits the shapes.",
        GRADIENTS, Patch(ops, "indexer_loss", bug_patches.one_headed_teacher),
    ),
    Bug(
        "teacher renormalised",
        "The sparse stage's target is the dense attention cut to the selected keys, not a softmax over these per head.",
        "Both are called the attention over the selected set; heads that look elsewhere then count too little.",
        GRADIENTS, Patch(ops, "indexer_loss", bug_patches.renormalised_teacher),
    ),
    Bug(
        "no teacher",
        "The indexer has no loss of its own, and so never learns.",
        "The language loss trains all else; but top-k passes no gradient.",
        GRADIENTS, Patch(ops, "indexer_loss", bug_patches.no_teacher),
    ),
)  # fmt: skip
