"""A module that computes as another one and shares its memory, so that freezing it changes nothing of the other."""

from torch import nn


def frozen_twin(module: nn.Module) -> nn.Module:
    """Return a module with the same weights, in the same memory, in eval mode and without gradients.

    The other one stays as it is: its mode, its parameters' `requires_grad`, its device and its dtype. New values that are
    written into its weights are seen by both; hooks are shared. Moved to another device or dtype, the twin has memory of
    its own.
    """
    return _twin(module, {}, {})


def _twin(module: nn.Module, modules: dict[int, nn.Module], parameters: dict[int, nn.Parameter]) -> nn.Module:
    """Return a module's twin; those that were made already, of modules and parameters used twice, by their ids."""
    if id(module) in modules:
        return modules[id(module)]
    twin = modules[id(module)] = type(module).__new__(type(module))
    twin.__dict__ = module.__dict__ | {
        "training": False,
        "_buffers": dict(module._buffers),
        "_parameters": {
            name: None if value is None else _frozen(value, parameters)
            for name, value in module._parameters.items()
        },
        "_modules": {
            name: None if child is None else _twin(child, modules, parameters)
            for name, child in module._modules.items()
        },
    }
    return twin


def _frozen(value: nn.Parameter, parameters: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(value) not in parameters:
        parameters[id(value)] = nn.Parameter(value.detach(), requires_grad=False)
    return parameters[id(value)]
