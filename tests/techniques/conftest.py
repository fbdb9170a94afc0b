import sys
from types import ModuleType

# deepctr-torch asks the internet for its newest version when it is imported; tests talk to nobody.
quiet = ModuleType("deepctr_torch.utils")
quiet.check_version = lambda version: None
sys.modules["deepctr_torch.utils"] = quiet
