"""Makes compressed models known to transformers' auto classes, and to PEFT, whichever package is imported first.

It costs next to nothing, since the classes are made when a config of theirs is: what they are built on takes seconds.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

from ..utils.names import FAMILY_NAMES

_CONFIGS = "transformers.models.auto.configuration_auto"  # has the mapping that all auto classes look into
_ADAPTED = "peft.utils.constants"  # has the modules that adapters are for by default, by model type
# Those of every shape; Q and K where they are two factors, the first of these.
_TARGETS = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_proj.down", "k_proj.down"]


class _Behind(MetaPathFinder):
    """Acts when a module has been imported, by whoever it was that asked for it."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in later)), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.act()
            sys.meta_path.remove(self)  # now, for an import that was interrupted may be tried again

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def register_with_others() -> None:
    """Make compressed models known to each of the packages that is there, and to the others as soon as they are."""
    for module, act in ((_CONFIGS, register), (_ADAPTED, name_targets)):
        if module in sys.modules:
            act()
        else:
            sys.meta_path.insert(0, _Behind(module, act))


def name_targets() -> None:
    """Tell PEFT what a LoRA config without ``target_modules`` adapts."""
    from peft.utils import constants

    targets = {f"flat_{family}": list(_TARGETS) for family in FAMILY_NAMES}
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.update(targets)


def register() -> None:
    """Make compressed models known; vLLM, in each of its processes, calls this as a plugin.

    Where two copies of this package are imported, the auto classes load models as those of the first.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    class StandIn(PreTrainedConfig):
        """Stands for a family's config class until a config of it is made."""

        family: ClassVar[str]

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from .flat_configs import flat_config

            config = flat_config(cls.family)
            AutoConfig.register(cls.model_type, config, exist_ok=True)
            return config(*args, **kwargs)

    for family in FAMILY_NAMES:
        if (model_type := f"flat_{family}") not in CONFIG_MAPPING:
            members = {"family": family, "model_type": model_type}
            AutoConfig.register(model_type, type(f"StandIn_{family}", (StandIn,), members))
