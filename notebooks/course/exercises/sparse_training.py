"""The exercises of chapter 06: hours of a training, one step of it, an honest difference, and a longer context.

The wrong answers run. Most of them even train: what they get wrong shows in a gradient, in an interval that is too
narrow, or in a model that quietly is another one.
"""

import torch
from torch import Tensor

from course.exercises import training_arithmetic
from course.exercises.exercise import Exercise, checker, require
from dsa.datasets.recall_tasks import Copy, Episodes
from dsa.model.config import Config
from dsa.model.transformer import Transformer
from dsa.training.indexer import joint_objective
from dsa.training.losses import language_loss


def _model(seed: int = 0) -> Transformer:
    """A sparse model of a few thousand weights, with random ones; K = 4."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "moe_intermediate_size": 16}
    model = Transformer(Config.mini().replace(**sizes, index_topk=4, max_position_embeddings=64))
    model.reset_parameters(seed)
    return model


def my_sparse_loss(model: Transformer, episodes: Episodes) -> Tensor:
    """The one loss of the sparse stage, whose backward serves both.

    Next-token cross-entropy, the mean over the tokens that count, plus
    each layer's KL, added. episodes.loss_mask: tokens to be predicted.
    """
    logits, kl = model(episodes.tokens, indexer_loss=True)
    mask = episodes.loss_mask[:, 1:]
    right = episodes.tokens[:, 1:][mask]
    log_p = logits[:, :-1][mask].log_softmax(-1)
    return kl.sum() - log_p.gather(-1, right[:, None]).mean()


def _without_kl(model: Transformer, episodes: Episodes) -> Tensor:
    """Leaves out the divergence: the indexers get no gradient."""
    return language_loss(model(episodes.tokens), episodes)


def _not_shifted(model: Transformer, episodes: Episodes) -> Tensor:
    """Predicts each token from itself."""
    logits, kl = model(episodes.tokens, indexer_loss=True)
    own = logits.log_softmax(-1).gather(-1, episodes.tokens[..., None])[..., 0]
    return kl.sum() - own[episodes.loss_mask].mean()


def _everything_counts(model: Transformer, episodes: Episodes) -> Tensor:
    """Counts tokens that nobody can predict, too."""
    logits, kl = model(episodes.tokens, indexer_loss=True)
    return kl.sum() + torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), episodes.tokens[:, 1:].flatten())


def _product(model: Transformer, episodes: Episodes) -> Tensor:
    """Multiplies the two losses: each then scales the other's gradient."""
    logits, kl = model(episodes.tokens, indexer_loss=True)
    return kl.sum() * language_loss(logits, episodes)


def _check_loss(answer) -> None:
    for seed in (0, 1):
        model, episodes = _model(seed), Copy(32).generate(torch.Generator().manual_seed(seed), 2)
        teach = joint_objective(_Fixed(episodes), 2)
        right, _ = teach(model, torch.Generator())
        right.backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found = answer(model, episodes)
        require(
            isinstance(found, Tensor) and found.ndim == 0, "return one number, a tensor that backward() can start from"
        )
        found.backward()
        for name, p in model.named_parameters():
            require(
                (p.grad is not None) == (name in wanted), f"{name} should{' not' * (name not in wanted)} get a gradient"
            )
            same = p.grad is None or torch.allclose(p.grad, wanted[name], atol=1e-5)
            require(same, f"the gradient of {name} is not that of the two losses added")
        require(abs(found.item() - right.item()) < 1e-4, f"the loss is {right:.4f}, yours is {found:.4f}")


class _Fixed:
    """A task that gives always the same episodes."""

    def __init__(self, episodes: Episodes):
        self.episodes = episodes

    def generate(self, generator: torch.Generator, size: int) -> Episodes:
        return self.episodes

    def score(self, logits: Tensor, episodes: Episodes) -> dict[str, float]:
        return {}


def my_longer(model: Transformer, length: int) -> Transformer:
    """A copy of a model that accepts texts of up to `length` tokens.

    The same weights, in tensors of its own, and the same attention and
    top_k. The model that was given stays as it is.
    """
    config = model.config.replace(max_position_embeddings=length)
    longer = Transformer(config)
    longer.load_state_dict(model.state_dict())
    longer.attention, longer.top_k = model.attention, model.top_k
    return longer


