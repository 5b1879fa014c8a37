"""sage-select: which preference pairs the current policy should train on next, and why."""

from sage_select.app.config import SageConfig as SageConfig
from sage_select.data.dataset import PreferenceDataset as PreferenceDataset
from sage_select.losses import dpo as dpo
from sage_select.losses import nca as nca
from sage_select.losses import nca_responses as nca_responses
from sage_select.models.reader import measure as measure
from sage_select.ops import sequence_logps as sequence_logps
from sage_select.ops import token_logps as token_logps
from sage_select.pairs import PairLogps as PairLogps
from sage_select.plan import plan_pools as plan_pools
from sage_select.references.store import ReferenceStore as ReferenceStore
from sage_select.schedules import Constant as Constant
from sage_select.schedules import Linear as Linear
from sage_select.scores import log_sage as log_sage
from sage_select.scores import sage as sage
from sage_select.selecting.selector import Selector as Selector
from sage_select.selection import Selection as Selection
from sage_select.strata import strata_from_judgments as strata_from_judgments
from sage_select.timeline import Timeline as Timeline
