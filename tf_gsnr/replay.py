"""A run once more: what its config.json says -> flags; two runs -> what differs. No TensorFlow."""

from __future__ import annotations

import math
from pathlib import Path

from tf_gsnr import experiments, lookup, records
from tf_gsnr.experiments.framework.settings import fields

HOW = ("engine", "jit_compile", "replicas", "shard", "on_divergence", "deterministic")
MADE_ON = ("versions", "devices", "processor", "cpus", "engine", "jit_compile")
CODE = ("dataset", "model")  # settings that may name a function of the user's own
UNCOMPARED = ("seconds",)  # of records: what no two runs share


def flags(path, direct: list[str]) -> list[str]:
    """The flags that make the run of a directory again, in a directory of its own.

    Args:
      path: of the run.
      direct: the flags given beside --replay, which come after these.

    Raises:
      ValueError: no run is there, or it is of somebody's own code, which `direct` does not name.

    Example: `python -m tf_gsnr.main --replay=runs/quickstart`.
    """
    try:
        config = records.read_config(path)
        settings = dict(config["settings"])
        experiment = settings.pop("experiment")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--replay={path}: no run of an experiment can be read there") from error
    _check_named(path, "experiment", experiment, experiment in experiments.EXPERIMENTS, direct)
    for name in CODE:
        values = settings.get(name)
        for value in values if isinstance(values, list) else [values]:
            ours = not (isinstance(value, str) and lookup.is_reference(value))
            _check_named(path, name, value, ours, direct)
    flag_of = {field.name: field.flag for field in fields(experiments.load(experiment).Settings)}
    unknown = [name for name in settings if name not in flag_of]
    if unknown:
        raise ValueError(
            f"--replay={path}: {experiment} has no setting {', '.join(unknown)}; the run is of "
            f"another version, {config.get('versions', {}).get('tf_gsnr')}"
        )
    how = {name: config.get("flags", {}).get(name) for name in HOW}
    values = {"experiment": experiment, "name": f"{Path(path).resolve().name}-replay"}
    values |= {flag_of[name]: value for name, value in settings.items()} | how
    if how["shard"]:
        i, _, k = how["shard"].partition("/")
        values["name"] = values["name"].replace(f"-{i}of{k}", "")
    return [f"--{name}={_text(value)}" for name, value in values.items() if value is not None]


def _check_named(path, flag, value, ours, direct):
    """Code that a run directory names is imported only where the command line names it, too."""
    given = [a.lstrip("-") for a in direct]
    if not ours and not any(a.startswith(f"{flag}=") and value in a for a in given):
        raise ValueError(
            f"--replay={path}: its {flag} is {value!r}, code of somebody's own, which is not "
            f"imported unless it is named: add --{flag}={value}"
        )


def _text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def differences(path, again) -> dict:
    """What differs between a run and its replay.

    Returns:
      A dict. `of`: the run's directory. `made_on`: name -> [there, here], what they were made on.
      `settings`: name -> [there, here]. `records`: how many both have; `only_there`, `only_here`:
      how many one has. `numbers`: name -> the largest relative difference, |a - b| / max(|a|, |b|)
      over the records that both have, for each number that is not the same.
    """
    there, here = (records.read_config(p) for p in (path, again))
    plan = records.read_plan(path)
    keys = [*dict.fromkeys(name for c in plan["configurations"] for name in c), "epoch"]
    rows, others = ({_key(r, keys): r for r in records.read_records(p)} for p in (path, again))
    common = rows.keys() & others.keys()
    numbers: dict[str, float] = {}
    for key in common:
        for name in (rows[key].keys() | others[key].keys()) - set(UNCOMPARED):
            apart = _apart(rows[key].get(name), others[key].get(name))
            if apart:
                numbers[name] = max(apart, numbers.get(name, 0.0))
    return {
        "of": str(path),
        "made_on": _unequal(there, here, MADE_ON),
        "settings": _unequal(there["settings"], here["settings"]),
        "records": len(common),
        "only_there": len(rows.keys() - common),
        "only_here": len(others.keys() - common),
        "numbers": dict(sorted(numbers.items(), key=lambda pair: -pair[1])),
    }


def _key(row, keys):
    return tuple(row.get(name) for name in keys)


def _unequal(there, here, names=None):
    names = names or sorted(there.keys() | here.keys())
    return {
        name: [there.get(name), here.get(name)]
        for name in names
        if there.get(name) != here.get(name)
    }


def _apart(a, b) -> float:
    """How far two values of a record are apart, of the larger; infinity for a missing one."""
    if a == b or (a != a and b != b):
        return 0.0
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (a, b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def text(found: dict, shown: int = 5) -> str:
    """The differences in lines for a terminal."""
    lines = [f"replay of {found['of']}:"]
    for what in ("settings", "made_on"):
        for name, (there, here) in found[what].items():
            lines.append(f"  {name}: {there} there, {here} here")
    for key, where in (("only_there", "there"), ("only_here", "here")):
        if found[key]:
            lines.append(f"  {found[key]} records are only {where}")
    numbers = found["numbers"]
    if not found["records"]:
        lines.append("  no record is in both")
    elif not numbers:
        lines.append(f"  {found['records']} records: every number is the same")
    else:
        lines.append(f"  {found['records']} records; {len(numbers)} numbers differ, at most by")
        lines += [f"    {apart:9.1e} of {name}" for name, apart in list(numbers.items())[:shown]]
    return "\n".join(lines)
