"""The tuner, which makes the stacks of an adapter and owns them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapters.linear_maps import aliases, holds_experts
from ..adapters.plan import Plan
from ..adapters.quantised import forget_quantiser, merged_dtype
from ..layers.switching import LateGradient
from ..layers.weights import Place
from .config import AllLinear, TCURConfig
from .experts import TargetParameter
from .experts_layer import TCURExperts
from .hosted import AdapterStack, unhost
from .layer import BROKEN, TCURLinear
from .planning import Layers, Record, plan_and_build
from .quantised import TCURQuantisedLinear
from .rows import Owner, rows_by_adapter

ALL_LINEAR = "all-linear"


class Configs(dict[str, TCURConfig]):
    """Maps adapter names to configs, the same objects that the caller passed.

    A caller may pass one config for several adapters or models, whose plans differ. A lookup
    therefore puts the plan of the adapter in question into the config.

    Before 0.21, peft stores the config of a new adapter before anything can check whether the name
    is free, and deletes it again if the tuner refuses the adapter. This class then restores the
    config of the existing adapter of that name.
    """

    def __init__(self, configs: Mapping[str, TCURConfig]) -> None:
        super().__init__(configs)
        self._replaced: dict[str, TCURConfig] = {}
        self._records: dict[str, Record] = {}

    def __getitem__(self, name: str) -> TCURConfig:
        config = super().__getitem__(name)
        if name in self._records:
            config.plan = self.record_of(name)
        return config

    def __setitem__(self, name: str, config: TCURConfig) -> None:
        if name in self:
            self._replaced[name] = self[name]
        super().__setitem__(name, config)

    def __delitem__(self, name: str) -> None:
        if name in self._replaced:
            super().__setitem__(name, self._replaced.pop(name))
        else:
            super().__delitem__(name)
            self._records.pop(name, None)

    def record(self, name: str, stacks: Sequence[AdapterStack]) -> None:
        """Keeps the plan that the config of that name holds now; these are its stacks."""
        self._records[name] = Record(super().__getitem__(name).plan, stacks)

    def record_of(self, name: str) -> list[dict[str, Any]] | None:
        """The plan of that adapter, with the present fingerprints of C and R."""
        return self._records[name].plan


class TCURModel(BaseTuner):  # type: ignore[misc]
    """peft's tuner for tCURLoRA, made by ``get_peft_model(model, TCURConfig(...))``.

    The stacks of an adapter, with their cores, are registered here as ``tcur_<stack>.<adapter>``.
    So a core has one name, even if many layers share it. ``plans[adapter]`` says which layers an
    adapter consists of, in which order, and which layers were left out.
    """

    prefix = "tcur_"
    tuner_layer_cls = TCURLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    plans: dict[str, Plan]
    targeted_module_names: list[str]  # of BaseTuner
    targeted_parameter_names: list[str]  # of BaseTuner

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, PeftConfig):
            # `inject_adapter_in_model` passes a single config; it discards the tuner and the cores.
            # Before that, add_adapter of transformers says that the model has an adapter.
            if getattr(model, "_hf_peft_config_loaded", False) and "peft_config" not in vars(model):
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise ValueError(
                "TCUR keeps shared cores on the tuner, which direct injection discards "
                "(inject_adapter_in_model, and add_adapter, load_adapter and from_pretrained of "
                "transformers); use peft.get_peft_model(model, config), and for a saved adapter "
                "peft.PeftModel.from_pretrained(model, folder)"
            )
        if isinstance(model, PeftModel) or any(isinstance(m, TCURLinear) for m in model.modules()):
            raise ValueError(
                f"model: expected one without adapters of TCUR or a PeftModel around it, got "
                f"{type(model).__name__}; use its add_adapter, or unload() it first"
            )
        self.owner = Owner()
        super().__init__(model, Configs(peft_config), *args, **kwargs)
        self.model.register_load_state_dict_post_hook(self.owner.loaded)
        self.register_load_state_dict_post_hook(_merge_again)  # cores are loaded after the model

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.plans = {}
        # Only used during an injection: the new adapter, and what was found for its layers.
        self._adding = adapter_name
        self._found: dict[str, tuple[AdapterStack, Place]] = {}
        self._parameters_found: dict[str, TargetParameter] = {}

    def _prepare_adapter_config(self, peft_config: TCURConfig, model_config: Any) -> TCURConfig:
        targets = peft_config.target_modules
        is_open = targets is None and not peft_config.target_parameters  # as LoRA reads it
        if is_open or isinstance(targets, AllLinear):
            peft_config.target_modules = ALL_LINEAR
        return peft_config

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adapts the targeted layers; after an error the model is unchanged."""
        _check_adapter_name(adapter_name)
        if adapter_name in self.plans:
            raise ValueError(f"adapter_name: expected a name that is free, got {adapter_name!r}")
        self._adding, self._is_all_linear = adapter_name, False
        config = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            adapted = {m.module for p in self.plans.values() for s in p.stacks for m in s.members}
            self.targeted_module_names = [n for n in self.targeted_module_names if n in adapted]
        except Exception:
            self._drop_stacks(adapter_name)
            raise
        finally:
            self._found, self._parameters_found = {}, {}
            if self._is_all_linear:
                config.target_modules = AllLinear(config.target_modules)

    def _prepare_model(self, peft_config: TCURConfig, model: nn.Module) -> None:
        """Plans the adapter and builds its stacks, before any layer is touched."""
        adapter_name = self._adding
        targets = peft_config.target_modules
        everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        if everything:
            self._is_all_linear = True
            _maybe_include_all_linear_layers(peft_config, model)
            _keep_layers_to_transform(peft_config)
        self._parameters_found = self._targeted_parameters(peft_config, model)
        layers: Layers = {**self._targeted_layers(peft_config, model), **self._parameters_found}
        if not layers:
            return  # peft itself reports targets that match nothing
        plan, stacks = plan_and_build(model, layers, peft_config, strict=not everything)
        self.peft_config.record(adapter_name, list(stacks.values()))
        self.plans[adapter_name] = plan
        self.owner.stacks[adapter_name] = list(stacks.values())
        for entry in plan.stacks:
            stack = stacks[entry.name]
            if f"{self.prefix}{entry.name}" not in self._modules:
                self.add_module(f"{self.prefix}{entry.name}", nn.ModuleDict())
            self.stacks_named(entry.name)[adapter_name] = stack
            for member, place in zip(entry.members, stack.places, strict=True):
                self._found[member.module] = (stack, place)

    def _targeted_layers(self, peft_config: TCURConfig, model: nn.Module) -> dict[str, nn.Module]:
        """The targeted base layers, by their names in the model without adapters."""
        modules = dict(model.named_modules())
        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        inside = tuple(f"{n}." for n, m in modules.items() if isinstance(m, wrappers))
        layers = {}
        for name, module in modules.items():
            if not name or (inside and name.startswith(inside)):
                continue
            if self._check_target_module_exists(peft_config, name):
                adapted = isinstance(module, TCURLinear)
                if adapted and module.merged:
                    raise ValueError(
                        f"model: expected unmerged layers, got {name} with "
                        f"{', '.join(module.merged_adapters)} merged; unmerge_adapter first"
                    )
                layers[name] = module.get_base_layer() if adapted else module
        return layers

    def _targeted_parameters(
        self, peft_config: TCURConfig, model: nn.Module
    ) -> dict[str, TargetParameter]:
        """The targeted parameters of experts, by their names in the model without adapters."""
        targets = tuple(peft_config.target_parameters or ())
        modules = dict(model.named_modules())
        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        inside = tuple(f"{n}." for n, m in modules.items() if isinstance(m, wrappers))
        found = {}
        for name, module in modules.items():
            if name.startswith(inside):
                continue
            adapted = isinstance(module, TCURExperts)
            base = module.get_base_layer() if adapted else module
            for key, parameter in base._parameters.items():
                full = f"{name}.{key}" if name else key
                if full not in targets and not full.endswith(tuple(f".{t}" for t in targets)):
                    continue
                if not name or not holds_experts(base, key):
                    shape = None if parameter is None else list(parameter.shape)
                    raise TypeError(
                        "target_parameters: expected parameters [experts, n1, n2] of modules "
                        f"within the model, got {full} {shape} of {type(base).__name__}"
                    )
                if adapted and module.merged:
                    raise ValueError(
                        f"model: expected unmerged experts, got {name} with "
                        f"{', '.join(module.merged_adapters)} merged; unmerge_adapter first"
                    )
                found[full] = TargetParameter(base, key)
        return found

    def _inject_parameters(
        self,
        peft_config: TCURConfig,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> list[str]:
        """Wraps the modules of the targeted parameters, and returns the names of these."""
        for name, target in self._parameters_found.items():
            if name not in self._found:
                continue  # the plan leaves it out
            owner, _, key = name.rpartition(".")
            layer = model.get_submodule(owner)
            if not isinstance(layer, TCURExperts):
                layer, module = TCURExperts(target.module, self.owner), layer
                self._replace_module(model, owner, layer, module)
            layer.add_parameter(adapter_name, key, *self._found[name])
        names = [*self._parameters_found]
        known = self.targeted_parameter_names  # where older versions of peft look for the names
        known.extend(name for name in names if name not in known)
        return names

    def _create_and_replace(
        self,
        peft_config: TCURConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        found = self._found.get(current_key)
        if found is None:
            return  # the plan leaves it out
        if not isinstance(target, TCURLinear):
            is_quantised = found[1].quantiser is not None
            kind = TCURQuantisedLinear if is_quantised else TCURLinear
            layer = kind(target, self.owner)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.add(adapter_name, *found)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # peft's version also uses child.weight, which composite modules_to_save do not have. It
        # also moves the submodules of the new layer, which here are only the base layer.
        for name in aliases(self.model, child):
            owner, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(owner), key, new_module)
        if isinstance(child, TCURLinear):
            unhost(new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates adapters, which are then trained, and freezes the others.

        An earlier graph still delivers its gradient to adapters that are frozen now. With
        activation checkpointing, a backward recomputes layers; it refuses to do so with other
        adapters than in the forward.

        Raises:
            RuntimeError: another thread is inside a call of the model, or its backward. Nothing has
                changed then.
        """
        with self._changing("set_adapter"):
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            for parameter in trained:
                if not parameter.requires_grad:
                    LateGradient.keep(parameter)

    def enable_adapter_layers(self) -> None:
        """Enables all adapters, in all threads.

        Raises:
            RuntimeError: another thread is inside a call of the model, or its backward. What that
                computes is then part with adapters, part without.
        """
        with self._changing("enable_adapter_layers", is_undone=True):
            super().enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Disables all adapters, in all threads, and unmerges what is merged.

        Raises:
            RuntimeError: another thread is inside a call of the model, or its backward. Nothing has
                changed then.
        """
        with self._changing("disable_adapter_layers"):
            for layer in self._layers():
                if layer.merged:
                    layer.unmerge()
            super().disable_adapter_layers()

    def unmerge_adapter(self) -> None:
        """Restores the base weights bit for bit.

        Raises:
            RuntimeError: another thread is inside a call of the model, or its backward. Nothing has
                changed then.
        """
        with self._changing("unmerge_adapter"):
            super().unmerge_adapter()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Casts cores to the base's dtype if the caller asked for it; else they stay fp32 or wider.

        Raises:
            ValueError: the base is 16-bit and the mode is "materialized".
        """
        plan = self.plans.get(adapter_name)
        if autocast_adapter_dtype or plan is None:
            return
        for entry in plan.stacks:
            stack = self.stacks_named(entry.name)[adapter_name]
            assert isinstance(stack, AdapterStack)
            base = stack.places[0].dtype
            if base == stack.core.dtype:
                continue
            if stack.mode == "materialized":
                self._take_back(adapter_name)
                raise ValueError(
                    "autocast_adapter_dtype: expected True with mode 'materialized' and a base of "
                    f"{base}, got False"
                )
            stack.narrow(base)

    def _take_back(self, adapter_name: str) -> None:
        """Removes an adapter that was just added."""
        if len(self.peft_config) == 1:
            self.unload()
        else:
            self.delete_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter with its stacks and cores.

        Raises:
            ValueError: there is no such adapter, or it is merged.
            RuntimeError: another thread is inside a call of the model, or its backward. Nothing is
                deleted then.
        """
        with self._changing("delete_adapter"):
            if any(adapter_name in layer.merged_adapters for layer in self._layers()):
                raise ValueError(
                    f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please "
                    "unmerge them first."
                )
            super().delete_adapter(adapter_name)
            self._drop_stacks(adapter_name)

    def _layers(self) -> list[TCURLinear]:
        """The adapted layers."""
        return [module for module in self.model.modules() if isinstance(module, TCURLinear)]

    def _changing(self, caller: str, is_undone: bool = False) -> AbstractContextManager[None]:
        """Context of a change to what all threads share; see `Gate.closed`."""
        # The tuner is the model here: it calls the forward of the model within it as a function.
        return self.owner.gate.closed(caller, self, self._layers(), is_undone)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds adapters to the base weights, in fp32 and rounded once.

        `unmerge_adapter` restores the base weights bit for bit.

        Args:
            adapter_names: by default the active ones.
            safe_merge: whether to check first that no weight becomes NaN or Inf.

        Raises:
            ValueError: an adapter is unknown, a merged weight is not finite, or an adapted layer
                is quantised. Nothing is merged then.
            RuntimeError: another thread is inside a call of the model, or its backward. Nothing is
                merged then.
        """
        with self._changing("merge_adapter"):
            self._check_merge(adapter_names, safe_merge)
            for module in self.model.modules():
                if isinstance(module, TCURQuantisedLinear):
                    module.merge(adapter_names=adapter_names)  # refuses
            super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
            for module in self.model.modules():
                if isinstance(module, TCURQuantisedLinear):
                    dtype = merged_dtype(self.model, module.tcur_base)
                    module.tcur_merged_dtype = dtype
        model = super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        hooks = model._load_state_dict_post_hooks
        for number in [number for number, hook in hooks.items() if hook == self.owner.loaded]:
            del hooks[number]
        vars(model).pop("peft_config", None)  # peft before 0.19 leaves it there
        if merge:
            forget_quantiser(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Makes ``model(..., adapter_names=[...])`` work, and ``generate`` with such names."""
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets: expected None, since they are for LoRA, got some")
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with rows_by_adapter(self, names, kwargs.get("num_beams") or 1):
            yield

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Checks everything before the first weight is written, so no model is merged by half."""
        for name in adapter_names or ():
            if name not in self.peft_config:
                known = ", ".join(self.peft_config)
                raise ValueError(f"adapter_names: expected some of {known}, got {name!r}")
        if not safe_merge:
            return
        for name, module in self.model.named_modules():
            if isinstance(module, TCURLinear):
                names = module.active_adapters if adapter_names is None else adapter_names
                weights = module.merged_weights([*module.merged_adapters, *names])
                if not all(torch.isfinite(weight).all() for weight in weights):
                    raise ValueError(
                        f"safe_merge: expected finite merged weights, got NaN or Inf in {name}; "
                        f"{BROKEN.format(', '.join(names))}"
                    )

    def stacks_named(self, name: str) -> nn.ModuleDict:
        """The stacks of that name, by adapter name."""
        stacks = self._modules[f"{self.prefix}{name}"]
        assert isinstance(stacks, nn.ModuleDict)
        return stacks

    def _drop_stacks(self, adapter_name: str) -> None:
        plan = self.plans.pop(adapter_name, None)
        self.owner.stacks.pop(adapter_name, None)
        for entry in plan.stacks if plan is not None else ():
            stacks = self.stacks_named(entry.name)
            stacks.pop(adapter_name)
            if not stacks:
                delattr(self, f"{self.prefix}{entry.name}")


def _check_adapter_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            "adapter_name: expected a name without dots that torch.nn.ModuleDict does not use "
            f"itself, got {name!r}"
        )


def _keep_layers_to_transform(config: TCURConfig) -> None:
    """Reduces all linear layers to those in ``layers_to_transform``, as peft reads their names."""
    if config.layers_to_transform is None:
        return
    probe, kept = copy.copy(config), set()
    for name in config.target_modules or ():
        _, dot, probe.target_modules = name.rpartition(".")
        probe.target_modules = {probe.target_modules}  # last part only: a whole name always matches
        if dot and check_target_module_exists(probe, name):
            kept.add(name)
    config.target_modules = kept


def _merge_again(tuner: TCURModel, incompatible_keys: Any) -> None:
    """After a checkpoint was loaded: merges again the layers that were merged before."""
    for layer in tuner.model.modules():
        if isinstance(layer, TCURLinear):
            layer.merge_again()
