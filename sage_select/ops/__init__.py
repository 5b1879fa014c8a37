"""Token and sequence log-probabilities straight from hidden states, without keeping logits."""

from sage_select.ops.shards import Shard
from sage_select.ops.token_logps import sequence_logps, token_logps

__all__ = ["Shard", "sequence_logps", "token_logps"]
