"""The contract's run in the plain PyTorch loop."""

import torch.distributed as dist
from contract import BETA, LEARNING_RATE, SAVE_EVERY, Case, config, dataset, policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sage_select import Processes, SelectionLog, build_loader, measure, nca
from sage_select.adapters.plain import Training, shard, train
from sage_select.models.wrappers import unwrapped
from sage_select.training import loop
from sage_select.training.checkpoints import whole_weights


def run(case: Case) -> None:
    if case.world > 1:
        dist.init_process_group("gloo")
    model, pairs = policy(), dataset()
    reference = measure(model, pairs, processes=Processes())
    if case.strategy == "ddp":
        model = DistributedDataParallel(model)
    if case.strategy == "fsdp2":
        shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    log = SelectionLog(case.folder / "selection")
    loader = build_loader(config(), pairs, model, reference, batch_size=4, log=log)

    case.watch_generators(loader)

    def on_select(interval, selection):
        case.measures(interval, pairs.take(selection.indices).ids.tolist(), unwrapped(model))

    def loss(logps, reference_logps, *, beta):
        losses = nca(logps, reference_logps, beta=beta)
        if losses.requires_grad:
            case.trains(pairs.take(logps.index).ids.tolist(), losses.tolist())
        return losses

    def save(*args):
        save_checkpoint(*args)
        if case.dies_now():
            case.die()

    def load(*args):
        state = load_newest(*args)
        case.watch(args[2], already=0 if state is None else state["loader"]["step"])
        return state

    save_checkpoint, load_newest = loop.save_checkpoint, loop.load_newest
    loader.on_select, loop.save_checkpoint, loop.load_newest = on_select, save, load
    training = Training(
        learning_rate=LEARNING_RATE,
        beta=BETA,
        loss=loss,
        warmup_share=0.0,
        micro_batch_size=case.per_process,
        evaluate_every=5,
        checkpoint_every=SAVE_EVERY,
        keep_checkpoints=100,
    )
    train(
        model,
        loader,
        pairs,
        reference,
        training,
        held_out=pairs.take(range(4)),
        folder=case.folder / "run",
        resume=case.attempt > 0,
        show_progress=False,
    )
    case.finish(whole_weights(model))
