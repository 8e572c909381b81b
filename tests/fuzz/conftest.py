"""The warnings of Hypothesis about long values are about our values, which are long on purpose."""

import warnings

from hypothesis.errors import HypothesisWarning

warnings.simplefilter("ignore", HypothesisWarning)
