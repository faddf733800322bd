"""What was typed after `genatt prepare` and stands in its --config file: a `PrepareConfig`, mistakes named as typed."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.redaction import one_line

FIELDS = {"min_user": "min_user_interactions", "min_item": "min_item_interactions"}  # where the option is shorter
_OPTIONS = {field: option for option, field in FIELDS.items()}


def configure(typed: Mapping[str, Any], file: Path | None) -> PrepareConfig:
    """The keys of `file`, replaced by the options `typed` (by parameter name, those typed alone).

    Only what was given is set: with `append_to` the rest comes from the parent.

    Raises
    ------
    GenattError
        Unreadable file, unknown key, or a value that does not fit, by its option or its key and file.
    """
    given = {FIELDS.get(name, name): value for name, value in typed.items()}
    if "event_weights" in given:
        given["event_weights"] = _weights(given["event_weights"])
    for name in ("time_from", "time_to"):
        if re.fullmatch(r"-?\d+", str(given.get(name))):
            given[name] = int(given[name])
    from_file = {} if file is None else _read(file)
    try:
        return PrepareConfig.model_validate(from_file | given)
    except ValidationError as error:
        raise _explained(error.errors()[0], given, file) from None


def _weights(text: str) -> dict[str, str]:
    """`view=1,cart=3` by event; the weights are checked later."""
    pairs = [pair.rpartition("=") for pair in text.split(",")]
    if not all(event and weight for event, _, weight in pairs):
        raise GenattError(f"--event-weights {text!r}: give EVENT=WEIGHT,EVENT=WEIGHT,…, as in view=1,cart=3")
    weights = {event.strip(): weight.strip() for event, _, weight in pairs}
    if len(weights) < len(pairs):
        raise GenattError(f"--event-weights {text!r}: an event has two weights: give one")
    return weights


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise GenattError(f"--config {file}: {reason}: name an existing YAML file") from None
    if not isinstance(tree, dict):
        raise GenattError(f"--config {file}: holds no keys: write `key: value` lines, as source: log.parquet")
    for key in tree:
        if key not in PrepareConfig.model_fields:
            near = difflib.get_close_matches(str(key), PrepareConfig.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PrepareConfig.model_fields)}"
            raise GenattError(f"--config {file}: unknown key {key}: {hint}")
    return tree


def _explained(error: ErrorDetails, given: Mapping[str, Any], file: Path | None) -> GenattError:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # a rule about several options
        return GenattError(_in_options(message) if file is None else f"{_in_options(message)} (see {file} too)")
    name = str(error["loc"][0])
    if error["type"] == "missing":
        mend = "give a --config file" if file is None else f"set {name} in {file}"
        return GenattError(f"no {_option(name)} is given: name it, or {mend}")
    value = error["input"] if len(error["loc"]) == 1 else f"{error['loc'][-1]}={error['input']}"
    where = _option(name) if name in given else f"--config {file}: {name}"
    message = message.removeprefix(f"{name} {value!r}: ")
    return GenattError(f"{where} {value!r}: {message[:1].lower()}{message[1:]}")


def _option(field: str) -> str:
    return "SOURCE" if field == "source" else "--" + _OPTIONS.get(field, field).replace("_", "-")


def _in_options(message: str) -> str:
    """A message about fields, told about options: `min_count` as `--min-count`, `format=csv` as `--format csv`."""
    names = "|".join(name if "_" in name else f"{name}(?==)" for name in PrepareConfig.model_fields)
    return re.sub(rf"\b({names})\b(=(?=\w))?", lambda match: _option(match[1]) + (" " if match[2] else ""), message)