def _in_place(model: Transformer, length: int) -> Transformer:
    """Changes the model that was given."""
    model.config = model.config.replace(max_position_embeddings=length)
    return model


def _newborn(model: Transformer, length: int) -> Transformer:
    """Forgets the weights: they are drawn anew."""
    return Transformer(model.config.replace(max_position_embeddings=length))


def _other_selection(model: Transformer, length: int) -> Transformer:
    """Forgets how the model was set: K is the config's again."""
    longer = Transformer(model.config.replace(max_position_embeddings=length))
    longer.load_state_dict(model.state_dict())
    return longer


def _shared(model: Transformer, length: int) -> Transformer:
    """Shares the tensors: training the copy would train the original."""
    longer = Transformer(model.config.replace(max_position_embeddings=length))
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.attention, longer.top_k = model.attention, model.top_k
    return longer


def _check_longer(answer) -> None:
    model = _model(3).eval()
    model.attention, model.top_k = "window", 3
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    short, long = (torch.randint(256, (1, n), generator=torch.Generator().manual_seed(n)) for n in (64, 100))
    with torch.no_grad():
        right = model(short)
        found = answer(model, 100)
        require(isinstance(found, Transformer), f"return a Transformer, not a {type(found).__name__}")
        require(found is not model and model.config.max_position_embeddings == 64, "the given model must stay as it is")
        limit = found.config.max_position_embeddings
        require(limit >= 100, f"the copy reads {limit} tokens, it should read 100")
        require(
            found.attention == "window" and found.top_k == 3, "the copy selects otherwise: set attention and top_k, too"
        )
        require(
            torch.allclose(found.eval()(short), right, atol=1e-5), "the copy says something else about a short text"
        )
        found(long)
        for p in found.parameters():
            p.add_(1.0)
    same = all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    require(same, "training the copy changes the original: they share their tensors")


EXERCISES = (
    Exercise(
        "What a number of tokens means", 1, 5,
        "How many hours would one GPU train? Then put in both numbers for the sparse stage, the report's and the "
        "article's; `tokens` and `forward` of the section before have what you need.",
        ("A backward pass computes two products where the forward pass computes one.",
         "So a training step is three forward passes.",
         "Divide by the FLOP per second that you really get, then by 3600."),
        training_arithmetic.my_gpu_hours, training_arithmetic.WRONG_HOURS, training_arithmetic.check_hours,
    ),
    Exercise(
        "Two losses, one step", 2, 15,
        "Write the loss of the sparse stage. The checker compares the gradient of *every* weight with the package's.",
        ("`model(tokens, indexer_loss=True)` returns the logits and the KL of each layer.",
         "Logits at t predict the token at t + 1: cut the last logits and the first token.",
         "Index both with `episodes.loss_mask[:, 1:]`, and add. Do not detach anything: the model has done it."),
        my_sparse_loss, (_without_kl, _not_shifted, _everything_counts, _product), _check_loss,
    ),
    Exercise(
        "An honest difference", 2, 10,
        "Two models, a few seeds, one number each. What may be said about the difference?",
        ("A lucky base model helps both of its descendants: look at the differences within a seed.",
         "`statistics.stdev` divides by n - 1, which matters for three.",
         "The mean of n differences is steadier than one of them, by the root of n."),
        training_arithmetic.my_interval, training_arithmetic.WRONG_INTERVALS, training_arithmetic.check_interval,
    ),
    Exercise(
        "A longer context", 2, 15,
        "Our models refuse texts of more than 512 tokens. No weight depends on the length, so a longer one is a matter "
        "of a config, and of breaking nothing else. Whether it has *learned* to read that far is another question.",
        ("`model.config.replace(max_position_embeddings=...)` gives a new config.",
         "`load_state_dict` copies the weights into a new `Transformer`.",
         "`attention` and `top_k` are set on the model and are no weights."),
        my_longer, (_in_place, _newborn, _other_selection, _shared), _check_longer,
    ),
)  # fmt: skip
check = checker(*EXERCISES)
