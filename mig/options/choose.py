"""Reading and checking everything that somebody asked for, at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mig.errors import OptionError
from mig.options.capability import CAPABILITIES, REMOVED_CAPABILITIES, Capability
from mig.options.parameters import Parameters
from mig.options.rules import broken_rules
from mig.options.support import SUPPORTED_PARAMETERS, UNSUPPORTED_VALUES


@dataclass(frozen=True, slots=True)
class Options:
    """Capabilities that are on, and parameters, which go together."""

    capabilities: frozenset[Capability] = frozenset()
    parameters: Parameters = field(default_factory=Parameters)

    @classmethod
    def choose(
        cls,
        capabilities: Iterable[str] | Mapping[str, bool],
        parameters: Mapping[str, object] | None,
        supported: frozenset[Capability],
    ) -> Options:
        """Read options by QMP's names; OptionError lists everything that is wrong with them.

        supported: the capabilities that this side of mig's engine does
        """
        chosen, violations = _read_capabilities(capabilities)
        values, more = Parameters().read(parameters or {})
        violations += more + broken_rules(chosen, values)
        violations += _missing_capabilities(chosen, supported) + _missing_parameters(values)
        if violations:
            raise OptionError(*violations)
        return cls(chosen, values)

    def changed(self, values: Mapping[str, object], *, running: bool) -> Options:
        """Return options with other parameters; OptionError lists everything that is wrong.

        running: the migration has started, so only what may change in flight may differ
        """
        parameters, violations = self.parameters.read(values)
        if running:
            violations += [
                f"Parameter '{spec.name}' cannot change once a migration has started"
                for spec, old, new in self.parameters.differences(parameters)
                if not spec.in_flight
            ]
        violations += broken_rules(self.capabilities, parameters)
        violations += _missing_parameters(parameters)
        if violations:
            raise OptionError(*violations)
        return Options(self.capabilities, parameters)


def capability_set(
    names: Iterable[str] | Mapping[str, bool], supported: frozenset[Capability]
) -> frozenset[Capability]:
    """Return the capabilities that ``names`` switches on; OptionError lists every violation."""
    return Options.choose(names, None, supported).capabilities


def capabilities_to_qmp(chosen: frozenset[Capability]) -> list[dict[str, Any]]:
    """Return what query-migrate-capabilities of QEMU 10.0 answers."""
    return [
        {"capability": str(capability), "state": capability in chosen}
        for capability, info in CAPABILITIES.items()
        if info.until is None
    ]


def unsupported(supported: frozenset[Capability]) -> list[str]:
    """Return the names of QEMU 10.0's options that mig does not do.

    supported: the capabilities that this side of mig's engine does
    """
    names = [str(c) for c, info in CAPABILITIES.items() if not info.until and c not in supported]
    return names + [s.name for s in Parameters.specs() if s.name not in SUPPORTED_PARAMETERS]


def _read_capabilities(
    names: Iterable[str] | Mapping[str, bool],
) -> tuple[frozenset[Capability], list[str]]:
    wanted = names if isinstance(names, Mapping) else dict.fromkeys(names, True)
    violations, chosen = [], set()
    for name, on in wanted.items():
        try:
            capability = Capability(name)
        except ValueError:
            violations.append(f"there is no capability '{name}'")
            continue
        if on and capability in REMOVED_CAPABILITIES:
            why = REMOVED_CAPABILITIES[capability]
            violations.append(f"capability '{name}' is not supported: {why}")
        elif on:
            chosen.add(capability)
    return frozenset(chosen), violations


def _missing_capabilities(
    chosen: frozenset[Capability], supported: frozenset[Capability]
) -> list[str]:
    return [
        f"mig does not do {name} yet (capability '{name}')" for name in sorted(chosen - supported)
    ]


def _missing_parameters(parameters: Parameters) -> list[str]:
    return [
        f"mig does not do {spec.name} yet (parameter '{spec.name}')"
        for spec, default, value in Parameters().differences(parameters)
        if spec.name not in SUPPORTED_PARAMETERS
    ] + [
        f"mig does not do {value} yet (parameter '{spec.name}')"
        for spec, default, value in Parameters().differences(parameters)
        if value in UNSUPPORTED_VALUES.get(spec.name, ())
    ]
