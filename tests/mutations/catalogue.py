"""All deliberate bugs."""

from tests.mutations.border import BORDER
from tests.mutations.movers import MOVERS
from tests.mutations.pager import PAGER

MUTATIONS = (*PAGER, *MOVERS, *BORDER)
