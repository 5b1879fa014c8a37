"""The command line: `sage-select plan | score | select | train | flips | store | doctor | config`.

Results go to stdout, as tables or (`--json`) as JSON; progress, warnings and errors go to stderr.
Exit codes: 0 done, 1 a bug in sage-select, 2 a wrong command line or configuration, 3 data, files
or models that cannot be used, 4 doctor found something that would stop the run, 130 interrupted.
"""

from sage_select.app.cli.main import app as app
from sage_select.app.cli.main import main as main
