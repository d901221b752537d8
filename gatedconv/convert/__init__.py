"""Gates for any convolutional network.

gate_model.py: the steps, in order; conversion.py: what it reports. attach_macs.py: MACs of gates that the user put in.
example.py: the user's example inputs. record.py, flow.py: a recording of the network, to find things in it;
module_kinds.py: what it takes for a layer. constants.py: values that no input changes. sites.py, branches.py: where
gates may go. channels.py: which channels go together, through sums and concatenations. install.py: gates in the user's
modules. record_macs.py: the MACs that each gate decides about; mac_trial.py: where they are an estimate. verify.py: the
result against its source.
"""

from gatedconv.convert.attach_macs import attach_macs
from gatedconv.convert.conversion import Conversion
from gatedconv.convert.gate_model import gate_model
from gatedconv.convert.verify import ConversionError, require_same

__all__ = ["Conversion", "ConversionError", "attach_macs", "gate_model", "require_same"]
