"""sage-select: which preference pairs the current policy should train on next, and why.

Everything a user needs is exported here and imported when it is first used, so that the package and
the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage_select.app import jobs as jobs
    from sage_select.app.config import SageConfig as SageConfig
    from sage_select.app.jobs import train as train
    from sage_select.app.run import build_loader as build_loader
    from sage_select.data.dataset import PreferenceDataset as PreferenceDataset
    from sage_select.losses import dpo as dpo
    from sage_select.losses import nca as nca
    from sage_select.losses import nca_responses as nca_responses
    from sage_select.models.reader import Reader as Reader
    from sage_select.models.reader import measure as measure
    from sage_select.models.reader import pair_logps as pair_logps
    from sage_select.models.serving import ServerMeasure as ServerMeasure
    from sage_select.ops import sequence_logps as sequence_logps
    from sage_select.ops import token_logps as token_logps
    from sage_select.pairs import PairLogps as PairLogps
    from sage_select.plan import plan_pools as plan_pools
    from sage_select.plan import plan_run as plan_run
    from sage_select.references.store import ReferenceStore as ReferenceStore
    from sage_select.schedules import Constant as Constant
    from sage_select.schedules import Linear as Linear
    from sage_select.scores import log_sage as log_sage
    from sage_select.scores import sage as sage
    from sage_select.selecting.loader import SelectiveLoader as SelectiveLoader
    from sage_select.selecting.loader import ShuffledLoader as ShuffledLoader
    from sage_select.selecting.log import SelectionLog as SelectionLog
    from sage_select.selecting.selector import Selector as Selector
    from sage_select.selection import Selection as Selection
    from sage_select.strata import strata_from_judgments as strata_from_judgments
    from sage_select.strata import strata_from_values as strata_from_values
    from sage_select.system.processes import Processes as Processes
    from sage_select.system.processes import join as join
    from sage_select.system.processes import leave as leave
    from sage_select.timeline import Timeline as Timeline
    from sage_select.training.loop import fit as fit
    from sage_select.training.settings import Training as Training
    from sage_select.training.sharding import save_pretrained as save_pretrained
    from sage_select.training.sharding import shard as shard
    from sage_select.training.update import update as update

_HOMES = {
    "SageConfig": "app.config",
    "train": "app.jobs",
    "build_loader": "app.run",
    "PreferenceDataset": "data.dataset",
    "dpo": "losses",
    "nca": "losses",
    "nca_responses": "losses",
    "Reader": "models.reader",
    "measure": "models.reader",
    "pair_logps": "models.reader",
    "ServerMeasure": "models.serving",
    "sequence_logps": "ops",
    "token_logps": "ops",
    "PairLogps": "pairs",
    "plan_pools": "plan",
    "plan_run": "plan",
    "ReferenceStore": "references.store",
    "Constant": "schedules",
    "Linear": "schedules",
    "log_sage": "scores",
    "sage": "scores",
    "SelectiveLoader": "selecting.loader",
    "ShuffledLoader": "selecting.loader",
    "SelectionLog": "selecting.log",
    "Selector": "selecting.selector",
    "Selection": "selection",
    "strata_from_judgments": "strata",
    "strata_from_values": "strata",
    "Processes": "system.processes",
    "join": "system.processes",
    "leave": "system.processes",
    "Timeline": "timeline",
    "fit": "training.loop",
    "Training": "training.settings",
    "save_pretrained": "training.sharding",
    "shard": "training.sharding",
    "update": "training.update",
}
"""The module that each name comes from; a test holds it against the imports above."""

__all__ = ["jobs", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "jobs":
        return import_module("sage_select.app.jobs")
    if name not in _HOMES:
        raise AttributeError(f"module 'sage_select' has no attribute {name!r}")
    value = getattr(import_module(f"sage_select.{_HOMES[name]}"), name)
    globals()[name] = value  # looked up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
