"""Finds the configured policy: built in, or the operator's own class."""

from importlib import import_module

from pdserve.core.errors import ConfigError
from pdserve.router.guard import GuardedPolicy
from pdserve.router.policies import BUILT_IN, KVAware
from pdserve.router.policy import RoutingPolicy
from pdserve.router.rules import RoutingRules


def load_policy(name: str, rules: RoutingRules) -> RoutingPolicy:
    """A built-in policy by its name, or a custom one by "module:Class", with KVAware in its stead should it fail.

    Raises ConfigError saying what is wrong."""
    if built_in := BUILT_IN.get(name):
        return built_in(rules)
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(sorted(BUILT_IN))
        raise ConfigError(f'routing.policy "{name}" is neither one of {known} nor of the form "module:Class"')
    try:
        factory = getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"routing.policy: cannot import {module}: {error}") from error
    except AttributeError as error:
        raise ConfigError(f"routing.policy: module {module} has no {attribute}") from error
    try:
        policy = factory(rules)
    except TypeError as error:
        raise ConfigError(f"routing.policy: {name} must take the RoutingRules as its only argument: {error}") from error
    if not callable(getattr(policy, "choose", None)):
        raise ConfigError(f"routing.policy: {name} has no method choose(ask, state)")
    return GuardedPolicy(name, policy, KVAware(rules))
