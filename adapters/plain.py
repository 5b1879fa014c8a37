"""Plain PyTorch: everything that a custom loop needs, and the library's own loop.

    for rows in loader:  # a SelectiveLoader: a pool is scored when its first batch is pulled
        update(model, optimizer, dataset.take(rows), reference, training)

`update` is the NCA update of a batch (or that of another loss, `Training(loss=...)`), on one
process or several. `train` is the loop of `sage_select.fit`, with evaluations, checkpoints and
resuming.
"""

from sage_select.training.loop import History as History
from sage_select.training.loop import fit as train  # also sage_select.fit
from sage_select.training.micro_batches import MicroBatch as MicroBatch
from sage_select.training.micro_batches import dealt as dealt
from sage_select.training.settings import Training as Training
from sage_select.training.sharding import checkpoint_activations as checkpoint_activations
from sage_select.training.sharding import load_best as load_best
from sage_select.training.sharding import save_pretrained as save_pretrained
from sage_select.training.sharding import shard as shard
from sage_select.training.update import optimizer_of as optimizer_of
from sage_select.training.update import update as update

__all__ = [
    "History",
    "MicroBatch",
    "Training",
    "checkpoint_activations",
    "dealt",
    "load_best",
    "optimizer_of",
    "save_pretrained",
    "shard",
    "train",
    "update",
]
