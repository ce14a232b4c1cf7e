"""The text of docs/options.md, from the tables."""

from __future__ import annotations

from mig.options.capability import CAPABILITIES, REMOVED_CAPABILITIES
from mig.options.parameters import REMOVED_PARAMETERS, Parameters, ParameterSpec
from mig.options.rules import RULES, Rule
from mig.options.support import (
    INCOMING_CAPABILITIES,
    OUTGOING_CAPABILITIES,
    SUPPORTED_PARAMETERS,
    UNSUPPORTED_VALUES,
)

_HEAD = """# Options of a migration

Generated: `python -c 'from mig.options.document import document; print(document(), end="")'`.

Names, defaults and ranges are those of QEMU 10.0, and tests compare them with a real one. An option
whose feature mig does not have yet is an error when it is switched on. Everything that is wrong
with a set of options is reported at once.
"""

_PARAMETERS = """## Parameters

A size given as text takes the suffixes k, M, G, T, P and E (of 1024); a bare number is in bytes.
*In flight* says whether `set_parameters()` may change it once a migration has started.
"""

_MAPPING_WORDS = "not set"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _capabilities() -> list[str]:
    rows = []
    for capability, info in CAPABILITIES.items():
        if capability in REMOVED_CAPABILITIES:
            continue
        sides = [
            side
            for side, done in (
                ("outgoing", OUTGOING_CAPABILITIES),
                ("incoming", INCOMING_CAPABILITIES),
            )
            if capability in done
        ]
        rows.append(
            [
                f"`{capability}`",
                info.doc,
                _when(info.since, info.until),
                ", ".join(sides) or "not yet",
            ]
        )
    return _table(["capability", "meaning", "since QEMU", "in mig"], rows)


def _when(since: str, until: str | None) -> str:
    return since if until is None else f"{since}, not since {until}"


def _default(spec: ParameterSpec) -> str:
    if spec.default is None:
        return _MAPPING_WORDS
    if isinstance(spec.default, bool):
        return "on" if spec.default else "off"
    if spec.default == "":
        return "none"
    return f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)


def _parameter(spec: ParameterSpec) -> list[str]:
    return [
        f"`{spec.name}`",
        spec.doc,
        spec.kind.unit,
        _default(spec),
        spec.kind.range,
        "yes" if spec.in_flight else "no",
        _when(spec.since or "mig's own", spec.until),
        _support(spec.name),
    ]


def _support(name: str) -> str:
    if name not in SUPPORTED_PARAMETERS:
        return "not yet"
    lacking = sorted(UNSUPPORTED_VALUES.get(name, ()))
    return f"yes, but for {', '.join(lacking)}" if lacking else "yes"


def _removed() -> list[str]:
    rows = [
        [f"`{name}`", "capability", CAPABILITIES[name].since, why]
        for name, why in REMOVED_CAPABILITIES.items()
    ]
    rows += [[f"`{name}`", "parameter", "", why] for name, why in REMOVED_PARAMETERS.items()]
    return _table(["name", "kind", "since QEMU", "what became of it"], rows)


def _rule(rule: Rule) -> str:
    return f"- {rule.words}"


def document() -> str:
    """Return the text of docs/options.md."""
    head = ["parameter", "meaning", "unit", "default", "range", "in flight", "since QEMU", "in mig"]
    lines = [_HEAD, "## Capabilities", "", *_capabilities()]
    lines += [_PARAMETERS, *_table(head, [_parameter(spec) for spec in Parameters.specs()])]
    lines += ["## What does not go together", ""]
    lines += [*dict.fromkeys(_rule(rule) for rule in RULES), ""]
    lines += ["## Known, but gone", "", *_removed()]
    return "\n".join(lines).rstrip("\n") + "\n"
