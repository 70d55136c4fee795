"""Multi-token prediction (MTP): one layer more, which predicts the token after the next (DeepSeek-V3 report, sec. 2.2).

The model turns tokens up to t into a hidden state and predicts token t + 1 from it. This layer takes the same hidden
state together with token t + 1 itself, once it is known, and predicts token t + 2. In training that is a denser signal:
the state at t must also serve a prediction one step further. In use it is a guess for free: the model can check
several guessed tokens in one pass (`dsa.generation.speculative`).

It is a whole decoder layer with an indexer and experts of its own, between a projection and a norm; embedding and head
are the model's. The published checkpoint stores it as layer `num_hidden_layers`, with copies of these two, and so are
its names here. Two details the report leaves open or says otherwise: the projection reads the embedding first and
then the hidden state (as the published weights are laid out; the report's formula has them the other way round), and
the hidden state is the model's after its last norm, as deployed systems have it.

For predictions further ahead the layer may go on from its own state instead of the model's, one token at a time:
normed, as the model's is. It was not trained for that, and such guesses get worse.
"""

import torch
from torch import Tensor, nn

from dsa.kernels.reference import at_least_fp32
from dsa.model.attention import ForwardContext, LayerOutput
from dsa.model.cache import LayerCache
from dsa.model.config import Config
from dsa.model.norm import RMSNorm
from dsa.model.transformer import Layer, Transformer, head_logits, init_weights

SHARED = ("embed_tokens.", "shared_head.head.")  # how the names of the model's own weights begin in this layer


class SharedHead(nn.Module):
    """A norm of this layer's own, before the model's head."""

    head: nn.Linear

    def __init__(self, config: Config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(Layer):
    """The extra layer. It has no embedding and head until it is attached to a model."""

    embed_tokens: nn.Embedding

    def __init__(self, config: Config):
        super().__init__(config, config.num_hidden_layers)
        D = config.hidden_size
        self.config = config
        self.enorm, self.hnorm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.shared_head = SharedHead(config)

    def tie_embeddings(self, model: Transformer) -> "MTP":
        """Share a model's embedding and head, and return self."""
        self.embed_tokens, self.shared_head.head = model.model.embed_tokens, model.lm_head
        return self

    def own_parameters(self) -> list[nn.Parameter]:
        """List what is not the model's."""
        return [p for name, p in self.named_parameters() if not name.startswith(SHARED)]

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw its own weights anew, as a model does its own."""
        init_weights([(name, p) for name, p in self.named_parameters() if not name.startswith(SHARED)], seed)

    def new_cache(self, model: Transformer, batch: int, capacity: int) -> LayerCache:
        """Make room for what it remembers of `batch` sequences, in the model's precision."""
        return model.new_cache(batch, capacity, layers=1).layers[0]

    def forward_mtp(
        self, hidden: Tensor, following: Tensor, context: ForwardContext, cache: LayerCache | None = None
    ) -> LayerOutput:
        """Look one token further (DeepSeek-V3 report Eq. 21, 22).

        Args:
            hidden: the model's normed states of T positions (B, T, D); or this layer's own, `normed`, to look further
                still.
            following: of each position the token that comes after it (B, T).
            context: `model.context` for these positions.
            cache: earlier positions' latents and index keys; these positions' are added.

        Returns:
            its states (B, T, D), from which `logits` predicts the token after `following`, and what
            `context.collect` asks for.
        """
        token, state = self.enorm(self.embed_tokens(following), context.dtype), self.hnorm(hidden, context.dtype)
        x = self.eh_proj(torch.cat([token, state], dim=-1))  # (B, T, 2 D) -> (B, T, D)
        return self(at_least_fp32(x), context, cache)

    def logits(self, state: Tensor) -> Tensor:
        """Predict: states (B, T, D) -> (B, T, vocab) in at least fp32 (DeepSeek-V3 report Eq. 23)."""
        return head_logits(self.shared_head.head, self.normed(state))

    def normed(self, state: Tensor) -> Tensor:
        """States (B, T, D) as its head takes them, and as a further look ahead does."""
        return self.shared_head.norm(state, self.embed_tokens.weight.dtype)
